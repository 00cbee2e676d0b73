"""Attention between the spatial and the temporal features of a video, in 3D windows, and the processor that all attention here runs on.

Shapes are written as suffixes: B clips, F frames, H and W latent rows and columns, C channels, N windows (all clips together),
S tokens of a sequence, T tokens of the text. `hidden_BFHWC` is a tensor of shape (B, F, H, W, C).
"""

import math
from typing import Literal, get_args

import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, dispatch_attention_fn
from diffusers.models.attention_processor import Attention
from torch import nn

from .gpu import kernels

Interaction = Literal["none", "spatial_query", "temporal_query", "swap", "joint_window", "global"]
INTERACTIONS: tuple[str, ...] = get_args(Interaction)
Role = Literal["spatial", "temporal"]
Window = tuple[int, int, int]

# cuDNN's backward pass fails from this many sequences on (seen on an H100 with cuDNN 9.19): temporal attention folds every
# latent position of every clip into the batch and gets there with 64 clips of 32x32 positions.
MOST_SEQUENCES = 65_535


class VideoAttnProcessor:
    """Multi-head attention through the dispatcher of diffusers, so that `set_attention_backend` reaches every layer.

    The processors that diffusers installs on U-Nets call PyTorch's kernel themselves and ignore the chosen backend. Sequences
    beyond `most_sequences` are computed in several calls of equal result.

    Args:
        most_sequences: the largest number of sequences given to the kernel in one call; at least 1.
    """

    # Read and written by ModelMixin.set_attention_backend and enable_parallelism.
    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __init__(self, most_sequences: int = MOST_SEQUENCES) -> None:
        self.most_sequences = most_sequences

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend from `hidden_states` (N, S, C) to `encoder_hidden_states` (N, T, D), or to itself; returns (N, S, C).

        Raises:
            ValueError: a mask was given; no layer of this model has one, and every backend computes without.
        """
        if attention_mask is not None:
            raise ValueError(f"A mask of the shape {tuple(attention_mask.shape)} was given; attention here knows none.")
        query, key, value = self._project(attn, hidden_states, encoder_hidden_states)
        projection, dropout = attn.to_out
        return dropout(projection(self._attend(query, key, value).flatten(-2)))

    def _project(
        self, attn: Attention, hidden: torch.Tensor, context: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        context = hidden if context is None else context
        heads = (attn.heads, -1)
        return tuple(
            project(tensor).unflatten(-1, heads)
            for project, tensor in ((attn.to_q, hidden), (attn.to_k, context), (attn.to_v, context))
        )

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if len(query) > self.most_sequences:
            parts = zip(*(tensor.split(self.most_sequences) for tensor in (query, key, value)), strict=True)
            # By name: a subclass's own way of attending takes other shapes than these parts have.
            return torch.cat([VideoAttnProcessor._attend(self, *part) for part in parts])
        backend, parallel = self._attention_backend, self._parallel_config
        return dispatch_attention_fn(query, key, value, backend=backend, parallel_config=parallel)


class TimeAttnProcessor(VideoAttnProcessor):
    """Attention along time: hidden states are (B, F, P, C), and the F frames at each of the P positions are a sequence.

    On an NVIDIA GPU our own kernel reads the frames where they lie, unless a backend was chosen, by `set_attention_backend` or
    otherwise; then, and elsewhere, they are brought together for the dispatcher. Both give the same result.
    """

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if self._own_kernel_fits(query):
            return kernels.attend_over_time(query, key, value)
        batch, _, positions = query.shape[:3]
        sequences = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
        return super()._attend(*sequences).unflatten(0, (batch, positions)).transpose(1, 2)

    def _own_kernel_fits(self, query: torch.Tensor) -> bool:
        if kernels is None or not query.is_cuda or self._attention_backend is not None:
            return False
        chosen, _ = _AttentionBackendRegistry.get_active_backend()
        return chosen == AttentionBackendName.NATIVE and kernels.fits(query)


def make_attention(
    channels: int,
    head_dim: int,
    context_channels: int | None = None,
    bias: bool = True,
    processor: VideoAttnProcessor | None = None,
) -> Attention:
    """An attention layer over `channels` with heads of `head_dim` channels; to itself where `context_channels` is None.

    `bias` is that of the output projection, the only one that may have any; the processor is a `VideoAttnProcessor` where None.
    """
    return Attention(
        query_dim=channels,
        cross_attention_dim=context_channels,
        heads=channels // head_dim,
        dim_head=head_dim,
        out_bias=bias,
        processor=processor or VideoAttnProcessor(),
    )


def fit_windows(size: int, largest: int) -> tuple[int, int]:
    """Cut an axis of `size` into the fewest windows of at most `largest`, as short as that number allows: (count, length).

    24, 40 and 44 are cut without a rest by 8 and 11: 3x8, 4x10, 4x11. Where `count * length` exceeds `size` (43 = 4x11 - 1),
    the last window shifts inward and overlaps its neighbour.
    """
    count = math.ceil(size / largest)
    return count, math.ceil(size / count)


def to_windows(hidden_BFHWC: torch.Tensor, window: Window) -> torch.Tensor:
    """Cut a video into 3D windows of at most `window` (frames, height, width): (N, S, C), S tokens of a window in one sequence."""
    hidden = hidden_BFHWC
    for axis in (3, 2, 1):  # from the last, so that the axes before it keep their numbers
        hidden = _split(hidden, axis, *fit_windows(hidden.shape[axis], window[axis - 1]))
    # (B, frame windows, f, row windows, h, column windows, w, C)
    return hidden.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4, 6).flatten(0, 3)


def from_windows(hidden_NSC: torch.Tensor, window: Window, shape: tuple[int, int, int, int]) -> torch.Tensor:
    """Undo `to_windows`: put windows back into a video of `shape` (B, F, H, W); of two windows over a position the first counts."""
    batch, *sizes = shape
    fits = [fit_windows(size, largest) for size, largest in zip(sizes, window, strict=True)]
    counts, lengths = zip(*fits, strict=True)
    hidden = hidden_NSC.unflatten(1, lengths).unflatten(0, (batch, *counts)).permute(0, 1, 4, 2, 5, 3, 6, 7)
    for axis, (size, (count, length)) in enumerate(zip(sizes, fits, strict=True), start=1):
        hidden = _join(hidden.flatten(axis, axis + 1), axis, size, count, length)
    return hidden


def _split(hidden: torch.Tensor, axis: int, count: int, length: int) -> torch.Tensor:
    size = hidden.shape[axis]
    if count * length > size:
        whole = (count - 1) * length
        hidden = torch.cat([hidden.narrow(axis, 0, whole), hidden.narrow(axis, size - length, length)], dim=axis)
    return hidden.unflatten(axis, (count, length))


def _join(hidden: torch.Tensor, axis: int, size: int, count: int, length: int) -> torch.Tensor:
    if count * length == size:
        return hidden
    whole = (count - 1) * length
    rest = size - whole
    return torch.cat([hidden.narrow(axis, 0, whole), hidden.narrow(axis, count * length - rest, rest)], dim=axis)


def roles(interaction: Interaction, depth: int) -> tuple[Role, Role]:
    """Which features ask (query) and which answer (key, value) in the block at `depth`, counted from the input, from 0.

    `swap` alternates, starting with the spatial features as the query; the one-way settings do not; `joint_window` and
    `global` are self-attention of the features that passed through both kinds of layer, which the temporal ones have.
    """
    if interaction == "swap":
        return ("spatial", "temporal") if depth % 2 == 0 else ("temporal", "spatial")
    if interaction == "spatial_query":
        return "spatial", "temporal"
    if interaction == "temporal_query":
        return "temporal", "spatial"
    return "temporal", "temporal"


class SwapAttention(nn.Module):
    """What a block of the U-Net ends with: `out = y + W0 Attention(q, kv)`, with x the spatial and y the temporal features.

    The query is computed from LN(x) and key and value from LN(y) in one block, and the other way round in the next
    ("swapped cross-attention in 3D windows", Wang et al. 2023; the exact form is ours, see docs/model.md). Tokens attend to those
    of their own 3D window; windows fold into the batch, so there is no mask. W0 is zero at the start: a new layer changes nothing.

    Args:
        channels: C of both inputs.
        head_dim: channels per attention head; divides `channels`.
        depth: number of the block, from 0 at the input.
        window: largest window (frames, height, width) in latent positions; see `fit_windows`.
        interaction: `swap`, or one of the other settings of the ablation but `none`. All have the same parameters.
    """

    def __init__(self, channels: int, head_dim: int, depth: int, window: Window, interaction: Interaction = "swap") -> None:
        super().__init__()
        self.query_role, self.context_role = roles(interaction, depth)
        self.window = None if interaction == "global" else window
        self.norm_query = nn.LayerNorm(channels)
        self.norm_context = nn.LayerNorm(channels)
        self.attn = make_attention(channels, head_dim, context_channels=channels, bias=False)
        nn.init.zeros_(self.attn.to_out[0].weight)

    def reset_parameters(self) -> None:
        """Give all weights the values of a new layer again."""
        for layer in self.modules():
            if isinstance(layer, nn.LayerNorm | nn.Linear):
                layer.reset_parameters()
        nn.init.zeros_(self.attn.to_out[0].weight)

    def forward(self, spatial_BFHWC: torch.Tensor, temporal_BFHWC: torch.Tensor) -> torch.Tensor:
        """The temporal features with what the attention adds to them; all tensors (B, F, H, W, C)."""
        batch, frames, height, width, _ = temporal_BFHWC.shape
        window = self.window or (frames, height, width)
        query_BFHWC = spatial_BFHWC if self.query_role == "spatial" else temporal_BFHWC
        context_BFHWC = spatial_BFHWC if self.context_role == "spatial" else temporal_BFHWC
        query_NSC = self.norm_query(to_windows(query_BFHWC, window))
        context_NSC = self.norm_context(to_windows(context_BFHWC, window))
        attended_NSC = self.attn(query_NSC, context_NSC)
        return temporal_BFHWC + from_windows(attended_NSC, window, (batch, frames, height, width))
