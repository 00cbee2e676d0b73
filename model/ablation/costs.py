"""What each interaction costs: parameters, memory and time of a training step."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional

from videofactory.model.benchmark.measure import synchronise
from videofactory.model.training.config import TrainingConfig
from videofactory.model.training.options import FACTOR
from videofactory.model.training.parameters import choose_trained
from videofactory.model.training.settings import Bucket
from videofactory.model.training.start import load_models

_WARM_UP = 1
_TEXT_TOKENS = 77


@dataclass(frozen=True)
class Cost:
    """Of the U-Net of one interaction.

    Attributes:
        parameters: all of them.
        step_bytes: of weights, their gradients, and what the backward pass of a batch keeps; temporary buffers come on top.
        step_seconds: median over the rounds, of forward and backward pass of a batch.
        step_ratio: median over the rounds of its time by that of the interaction it is compared with, in the same round.
    """

    parameters: int
    step_bytes: int
    step_seconds: float
    step_ratio: float


def measure(configs: Mapping[str, TrainingConfig], device: torch.device, against: str, rounds: int = 5) -> dict[str, Cost]:
    """The costs by interaction, for a batch of the first video bucket, in the configuration's precision.

    Every round times a step of each, one after the other: what else the machine does meets them alike.

    Args:
        configs: by interaction; they differ in that alone.
        against: the interaction that step times are divided by; the first of them where it is none of them.
        rounds: after one that does not count.
    """
    models: dict[str, Any] = {}
    inputs: dict[str, tuple[torch.Tensor, ...]] = {}
    sizes: dict[str, int] = {}
    for name, config in configs.items():
        bucket = next(bucket for bucket in config.data.buckets if bucket.frames > 1)
        unet = load_models(config.model, config.noise, bucket.size, config.seed).unet
        choose_trained(unet, config.model, config.seed)
        if config.gradient_checkpointing:
            unet.enable_gradient_checkpointing()
        models[name] = torch.nn.Module.to(unet, device)
        inputs[name] = _arguments(unet, bucket, device)
        sizes[name] = _step_bytes(unet, inputs[name], config.precision)
    times: dict[str, list[float]] = {name: [] for name in configs}
    for _ in range(_WARM_UP + rounds):
        for name, unet in models.items():
            times[name].append(_step(unet, inputs[name], device, configs[name].precision))
    base = against if against in configs else next(iter(configs))
    return {
        name: Cost(
            parameters=sum(parameter.numel() for parameter in models[name].parameters()),
            step_bytes=sizes[name],
            step_seconds=statistics.median(times[name][_WARM_UP:]),
            step_ratio=statistics.median(a / b for a, b in zip(times[name][_WARM_UP:], times[base][_WARM_UP:], strict=True)),
        )
        for name in configs
    }


def _arguments(unet: Any, bucket: Bucket, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Latents, time steps and texts of a batch; the values do not matter."""
    shape = (bucket.batch, unet.config.in_channels, bucket.frames, bucket.height // FACTOR, bucket.width // FACTOR)
    texts = (bucket.batch, _TEXT_TOKENS, unet.config.cross_attention_dim)
    return (
        torch.zeros(shape, device=device),
        torch.zeros(bucket.batch, dtype=torch.int64, device=device),
        torch.zeros(texts, device=device),
    )


def _step_bytes(unet: Any, arguments: tuple[torch.Tensor, ...], precision: str) -> int:
    """Counted on a real forward pass: every storage that is kept for the backward pass, once, and weights and gradients."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    computing = torch.autocast(arguments[0].device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with computing, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # As long as the prediction is held, so is all that was kept, and no address is given twice.
        predicted = unet(*arguments, return_dict=False)[0]
    del predicted
    gradients = sum(parameter.nbytes for parameter in unet.parameters() if parameter.requires_grad)
    return sum(kept.values()) + sum(parameter.nbytes for parameter in unet.parameters()) + gradients


def _step(unet: Any, arguments: tuple[torch.Tensor, ...], device: torch.device, precision: str) -> float:
    """Seconds of a forward and backward pass."""
    synchronise(device)
    began = time.perf_counter()
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        predicted = unet(*arguments, return_dict=False)[0]
    torch.autograd.backward(functional.mse_loss(predicted.float(), torch.zeros_like(arguments[0])))
    synchronise(device)
    seconds = time.perf_counter() - began
    unet.zero_grad(set_to_none=True)  # the others' turn
    return seconds
