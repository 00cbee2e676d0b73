"""Our Triton kernels and their gradients equal float64 references, with and without a GPU."""

import copy
import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from unittest import mock

import pytest
import torch

from .tiny_unets import noise, tiny_unet


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
        bound = {"float32": 2e-6, "float16": 2e-3}.get(name.rpartition(".")[2], 2e-2)
        assert all(error < bound for error in errors), (name, errors)  # none is NaN, either


def test_our_kernels_can_be_turned_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By the environment, and by themselves where Triton could not compile its launchers."""
    from videofactory.model import gpu

    monkeypatch.setenv("VIDEOFACTORY_TRITON", "0")
    assert "VIDEOFACTORY_TRITON=0" in gpu.obstacle()
    program = "from videofactory.model import gpu; assert gpu.kernels is None and gpu.group_norm is None"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)

    monkeypatch.setenv("VIDEOFACTORY_TRITON", "1")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if find_spec("triton") is not None:
        assert "C compiler" in gpu.obstacle()
        monkeypatch.setenv("CC", "cc")
        monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path))
        assert f"Python.h in {tmp_path}" in gpu.obstacle()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_whole_model_equals_itself_on_the_processor(dtype: torch.dtype) -> None:
    """With our kernels on a GPU, against PyTorch's operations in double precision; under autocast for half precision."""
    unet = tiny_unet(attention_head_dim=16)
    inputs = (noise(2, 4, 5, 9, 11), torch.tensor([3, 700]), noise(2, 6, 16, seed=1))
    with torch.no_grad(), torch.backends.cudnn.flags(allow_tf32=False):
        expected = copy.deepcopy(unet).double()(inputs[0].double(), inputs[1], inputs[2].double()).sample
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            found = unet.cuda()(*(tensor.cuda() for tensor in inputs)).sample
    error = (found.double().cpu() - expected).norm() / expected.norm()
    assert error < {torch.float32: 1e-4, torch.float16: 1e-2}.get(dtype, 5e-2), error


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
