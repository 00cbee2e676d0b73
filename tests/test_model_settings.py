"""Settings and inputs that do not fit are errors that name the value, the cause and the way out."""

import math
import re

import numpy
import pytest
import torch

from videofactory.model.settings import check_settings
from videofactory.model.unet import SwapUNet

from .tiny_unets import TIMESTEP, TINY, greatest_difference, inputs, noise, predict, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unet():
    """Shared; tests that change anything of it make their own."""
    return tiny_unet()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_levels": (True,)}, r"attention_levels = \(True,\) has 1 levels, block_out_channels = \(16, 32\) has 2"),
        ({"attention_head_dim": (8, 8, 8)}, r"attention_head_dim = \(8, 8, 8\) has 3 levels, .* has 2"),
        ({"swap_windows": ((4, 4, 4),)}, r"swap_windows = \(\(4, 4, 4\),\) has 1 levels, .* has 2"),
        ({"interaction": "swapped"}, "interaction = 'swapped'.*is 'swap'"),
        ({"interaction": None}, "interaction = None.*is 'none'"),
        ({"norm_num_groups": 5}, r"norm_num_groups = 5 does not divide 16 of block_out_channels = \(16, 32\)"),
        ({"attention_head_dim": (8, 12)}, r"attention_head_dim = 12 does not divide 32 of block_out_channels = \(16, 32\)"),
        ({"block_out_channels": ()}, r"block_out_channels = \(\); the channels of every level"),
        ({"block_out_channels": 16}, "block_out_channels = 16; the channels of every level"),
        ({"block_out_channels": (16, 0)}, r"block_out_channels = \(16, 0\); the channels of every level"),
        ({"block_out_channels": (16, 32.0)}, r"block_out_channels = \(16, 32\.0\); the channels of every level"),
        ({"attention_levels": True}, "attention_levels = True; True or False for every level"),
        ({"attention_levels": "ab"}, "attention_levels = 'ab'; True or False for every level"),
        ({"attention_levels": (True, None)}, r"attention_levels = \(True, None\) holds None; True or False"),
        ({"attention_head_dim": 0}, "attention_head_dim = 0 holds 0; a whole number of at least 1"),
        ({"attention_head_dim": -8}, "attention_head_dim = -8 holds -8; a whole number of at least 1"),
        ({"attention_head_dim": None}, "attention_head_dim = None holds None; a whole number of at least 1"),
        ({"attention_head_dim": (8, 8.0)}, r"attention_head_dim = \(8, 8\.0\) holds 8\.0; a whole number of at least 1"),
        ({"attention_head_dim": True}, "attention_head_dim = True holds True; a whole number of at least 1"),
        ({"swap_windows": (4, 4)}, r"swap_windows = \(4, 4\) holds 4; three whole numbers"),
        ({"swap_windows": ((4, 4, 4), (4, 4))}, r"swap_windows = .* holds \(4, 4\); three whole numbers of at least 1 \(frames"),
        ({"swap_windows": ((4, 0, 4), (4, 4, 4))}, r"swap_windows = .* holds \(4, 0, 4\); three whole numbers of at least 1"),
        ({"swap_windows": ((4, 2.5, 4), (4, 4, 4))}, r"swap_windows = .* holds \(4, 2\.5, 4\); three whole numbers"),
        ({"swap_windows": None}, "swap_windows = None; three whole numbers of at least 1 .* for every level is wanted"),
        *(
            ({name: value}, f"{name} = {value!r}; a whole number of at least 1 is wanted")
            for name in ("in_channels", "out_channels", "layers_per_block", "cross_attention_dim", "norm_num_groups")
            for value in (0, -1, None, 2.0, "2", True)
        ),
        *(({"norm_eps": value}, f"norm_eps = {value!r}; a number above 0") for value in (0, -1e-5, None, math.nan, math.inf)),
        *(({"dropout": value}, f"dropout = {value!r}; a probability") for value in (-0.1, 1.5, None, math.nan)),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        SwapUNet(**{**TINY, **settings})


def test_the_extremes_of_what_is_allowed_make_models():
    with torch.device("meta"):
        one = {"block_out_channels": [1], "attention_levels": [True], "swap_windows": [[1, 1, 1]], "attention_head_dim": 1}
        SwapUNet(**one, in_channels=1, out_channels=1, layers_per_block=1, cross_attention_dim=1, norm_num_groups=1, dropout=1)
    assert check_settings(SwapUNet(**TINY, dropout=0).config) is None


@pytest.mark.parametrize(
    ("sample", "text", "message"),
    [
        ((2, 4, 6, 7), (2, 5, 16), r"\(2, 4, 6, 7\).*\(batch, 4, frames, height, width\)"),
        ((2, 3, 3, 6, 7), (2, 5, 16), r"\(2, 3, 3, 6, 7\).*\(batch, 4, frames"),
        ((2, 4, 0, 6, 7), (2, 5, 16), r"\(2, 4, 0, 6, 7\).*at least one clip and one frame"),
        ((0, 4, 3, 6, 7), (0, 5, 16), r"\(0, 4, 3, 6, 7\).*at least one clip and one frame"),
        ((2, 4, 3, 1, 7), (2, 5, 16), "height 1 and width 7.*at least 2"),
        ((2, 4, 3, 6, 1), (2, 5, 16), "height 6 and width 1.*at least 2"),
        ((2, 4, 3, 6, 7), (2, 5, 24), r"\(2, 5, 24\).*\(2, 'tokens', 16\)"),
        ((2, 4, 3, 6, 7), (3, 5, 16), r"\(3, 5, 16\).*\(2, 'tokens', 16\)"),
        ((2, 4, 3, 6, 7), (5, 16), r"\(5, 16\).*\(2, 'tokens', 16\)"),
        ((2, 4, 3, 6, 7), (2, 0, 16), r"\(2, 0, 16\).*at least one token"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(unet, sample, text, message):
    with pytest.raises(ValueError, match=message):
        predict(unet, noise(*sample), noise(*text))


def test_time_steps_that_do_not_fit_are_an_error(unet):
    with pytest.raises(ValueError, match=r"\(3,\); one is wanted, or one for each of 2 clips"):
        predict(unet, *inputs(), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("latents", "embedded", "message"),
    [
        (torch.int64, torch.float32, "latents are torch.int64 and the embedded text is torch.float32; floating-point"),
        (torch.float32, torch.int64, "latents are torch.float32 and the embedded text is torch.int64; floating-point"),
        (
            torch.float32,
            torch.bfloat16,
            r"latents are torch.float32 and the embedded text is torch.bfloat16; one precision.*\.to",
        ),
        (torch.float16, torch.float32, "latents are torch.float16 and the embedded text is torch.float32; one precision"),
    ],
    ids=str,
)
def test_precisions_that_do_not_fit_are_errors(unet, latents, embedded, message):
    sample, text = inputs()
    with pytest.raises(ValueError, match=message):
        predict(unet, sample.to(latents), text.to(embedded))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_a_precision_other_than_the_model_s_is_an_error(unet, half):
    sample, text = inputs()
    with pytest.raises(ValueError, match=f"latents are {half} and the embedded text is {half}; .*, torch.float32: .*autocast"):
        predict(unet, sample.to(half), text.to(half))
    with pytest.raises(ValueError, match=f"torch.float32; .*the model's own, {half}"):
        predict(tiny_unet().to(half), sample, text)


def test_where_precision_is_converted_on_the_way_it_may_differ(unet):
    (sample, text), half = inputs(), torch.bfloat16
    expected = predict(unet, sample, text)
    found = {}
    with torch.autocast("cpu", dtype=half):
        found["autocast"] = predict(unet, sample.to(half), text.to(half))
    stored = tiny_unet()
    stored.enable_layerwise_casting(storage_dtype=half, compute_dtype=torch.float32)
    assert stored.conv_in.weight.dtype == half
    found["layerwise casting"] = predict(stored, sample, text)
    hooked = tiny_unet()
    for module in hooked.modules():  # as data parallel training does, whose parameters are converted layer by layer
        module.register_forward_pre_hook(lambda layer, _: layer.to(half) and None)
    found["hooks"] = predict(hooked, sample.to(half), text.to(half))
    for way, prediction in found.items():
        assert greatest_difference(prediction, expected) <= 0.1 * expected.abs().max(), way


@pytest.mark.parametrize("name", ["sample", "encoder_hidden_states"])
@pytest.mark.parametrize("value", [None, [1.0], "3"], ids=str)
def test_inputs_that_are_no_tensors_are_errors(unet, name, value):
    given = {"sample": inputs()[0], "timestep": TIMESTEP, "encoder_hidden_states": inputs()[1]} | {name: value}
    with pytest.raises(TypeError, match=f"{name} is of the type {type(value).__name__}; a tensor is wanted"):
        unet(**given)


@pytest.mark.parametrize(
    ("timestep", "kind"),
    [
        *((value, TypeError) for value in ("3", None, [3, 4], 3j)),
        *((value, ValueError) for value in (-1, -0.5, math.nan, math.inf)),
    ],
    ids=str,
)
def test_time_steps_that_are_none_are_errors(unet, timestep, kind):
    with pytest.raises(kind, match=re.escape(f"timestep = {timestep!r}; a number")):
        predict(unet, *inputs(), timestep)


def test_time_steps_of_numpy_are_numbers(unet):
    expected = predict(unet, *inputs(), 3)
    for timestep in (numpy.int64(3), numpy.float32(3)):
        assert torch.equal(predict(unet, *inputs(), timestep), expected)


def test_autocast_takes_text_of_another_precision(unet):
    sample, text = inputs()
    expected = predict(unet, sample, text)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = predict(unet, sample, text.bfloat16())
    assert (found - expected).abs().max() <= 0.1 * expected.abs().max()
