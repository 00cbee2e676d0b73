"""Where a parent comes from, and what may differ from it: all else is an error that names the value and the way out."""

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel, UNetMotionModel
from safetensors.torch import load_file, save_file

from videofactory.model.settings import FREE
from videofactory.model.unet import SwapUNet

from .tiny_parents import NEW_OVER_TIME, SD1, SD2, check_copied, frame_by_frame, image_model, video_model
from .tiny_unets import TIMESTEP, greatest_difference, inputs, predict, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

# How a parent of each kind is made, with 8 channels to a head, and how it becomes a video model.
STARTS = {
    "2d": (lambda seed=0: image_model(seed, **SD2), SwapUNet.from_unet2d),
    "3d": (video_model, SwapUNet.from_unet3d),
}


@pytest.mark.parametrize("heads", [SD1, SD2], ids=["sd1", "sd2"])
def test_from_a_directory(tmp_path, heads):
    parent = image_model(**heads)
    parent.save_pretrained(tmp_path / "pipeline" / "unet")
    sample, text = inputs()
    expected = frame_by_frame(parent, sample, text)
    for where in ({"unet": tmp_path / "pipeline", "subfolder": "unet"}, {"unet": str(tmp_path / "pipeline" / "unet")}):
        child, info = SwapUNet.from_unet2d(**where, output_loading_info=True)
        assert greatest_difference(predict(child, sample, text), expected) <= 1e-5
        check_copied(child, parent, info, (*NEW_OVER_TIME, ".swap."))


def test_a_video_model_from_a_directory(tmp_path):
    parent = video_model()
    parent.save_pretrained(tmp_path / "unet")
    sample, text = inputs()
    with torch.no_grad():
        expected = parent(sample, TIMESTEP, text).sample
    assert greatest_difference(predict(SwapUNet.from_unet3d(tmp_path, subfolder="unet"), sample, text), expected) <= 1e-5


def test_what_was_inflated_is_saved_and_loaded(tmp_path):
    child = SwapUNet.from_unet2d(image_model(**SD1))
    child.save_pretrained(tmp_path)
    loaded = SwapUNet.from_pretrained(tmp_path)
    assert all(torch.equal(weight, loaded.state_dict()[name]) for name, weight in child.state_dict().items())
    assert greatest_difference(predict(loaded, *inputs()), predict(child, *inputs())) <= 1e-5


def test_another_class_is_refused(tmp_path):
    with pytest.raises(ValueError, match="UNet3DConditionModel was given; this needs a UNet2DConditionModel"):
        SwapUNet.from_unet2d(video_model())
    with pytest.raises(ValueError, match="UNet2DConditionModel was given; this needs a UNet3DConditionModel"):
        SwapUNet.from_unet3d(image_model())
    with pytest.raises(ValueError, match="SwapUNet was given; this needs a UNet2DConditionModel"):
        SwapUNet.from_unet2d(tiny_unet())
    image_model().save_pretrained(tmp_path / "unet")
    with pytest.raises(ValueError, match="is of the class UNet2DConditionModel; this needs a UNet3DConditionModel"):
        SwapUNet.from_unet3d(tmp_path, subfolder="unet")


def test_a_directory_without_a_model_is_an_error(tmp_path):
    with pytest.raises(OSError, match=str(tmp_path)):
        SwapUNet.from_unet2d(tmp_path, subfolder="unet")


@pytest.mark.parametrize("start", STARTS)
def test_a_variant_is_found_and_read_in_the_precision_that_was_asked_for(tmp_path, start):
    make, way = STARTS[start]
    make().to(torch.float16).save_pretrained(tmp_path / "unet", variant="fp16")
    with pytest.raises(OSError, match="diffusion_pytorch_model"):
        way(tmp_path, subfolder="unet")
    expected = way(make().to(torch.float16))
    for name in ("torch_dtype", "dtype"):
        child = way(tmp_path, subfolder="unet", variant="fp16", **{name: torch.float16})
        assert child.dtype == torch.float16
        same = [name for name, weight in expected.state_dict().items() if torch.equal(weight, child.state_dict()[name])]
        assert len(same) > 100
        assert all(name in same or ".swap." in name or over_time(name) for name in expected.state_dict())
    assert way(tmp_path, subfolder="unet", variant="fp16").dtype == torch.float32


def over_time(name):
    return any(module in f".{name}" for module in NEW_OVER_TIME)


@pytest.mark.parametrize("start", STARTS)
def test_a_parent_from_the_hub_is_found_by_its_revision_in_the_cache(tmp_path, start):
    make, way = STARTS[start]
    parents = {"main": make(0), "other": make(1)}
    repository = tmp_path / "models--someone--something"
    for number, (revision, parent) in enumerate(parents.items()):
        commit = str(number) * 40
        parent.save_pretrained(repository / "snapshots" / commit / "unet")
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    options = {"subfolder": "unet", "cache_dir": tmp_path, "local_files_only": True, "token": "hf_none"}
    for revision, parent in parents.items():
        child = way("someone/something", revision=revision, interaction="none", **options)
        assert torch.equal(child.conv_in.weight, parent.conv_in.weight)
    with pytest.raises(OSError, match="nothing"):
        way("someone/nothing", **options)


@pytest.mark.parametrize("way", ["from_pretrained", "from_unet2d", "from_unet3d"])
@pytest.mark.parametrize(
    ("misspelt", "hint"),
    [
        ("interacton", "The nearest is 'interaction'."),
        ("varient", "The nearest is 'variant'."),
        ("torch_dtyp", "The nearest is 'torch_dtype'."),
        ("tokens", "The nearest is 'token'."),
        ("zebra", "Its settings are attention_head_dim, attention_levels, block_out_channels, "),
    ],
)
def test_a_misspelt_option_is_an_error_before_any_weight_is_loaded(tmp_path, way, misspelt, hint):
    tiny_unet().save_config(tmp_path)  # and no weights
    with pytest.raises(ValueError) as error:
        getattr(SwapUNet, way)(tmp_path, **{misspelt: "none"})
    assert str(error.value).startswith(f"SwapUNet has no setting '{misspelt}' (= 'none'). {hint}")


@pytest.mark.parametrize(("way", "wanted"), [("from_unet2d", UNet2DConditionModel), ("from_unet3d", UNet3DConditionModel)])
@pytest.mark.parametrize("place", [None, 3, ["unet"]], ids=str)
def test_a_parent_that_is_no_model_and_no_place_is_an_error_at_once(monkeypatch, way, wanted, place):
    monkeypatch.setattr(wanted, "load_config", pytest.fail)
    with pytest.raises(TypeError) as error:
        getattr(SwapUNet, way)(place)
    assert f"unet = {place!r}; a {wanted.__name__} is wanted, or where one was saved" in str(error.value)


def test_an_option_for_loading_beside_an_object_is_an_error():
    with pytest.raises(ValueError, match="UNet2DConditionModel was given as an object; subfolder, revision, variant is for one"):
        SwapUNet.from_unet2d(image_model(), subfolder="unet", variant="fp16", revision="main")


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("in_channels", 8),
        ("out_channels", 8),
        ("block_out_channels", (16, 64)),
        ("attention_levels", (True, True)),
        ("layers_per_block", 2),
        ("attention_head_dim", 4),
        ("cross_attention_dim", 24),
        ("norm_num_groups", 8),
        ("norm_eps", 1e-2),
    ],
)
def test_a_setting_that_contradicts_the_parent_is_an_error(start, name, value):
    make, way = STARTS[start]
    parent = make()
    with pytest.raises(ValueError, match=f"{name} = .* contradicts the parent, which has .*; of the settings only interaction"):
        way(parent, **{name: value})
    agreed = dict(way(parent).config)[name]
    assert way(parent, **{name: agreed}).config[name] == agreed


@pytest.mark.parametrize("start", STARTS)
def test_every_setting_is_free_or_the_parent_s(start):
    make, way = STARTS[start]
    free = {"interaction": "global", "swap_windows": [[2, 2, 2], [1, 1, 1]], "dropout": 0.5}
    assert set(free) == set(FREE)
    child, (sample, text) = way(make(), **free), inputs()
    assert free.items() <= child.config.items()
    assert greatest_difference(predict(child, sample, text), predict(way(make()), sample, text)) <= 1e-5
    assert way(make(), attention_head_dim=[8, 8]).config.attention_head_dim == [8, 8]  # one number said for every level


@pytest.mark.parametrize("start", STARTS)
def test_a_file_that_lacks_weights_or_has_others_is_an_error(tmp_path, start):
    make, way = STARTS[start]
    make().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    del weights["conv_in.weight"], weights["conv_out.bias"]
    save_file(weights | {"stranger": torch.ones(2)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError) as error:
        way(tmp_path)
    assert "2 missing (first: ['conv_in.weight', 'conv_out.bias']); 1 unexpected (first: ['stranger'])." in str(error.value)
    assert "ConditionModel" in str(error.value)


def test_an_image_model_in_motion_modules_is_another_class():
    parent = UNetMotionModel(
        block_out_channels=(16, 32),
        norm_num_groups=4,
        cross_attention_dim=16,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
    )
    with pytest.raises(ValueError, match="UNetMotionModel was given"):
        SwapUNet.from_unet2d(parent)
