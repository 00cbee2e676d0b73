"""Small image and video models of diffusers, from which a swap-attention U-Net can start."""

import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel

from .tiny_unets import TIMESTEP, randomise

NEW_OVER_TIME = ("transformer_in.", ".temp_convs.", ".temp_attentions.")
KINDS = ("CrossAttnDownBlock", "DownBlock"), ("UpBlock", "CrossAttnUpBlock")
SETTINGS = {"block_out_channels": (16, 32), "layers_per_block": 1, "cross_attention_dim": 16, "norm_num_groups": 4}
FOUR_LEVELS = (
    ("CrossAttnDownBlock", "CrossAttnDownBlock", "CrossAttnDownBlock", "DownBlock"),
    ("UpBlock", "CrossAttnUpBlock", "CrossAttnUpBlock", "CrossAttnUpBlock"),
)
# The number of heads, under diffusers' name for it.
SD1 = {"attention_head_dim": 8, "use_linear_projection": False}
SD2 = {"attention_head_dim": (2, 4), "use_linear_projection": True}


def image_model(seed=0, kinds=KINDS, **settings):
    names = {
        key: tuple(f"{kind}2D" for kind in side) for key, side in zip(("down_block_types", "up_block_types"), kinds, strict=True)
    }
    return randomise(UNet2DConditionModel(**{**SETTINGS, **SD2, **names, **settings}).eval(), seed)


def video_model(seed=0, kinds=KINDS, **settings):
    names = {
        key: tuple(f"{kind}3D" for kind in side) for key, side in zip(("down_block_types", "up_block_types"), kinds, strict=True)
    }
    return randomise(UNet3DConditionModel(**{**SETTINGS, "attention_head_dim": 8, **names, **settings}).eval(), seed)


@torch.no_grad()
def frame_by_frame(parent, sample, text, timestep=TIMESTEP):
    return torch.stack([parent(frame, timestep, text).sample for frame in sample.unbind(2)], dim=2)


def check_copied(child, parent, info, new_modules):
    """Every weight of the parent is in the child, and what else the child has is of the new modules."""
    given, taken = parent.state_dict(), child.state_dict()
    assert set(info.copied) == set(given)
    assert not set(info.copied) & set(info.new)
    assert set(info.copied) | set(info.new) == set(taken)
    for name, weight in given.items():
        assert torch.equal(weight.flatten(), taken[name].flatten()), name
    for module in new_modules:
        assert any(module in name for name in info.new)
    assert all(any(module in name for module in new_modules) for name in info.new)
