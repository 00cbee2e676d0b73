"""The U-Net as a whole: sizes, images, batches, precision, memory order."""

import subprocess
import sys
from collections import Counter

import pytest
import torch
from diffusers import UNet3DConditionModel
from diffusers.models.attention_processor import Attention

from videofactory.model.attention import INTERACTIONS
from videofactory.model.mixin import order_loaded
from videofactory.model.unet import SwapUNet, SwapUNetOutput

from .tiny_unets import NARROW, TIMESTEP, fresh_unet, greatest_difference, inputs, noise, predict, randomise, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")


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


def same_weights(one, other):
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def is_in_order(weight):
    order = {4: torch.channels_last, 5: torch.channels_last_3d}.get(weight.ndim, torch.contiguous_format)
    return weight.is_contiguous(memory_format=order)


def test_channels_last_orders_all_convolutions_and_changes_no_value(unet):
    model = tiny_unet().to(memory_format=torch.contiguous_format)
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


@pytest.mark.parametrize("low", [True, False])
@pytest.mark.parametrize("options", [{}, {"torch_dtype": torch.bfloat16}, {"interaction": "global"}], ids=str)
def test_a_loaded_model_is_in_order_and_has_the_saved_values(tmp_path, unet, options, low):
    unet.save_pretrained(tmp_path)
    model = SwapUNet.from_pretrained(tmp_path, low_cpu_mem_usage=low, **options)
    assert all(is_in_order(weight) for weight in model.parameters())
    assert same_weights(tiny_unet().to(model.dtype), model)


def test_weights_without_memory_or_of_another_kind_keep_their_order():
    class Quantized(torch.nn.Parameter):
        pass

    model = fresh_unet().to(memory_format=torch.contiguous_format)
    model.conv_in.weight = Quantized(model.conv_in.weight.detach())
    model.conv_out.weight = torch.nn.Parameter(model.conv_out.weight.detach().to(torch.int8), requires_grad=False)
    model.mid_block.resnets[0].conv1.to("meta")
    order_loaded(model)
    assert {name for name, weight in model.named_parameters() if not is_in_order(weight)} == {
        "conv_in.weight",
        "conv_out.weight",
        "mid_block.resnets.0.conv1.weight",
    }
    assert type(model.conv_in.weight) is Quantized


def test_latents_in_any_memory_order_give_the_same(unet):
    sample, text = inputs()
    other = sample.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)
    assert torch.equal(other, sample)
    assert greatest_difference(predict(unet, other, text), predict(unet, sample, text)) <= 1e-5


def test_the_names_of_layers_that_stay_whole_are_those_of_layers(unet):
    classes = {type(module).__name__ for module in unet.modules()}
    assert set(unet._no_split_modules) <= classes
    assert set(unet._repeated_blocks) <= classes


def test_importing_the_package_alone_imports_nothing_heavy():
    program = "import sys, videofactory.model; print(sorted({name.partition('.')[0] for name in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "'videofactory'" in loaded
    assert not [name for name in ("torch", "diffusers", "transformers", "numpy", "av", "ray") if f"'{name}'" in loaded]
