"""Training the U-Net: gradients, checkpointing, compiling, adapters, moving averages, and a small batch learned by heart."""

import copy
from collections import Counter

import peft
import pytest
import torch
from diffusers.training_utils import EMAModel
from torch._decomp import get_decompositions
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.debugging import boxed_nop
from torch._dynamo.utils import counters
from torch.nn import functional

from videofactory.model.unet import SwapUNet

from .tiny_unets import fresh_unet, greatest_difference, inputs, noise, predict, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

# Compiling takes its time for every layer, so here are few.
SHORT = {"block_out_channels": (16,), "attention_levels": (True,), "swap_windows": ((2, 4, 4),)}
# "aot_eager" for gradients. By itself it believes that the gradient of a group norm on a CPU lies in memory as its input did, and
# fails; Inductor takes that operation apart, and so does this.
TRAINING_BACKEND = aot_autograd(
    fw_compiler=boxed_nop, decompositions=get_decompositions([torch.ops.aten.native_group_norm_backward])
)
LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0"]}


@pytest.fixture
def compiler():
    """A compiler that remembers nothing, and whose settings are as they were when the test is over."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch():
        yield torch._dynamo
    torch._dynamo.reset()


def loss_of(unet, frames=3):
    sample, text = inputs(frames=frames)
    return functional.mse_loss(unet(sample, torch.tensor([3, 700]), text).sample, noise(*sample.shape, seed=5))


def gradients_of(unet, frames=3):
    unet.zero_grad()
    loss = loss_of(unet, frames)
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in unet.named_parameters()}


def check_equal(found, expected):
    assert abs(found[0] - expected[0]) <= 1e-5
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert greatest_difference(found[1][name], gradient) <= 5e-5, name


def test_every_parameter_learns_from_a_video():
    unet = fresh_unet().train()
    _, gradients = gradients_of(unet)
    waiting = {name for name, gradient in gradients.items() if not gradient.any()}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
    # What is before a zero learns from the second step on, and the zeros themselves from the first.
    assert waiting
    assert all(any(part in name for part in (".swap.", "transformer_in", "temp_convs", "temp_attentions")) for name in waiting)
    ends = [name for name, parameter in unet.named_parameters() if parameter.ndim > 1 and not parameter.any()]
    assert any(name.endswith("swap.attn.to_out.0.weight") for name in ends)
    assert not waiting & set(ends)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    optimizer.step()
    _, gradients = gradients_of(unet)
    assert not [name for name, gradient in gradients.items() if not gradient.any()]
    assert all(parameter.isfinite().all() for parameter in unet.parameters())


def test_an_image_teaches_the_layers_of_images_only():
    unet = tiny_unet()
    loss_of(unet, frames=1).backward()
    learned = {name for name, parameter in unet.named_parameters() if parameter.grad is not None and parameter.grad.any()}
    over_time = {
        name
        for name, _ in unet.named_parameters()
        if any(part in name for part in (".swap.", "transformer_in.", ".temp_convs.", ".temp_attentions."))
    }
    assert learned == {name for name, _ in unet.named_parameters()} - over_time


@pytest.mark.parametrize("interaction", ["swap", "joint_window", "none"])
def test_a_small_batch_is_learned_by_heart(interaction):
    unet = fresh_unet(interaction=interaction).train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        loss = loss_of(unet)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_swap_attention_alone_can_learn():
    """Everything else held still, its zero weight and what stands before it lower the loss."""
    unet = tiny_unet()
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(".swap." in name)
            if name.endswith("swap.attn.to_out.0.weight"):
                parameter.zero_()
    optimizer = torch.optim.AdamW([parameter for parameter in unet.parameters() if parameter.requires_grad], lr=1e-2)
    first = loss_of(unet).item()
    for _ in range(15):
        optimizer.zero_grad()
        loss_of(unet).backward()
        optimizer.step()
    assert loss_of(unet).item() < 0.8 * first


def test_mixed_precision_learns_nearly_the_same():
    unet = tiny_unet()
    expected, _ = gradients_of(unet)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = loss_of(unet)
    assert abs(loss - expected) <= 0.05 * expected
    loss.backward()
    assert {parameter.grad.dtype for parameter in unet.parameters()} == {torch.float32}
    assert all(parameter.grad.isfinite().all() for parameter in unet.parameters())


def count_calls(unet):
    """How often every layer that checkpointing keeps whole is entered, by name."""
    calls = Counter()
    for name, module in unet.named_modules():
        if type(module).__name__ in unet._repeated_blocks and name != "transformer_in":
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


@pytest.mark.parametrize("frames", [1, 3])
def test_gradient_checkpointing_changes_memory_only(frames):
    unet = tiny_unet().train()
    if frames == 1:
        for name, parameter in unet.named_parameters():
            parameter.requires_grad_(not any(part in name for part in (".swap.", "transformer_in", "temp_convs", "temp_att")))
    calls = count_calls(unet)

    def step():
        calls.clear()
        unet.zero_grad()
        loss = loss_of(unet, frames)
        loss.backward()
        return loss.detach(), {name: weight.grad.clone() for name, weight in unet.named_parameters() if weight.requires_grad}

    expected = step()
    layers = set(calls)
    assert layers
    assert set(calls.values()) == {1}
    unet.enable_gradient_checkpointing()
    assert unet.is_gradient_checkpointing
    found = step()
    check_equal(found, expected)
    assert calls == dict.fromkeys(layers, 2)
    unet.disable_gradient_checkpointing()
    check_equal(step(), expected)
    assert set(calls.values()) == {1}


def test_gradient_checkpointing_keeps_less():
    unet, kept = tiny_unet(layers_per_block=2), []
    for on in (False, True):
        if on:
            unet.enable_gradient_checkpointing()
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor, sizes=sizes: (
                sizes.update({tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()}),
                tensor,
            )[1],
            lambda tensor: tensor,
        ):
            loss_of(unet)
        weights = {parameter.untyped_storage().data_ptr() for parameter in unet.parameters()}
        kept.append(sum(size for place, size in sizes.items() if place not in weights))
    assert kept[1] < 0.6 * kept[0]


def test_gradient_checkpointing_does_nothing_without_gradients():
    unet = tiny_unet()
    expected = predict(unet, *inputs())
    unet.enable_gradient_checkpointing()
    calls = count_calls(unet)
    assert torch.equal(predict(unet, *inputs()), expected)
    assert set(calls.values()) == {1}


def test_gradient_checkpointing_with_dropout_repeats_the_same_dropout():
    unet = tiny_unet(dropout=0.3).train()
    results = []
    for _ in range(2):
        torch.manual_seed(4)
        results.append(gradients_of(unet))
        unet.enable_gradient_checkpointing()
    check_equal(results[1], results[0])


def test_the_whole_model_compiles_to_one_graph(compiler):
    unet = tiny_unet(swap_windows=((2, 4, 3), (2, 2, 2)))
    sample, text = inputs()
    expected = [predict(unet, sample, text, torch.tensor(step)) for step in (3, 700)]
    compiled = torch.compile(unet, fullgraph=True, backend="aot_eager")
    assert greatest_difference(predict(compiled, sample, text, torch.tensor(3)), expected[0]) <= 1e-5
    with compiler.config.patch(error_on_recompile=True):
        assert greatest_difference(predict(compiled, sample, text, torch.tensor(700)), expected[1]) <= 1e-5
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_time_step_as_a_number_compiles_too(compiler):
    unet = tiny_unet(**SHORT)
    compiled = torch.compile(unet, fullgraph=True, backend="eager")
    for step in (3, 700, 12.5):
        assert greatest_difference(predict(compiled, *inputs(), step), predict(unet, *inputs(), step)) <= 1e-5
    assert not counters["graph_break"]


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_training_compiles_to_one_graph(compiler, checkpointing):
    unet = tiny_unet(**SHORT).train()
    expected = gradients_of(unet)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    unet.compile(fullgraph=True, backend=TRAINING_BACKEND)
    check_equal(gradients_of(unet), expected)
    with compiler.config.patch(error_on_recompile=True):
        check_equal(gradients_of(unet), expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_layers_of_equal_shape_share_a_compiled_graph(compiler):
    unet = tiny_unet(**SHORT, layers_per_block=3)
    expected = predict(unet, *inputs())
    layers = sum(type(module).__name__ in unet._repeated_blocks for module in unet.modules())
    unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    assert greatest_difference(predict(unet, *inputs()), expected) <= 1e-5
    with compiler.config.patch(error_on_recompile=True):
        predict(unet, *inputs())
    graphs = counters["stats"]["unique_graphs"]
    assert len(unet._repeated_blocks) <= graphs <= layers / 3
    assert not counters["graph_break"]


def test_compiled_layers_train_with_checkpointing(compiler):
    unet = tiny_unet(**SHORT)
    expected = gradients_of(unet)
    unet.enable_gradient_checkpointing()
    unet.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    check_equal(gradients_of(unet), expected)
    assert not counters["graph_break"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_inductor_computes_the_same(compiler):
    unet = tiny_unet(**SHORT)
    expected = gradients_of(unet)
    unet.compile(fullgraph=True)
    check_equal(gradients_of(unet), expected)


def test_an_adapter_trains_alone_and_goes_again(tmp_path):
    unet = tiny_unet()
    expected = predict(unet, *inputs())
    weights = {name: weight.clone() for name, weight in unet.state_dict().items()}
    attentions = len(unet.attn_processors)
    unet.requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(**LORA))
    assert greatest_difference(predict(unet, *inputs()), expected) <= 1e-6
    trained = {name for name, parameter in unet.named_parameters() if parameter.requires_grad}
    assert len(trained) == 2 * 4 * attentions
    assert all("lora_" in name for name in trained)
    optimizer = torch.optim.AdamW([parameter for parameter in unet.parameters() if parameter.requires_grad], lr=1e-2)
    first = loss_of(unet).item()
    for _ in range(5):
        optimizer.zero_grad()
        loss_of(unet).backward()
        optimizer.step()
    assert loss_of(unet).item() < first
    adapted = predict(unet, *inputs())
    assert greatest_difference(adapted, expected) > 1e-2

    unet.save_lora_adapter(tmp_path)
    other = tiny_unet()
    other.load_lora_adapter(tmp_path, prefix=None, use_safetensors=True)
    assert greatest_difference(predict(other, *inputs()), adapted) <= 1e-5
    unet.disable_adapters()
    assert greatest_difference(predict(unet, *inputs()), expected) <= 1e-6
    unet.enable_adapters()
    assert greatest_difference(predict(unet, *inputs()), adapted) <= 1e-6
    unet.delete_adapters("default")
    assert greatest_difference(predict(unet, *inputs()), expected) <= 1e-6
    unet.unload_lora()
    assert all(torch.equal(weight, weights[name]) for name, weight in unet.state_dict().items())
    assert unet.state_dict().keys() == weights.keys()


def test_an_adapter_is_fused_and_follows_its_scale():
    unet = tiny_unet()
    expected = predict(unet, *inputs())
    unet.add_adapter(peft.LoraConfig(**LORA))
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * noise(*parameter.shape))
    adapted = predict(unet, *inputs())
    assert greatest_difference(adapted, expected) > 1e-2
    unet.set_adapters("default", 0.0)
    assert greatest_difference(predict(unet, *inputs()), expected) <= 1e-6
    unet.set_adapters("default", 1.0)
    unet.fuse_lora()
    assert greatest_difference(predict(unet, *inputs()), adapted) <= 1e-4
    unet.unfuse_lora()
    assert greatest_difference(predict(unet, *inputs()), adapted) <= 1e-4


def test_a_moving_average_follows_is_saved_and_loaded(tmp_path):
    unet = fresh_unet().train()
    average = EMAModel(unet.parameters(), decay=0.75, model_cls=SwapUNet, model_config=unet.config)
    before = [parameter.clone() for parameter in unet.parameters()]
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-2)
    for _ in range(2):
        loss_of(unet).backward()
        optimizer.step()
        average.step(unet.parameters())
    last = [parameter.clone() for parameter in unet.parameters()]
    between = zip(before, average.shadow_params, last, strict=True)
    assert all(not torch.equal(shadow, new) and not torch.equal(shadow, old) for old, shadow, new in between)

    average.save_pretrained(tmp_path)
    again = EMAModel.from_pretrained(tmp_path, model_cls=SwapUNet)
    assert (again.decay, again.optimization_step) == (0.75, 2)
    assert all(torch.equal(*pair) for pair in zip(again.shadow_params, average.shadow_params, strict=True))
    loaded = SwapUNet.from_pretrained(tmp_path)
    average.store(unet.parameters())
    average.copy_to(unet.parameters())
    assert greatest_difference(predict(loaded, *inputs()), predict(unet.eval(), *inputs())) <= 1e-5
    average.restore(unet.parameters())
    assert all(torch.equal(*pair) for pair in zip(unet.parameters(), last, strict=True))


def test_a_copy_is_a_model_of_its_own():
    unet = tiny_unet()
    other = copy.deepcopy(unet)
    expected = predict(unet, *inputs())
    gradients_of(other)
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert torch.equal(predict(unet, *inputs()), expected)
    assert not torch.equal(predict(other, *inputs()), expected)
