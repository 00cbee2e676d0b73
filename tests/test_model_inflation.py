"""A U-Net that starts from an image or video model computes what its parent does, from every one of its weights, or says why not."""

import inspect
import re

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from torch import nn

from videofactory.model.attention import INTERACTIONS
from videofactory.model.inflation import USUAL_2D, USUAL_3D
from videofactory.model.unet import SwapUNet

from .tiny_parents import (
    FOUR_LEVELS,
    NEW_OVER_TIME,
    SD1,
    SD2,
    check_copied,
    frame_by_frame,
    image_model,
    video_model,
)
from .tiny_unets import TIMESTEP, greatest_difference, inputs, noise, predict, randomise

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("size", [(8, 8), (6, 11), (7, 5), (2, 2), (3, 2)])
@pytest.mark.parametrize("heads", [SD1, SD2], ids=["sd1", "sd2"])
def test_an_image_model_continues_frame_by_frame(heads, size):
    parent = image_model(**heads)
    child, info = SwapUNet.from_unet2d(parent, output_loading_info=True)
    sample, text = inputs(2, 3, *size)
    expected = frame_by_frame(parent, sample, text)
    assert expected.abs().mean() > 0.1
    assert greatest_difference(predict(child, sample, text), expected) <= 1e-5
    check_copied(child, parent, info, (*NEW_OVER_TIME, ".swap."))


@pytest.mark.parametrize("size", [(8, 8), (6, 11), (7, 5), (2, 2), (3, 2)])
def test_a_video_model_continues_as_a_whole(size):
    parent = video_model()
    child, info = SwapUNet.from_unet3d(parent, output_loading_info=True)
    sample, text = inputs(2, 3, *size)
    with torch.no_grad():
        expected = parent(sample, TIMESTEP, text).sample
        frames_apart = torch.cat([parent(frame, TIMESTEP, text).sample for frame in sample.split(1, dim=2)], dim=2)
    assert greatest_difference(predict(child, sample, text), expected) <= 1e-5
    assert greatest_difference(frames_apart, expected) > 0.1  # so its layers over time do count
    check_copied(child, parent, info, (".swap.",))


@torch.no_grad()
def test_a_single_frame_is_an_image_here_and_a_video_to_the_parent():
    """The one case in which the child differs: its layers over time step aside, and the parent's do not."""
    parent = video_model()
    child, (sample, text) = SwapUNet.from_unet3d(parent), inputs(frames=1)
    expected, found = parent(sample, TIMESTEP, text).sample, predict(child, sample, text)
    assert greatest_difference(found, expected) > 0.1 * expected.abs().max()
    for module in parent.modules():
        if type(module).__name__ in ("TransformerTemporalModel", "TemporalConvLayer"):
            for parameter in (module.proj_out if hasattr(module, "proj_out") else module.conv4[-1]).parameters():
                parameter.zero_()
    assert greatest_difference(found, parent(sample, TIMESTEP, text).sample) <= 1e-5


def test_models_of_four_levels_continue_at_the_published_latents():
    """16 frames of 24x43, with the real model's levels, layers and windows, 20 times narrower."""
    settings = {"kinds": FOUR_LEVELS, "block_out_channels": (16, 32, 64, 64), "layers_per_block": 2}
    image, video = image_model(**settings, attention_head_dim=(2, 4, 8, 8)), video_model(**settings)
    sample, text = inputs(1, 16, 24, 43)
    inflated = SwapUNet.from_unet2d(image)
    assert inflated.config.swap_windows == [(16, 8, 11), (16, 6, 11), (16, 6, 11), (16, 3, 6)]
    assert greatest_difference(predict(inflated, sample, text), frame_by_frame(image, sample, text)) <= 1e-5
    with torch.no_grad():
        expected = video(sample, TIMESTEP, text).sample
    assert greatest_difference(predict(SwapUNet.from_unet3d(video), sample, text), expected) <= 1e-5


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_every_interaction_continues_exactly(interaction):
    image, video = image_model(), video_model()
    sample, text = inputs()
    windows = {"swap_windows": ((2, 4, 3), (2, 2, 2))}
    inflated, info = SwapUNet.from_unet2d(image, interaction=interaction, output_loading_info=True, **windows)
    assert greatest_difference(predict(inflated, sample, text), frame_by_frame(image, sample, text)) <= 1e-5
    assert any(".swap." in name for name in info.new) == (interaction != "none")
    grown, info = SwapUNet.from_unet3d(video, interaction=interaction, output_loading_info=True, **windows)
    with torch.no_grad():
        assert greatest_difference(predict(grown, sample, text), video(sample, TIMESTEP, text).sample) <= 1e-5
    assert bool(info.new) == (interaction != "none")
    assert grown.config.interaction == inflated.config.interaction == interaction
    assert [tuple(window) for window in grown.config.swap_windows] == [(2, 4, 3), (2, 2, 2)]


@pytest.mark.parametrize(
    "settings",
    [
        {"layers_per_block": 2},
        {"layers_per_block": (1, 1), "cross_attention_dim": (16, 16)},
        {"kinds": (("DownBlock", "CrossAttnDownBlock"), ("CrossAttnUpBlock", "UpBlock"))},
        {"kinds": (("CrossAttnDownBlock",) * 2, ("CrossAttnUpBlock",) * 2)},
        {"in_channels": 4, "out_channels": 8},
        {"norm_eps": 1e-2},
        {"upcast_attention": True},
        {"block_out_channels": (24, 24), "attention_head_dim": 3},
    ],
    ids=str,
)
def test_other_layouts_of_an_image_model_continue_too(settings):
    parent = image_model(**settings)
    sample, text = inputs()
    child = SwapUNet.from_unet2d(parent)
    assert greatest_difference(predict(child, sample, text), frame_by_frame(parent, sample, text)) <= 1e-5


def test_the_time_step_reaches_the_child_as_it_does_the_parent():
    parent, timesteps = image_model(), torch.tensor([3, 998])
    child, (sample, text) = SwapUNet.from_unet2d(parent), inputs()
    expected = frame_by_frame(parent, sample, text, timesteps)
    assert greatest_difference(predict(child, sample, text, timesteps), expected) <= 1e-5


def test_an_image_is_the_image_model_s_own_after_training_over_time():
    parent = image_model()
    child, info = SwapUNet.from_unet2d(parent, output_loading_info=True)
    with torch.no_grad():
        for name, parameter in child.named_parameters():
            if name in info.new:
                parameter.copy_(noise(*parameter.shape))
    sample, text = inputs()
    assert greatest_difference(predict(child, sample, text), frame_by_frame(parent, sample, text)) > 0.1
    image = sample[:, :, :1]
    assert greatest_difference(predict(child, image, text), frame_by_frame(parent, image, text)) <= 1e-5


def test_a_parent_is_left_alone_and_shares_no_memory():
    parent = image_model()
    before = {name: weight.clone() for name, weight in parent.state_dict().items()}
    child = SwapUNet.from_unet2d(parent)
    randomise(child, seed=9)
    assert all(torch.equal(weight, before[name]) for name, weight in parent.state_dict().items())


def test_the_child_has_the_parent_s_precision_and_is_ready_to_use():
    child = SwapUNet.from_unet2d(image_model(dropout=0.25).to(torch.bfloat16))
    assert {parameter.dtype for parameter in child.parameters()} == {torch.bfloat16}
    assert not child.training
    assert child.config.dropout == 0.25
    assert [module.p for name, module in child.named_modules() if name.endswith("resnets.0.dropout")] == [0.25] * 5


UNUSUAL_2D = [
    {"act_fn": "gelu"},
    {"addition_embed_type": "text"},
    {"attention_type": "gated"},
    {"center_input_sample": True},
    {"class_embed_type": "timestep"},
    {"class_embeddings_concat": True},
    {"conv_in_kernel": 1},
    {"conv_out_kernel": 1},
    {"cross_attention_norm": "layer_norm"},
    {"downsample_padding": 0},
    {"dual_cross_attention": True},
    {"encoder_hid_dim": 12},
    {"flip_sin_to_cos": False},
    {"freq_shift": 1},
    {"mid_block_only_cross_attention": True},
    {"mid_block_scale_factor": 2},
    {"mid_block_type": "UNetMidBlock2D"},
    {"mid_block_type": None},
    {"num_class_embeds": 3},
    {"only_cross_attention": True},
    {"only_cross_attention": (True, False)},
    {"projection_class_embeddings_input_dim": 4},
    {"resnet_out_scale_factor": 0.5},
    {"resnet_skip_time_act": True},
    {"resnet_time_scale_shift": "scale_shift"},
    {"time_cond_proj_dim": 8},
    {"time_embedding_act_fn": "silu"},
    {"time_embedding_dim": 32},
    {"time_embedding_type": "fourier"},
    {"timestep_post_act": "silu"},
    {"transformer_layers_per_block": 2},
    {"transformer_layers_per_block": (1, 2)},
    {"layers_per_block": (1, 2)},
    {"cross_attention_dim": (16, 24)},
]


@pytest.mark.parametrize("unusual", UNUSUAL_2D, ids=str)
def test_an_image_model_with_an_unusual_setting_is_refused(unusual):
    ((name, value),) = unusual.items()
    with pytest.raises(ValueError, match="The parent has") as error:
        SwapUNet.from_unet2d(image_model(**unusual))
    assert name in str(error.value)
    assert repr(value) in str(error.value)
    if name in USUAL_2D:
        assert str(error.value).endswith(f"only where it is {USUAL_2D[name]!r}.")


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({"attention_head_dim": 3}, "The parent has attention_head_dim = 3: 3 heads do not divide 16 channels."),
        ({"attention_head_dim": (4, 5)}, "The parent has attention_head_dim = (4, 5): 5 heads do not divide 32 channels."),
    ],
    ids=str,
)
def test_heads_that_do_not_divide_the_channels_are_refused_as_the_parent_has_them(heads, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        SwapUNet.from_unet2d(image_model(**heads))


@pytest.mark.parametrize(
    "unusual", [{"act_fn": "gelu"}, {"downsample_padding": 0}, {"mid_block_scale_factor": 2}, {"time_cond_proj_dim": 8}], ids=str
)
def test_a_video_model_with_an_unusual_setting_is_refused(unusual):
    ((name, value),) = unusual.items()
    with pytest.raises(ValueError, match=f"{name} = {value!r}.*{USUAL_3D[name]!r}"):
        SwapUNet.from_unet3d(video_model(**unusual))


FOLLOWED = {
    "in_channels",
    "out_channels",
    "down_block_types",
    "up_block_types",
    "block_out_channels",
    "layers_per_block",
    "norm_num_groups",
    "norm_eps",
    "cross_attention_dim",
    "attention_head_dim",
    "num_attention_heads",
    "dropout",
    "use_linear_projection",  # shows in the shape of the weights
}
# Metadata, precision alone, or details of an embedding that is refused.
WITHOUT_INFLUENCE = {
    "sample_size",
    "upcast_attention",
    "encoder_hid_dim_type",
    "addition_time_embed_dim",
    "addition_embed_type_num_heads",
}


@pytest.mark.parametrize(("parent", "usual"), [(UNet2DConditionModel, USUAL_2D), (UNet3DConditionModel, USUAL_3D)])
def test_every_setting_of_a_parent_is_followed_or_checked(parent, usual):
    """A version of diffusers that adds a setting shows here."""
    settings = inspect.signature(parent.__init__).parameters
    assert set(settings) - {"self"} - FOLLOWED - WITHOUT_INFLUENCE == set(usual)
    assert {name: settings[name].default for name in usual} == usual


def test_every_checked_setting_has_a_parent_that_is_refused_for_it():
    refused = {name for unusual in UNUSUAL_2D for name in unusual}
    assert set(USUAL_2D) - refused == {"reverse_transformer_layers_per_block"}  # only beside nested transformer_layers_per_block


@pytest.mark.parametrize(
    ("kinds", "named"),
    [
        ((("CrossAttnDownBlock", "ResnetDownsampleBlock"), ("UpBlock", "CrossAttnUpBlock")), "ResnetDownsampleBlock2D"),
        ((("CrossAttnDownBlock", "DownBlock"), ("CrossAttnUpBlock", "UpBlock")), r"\['CrossAttnUpBlock2D', 'UpBlock2D'\] up"),
    ],
)
def test_other_blocks_are_refused(kinds, named):
    with pytest.raises(ValueError, match=f"{named}.*CrossAttnDownBlock2D and DownBlock2D"):
        SwapUNet.from_unet2d(image_model(kinds=kinds))


def test_of_a_video_model_only_the_dropout_in_training_is_not_continued():
    parent = video_model()
    models = [parent, SwapUNet.from_unet3d(parent), SwapUNet.from_unet3d(parent, dropout=0.1)]
    dropped = [
        {module.p for name, module in model.named_modules() if "temp_convs" in name and isinstance(module, nn.Dropout)}
        for model in models
    ]
    assert dropped == [{0.1}, {0.0}, {0.1}]


def test_extra_and_missing_weights_are_refused():
    parent = image_model()
    parent.controlnet_hint = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"2 of its weights have no place.*controlnet_hint\.weight"):
        SwapUNet.from_unet2d(parent)
    parent = image_model()
    del parent.conv_norm_out
    with pytest.raises(ValueError, match=r"2\s+that it should have are missing.*conv_norm_out\.weight"):
        SwapUNet.from_unet2d(parent)
