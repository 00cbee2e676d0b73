"""How much memory a training step needs, computed on shapes alone: no GPU, and no memory, is needed for that."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional

from .subjects import Scale, build_bare, make_inputs


def training_bytes(subject: str, scale: Scale, batch: int, checkpointing: bool) -> int:
    """Bytes in use at the highest point of an eager training step in bfloat16: weights, gradients and activations.

    What the allocator wastes, the workspaces of libraries and the optimizer's state come on top. Layers run as they do without a
    GPU, where group norm and the feed-forward gate keep somewhat more for the backward pass than our kernels do.
    """
    device = torch.device("cpu")
    before = torch.get_default_dtype()
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = build_bare(subject, scale, device).train()
        finally:
            torch.set_default_dtype(before)
        if checkpointing:
            cast(Any, model).enable_gradient_checkpointing()
        inputs = make_inputs(scale, scale.sizes[0], batch, device, torch.bfloat16)
        tracker = MemTracker()
        tracker.track_external(model)
        with tracker:
            predicted = model(*inputs.arguments, return_dict=False)[0]
            torch.autograd.backward(functional.mse_loss(predicted.float(), inputs.target.float()))
    peak = tracker.get_tracker_snapshot("peak")[device]
    return int(next(size for kind, size in peak.items() if "total" in str(kind).lower()))
