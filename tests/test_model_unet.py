"""The U-Net as a whole: sizes, images, batches, precision, files, memory order, and every message of an error."""

import json
import subprocess
import sys
from collections import Counter

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet3DConditionModel
from diffusers.models.attention_processor import Attention

from videofactory.model.attention import INTERACTIONS
from videofactory.model.unet import SwapUNet, SwapUNetOutput

from .tiny_unets import (  # noqa: F401
    NARROW,
    TIMESTEP,
    fresh_unet,
    greatest_difference,
    inputs,
    noise,
    one_thread,
    predict,
    randomise,
    tiny_unet,
)


@pytest.fixture(scope="module")
def unet():
    """Shared; tests that change anything of it make their own."""
    return tiny_unet()


def count_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_real_model_has_its_size():
    counts = {}
    for interaction in INTERACTIONS:
        with torch.device("meta"):
            counts[interaction] = count_parameters(SwapUNet(interaction=interaction))
    assert counts.pop("none") == 1_411_233_860
    assert set(counts.values()) == {1_448_131_140}


def test_without_interaction_it_is_model_scope_s_u_net():
    with torch.device("meta"):
        ours, theirs = SwapUNet(interaction="none"), UNet3DConditionModel()
    assert {name: weight.shape for name, weight in ours.state_dict().items()} == {
        name: weight.shape for name, weight in theirs.state_dict().items()
    }


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_a_new_model_computes_what_it_does_without_interaction(interaction):
    model, plain = fresh_unet(interaction=interaction), tiny_unet(seed=3, interaction="none")
    assert not model.load_state_dict(plain.state_dict(), strict=False).unexpected_keys
    assert torch.equal(predict(model, *inputs()), predict(plain, *inputs()))


def test_the_interactions_are_six_different_models():
    results = {interaction: predict(tiny_unet(interaction=interaction), *inputs()) for interaction in INTERACTIONS}
    names = list(results)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            assert greatest_difference(results[one], results[other]) > 1e-2, (one, other)


def test_every_parameter_changes_the_result():
    model = tiny_unet()
    (model(inputs()[0], TIMESTEP, inputs()[1]).sample * noise(2, 4, 3, 6, 7, seed=5)).sum().backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad.abs().max() < 1e-4]


@pytest.mark.parametrize("size", [(2, 2), (2, 3), (3, 2), (5, 9), (24, 43), (43, 24)])
@pytest.mark.parametrize("frames", [1, 2, 9])
def test_any_size_and_length(unet, size, frames):
    sample, text = inputs(1, frames, *size)
    prediction = predict(unet, sample, text)
    assert prediction.shape == sample.shape
    assert prediction.isfinite().all()


@pytest.mark.parametrize("size", [(8, 8), (9, 15), (24, 43), (13, 8)])
def test_any_size_with_four_levels(size):
    sample, text = inputs(1, 2, *size)
    assert predict(randomise(SwapUNet(**NARROW).eval()), sample, text).shape == sample.shape


def test_channels_out_may_differ_from_channels_in():
    model = tiny_unet(in_channels=5, out_channels=3)
    assert predict(model, noise(2, 5, 3, 6, 7), noise(2, 4, 16)).shape == (2, 3, 3, 6, 7)


def test_settings_per_level():
    model = tiny_unet(attention_head_dim=(4, 16), attention_levels=(False, True))
    assert predict(model, *inputs()).isfinite().all()
    heads = {attn.to_q.out_features // attn.heads for attn in model.modules() if isinstance(attn, Attention)}
    assert heads == {4, 16}
    assert [hasattr(block, "attentions") for block in model.down_blocks] == [False, True]


def over_time(name):
    return any(part in ("transformer_in", "temp_convs", "temp_attentions", "swap") for part in name.split("."))


def test_an_image_passes_no_layer_over_time(unet):
    called = Counter()
    hooks = [module.register_forward_hook(lambda *_, name=name: called.update([name])) for name, module in unet.named_modules()]
    try:
        image, text = inputs(frames=1)
        predict(unet, image, text)
        assert called
        assert not [name for name in called if over_time(name)]
        predict(unet, *inputs())
        assert {name for name, _ in unet.named_modules() if name.split(".")[-1] == "swap"} < set(called)
        assert [name for name in called if over_time(name)]
    finally:
        for hook in hooks:
            hook.remove()


def test_an_image_is_independent_of_all_weights_over_time(unet):
    image, text = inputs(frames=1)
    other = tiny_unet()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if over_time(name):
                parameter.mul_(7)
    assert torch.equal(predict(other, image, text), predict(unet, image, text))
    assert not torch.equal(predict(other, *inputs()), predict(unet, *inputs()))


def test_frames_of_a_video_are_seen_by_each_other(unet):
    sample, text = inputs()
    before = predict(unet, sample, text)
    sample = sample.clone()
    sample[:, :, 2] += 1
    assert (predict(unet, sample, text) - before)[:, :, 0].abs().max() > 1e-3


def test_a_clip_in_a_batch_is_the_clip_alone(unet):
    sample, text = inputs(batch=3)
    timesteps = torch.tensor([1, 500, 999])
    together = predict(unet, sample, text, timesteps)
    for place in range(3):
        row = slice(place, place + 1)
        alone = predict(unet, sample[row], text[row], timesteps[row])
        assert greatest_difference(together[row], alone) <= 1e-5
    for other in (timesteps.flip(0), 500):
        assert greatest_difference(together, predict(unet, sample, text, other)) > 1e-2


def test_every_clip_follows_its_own_text(unet):
    sample, text = inputs()
    before = predict(unet, sample, text)
    text = torch.stack([text[0], text[0]])
    after = predict(unet, sample, text)
    assert greatest_difference(after[:1], before[:1]) <= 1e-5
    assert greatest_difference(after[1:], before[1:]) > 1e-2


@pytest.mark.parametrize(
    "timestep",
    [
        float(TIMESTEP),
        torch.tensor(TIMESTEP),
        torch.tensor([TIMESTEP]),
        torch.tensor([TIMESTEP] * 2),
        torch.tensor(float(TIMESTEP)),
        torch.tensor([TIMESTEP], dtype=torch.int32),
    ],
    ids=str,
)
def test_a_time_step_in_any_form(unet, timestep):
    assert torch.equal(predict(unet, *inputs(), timestep), predict(unet, *inputs(), TIMESTEP))


def test_the_prediction_comes_as_an_output_or_a_tuple(unet):
    with torch.no_grad():
        output = unet(inputs()[0], TIMESTEP, inputs()[1])
        alone = unet(inputs()[0], TIMESTEP, inputs()[1], return_dict=False)
    assert isinstance(output, SwapUNetOutput)
    assert isinstance(alone, tuple)
    assert len(alone) == 1
    assert torch.equal(output.sample, alone[0])
    assert torch.equal(output["sample"], output[0])


def test_two_calls_give_the_same(unet):
    assert torch.equal(predict(unet, *inputs()), predict(unet, *inputs()))
    assert torch.equal(predict(tiny_unet(), *inputs()), predict(unet, *inputs()))


def test_dropout_counts_in_training_only():
    model = tiny_unet(dropout=0.5)
    assert torch.equal(predict(model, *inputs()), predict(tiny_unet(), *inputs()))
    model.train()
    assert not torch.equal(predict(model, *inputs()), predict(model, *inputs()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.1), (torch.float16, 0.02), (torch.float64, 1e-5)], ids=str)
def test_other_precisions_are_near_float32(dtype, tolerance):
    sample, text = inputs()
    expected = predict(tiny_unet(), sample, text)
    prediction = predict(tiny_unet().to(dtype), sample.to(dtype), text.to(dtype))
    assert prediction.dtype == dtype
    assert greatest_difference(prediction, expected) <= tolerance * expected.abs().max()


def settings_of(model):
    return json.loads(json.dumps({name: value for name, value in model.config.items() if not name.startswith("_")}))


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("options", "files"),
    [
        ({}, r"diffusion_pytorch_model.safetensors"),
        ({"variant": "fp16"}, "diffusion_pytorch_model.fp16.safetensors"),
        ({"max_shard_size": "500KB"}, "diffusion_pytorch_model.safetensors.index.json"),
    ],
    ids=["whole", "variant", "shards"],
)
def test_saved_and_loaded(unet, tmp_path, options, files):
    unet.save_pretrained(tmp_path, **options)
    assert (tmp_path / files).exists()
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if "max_shard_size" not in options else 4)
    loaded, info = SwapUNet.from_pretrained(tmp_path, variant=options.get("variant"), output_loading_info=True)
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


def is_in_order(weight):
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim, torch.contiguous_format)
    return weight.is_contiguous(memory_format=order)


def test_channels_last_orders_all_convolutions_and_changes_no_value(tmp_path, unet):
    unet.save_pretrained(tmp_path)
    model = SwapUNet.from_pretrained(tmp_path)
    assert not all(is_in_order(weight) for weight in model.parameters())
    assert model.to(memory_format=torch.channels_last) is model
    assert all(is_in_order(weight) for weight in model.parameters())
    assert {weight.ndim for weight in model.parameters()} == {1, 2, 4, 5}
    assert same_weights(unet, model)
    model.to(torch.float64, memory_format=torch.channels_last)
    assert model.dtype == torch.float64
    assert all(is_in_order(weight) for weight in model.parameters())
    model.to(memory_format=torch.contiguous_format)
    assert all(weight.is_contiguous() for weight in model.parameters())


def test_a_new_model_is_in_order_and_stays_so_in_other_precisions():
    model = fresh_unet()
    assert all(is_in_order(weight) for weight in model.parameters())
    assert model.to(torch.bfloat16) is model
    assert all(is_in_order(weight) for weight in model.parameters())


def test_latents_in_any_memory_order_give_the_same(unet):
    sample, text = inputs()
    other = sample.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.equal(other, sample)
    assert greatest_difference(predict(unet, other, text), predict(unet, sample, text)) <= 1e-5


def test_the_names_of_layers_that_stay_whole_are_those_of_layers(unet):
    classes = {type(module).__name__ for module in unet.modules()}
    assert set(unet._no_split_modules) <= classes
    assert set(unet._repeated_blocks) <= classes


def test_a_model_spread_over_devices_computes_the_same(unet, tmp_path):
    """Layers that stay whole, as `device_map` needs them: the finest split there is, with weights on disk between calls."""
    from accelerate import disk_offload

    spread = tiny_unet()
    disk_offload(spread, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in spread.parameters())
    assert greatest_difference(predict(spread, *inputs()), predict(unet, *inputs())) <= 1e-5


def test_weights_kept_in_eight_bits_give_nearly_the_same(unet):
    model = tiny_unet()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    by_name = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1 and "time_emb" not in name}
    assert {parameter.dtype for parameter in by_name.values()} == {torch.float8_e4m3fn}
    expected = predict(unet, *inputs())
    assert greatest_difference(predict(model, *inputs()), expected) <= 0.5 * expected.abs().max()


@pytest.mark.parametrize(
    ("sample", "text", "message"),
    [
        ((2, 4, 6, 7), (2, 5, 16), r"\(2, 4, 6, 7\).*\(batch, 4, frames, height, width\)"),
        ((2, 3, 3, 6, 7), (2, 5, 16), r"\(2, 3, 3, 6, 7\).*\(batch, 4, frames"),
        ((2, 4, 3, 1, 7), (2, 5, 16), "height 1 and width 7.*at least 2"),
        ((2, 4, 3, 6, 1), (2, 5, 16), "height 6 and width 1.*at least 2"),
        ((2, 4, 3, 6, 7), (2, 5, 24), r"\(2, 5, 24\).*\(2, 'tokens', 16\)"),
        ((2, 4, 3, 6, 7), (3, 5, 16), r"\(3, 5, 16\).*\(2, 'tokens', 16\)"),
        ((2, 4, 3, 6, 7), (5, 16), r"\(5, 16\).*\(2, 'tokens', 16\)"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(unet, sample, text, message):
    with pytest.raises(ValueError, match=message):
        predict(unet, noise(*sample), noise(*text))


def test_time_steps_that_do_not_fit_are_an_error(unet):
    with pytest.raises(ValueError, match=r"\(3,\); one is wanted, or one for each of 2 clips"):
        predict(unet, *inputs(), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention_levels": (True,)}, r"attention_levels = \(True,\) has 1 levels, block_out_channels = \(16, 32\) has 2"),
        ({"attention_head_dim": (8, 8, 8)}, r"attention_head_dim = \[8, 8, 8\] has 3 levels, .* has 2"),
        ({"swap_windows": ((4, 4, 4),)}, r"swap_windows = \(\(4, 4, 4\),\) has 1 levels, .* has 2"),
        ({"interaction": "swapped"}, "interaction = 'swapped'.*is 'swap'"),
        ({"norm_num_groups": 5}, r"norm_num_groups = 5 does not divide 16 of block_out_channels = \(16, 32\)"),
        ({"attention_head_dim": (8, 12)}, r"attention_head_dim = 12 does not divide 32 of block_out_channels = \(16, 32\)"),
        ({"swap_windows": ((4, 4, 4), (4, 4))}, r"window of swap_windows is \(4, 4\); three numbers"),
        ({"swap_windows": ((4, 0, 4), (4, 4, 4))}, r"window of swap_windows is \(4, 0, 4\).*at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_errors(settings, message):
    with pytest.raises(ValueError, match=message):
        fresh_unet(**settings)


def test_importing_the_package_alone_imports_nothing_heavy():
    program = "import sys, videofactory.model; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'videofactory'" in loaded
    assert not [name for name in ("torch", "diffusers", "transformers", "numpy", "av", "ray") if f"'{name}'" in loaded]
