"""Our Triton kernels and their gradients equal float64 references, with and without a GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from unittest import mock

import pytest
import torch


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.timeout(600)
def test_kernels_equal_their_references() -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernel_checks"], env=os.environ | interpreted, capture_output=True, text=True, timeout=580
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) >= 18
    for name, errors in results.items():
        assert max(errors) < {"float32": 2e-6, "float16": 2e-3}.get(name.rpartition(".")[2], 2e-2), (name, errors)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_compilers_see_operators_and_their_shapes() -> None:
    """On tensors without data, as torch.compile traces them, for a GPU that need not be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    from videofactory.model import group_norm, kernels

    with FakeTensorMode(), torch.no_grad(), mock.patch("torch.compiler.is_compiling", return_value=True):
        tokens = torch.randn(2, 70, 64, device="cuda", dtype=torch.bfloat16)
        weight, bias = torch.randn(2, 64, device="cuda")
        frames = torch.randn(2, 16, 3, 2, 16, device="cuda", dtype=torch.bfloat16)
        cases = {
            "group_norm": (lambda x: group_norm.group_norm(x, weight, bias, 8, 1e-5, True), tokens, (2, 70, 64)),
            "attend_over_time": (lambda x: kernels.attend_over_time(x, x, x), frames, (2, 16, 3, 2, 16)),
            "gate": (kernels.gate, tokens, (2, 70, 32)),
        }
        for name, (operation, given, shape) in cases.items():
            traced = make_fx(operation)(given)
            calls = [node for node in traced.graph.nodes if node.op == "call_function"]
            assert any(str(node.target) == f"videofactory.{name}.default" for node in calls)
            (result,) = (node for node in traced.graph.nodes if node.op == "output")
            assert result.args[0].meta["val"].shape == shape
