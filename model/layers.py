"""The layers of the U-Net around swap attention: residual blocks, temporal convolutions, spatial and temporal transformers.

Every layer takes and gives a video as (B, F, H, W, C), contiguous: the memory order of `channels_last` convolutions, so that
turning it into frames for a convolution or into tokens for attention copies nothing. Parameters carry the names that they have in
diffusers' UNet2DConditionModel and UNet3DConditionModel, so the weights of either load as they are.
Shape suffixes as in `attention.py`.
"""

import torch
from torch import nn
from torch.nn import functional

from .attention import TimeAttnProcessor, VideoAttnProcessor, make_attention
from .gpu import group_norm, kernels


def convolve(convolution: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """A convolution over (N, H, W, C) or (B, F, H, W, C), whose kernels here all keep or shrink these axes: channels stay last."""
    return convolution(hidden.movedim(-1, 1)).movedim(1, -1)


class GroupNorm(nn.GroupNorm):
    """Group norm over (N, ..., C), with SiLU after it where `silu`; statistics over all axes but the first, by group of channels."""

    def __init__(self, groups: int, channels: int, eps: float, silu: bool = False) -> None:
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(N, ..., C) to the same shape."""
        tokens = hidden.flatten(1, -2)
        ours = group_norm is not None and hidden.is_cuda and hidden.dtype != torch.float64
        if ours and len(hidden) <= group_norm.MOST_SAMPLES:
            normed = group_norm.group_norm(tokens, self.weight, self.bias, self.num_groups, self.eps, self.silu)
        else:
            normed = super().forward(tokens.transpose(1, 2)).transpose(1, 2)
            normed = functional.silu(normed) if self.silu else normed
        return normed.view_as(hidden)


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions on every frame by itself, the time embedding between them, and a shortcut around both."""

    def __init__(self, in_channels: int, out_channels: int, time_channels: int, groups: int, eps: float, dropout: float) -> None:
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps, silu=True)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps, silu=True)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, hidden_BFHWC: torch.Tensor, time_BC: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W, C) and the activated time embedding (B, C) to (B, F, H, W, C)."""
        images_NHWC = hidden_BFHWC.flatten(0, 1)
        residual = convolve(self.conv1, self.norm1(images_NHWC)).unflatten(0, hidden_BFHWC.shape[:2])
        residual = residual + self.time_emb_proj(time_BC)[:, None, None, None]
        residual = convolve(self.conv2, self.dropout(self.norm2(residual.flatten(0, 1))))
        shortcut = images_NHWC if self.conv_shortcut is None else convolve(self.conv_shortcut, images_NHWC)
        return (shortcut + residual).unflatten(0, hidden_BFHWC.shape[:2])


class TimeStage(nn.Sequential):
    """Norm, SiLU, dropout and a convolution over three frames; the SiLU is done in the norm and only keeps its number among the names."""

    def __init__(self, channels: int, groups: int, *dropout: nn.Module) -> None:
        convolution = nn.Conv3d(channels, channels, (3, 1, 1), padding=(1, 0, 0))
        super().__init__(GroupNorm(groups, channels, eps=1e-5, silu=True), nn.Identity(), *dropout, convolution)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W, C) to the same shape."""
        *layers, convolution = self
        hidden = input
        for layer in layers:
            hidden = layer(hidden)
        return convolve(convolution, hidden)


class TemporalConv(nn.Module):
    """Four convolutions along time with a shortcut around them; the last is zero at the start, so a new layer changes nothing."""

    def __init__(self, channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.conv1 = TimeStage(channels, groups)
        self.conv2 = TimeStage(channels, groups, nn.Dropout(dropout))
        self.conv3 = TimeStage(channels, groups, nn.Dropout(dropout))
        self.conv4 = TimeStage(channels, groups, nn.Dropout(dropout))
        for parameter in self.conv4[-1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, hidden_BFHWC: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W, C) to the same shape."""
        return hidden_BFHWC + self.conv4(self.conv3(self.conv2(self.conv1(hidden_BFHWC))))


class GatedProjection(nn.Module):
    """A linear layer to twice the width, one half opened by the GELU of the other ("GEGLU", Shazeer 2020)."""

    def __init__(self, channels: int, inner_channels: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner_channels)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., channels) to (..., inner_channels)."""
        projected = self.proj(hidden)
        if kernels is not None and projected.is_cuda and projected.dtype != torch.float64:
            return kernels.gate(projected)
        opened, gate = projected.chunk(2, dim=-1)
        return opened * functional.gelu(gate)


class FeedForward(nn.Module):
    """A gated projection to four times the width, and back."""

    def __init__(self, channels: int, dropout: float) -> None:
        super().__init__()
        inner = 4 * channels
        self.net = nn.ModuleList([GatedProjection(channels, inner), nn.Dropout(dropout), nn.Linear(inner, channels)])

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., C) to the same shape."""
        for layer in self.net:
            hidden = layer(hidden)
        return hidden


class TransformerBlock(nn.Module):
    """Self-attention, attention to a text or again to itself, and a feed-forward layer, each with its norm and shortcut.

    Args:
        channels: C of input and output.
        head_dim: channels per attention head.
        context_channels: width of the embedded text; None for a block over time, where both attentions are self-attention.
        dropout: in the feed-forward layer.
    """

    def __init__(self, channels: int, head_dim: int, context_channels: int | None, dropout: float) -> None:
        super().__init__()
        processor = TimeAttnProcessor if context_channels is None else VideoAttnProcessor
        self.norm1 = nn.LayerNorm(channels)
        self.attn1 = make_attention(channels, head_dim, processor=processor())
        self.norm2 = nn.LayerNorm(channels)
        self.attn2 = make_attention(channels, head_dim, context_channels, processor=processor())
        self.norm3 = nn.LayerNorm(channels)
        self.ff = FeedForward(channels, dropout)

    def forward(self, hidden: torch.Tensor, text_BTC: torch.Tensor | None = None) -> torch.Tensor:
        """Over space: (B·F, S, C), S positions of a frame in one sequence, with the text (B, T, D). Over time: (B, F, P, C)."""
        hidden = hidden + self.attn1(self.norm1(hidden))
        query = self.norm2(hidden)
        if text_BTC is None:
            attended = self.attn2(query)
        else:
            # All frames of a clip ask the same text: its keys and values are computed once per clip, not once per frame.
            attended = self.attn2(query.reshape(len(text_BTC), -1, query.shape[-1]), text_BTC).view_as(query)
        hidden = hidden + attended
        return hidden + self.ff(self.norm3(hidden))


class SpatialTransformer(nn.Module):
    """Self-attention within each frame, attention to the text, feed-forward."""

    def __init__(self, channels: int, head_dim: int, context_channels: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, head_dim, context_channels, dropout)])
        self.proj_out = nn.Linear(channels, channels)

    def forward(self, hidden_BFHWC: torch.Tensor, text_BTC: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W, C) and the embedded text (B, T, D) to (B, F, H, W, C)."""
        tokens = self.proj_in(self.norm(hidden_BFHWC.flatten(0, 1)).flatten(1, 2))  # (B·F, H·W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens, text_BTC)
        return hidden_BFHWC + self.proj_out(tokens).view_as(hidden_BFHWC)


class TemporalTransformer(nn.Module):
    """Self-attention along time at every position, twice, and feed-forward; the output projection is zero at the start on request.

    Args:
        channels: C of input and output.
        head_dim: channels per attention head.
        groups: of the group norm over a whole clip.
        dropout: in the feed-forward layer.
        inner_channels: of the transformer; `channels` where None.
    """

    def __init__(self, channels: int, head_dim: int, groups: int, dropout: float, inner_channels: int | None = None) -> None:
        super().__init__()
        inner = inner_channels or channels
        self.norm = GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, inner)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(inner, head_dim, None, dropout)])
        self.proj_out = nn.Linear(inner, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, hidden_BFHWC: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W, C) to the same shape."""
        tokens = self.proj_in(self.norm(hidden_BFHWC).flatten(2, 3))  # (B, F, H·W, C)
        for block in self.transformer_blocks:
            tokens = block(tokens)
        return hidden_BFHWC + self.proj_out(tokens).view_as(hidden_BFHWC)


class Downsample(nn.Module):
    """Halves height and width of every frame, rounding up."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, hidden_BFHWC: torch.Tensor) -> torch.Tensor:
        """(B, F, H, W, C) to (B, F, ceil(H/2), ceil(W/2), C)."""
        return convolve(self.conv, hidden_BFHWC.flatten(0, 1)).unflatten(0, hidden_BFHWC.shape[:2])


class Upsample(nn.Module):
    """Doubles height and width of every frame by repeating, cuts to the size that was halved, and convolves."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, hidden_BFHWC: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(B, F, H, W, C) to (B, F, height, width, C), with `height` 2H or 2H-1 and `width` 2W or 2W-1."""
        doubled = hidden_BFHWC[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2, -1).flatten(2, 3).flatten(3, 4)
        return convolve(self.conv, doubled[:, :, :height, :width].flatten(0, 1)).unflatten(0, hidden_BFHWC.shape[:2])
