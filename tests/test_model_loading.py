"""A saved U-Net is loaded whole, in every form that diffusers has for it, or there is an error that says what is wrong."""

import inspect
import json
import re

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from diffusers.models import modeling_utils
from safetensors.torch import load_file, save_file

from videofactory.model.attention import INTERACTIONS
from videofactory.model.mixin import LOADING
from videofactory.model.settings import FREE
from videofactory.model.unet import SwapUNet

from .tiny_unets import fresh_unet, greatest_difference, inputs, predict, randomise, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

WEIGHTS = "diffusion_pytorch_model.safetensors"
SHARDS = {"max_shard_size": "500KB"}
MEETING = [interaction for interaction in INTERACTIONS if interaction != "none"]


@pytest.fixture(scope="module")
def unet():
    """Shared; tests that change anything of it make their own."""
    return tiny_unet()


@pytest.fixture(scope="module")
def plain():
    return tiny_unet(interaction="none")


def settings_of(model):
    return json.loads(json.dumps({name: value for name, value in model.config.items() if not name.startswith("_")}))


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def rewrite(folder, change):
    """Apply `change` to the dict of weights that was saved in `folder`."""
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, WEIGHTS),
        ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
        (SHARDS, "diffusion_pytorch_model.safetensors.index.json"),
        ({"safe_serialization": False}, "diffusion_pytorch_model.bin"),
    ],
    ids=["whole", "variant", "shards", "bin"],
)
def test_saved_and_loaded(unet, tmp_path, options, files):
    unet.save_pretrained(tmp_path, **options)
    assert (tmp_path / files).exists()
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".json"]) == (4 if options == SHARDS else 1)
    for low in (True, False):
        loaded, info = SwapUNet.from_pretrained(
            tmp_path, variant=options.get("variant"), output_loading_info=True, low_cpu_mem_usage=low
        )
        assert not any(info.values())
        assert same_weights(unet, loaded)
        assert not loaded.training
        assert greatest_difference(predict(loaded, *inputs()), predict(unet, *inputs())) <= 1e-5
        assert settings_of(loaded) == settings_of(unet)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_loaded_in_half_precision(unet, tmp_path, name):
    unet.save_pretrained(tmp_path)
    loaded = SwapUNet.from_pretrained(tmp_path, **{name: torch.bfloat16})
    assert loaded.dtype == torch.bfloat16
    assert same_weights(tiny_unet().to(torch.bfloat16), loaded)
    sample, text = inputs()
    assert predict(loaded, sample.bfloat16(), text.bfloat16()).isfinite().all()


def test_saved_in_half_precision(tmp_path):
    tiny_unet().to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    loaded = SwapUNet.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert same_weights(tiny_unet().to(torch.float16), loaded)


PARTS = [
    "conv_in",
    "time_proj",
    "time_embedding",
    "transformer_in",
    "down_blocks",
    "mid_block",
    "up_blocks",
    "conv_norm_out",
    "conv_out",
]
PLACES = {
    "plainly": {},
    "with memory": {"low_cpu_mem_usage": False},
    "cpu": {"device_map": "cpu"},
    "auto": {"device_map": "auto"},
    "disk": {"device_map": {name: "disk" if "blocks" in name else "cpu" for name in PARTS}, "offload_folder": "offload"},
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("files", [{}, SHARDS], ids=["whole", "shards"])
@pytest.mark.parametrize("grow", [False, True], ids=["as saved", "grown"])
def test_a_model_is_loaded_wherever_it_belongs(plain, tmp_path, monkeypatch, place, files, grow):
    """Grown: swap attention was asked for, and the saved model has none."""
    monkeypatch.chdir(tmp_path)
    plain.save_pretrained(tmp_path, **files)
    options = PLACES[place] | ({"interaction": "swap", "swap_windows": ((2, 3, 3), (2, 2, 2))} if grow else {})
    loaded, info = SwapUNet.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert greatest_difference(predict(loaded, *inputs()), predict(plain, *inputs())) <= 1e-5
    assert loaded.config.interaction == ("swap" if grow else "none")
    assert set(info.pop("missing_keys")) == {name for name in fresh_unet().state_dict() if ".swap." in name and grow}
    assert not any(info.values())
    if place != "disk":
        assert all(weight.isfinite().all() and not weight.is_meta for weight in loaded.parameters())


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("interaction", MEETING)
def test_asked_for_swap_attention_a_saved_model_without_gets_new_one(plain, tmp_path, interaction, low):
    plain.save_pretrained(tmp_path)
    grown = SwapUNet.from_pretrained(tmp_path, interaction=interaction, low_cpu_mem_usage=low)
    assert torch.equal(predict(grown, *inputs()), predict(SwapUNet.from_pretrained(tmp_path), *inputs()))
    torch.manual_seed(0)
    new = {name: weight for name, weight in grown.state_dict().items() if ".swap." in name}
    for name, weight in new.items():
        usual = fresh_unet(interaction=interaction).state_dict()[name]
        assert weight.dtype == torch.float32
        # As the constructor has it: zeros, ones, or random numbers of the same range.
        assert weight.unique().numel() > 9 if usual.unique().numel() > 9 else torch.equal(weight, usual)
        assert 0.8 * usual.abs().max() <= weight.abs().max() <= 1.25 * usual.abs().max()
    assert sum(name.endswith("to_out.0.weight") for name in new) == 5
    assert (
        greatest_difference(predict(randomise(grown), *inputs()), predict(tiny_unet(interaction=interaction), *inputs())) <= 1e-5
    )


@pytest.mark.parametrize("low", [True, False])
def test_new_swap_attention_has_the_precision_that_was_asked_for(plain, tmp_path, low):
    plain.save_pretrained(tmp_path)
    grown = SwapUNet.from_pretrained(tmp_path, interaction="swap", torch_dtype=torch.bfloat16, low_cpu_mem_usage=low)
    assert {weight.dtype for weight in grown.state_dict().values()} == {torch.bfloat16}
    same, (sample, text) = SwapUNet.from_pretrained(tmp_path, torch_dtype=torch.bfloat16), inputs()
    same.to(memory_format=torch.channels_last), grown.to(memory_format=torch.channels_last)
    assert torch.equal(*(predict(unet, sample.bfloat16(), text.bfloat16()) for unet in (same, grown)))


def test_shards_read_at_the_same_time_give_the_same(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    plain.save_pretrained(tmp_path, **SHARDS)
    grown = SwapUNet.from_pretrained(tmp_path, interaction="swap")
    assert greatest_difference(predict(grown, *inputs()), predict(plain, *inputs())) <= 1e-5


def test_what_was_grown_is_saved_and_loaded_as_a_model_of_its_own(plain, tmp_path):
    plain.save_pretrained(tmp_path / "plain")
    grown = randomise(SwapUNet.from_pretrained(tmp_path / "plain", interaction="swap"), seed=3)
    grown.save_pretrained(tmp_path / "grown")
    loaded = SwapUNet.from_pretrained(tmp_path / "grown")
    assert loaded.config.interaction == "swap"
    assert same_weights(loaded, grown)


@pytest.mark.parametrize("interaction", MEETING)
def test_another_interaction_takes_the_same_weights(unet, tmp_path, interaction):
    unet.save_pretrained(tmp_path)
    loaded = SwapUNet.from_pretrained(tmp_path, interaction=interaction)
    assert same_weights(loaded, unet)
    assert greatest_difference(predict(loaded, *inputs()), predict(tiny_unet(interaction=interaction), *inputs())) <= 1e-5


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("files", [{}, SHARDS], ids=["whole", "shards"])
def test_trained_swap_attention_is_not_dropped_by_the_way(unet, tmp_path, files, low):
    unet.save_pretrained(tmp_path, **files)
    with pytest.raises(ValueError, match=r"40 unexpected \(first: \['down_blocks.0.swap.*To drop them on purpose"):
        SwapUNet.from_pretrained(tmp_path, interaction="none", low_cpu_mem_usage=low)


def test_swap_attention_is_dropped_on_purpose_as_the_error_says(unet):
    plain = SwapUNet.from_config(unet.config, interaction="none")
    assert not plain.load_state_dict(unet.state_dict(), strict=False).missing_keys
    same = tiny_unet(interaction="none")
    same.load_state_dict({name: weight for name, weight in unet.state_dict().items() if ".swap." not in name})
    assert torch.equal(predict(plain.eval(), *inputs()), predict(same, *inputs()))


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("files", [{}, SHARDS, {"safe_serialization": False}], ids=["whole", "shards", "bin"])
def test_weights_that_are_missing_or_too_many_are_an_error(tmp_path, files, low):
    model = tiny_unet()
    model.stranger = torch.nn.Linear(2, 2)
    del model.conv_norm_out, model.mid_block.swap.norm_query
    model.save_pretrained(tmp_path, **files)
    with pytest.raises(ValueError) as error:
        SwapUNet.from_pretrained(tmp_path, low_cpu_mem_usage=low)
    assert str(tmp_path) in str(error.value)
    assert "4 missing (first: ['conv_norm_out.bias', 'conv_norm_out.weight', 'mid_block.swap.norm_query.bias'])" in str(
        error.value
    )
    assert "2 unexpected (first: ['stranger.bias', 'stranger.weight'])" in str(error.value)
    assert "interaction" not in str(error.value)


@pytest.mark.parametrize("interaction", [None, "swap", "global"])
def test_missing_swap_attention_is_started_only_where_the_saved_model_had_none(unet, tmp_path, interaction):
    asked = {} if interaction is None else {"interaction": interaction}
    unet.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("up_blocks.0.swap.attn.to_q.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(first: \['up_blocks.0.swap.attn.to_q.weight'\]\)\.$"):
        SwapUNet.from_pretrained(tmp_path, **asked)
    rewrite(tmp_path, lambda weights: [weights.pop(name) for name in list(weights) if ".swap." in name])
    with pytest.raises(ValueError, match=r'40 missing.*though its config.json names.*interaction="none"'):
        SwapUNet.from_pretrained(tmp_path, **asked)
    SwapUNet.from_pretrained(tmp_path, interaction="none")


def test_a_saved_model_without_swap_attention_that_lacks_more_is_an_error(plain, tmp_path):
    plain.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda weights: weights.pop("conv_in.bias"))
    with pytest.raises(ValueError, match=r"1 missing \(first: \['conv_in.bias'\]\)\.$"):
        SwapUNet.from_pretrained(tmp_path, interaction="swap")


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("files", [{}, SHARDS], ids=["whole", "shards"])
def test_weights_of_another_shape_are_an_error(unet, tmp_path, files, low):
    unet.save_pretrained(tmp_path, **files)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"in_channels": 8}))
    with pytest.raises(ValueError) as error:
        SwapUNet.from_pretrained(tmp_path, low_cpu_mem_usage=low)
    shapes = "conv_in.weight: (16, 4, 3, 3) in the file, (16, 8, 3, 3) in the model"
    assert f"not those of this SwapUNet: 1 of another shape (first: ['{shapes}'])." in str(error.value)
    assert "ignore_mismatched_sizes" not in str(error.value)


CONTRADICTIONS = {
    "in_channels": (8, 4),
    "out_channels": (8, 4),
    "block_out_channels": ((16, 64), [16, 32]),
    "attention_levels": ((True, True), [True, False]),
    "layers_per_block": (2, 1),
    "attention_head_dim": (4, 8),
    "cross_attention_dim": (32, 16),
    "norm_num_groups": (8, 4),
    "norm_eps": (1e-2, 1e-5),
}


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_setting_that_contradicts_the_saved_one_is_an_error_before_weights_are_read(unet, tmp_path, name):
    unet.save_config(tmp_path)  # and no weights
    asked, saved = CONTRADICTIONS[name]
    with pytest.raises(ValueError) as error:
        SwapUNet.from_pretrained(tmp_path, **{name: asked})
    assert f"{name} = {asked!r} contradicts the checkpoint '{tmp_path}', which has {saved!r};" in str(error.value)
    assert "interaction, swap_windows, dropout may differ" in str(error.value)


def test_every_setting_may_be_said_again_and_three_may_differ(unet, tmp_path):
    unet.save_pretrained(tmp_path)
    same = {name: tuple(value) if isinstance(value, list) else value for name, value in settings_of(unet).items()}
    assert set(same) - set(FREE) == set(CONTRADICTIONS)
    free = {"interaction": "global", "swap_windows": ((2, 2, 2), (1, 1, 1)), "dropout": 0.5}
    assert set(free) == set(FREE)
    loaded = SwapUNet.from_pretrained(tmp_path, **same | free | {"attention_head_dim": (8, 8)})
    assert same_weights(loaded, unet)
    assert loaded.config.dropout == 0.5
    # A setting that the file lacks has its default.
    config = json.loads((tmp_path / "config.json").read_text())
    del config["norm_eps"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    SwapUNet.from_pretrained(tmp_path, norm_eps=1e-5)
    with pytest.raises(ValueError, match=r"norm_eps = 0\.01 contradicts .* has 1e-05"):
        SwapUNet.from_pretrained(tmp_path, norm_eps=1e-2)


def test_what_would_leave_weights_without_values_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"ignore_mismatched_sizes = True would leave .*whole or not at all"):
        SwapUNet.from_pretrained(tmp_path / "nothing", ignore_mismatched_sizes=True)


@pytest.mark.parametrize("place", [None, 3, ["unet"]], ids=str)
def test_a_place_that_is_none_is_an_error_at_once(monkeypatch, place):
    monkeypatch.setattr(SwapUNet, "load_config", pytest.fail)
    with pytest.raises(TypeError, match=f"a directory or a Hub id, as a text or a path; {re.escape(repr(place))} is none"):
        SwapUNet.from_pretrained(place)


def test_hints_know_every_argument_of_diffusers_for_loading():
    """A version of diffusers that adds one shows here."""
    taken = set(re.findall(r'kwargs\.pop\(\s*"(\w+)"', inspect.getsource(modeling_utils.ModelMixin.from_pretrained)))
    assert "torch_dtype" in taken
    assert taken - set(LOADING) == {"ignore_mismatched_sizes", "parallel_config"}  # refused


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_a_configuration_makes_the_same_model(tmp_path, interaction):
    model = fresh_unet(interaction=interaction, attention_head_dim=(8, 16))
    model.save_config(tmp_path)
    again = SwapUNet.from_config(SwapUNet.load_config(tmp_path))
    assert [(name, weight.shape) for name, weight in again.named_parameters()] == [
        (name, weight.shape) for name, weight in model.named_parameters()
    ]
    again.load_state_dict(randomise(model).state_dict())
    assert torch.equal(predict(again.eval(), *inputs()), predict(model, *inputs()))


def test_an_unknown_setting_is_an_error_that_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match=r"'swap_window' \(= \[\[4, 4, 4\]\]\).*'swap_windows'"):
        SwapUNet.from_config({**dict(fresh_unet().config), "swap_window": [[4, 4, 4]]})
    fresh_unet().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"cross_attention_dims": 16}))
    with pytest.raises(ValueError, match=r"'cross_attention_dims'.*'cross_attention_dim'"):
        SwapUNet.from_pretrained(tmp_path)


def test_a_misspelt_argument_is_an_error_that_names_the_nearest(unet):
    message = r"SwapUNet has no setting 'interacton' \(= 'none'\)\. The nearest is 'interaction'"
    with pytest.raises(ValueError, match=message):
        SwapUNet.from_config(unet.config, interacton="none")
    assert SwapUNet.from_config(unet.config, interaction="none").config.interaction == "none"


def test_arguments_for_loading_are_no_settings(unet, tmp_path):
    (tmp_path / "pipeline").mkdir()
    unet.save_pretrained(tmp_path / "pipeline" / "unet", variant="fp16")
    loading = {
        "cache_dir": tmp_path,
        "force_download": False,
        "proxies": None,
        "local_files_only": True,
        "token": None,
        "revision": "main",
        "subfolder": "unet",
        "mirror": None,
        "variant": "fp16",
        "use_safetensors": True,
        "disable_mmap": True,
        "max_memory": None,
        "offload_state_dict": False,
        "low_cpu_mem_usage": True,
        "ignore_mismatched_sizes": False,
        "quantization_config": None,
    }
    assert same_weights(SwapUNet.from_pretrained(tmp_path / "pipeline", **loading), unet)


@pytest.mark.parametrize(
    ("parent", "kinds", "way"), [(UNet2DConditionModel, "2D", "from_unet2d"), (UNet3DConditionModel, "3D", "from_unet3d")]
)
def test_loading_a_parent_s_folder_names_the_way(tmp_path, parent, kinds, way):
    blocks = {"down_block_types": (f"CrossAttnDownBlock{kinds}",), "up_block_types": (f"CrossAttnUpBlock{kinds}",)}
    parent(block_out_channels=(16,), norm_num_groups=4, cross_attention_dim=16, attention_head_dim=8, **blocks).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match=f"{parent.__name__}, not SwapUNet. SwapUNet.{way}"):
        SwapUNet.from_pretrained(tmp_path)


def test_a_pipeline_of_diffusers_loads_it_as_a_component(unet, tmp_path):
    """It looks for diffusers' base class in the module of the component's class."""
    from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES, get_class_obj_and_candidates

    _, candidates = get_class_obj_and_candidates(SwapUNet.__module__, "SwapUNet", LOADABLE_CLASSES["diffusers"], None, False)
    assert any(candidate is not None and issubclass(SwapUNet, candidate) for candidate in candidates.values())
