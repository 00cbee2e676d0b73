"""Windows, swap attention against its formula in float64, the order of roles, and the processor that all attention runs on."""

import itertools
import math
from collections import Counter

import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.attention_processor import Attention
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from videofactory.model.attention import (
    INTERACTIONS,
    SwapAttention,
    TimeAttnProcessor,
    VideoAttnProcessor,
    fit_windows,
    from_windows,
    make_attention,
    roles,
    to_windows,
)
from videofactory.model.unet import SwapUNet

from .tiny_unets import NARROW, greatest_difference, inputs, noise, predict, randomise, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = [
    ((1, 16, 24, 40), (16, 8, 11)),
    ((1, 16, 24, 44), (16, 8, 11)),
    ((2, 16, 24, 43), (16, 8, 11)),
    ((1, 16, 12, 22), (16, 6, 11)),
    ((1, 16, 6, 11), (16, 6, 11)),
    ((2, 16, 3, 6), (16, 3, 6)),
    ((2, 1, 1, 1), (16, 8, 11)),
    ((1, 7, 13, 17), (3, 5, 4)),
    ((1, 5, 11, 19), (16, 2, 1)),
    *(((1, frames, 3, 4), (16, 2, 2)) for frames in range(1, 34)),
]


def positions(shape):
    """A video (B, F, H, W, 1) that holds the number of every position, from 0."""
    return torch.arange(math.prod(shape)).view(*shape, 1)


def starts(size, largest):
    """Where the windows of an axis begin and how long they are, written down independently of the module."""
    count = -(-size // largest)
    length = -(-size // count)
    return [min(number * length, size - length) for number in range(count)], length


def boxes(shape, window):
    """The windows of a video (F, H, W) in their order, each as three slices."""
    axes = [starts(size, largest) for size, largest in zip(shape, window, strict=True)]
    sides = [[slice(start, start + length) for start in begin] for begin, length in axes]
    return list(itertools.product(*sides))


@given(size=st.integers(1, 200), largest=st.integers(1, 64))
def test_windows_are_the_fewest_and_the_shortest(size, largest):
    count, length = fit_windows(size, largest)
    assert length <= largest
    assert (count - 1) * largest < size <= count * largest
    assert (length - 1) * count < size <= length * count


def test_the_model_s_own_axes_are_cut_as_documented():
    assert [fit_windows(size, largest) for size, largest in ((24, 8), (40, 11), (44, 11), (43, 11))] == [
        (3, 8),
        (4, 10),
        (4, 11),
        (4, 11),
    ]


@pytest.mark.parametrize(("shape", "window"), SHAPES)
def test_windows_are_boxes_and_go_back_to_their_places(shape, window):
    check_windows(shape, window)


@settings(deadline=None, max_examples=150)
@given(shape=st.tuples(st.integers(1, 2), *[st.integers(1, 13)] * 3), window=st.tuples(*[st.integers(1, 6)] * 3))
def test_windows_of_any_size_are_boxes_and_go_back_to_their_places(shape, window):
    check_windows(shape, window)


def check_windows(shape, window):
    video = positions(shape)
    windows = to_windows(video, window)
    expected = torch.stack([clip[box].reshape(-1, 1) for clip in video for box in boxes(shape[1:], window)])
    assert torch.equal(windows, expected)
    assert torch.equal(from_windows(windows, window, shape), video)
    # Where windows overlap, exactly one of them gives a position its value: the first.
    number = torch.arange(len(windows))[:, None, None].expand_as(windows)
    first = torch.full((math.prod(shape),), len(windows)).scatter_reduce(0, windows.flatten(), number.flatten(), "amin")
    assert torch.equal(from_windows(number, window, shape).flatten(), first)


def test_windows_pass_gradients_to_every_position_once():
    video = noise(2, 5, 7, 9, 3).requires_grad_()
    weights = noise(2, 5, 7, 9, 3, seed=1)
    (from_windows(to_windows(video, (2, 3, 4)), (2, 3, 4), (2, 5, 7, 9)) * weights).sum().backward()
    assert torch.equal(video.grad, weights)


def swap_layer(interaction="swap", depth=0, window=(2, 4, 3), channels=16):
    return randomise(SwapAttention(channels, 8, depth, window, interaction), seed=depth)


def layer_norm(tokens, norm):
    centred = tokens - tokens.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight.double() + norm.bias.double()


def plain_attention(attn, query, context):
    """Multi-head attention of (S, C) to (T, C), head by head in float64; the output projection included."""
    q, k, v = (
        tokens @ project.weight.double().T for tokens, project in ((query, attn.to_q), (context, attn.to_k), (context, attn.to_v))
    )
    heads = []
    for part in torch.arange(q.shape[-1]).chunk(attn.heads):
        scores = q[:, part] @ k[:, part].T / math.sqrt(len(part))
        weights = (scores - scores.max(-1, keepdim=True).values).exp()
        heads.append(weights / weights.sum(-1, keepdim=True) @ v[:, part])
    projection = attn.to_out[0]
    projected = torch.cat(heads, -1) @ projection.weight.double().T
    return projected if projection.bias is None else projected + projection.bias.double()


def swap_formula(layer, query_video, context_video, temporal, window):
    """out = y + W0 Attention(q = LN(query), kv = LN(context)) in float64, one window after the other."""
    out = temporal.double().clone()
    for clip in range(len(out)):
        done = torch.zeros(out.shape[1:4], dtype=torch.bool)
        for box in boxes(out.shape[1:4], window):
            query = layer_norm(query_video[clip][box].double(), layer.norm_query)
            context = layer_norm(context_video[clip][box].double(), layer.norm_context)
            attended = plain_attention(layer.attn, query.flatten(0, 2), context.flatten(0, 2)).view_as(query)
            fresh = ~done[box].unsqueeze(-1)
            out[clip][box] += attended * fresh
            done[box] = True
    return out


@pytest.mark.parametrize(
    ("shape", "window"), [((2, 3, 6, 7), (2, 4, 3)), ((1, 2, 24, 43), (16, 8, 11)), ((2, 1, 1, 2), (4, 4, 4))]
)
@pytest.mark.parametrize(
    ("interaction", "depth", "query", "context"),
    [
        ("swap", 0, "spatial", "temporal"),
        ("swap", 1, "temporal", "spatial"),
        ("spatial_query", 1, "spatial", "temporal"),
        ("temporal_query", 0, "temporal", "spatial"),
        ("joint_window", 0, "temporal", "temporal"),
        ("global", 1, "temporal", "temporal"),
    ],
)
def test_swap_attention_is_its_formula(shape, window, interaction, depth, query, context):
    layer = swap_layer(interaction, depth, window)
    features = {"spatial": noise(*shape, 16, seed=1), "temporal": 3 * noise(*shape, 16, seed=2) + 1}
    whole = shape[1:] if interaction == "global" else window
    with torch.no_grad():
        out = layer(features["spatial"], features["temporal"])
        expected = swap_formula(layer, features[query], features[context], features["temporal"], whole)
    assert greatest_difference(out, expected) <= 1e-5
    assert greatest_difference(out, features["temporal"]) > 0.1


def test_the_gradients_of_swap_attention_are_those_of_its_formula():
    layer = swap_layer(depth=1).double()
    spatial, temporal = (noise(1, 3, 6, 7, 16, seed=seed).double().requires_grad_() for seed in (1, 2))
    weights = noise(1, 3, 6, 7, 16, seed=3).double()
    wanted = [spatial, temporal, *layer.parameters()]
    found = torch.autograd.grad((layer(spatial, temporal) * weights).sum(), wanted)
    formula = swap_formula(layer, temporal, spatial, temporal, (2, 4, 3))
    expected = torch.autograd.grad((formula * weights).sum(), wanted)
    for one, other in zip(found, expected, strict=True):
        assert greatest_difference(one, other) <= 1e-10


@pytest.mark.parametrize("changed", ["spatial", "temporal"])
@pytest.mark.parametrize("depth", [0, 1])
@pytest.mark.parametrize("place", [(0, 0, 0), (2, 5, 4), (1, 3, 6)])
def test_a_token_changes_its_own_windows_and_no_other(changed, depth, place):
    layer, window = swap_layer(depth=depth), (2, 4, 3)
    features = {"spatial": noise(2, 3, 6, 7, 16, seed=1), "temporal": noise(2, 3, 6, 7, 16, seed=2)}
    is_query = changed == roles("swap", depth)[0]
    with torch.no_grad():
        before = layer(**{f"{name}_BFHWC": video for name, video in features.items()})
        features[changed] = features[changed].clone()
        features[changed][1][place] += noise(16, seed=3)
        after = layer(**{f"{name}_BFHWC": video for name, video in features.items()})
    reached = torch.zeros(3, 6, 7, dtype=torch.bool)
    if is_query:
        reached[place] = True
    else:
        taken = torch.zeros(3, 6, 7, dtype=torch.bool)
        for box in boxes((3, 6, 7), window):
            inside = torch.zeros(3, 6, 7, dtype=torch.bool)
            inside[box] = True
            if inside[place]:
                reached |= inside & ~taken
            taken |= inside
        assert 1 < reached.sum() < reached.numel()
        reached[place] = True
    different = (before != after).any(-1)
    assert not different[0].any()
    assert torch.equal(different[1], reached)


def test_a_query_outside_its_windows_does_not_reach_across_clips_or_frames():
    layer = swap_layer(window=(1, 4, 4))
    spatial, temporal = noise(1, 4, 4, 4, 16, seed=1), noise(1, 4, 4, 4, 16, seed=2)
    with torch.no_grad():
        whole = layer(spatial, temporal)
        for frame in range(4):
            alone = layer(spatial[:, frame : frame + 1], temporal[:, frame : frame + 1])
            assert greatest_difference(whole[:, frame : frame + 1], alone) <= 1e-6


def test_a_new_swap_layer_changes_nothing():
    layer = SwapAttention(16, 8, 0, (2, 4, 3))
    temporal = noise(2, 3, 6, 7, 16, seed=2)
    assert torch.equal(layer(noise(2, 3, 6, 7, 16, seed=1), temporal), temporal)


def query_roles(unet):
    blocks = [*unet.down_blocks, unet.mid_block, *unet.up_blocks]
    return [(block.swap.query_role, block.swap.context_role) for block in blocks]


def test_roles_swap_from_block_to_block_over_the_whole_u_net():
    there, back = ("spatial", "temporal"), ("temporal", "spatial")
    wanted = {
        "swap": [there, back] * 4 + [there],
        "spatial_query": [there] * 9,
        "temporal_query": [back] * 9,
        "joint_window": [("temporal", "temporal")] * 9,
        "global": [("temporal", "temporal")] * 9,
    }
    assert {*wanted, "none"} == set(INTERACTIONS)
    for interaction, expected in wanted.items():
        with torch.device("meta"):
            unet = SwapUNet(**NARROW, interaction=interaction)
        assert query_roles(unet) == expected
        assert len([name for name, _ in unet.named_modules() if name.endswith(".swap")]) == 9


def test_the_last_spatial_and_the_last_temporal_features_of_a_block_meet():
    unet = tiny_unet(layers_per_block=2)
    seen, outputs = {}, {}
    for name, module in unet.named_modules():
        if name.endswith(".swap"):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args}))
        elif name.count(".") >= 2 and name.split(".")[-2] in ("resnets", "temp_convs", "attentions", "temp_attentions"):
            module.register_forward_hook(lambda _, args, output, name=name: outputs.update({name: output}))
    predict(unet, *inputs())
    last = {
        "down_blocks.0": ("attentions.1", "temp_attentions.1"),
        "down_blocks.1": ("resnets.1", "temp_convs.1"),
        "mid_block": ("resnets.1", "temp_convs.1"),
        "up_blocks.0": ("resnets.2", "temp_convs.2"),
        "up_blocks.1": ("attentions.2", "temp_attentions.2"),
    }
    assert set(seen) == {f"{block}.swap" for block in last}
    for block, (spatial, temporal) in last.items():
        assert seen[f"{block}.swap"][0] is outputs[f"{block}.{spatial}"]
        assert seen[f"{block}.swap"][1] is outputs[f"{block}.{temporal}"]


class Kernels(TorchDispatchMode):
    """Counts operations; PyTorch's usual attention on a CPU is one of its own, the plain formula takes a softmax."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))

    @property
    def fused(self):
        return self.calls["_scaled_dot_product_flash_attention_for_cpu"]

    @property
    def plain(self):
        return self.calls["_softmax"] + self.calls["_safe_softmax"]


def count_kernels(unet):
    with Kernels() as kernels:
        out = predict(unet, *inputs())
    return out, kernels.fused, kernels.plain


def attention_layers(unet):
    return [module for module in unet.modules() if isinstance(module, Attention)]


def test_the_chosen_backend_reaches_every_attention_layer():
    unet = tiny_unet()
    layers = len(attention_layers(unet))
    assert layers >= 20
    usual, *counts = count_kernels(unet)
    assert counts == [layers, 0]
    with attention_backend():  # diffusers makes the chosen backend that of the whole process, too; this takes it back
        unet.set_attention_backend("_native_math")
        plain, *counts = count_kernels(unet)
    assert counts == [0, layers]
    assert greatest_difference(usual, plain) <= 1e-5
    assert count_kernels(unet)[1:] == (0, layers)
    unet.reset_attention_backend()
    again, *counts = count_kernels(unet)
    assert counts == [layers, 0]
    assert torch.equal(again, usual)
    with attention_backend("_native_math"):
        assert count_kernels(unet)[1:] == (0, layers)
    assert count_kernels(unet)[1:] == (layers, 0)


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ValueError, match="fastest"):
        tiny_unet().set_attention_backend("fastest")


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_every_attention_layer_has_our_processor_of_its_own(interaction):
    unet = tiny_unet(interaction=interaction)
    processors = unet.attn_processors
    assert len(processors) == len(attention_layers(unet)) == len({id(processor) for processor in processors.values()})
    for name, processor in processors.items():
        over_time = "temp_attentions" in name or "transformer_in" in name
        assert type(processor) is (TimeAttnProcessor if over_time else VideoAttnProcessor), name


def test_more_sequences_than_a_kernel_takes_give_the_same_result():
    unet = tiny_unet()
    whole, calls, _ = count_kernels(unet)
    for processor in unet.attn_processors.values():
        processor.most_sequences = 5
    chunked, more_calls, _ = count_kernels(unet)
    assert more_calls > 2 * calls
    assert greatest_difference(whole, chunked) <= 1e-6


@pytest.mark.parametrize("processor", [VideoAttnProcessor, TimeAttnProcessor])
def test_chunks_have_the_gradients_of_the_whole(processor):
    hidden, weights = noise(3, 4, 7, 16), noise(3, 4, 7, 16, seed=1)
    if processor is VideoAttnProcessor:
        hidden, weights = hidden.flatten(0, 1), weights.flatten(0, 1)
    gradients = []
    for most in (65_535, 5, 1):
        attn = randomise(make_attention(16, 8, processor=processor(most)))
        given_hidden = hidden.clone().requires_grad_()
        gradients.append(torch.autograd.grad((attn(given_hidden) * weights).sum(), [given_hidden, *attn.parameters()]))
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            assert greatest_difference(one, two) <= 1e-5


def test_a_mask_is_refused():
    attn = make_attention(16, 8)
    with pytest.raises(ValueError, match=r"\(2, 5, 5\)"):
        attn(noise(2, 5, 16), attention_mask=torch.zeros(2, 5, 5))


@pytest.mark.parametrize("frames", [1, 2, 16, 33])
def test_attention_over_time_sees_the_frames_of_one_position(frames):
    attn = randomise(make_attention(16, 8, processor=TimeAttnProcessor()))
    hidden = noise(2, frames, 6, 16)
    with torch.no_grad():
        out = attn(hidden)
        for clip, position in itertools.product(range(2), range(6)):
            sequence = hidden[clip, :, position].double()
            assert greatest_difference(out[clip, :, position], plain_attention(attn, sequence, sequence)) <= 1e-5


def test_attention_to_a_text_is_its_formula():
    attn = randomise(make_attention(16, 8, 24))
    hidden, text = noise(3, 7, 16), noise(3, 5, 24, seed=1)
    with torch.no_grad():
        out = attn(hidden, text)
        for clip in range(3):
            assert greatest_difference(out[clip], plain_attention(attn, hidden[clip].double(), text[clip].double())) <= 1e-5
