"""The encoder, middle and decoder blocks of the U-Net: spatial layers, temporal layers, and swap attention at the end.

Every block runs its layers in pairs, one over space, one over time. The output of the last spatial layer is x, that of the last
temporal layer y, and swap attention lets them question each other. Where a video has one frame it is an image: the temporal
layers and swap attention step aside, and what remains is the image model. Shape suffixes as in `attention.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .attention import Interaction, SwapAttention, Window
from .layers import Downsample, ResnetBlock, SpatialTransformer, TemporalConv, TemporalTransformer, Upsample
from .settings import per_level


@dataclass(frozen=True)
class BlockSettings:
    """What all layers of one block share.

    Attributes:
        channels: C of the block's output.
        attention: whether the block has spatial and temporal transformers.
        head_dim: channels per attention head.
        context_channels: width of the embedded text.
        time_channels: width of the time embedding.
        groups, eps: of the group norms.
        dropout: in residual blocks, temporal convolutions and feed-forward layers.
        interaction: see `attention.Interaction`.
        window: largest window of the swap attention.
        depth: number of the block, from 0 at the input.
    """

    channels: int
    attention: bool
    head_dim: int
    context_channels: int
    time_channels: int
    groups: int
    eps: float
    dropout: float
    interaction: Interaction
    window: Window
    depth: int


def block_settings(config: Mapping[str, Any]) -> list[BlockSettings]:
    """The settings of all blocks of a U-Net of this configuration, from the input to the output; the middle block has the last level."""
    levels = len(config["block_out_channels"])
    order = [*range(levels), levels - 1, *reversed(range(levels))]
    head_dims = per_level(config["attention_head_dim"], levels)
    return [
        BlockSettings(
            channels=config["block_out_channels"][level],
            attention=config["attention_levels"][level],
            head_dim=head_dims[level],
            context_channels=config["cross_attention_dim"],
            time_channels=4 * config["block_out_channels"][0],
            groups=config["norm_num_groups"],
            eps=config["norm_eps"],
            dropout=config["dropout"],
            interaction=config["interaction"],
            window=tuple(config["swap_windows"][level]),
            depth=depth,
        )
        for depth, level in enumerate(order)
    ]


class Block(nn.Module):
    """Layers over space and time in turn, shared by all three kinds of blocks; runs a layer checkpointed where that is on."""

    # Set by ModelMixin.enable_gradient_checkpointing.
    _gradient_checkpointing_func: Callable[..., Any]

    def __init__(self, settings: BlockSettings, in_channels: list[int], transformers: int) -> None:
        super().__init__()
        s = settings
        self.resnets = nn.ModuleList(
            ResnetBlock(width, s.channels, s.time_channels, s.groups, s.eps, s.dropout) for width in in_channels
        )
        self.temp_convs = nn.ModuleList(TemporalConv(s.channels, s.groups, s.dropout) for _ in in_channels)
        if transformers:
            self.attentions = nn.ModuleList(
                SpatialTransformer(s.channels, s.head_dim, s.context_channels, s.groups, s.dropout) for _ in range(transformers)
            )
            self.temp_attentions = nn.ModuleList(
                TemporalTransformer(s.channels, s.head_dim, s.groups, s.dropout) for _ in range(transformers)
            )
        self.has_attention = transformers > 0
        self.swap = None
        if s.interaction != "none":
            self.swap = SwapAttention(s.channels, s.head_dim, s.depth, s.window, s.interaction)
        self.gradient_checkpointing = False

    def run(self, layer: nn.Module, *inputs: Any) -> torch.Tensor:
        """`layer(*inputs)`, keeping only the inputs for the backward pass where gradient checkpointing is on."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            output: torch.Tensor = self._gradient_checkpointing_func(layer, *inputs)
            return output
        result: torch.Tensor = layer(*inputs)
        return result

    def convolve(self, index: int, hidden: torch.Tensor, time_BC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Residual block and temporal convolution number `index`: the spatial features x and the temporal features y."""
        spatial = self.run(self.resnets[index], hidden, time_BC)
        return spatial, spatial if hidden.shape[1] == 1 else self.run(self.temp_convs[index], spatial)

    def attend(self, index: int, hidden: torch.Tensor, text_BTC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Spatial and temporal transformer number `index`: the spatial features x and the temporal features y."""
        spatial = self.run(self.attentions[index], hidden, text_BTC)
        return spatial, spatial if hidden.shape[1] == 1 else self.run(self.temp_attentions[index], spatial)

    def interact(self, spatial: torch.Tensor, temporal: torch.Tensor) -> torch.Tensor:
        """What the block ends with: swap attention between x and y; y alone for an image or without interaction."""
        if self.swap is None or temporal.shape[1] == 1:
            return temporal
        return self.run(self.swap, spatial, temporal)


class DownBlock(Block):
    """An encoder block: layers, swap attention, and half the resolution for the next block."""

    def __init__(self, settings: BlockSettings, in_channels: int, layers: int, downsample: bool) -> None:
        widths = [in_channels] + [settings.channels] * (layers - 1)
        super().__init__(settings, widths, layers if settings.attention else 0)
        self.downsamplers = nn.ModuleList([Downsample(settings.channels)]) if downsample else None

    def forward(
        self, hidden: torch.Tensor, time_BC: torch.Tensor, text_BTC: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """(B, F, H, W, C) to the next block's input, and what every layer gives to the decoder."""
        skips = []
        for index in range(len(self.resnets)):
            spatial, hidden = self.convolve(index, hidden, time_BC)
            if self.has_attention:
                spatial, hidden = self.attend(index, hidden, text_BTC)
            if index == len(self.resnets) - 1:
                hidden = self.interact(spatial, hidden)
            skips.append(hidden)
        if self.downsamplers is not None:
            hidden = self.downsamplers[0](hidden)
            skips.append(hidden)
        return hidden, skips


class MiddleBlock(Block):
    """The block at the lowest resolution: convolutions, transformers, convolutions, swap attention."""

    def __init__(self, settings: BlockSettings) -> None:
        super().__init__(settings, [settings.channels] * 2, transformers=1)

    def forward(self, hidden: torch.Tensor, time_BC: torch.Tensor, text_BTC: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W, C) to the same shape."""
        _, hidden = self.convolve(0, hidden, time_BC)
        _, hidden = self.attend(0, hidden, text_BTC)
        spatial, hidden = self.convolve(1, hidden, time_BC)
        return self.interact(spatial, hidden)


class UpBlock(Block):
    """A decoder block: layers that also see what the encoder kept, swap attention, and the resolution of the next block."""

    def __init__(self, settings: BlockSettings, in_channels: int, skip_channels: list[int], upsample: bool) -> None:
        widths = [in_channels] + [settings.channels] * (len(skip_channels) - 1)
        inputs = [width + skip for width, skip in zip(widths, skip_channels, strict=True)]
        super().__init__(settings, inputs, len(skip_channels) if settings.attention else 0)
        self.upsamplers = nn.ModuleList([Upsample(settings.channels)]) if upsample else None

    def forward(
        self,
        hidden: torch.Tensor,
        skips: list[torch.Tensor],
        time_BC: torch.Tensor,
        text_BTC: torch.Tensor,
        size: tuple[int, int],
    ) -> torch.Tensor:
        """(B, F, H, W, C) and what the encoder kept, last first, to the next block's input of (height, width) `size`."""
        for index, skip in enumerate(skips):
            spatial, hidden = self.convolve(index, torch.cat([hidden, skip], dim=-1), time_BC)
            if self.has_attention:
                spatial, hidden = self.attend(index, hidden, text_BTC)
        hidden = self.interact(spatial, hidden)
        if self.upsamplers is not None:
            hidden = self.upsamplers[0](hidden, *size)
        return hidden
