"""Start a video model from the weights of a published image or video model, leaving no parent weight unused.

Modules carry the names of their parents, so that one strict rule is enough: every weight of the parent goes in by its name, and
what is left over in the child must be of the kinds that are new.
"""

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel

from .mixin import check_weights
from .settings import check_agreement, check_names, per_level

if TYPE_CHECKING:
    from .unet import SwapUNet

logger = logging.getLogger(__name__)

# Modules that the parent does not have. All end in a zero, so that they change nothing at first.
NEW_IN_UNET2D = ("transformer_in.", ".temp_convs.", ".temp_attentions.", ".swap.")
NEW_IN_UNET3D = (".swap.",)

# Settings of a UNet2DConditionModel that this model follows by their usual value only. Others have no influence on it.
USUAL_2D: dict[str, Any] = {
    "act_fn": "silu",
    "addition_embed_type": None,
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "class_embeddings_concat": False,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "cross_attention_norm": None,
    "downsample_padding": 1,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_only_cross_attention": None,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_class_embeds": None,
    "only_cross_attention": False,
    "projection_class_embeddings_input_dim": None,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
    "transformer_layers_per_block": 1,
}
USUAL_3D: dict[str, Any] = {
    "act_fn": "silu",
    "downsample_padding": 1,
    "mid_block_scale_factor": 1,
    "time_cond_proj_dim": None,
}


# Arguments of diffusers' `from_pretrained` that say where a parent is found and how it is read.
HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")
LOADING = ("variant", "torch_dtype", "dtype", *HUB)


@dataclass(frozen=True)
class LoadingInfo:
    """What `from_unet2d` and `from_unet3d` did.

    Attributes:
        copied: names of the parameters that came from the parent: all that the parent has.
        new: names of the parameters that the parent does not have.
    """

    copied: tuple[str, ...]
    new: tuple[str, ...]


def from_unet2d(
    cls: "type[SwapUNet]", unet: Any, subfolder: str | None, options: dict[str, Any]
) -> "tuple[SwapUNet, LoadingInfo]":
    """See `SwapUNet.from_unet2d`."""
    loading, config = _sort(cls, options)
    parent = _load(UNet2DConditionModel, unet, subfolder, loading)
    _check_usual(parent, USUAL_2D)
    inherited = _inherit(parent, "CrossAttnDownBlock2D", "DownBlock2D")
    inherited["attention_head_dim"] = _head_dims(parent)
    inherited["dropout"] = parent.config.dropout
    return _grow(cls, parent, inherited, config, NEW_IN_UNET2D)


def from_unet3d(
    cls: "type[SwapUNet]", unet: Any, subfolder: str | None, options: dict[str, Any]
) -> "tuple[SwapUNet, LoadingInfo]":
    """See `SwapUNet.from_unet3d`."""
    loading, config = _sort(cls, options)
    parent = _load(UNet3DConditionModel, unet, subfolder, loading)
    _check_usual(parent, USUAL_3D)
    inherited = _inherit(parent, "CrossAttnDownBlock3D", "DownBlock3D")
    inherited["attention_head_dim"] = parent.config.attention_head_dim
    return _grow(cls, parent, inherited, config, NEW_IN_UNET3D)


def _sort(cls: "type[SwapUNet]", options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments for loading the parent, and settings of the child."""
    loading = {name: value for name, value in options.items() if name in LOADING}
    config = {name: value for name, value in options.items() if name not in LOADING}
    check_names(config, cls.setting_names(), cls.__name__, LOADING)
    return loading, config


def _load(parent_class: Any, unet: Any, subfolder: str | None, loading: dict[str, Any]) -> Any:
    if isinstance(unet, parent_class):
        if subfolder is not None or loading:
            options = ", ".join(["subfolder"] * (subfolder is not None) + sorted(loading))
            raise ValueError(f"A {type(unet).__name__} was given as an object; {options} is for one that is loaded.")
        return unet
    if isinstance(unet, torch.nn.Module):
        raise ValueError(f"A {type(unet).__name__} was given; this needs a {parent_class.__name__}.")
    if not isinstance(unet, str | os.PathLike):
        raise TypeError(
            f"unet = {unet!r}; a {parent_class.__name__} is wanted, or where one was saved: a directory or a Hub id, as a text or a path."
        )
    hub = {name: value for name, value in loading.items() if name in HUB}
    found = parent_class.load_config(unet, subfolder=subfolder, **hub).get("_class_name", parent_class.__name__)
    if found != parent_class.__name__:
        raise ValueError(f"The checkpoint {str(unet)!r} is of the class {found}; this needs a {parent_class.__name__}.")
    parent, info = parent_class.from_pretrained(
        unet, subfolder=subfolder, use_safetensors=True, output_loading_info=True, **loading
    )
    check_weights(parent, unet, info["missing_keys"], info["unexpected_keys"])
    return parent


def _check_usual(parent: Any, usual: dict[str, Any]) -> None:
    for name, wanted in usual.items():
        value = parent.config.get(name, wanted)
        if isinstance(value, list | tuple) and len(set(value)) == 1:
            value = value[0]
        if value != wanted:
            raise ValueError(f"The parent has {name} = {value!r}; a video model can be started only where it is {wanted!r}.")


def _head_dims(parent: Any) -> list[int]:
    """Channels per attention head of every level of a UNet2DConditionModel."""
    widths = parent.config.block_out_channels
    # Named attention_head_dim, it is the number of heads in every published U-Net of this class.
    name = "num_attention_heads" if parent.config.num_attention_heads else "attention_head_dim"
    heads = per_level(parent.config[name], len(widths))
    for channels, number in zip(widths, heads, strict=True):
        if channels % number:
            raise ValueError(
                f"The parent has {name} = {parent.config[name]!r}: {number} heads do not divide {channels} channels. A video model can "
                "be started where heads divide the channels of every level."
            )
    return [channels // number for channels, number in zip(widths, heads, strict=True)]


def _inherit(parent: Any, attention_block: str, plain_block: str) -> dict[str, Any]:
    kinds = [attention_block, plain_block]
    blocks = list(parent.config.down_block_types)
    upward = [kind.replace("Up", "Down") for kind in reversed(parent.config.up_block_types)]
    if set(blocks) - set(kinds) or blocks != upward:
        raise ValueError(
            f"The parent has the blocks {blocks} down and {list(parent.config.up_block_types)} up; a video model can be started where "
            f"they are {' and '.join(kinds)}, the same in both directions."
        )
    names = ("in_channels", "out_channels", "block_out_channels", "norm_num_groups", "norm_eps")
    inherited = {name: parent.config[name] for name in names}
    for name in ("layers_per_block", "cross_attention_dim"):
        value = parent.config[name]
        different = {value} if isinstance(value, int) else set(value)
        if len(different) > 1:
            raise ValueError(f"The parent has {name} = {value!r}; a video model can be started where all levels have the same.")
        inherited[name] = different.pop()
    return inherited | {"attention_levels": [kind == attention_block for kind in blocks]}


def _grow(
    cls: "type[SwapUNet]", parent: Any, inherited: dict[str, Any], config: dict[str, Any], new_modules: tuple[str, ...]
) -> "tuple[SwapUNet, LoadingInfo]":
    check_agreement(config, inherited, "the parent")
    settings = {"swap_windows": _windows(cls, len(inherited["block_out_channels"])), **inherited, **config}
    model = cls.from_config(settings)
    weights = dict(parent.state_dict())
    for name, wanted in model.state_dict().items():
        given = weights.get(name)
        if given is not None and given.shape != wanted.shape and given.shape == (*wanted.shape, 1, 1):
            weights[name] = given.flatten(1)  # a 1x1 convolution around a transformer (SD 1.x) is a linear layer
    missing, unexpected = model.load_state_dict(weights, strict=False)
    strangers = [name for name in missing if not any(module in f".{name}" or name.startswith(module) for module in new_modules)]
    if unexpected or strangers:
        raise ValueError(
            f"The parent does not fit: {len(unexpected)} of its weights have no place (first: {unexpected[:3]}), and {len(strangers)} "
            f"that it should have are missing (first: {strangers[:3]})."
        )
    logger.info("%d parameters copied from %s, %d new", len(weights), type(parent).__name__, len(missing))
    if parent.dtype != model.dtype:
        model.to(parent.dtype)
    return model.eval(), LoadingInfo(tuple(weights), tuple(missing))


def _windows(cls: "type[SwapUNet]", levels: int) -> list[tuple[int, int, int]]:
    """The default windows for as many levels as the parent has."""
    import inspect

    default = list(inspect.signature(cls.__init__).parameters["swap_windows"].default)
    return (default + default[-1:] * levels)[:levels]
