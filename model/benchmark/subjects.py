"""What the model benchmark compares: our U-Net and diffusers' UNet3DConditionModel of equal width, with random weights and inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn

PEER = "peer"
OURS = "ours"
OURS_WITHOUT_SWAP = "ours without swap"
SUBJECTS = (PEER, OURS, OURS_WITHOUT_SWAP)


class Size(NamedTuple):
    """A clip in latent space: frames, rows and columns."""

    frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return "x".join(map(str, self))

    @classmethod
    def parse(cls, text: str, frames: int) -> Size:
        """Read `24x40` (with `frames` frames) or `16x24x40`.

        Raises:
            ValueError: neither two nor three positive whole numbers.
        """
        numbers = text.lower().split("x")
        if len(numbers) not in (2, 3) or not all(number.isdigit() and int(number) > 0 for number in numbers):
            raise ValueError(f"size {text!r} is not HEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH; write 24x40 or 16x24x40")
        return cls(*map(int, numbers)) if len(numbers) == 3 else cls(frames, int(numbers[0]), int(numbers[1]))


@dataclass(frozen=True)
class Scale:
    """How large everything is that a run measures.

    Attributes:
        name: for the head of the output.
        channels: of each level of both U-Nets; the other widths follow diffusers' names.
        windows: largest window of swap attention per level; None for our U-Net's own default.
        sizes: of the clips; goals are judged at the first.
        forward_batches, training_batches: clips per batch; of training, the first is the one that is looked into.
        other_batches: clips per batch at the sizes after the first.
        matmul_side: rows and columns of the matrix product that rates are held against.
        copy_bytes: of the buffer that is copied.
    """

    name: str
    channels: tuple[int, ...]
    attention_levels: tuple[bool, ...]
    layers_per_block: int
    head_channels: int
    text_tokens: int
    text_channels: int
    norm_groups: int
    windows: tuple[tuple[int, int, int], ...] | None
    sizes: tuple[Size, ...]
    forward_batches: tuple[int, ...]
    training_batches: tuple[int, ...]
    other_batches: tuple[int, ...]
    matmul_side: int
    copy_bytes: int


FULL = Scale(
    name="full width",
    channels=(320, 640, 1280, 1280),
    attention_levels=(True, True, True, False),
    layers_per_block=2,
    head_channels=64,
    text_tokens=77,
    text_channels=1024,
    norm_groups=32,
    windows=None,
    sizes=(Size(16, 24, 40), Size(16, 24, 43)),
    forward_batches=(1, 2, 8),
    training_batches=(8, 1),
    other_batches=(1, 8),
    matmul_side=8192,
    copy_bytes=4 * 2**30,
)

SMALL = Scale(
    name="small width",
    channels=(32, 64),
    attention_levels=(True, False),
    layers_per_block=1,
    head_channels=8,
    text_tokens=7,
    text_channels=32,
    norm_groups=8,
    windows=((4, 4, 5), (4, 2, 3)),
    sizes=(Size(4, 8, 10), Size(4, 8, 11)),
    forward_batches=(1, 2),
    training_batches=(2,),
    other_batches=(1,),
    matmul_side=512,
    copy_bytes=16 * 2**20,
)


@dataclass(frozen=True)
class Inputs:
    """Random inputs of one batch.

    Attributes:
        sample: noisy latents, (B, 4, F, H, W).
        timestep: whole numbers from 0 to 999, (B,).
        text: embedded prompts, (B, tokens, channels).
        target: what the output is compared with in training; shape of `sample`.
    """

    sample: torch.Tensor
    timestep: torch.Tensor
    text: torch.Tensor
    target: torch.Tensor

    @property
    def arguments(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Those of `forward`, in order."""
        return self.sample, self.timestep, self.text


def make_inputs(scale: Scale, size: Size, batch: int, device: torch.device, dtype: torch.dtype) -> Inputs:
    """Normal noise and random time steps; zeros would flatter the clock, since arithmetic on them draws less power."""
    made: dict[str, Any] = {"device": device, "dtype": dtype}
    return Inputs(
        sample=torch.randn(batch, 4, *size, **made),
        timestep=torch.randint(0, 1000, (batch,), device=device),
        text=torch.randn(batch, scale.text_tokens, scale.text_channels, **made),
        target=torch.randn(batch, 4, *size, **made),
    )


def build(subject: str, scale: Scale, device: torch.device, dtype: torch.dtype, channels_last: bool = True) -> nn.Module:
    """A U-Net with random weights on `device`, no layer of which is zero.

    Args:
        subject: one of `SUBJECTS`.
        scale: its width.
        device: where it is built; drawing the weights of 1.4 B parameters anywhere else takes minutes.
        dtype: of its parameters.
        channels_last: whether the convolution weights of ours have that memory order; the peer is measured as it comes.
    """
    torch.manual_seed(0)
    model = build_bare(subject, scale, device)
    fill_zero_layers(model)
    nn.Module.to(model, dtype)  # diffusers' own `to` warns of an empty list of modules to be kept in float32
    if subject != PEER:
        cast(Any, model).to(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return model


def build_bare(subject: str, scale: Scale, device: torch.device) -> nn.Module:
    """A U-Net as its class initialises it, in float32; on the meta device it has shapes alone.

    Raises:
        ValueError: `subject` is none of `SUBJECTS`.
    """
    if subject not in SUBJECTS:
        raise ValueError(f"subject {subject!r} is unknown; choose one of {', '.join(map(repr, SUBJECTS))}")
    with device:
        return _peer(scale) if subject == PEER else _ours(scale, "swap" if subject == OURS else "none")


def _ours(scale: Scale, interaction: str) -> nn.Module:
    from ..unet import SwapUNet

    chosen: dict[str, Any] = {} if scale.windows is None else {"swap_windows": scale.windows}
    ours: nn.Module = SwapUNet(
        block_out_channels=scale.channels,
        attention_levels=scale.attention_levels,
        layers_per_block=scale.layers_per_block,
        attention_head_dim=scale.head_channels,
        cross_attention_dim=scale.text_channels,
        norm_num_groups=scale.norm_groups,
        interaction=interaction,
        **chosen,
    )
    return ours


def _peer(scale: Scale) -> nn.Module:
    from diffusers import UNet3DConditionModel

    down = tuple("CrossAttnDownBlock3D" if attends else "DownBlock3D" for attends in scale.attention_levels)
    up = tuple("CrossAttnUpBlock3D" if attends else "UpBlock3D" for attends in reversed(scale.attention_levels))
    peer = UNet3DConditionModel(
        block_out_channels=scale.channels,
        down_block_types=down,
        up_block_types=up,
        layers_per_block=scale.layers_per_block,
        attention_head_dim=scale.head_channels,
        cross_attention_dim=scale.text_channels,
        norm_num_groups=scale.norm_groups,
    )
    return cast(nn.Module, peer)


def fill_zero_layers(model: nn.Module) -> None:
    """Draw the weights that initialisation left at zero from a narrow normal distribution, so that every branch counts."""
    with torch.no_grad():
        for parameter in model.parameters():
            # Biases are zero in any model; a zero matrix or kernel switches its branch off.
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(std=0.02)
