"""Our Triton kernels where there is Triton for NVIDIA GPUs; None elsewhere, and PyTorch's own operations serve."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch


def _module(name: str) -> Any:
    there = torch.version.hip is None and find_spec("triton") is not None
    return import_module(f".{name}", __package__) if there else None


kernels = _module("kernels")
group_norm = _module("group_norm")
