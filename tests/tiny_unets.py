"""Small swap-attention U-Nets for tests, in which every weight counts, and what is put into them."""

import math
from typing import Any

import torch
from torch import nn

from videofactory.model.unet import SwapUNet

TINY: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "attention_levels": (True, False),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
    "swap_windows": ((4, 4, 4), (4, 2, 2)),
}
# The four levels and windows of the real model, 20 times narrower.
NARROW: dict[str, Any] = {
    "block_out_channels": (16, 32, 64, 64),
    "attention_head_dim": 8,
    "cross_attention_dim": 16,
    "norm_num_groups": 4,
}
TIMESTEP = 321


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter random values of a usual size, those that start as zeros or ones too; returns the model."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / math.sqrt(parameter[0].numel()))
        else:
            parameter.copy_(0.1 * noise + parameter.mean().round())  # round a norm's ones, or a bias of about zero
    return model


def fresh_unet(seed: int = 0, **settings: Any) -> SwapUNet:
    """A tiny U-Net as its constructor makes it."""
    torch.manual_seed(seed)
    return SwapUNet(**{**TINY, **settings}).eval()


def tiny_unet(seed: int = 0, **settings: Any) -> SwapUNet:
    """A tiny U-Net whose every layer changes the result."""
    return randomise(fresh_unet(seed, **settings), seed)


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(
    batch: int = 2, frames: int = 3, height: int = 6, width: int = 7, text_channels: int = 16
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy latents (B, 4, F, H, W) and embedded texts (B, 5, text_channels)."""
    return noise(batch, 4, frames, height, width, seed=1), noise(batch, 5, text_channels, seed=2)


def predict(unet: SwapUNet, sample: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor | float = TIMESTEP) -> torch.Tensor:
    with torch.no_grad():
        return unet(sample, timestep, text).sample


def greatest_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    assert first.shape == second.shape
    return (first.double() - second.double()).abs().max().item()
