"""Our Triton kernels and their gradients equal float64 references, with and without a GPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

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
