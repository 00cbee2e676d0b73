"""What diffusers offers on every model: it works here and changes nothing, or is refused with the way that works."""

import logging

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload
from diffusers import ContextParallelConfig
from diffusers.models.attention_processor import AttnProcessor2_0

from videofactory.model.attention import TimeAttnProcessor, VideoAttnProcessor

from .tiny_unets import greatest_difference, inputs, noise, predict, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def unet():
    """Shared; tests that change anything of it make their own."""
    return tiny_unet()


@pytest.fixture(scope="module")
def expected(unet):
    return predict(unet, *inputs())


def test_a_model_spread_over_devices_computes_the_same(expected, tmp_path):
    """Layers that stay whole, as `device_map` needs them: the finest split there is, with weights on disk between calls."""
    spread = tiny_unet()
    disk_offload(spread, tmp_path, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in spread.parameters())
    assert greatest_difference(predict(spread, *inputs()), expected) <= 1e-5


def test_a_model_kept_in_memory_computes_the_same(expected):
    """What moves weights to a GPU for the time of each layer, here with the processor in its place."""
    offloaded = tiny_unet()
    cpu_offload(offloaded, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in offloaded.parameters())
    for _ in range(2):
        assert torch.equal(predict(offloaded, *inputs()), expected)
    assert all(parameter.is_meta for parameter in offloaded.parameters())


def is_near(found, expected):
    """Whether a prediction is the expected one but for the rounding of weights to eight bits, in direction and in size."""
    correlation = torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1]
    return bool(correlation >= 0.97 and (found - expected).norm() <= 0.25 * expected.norm())


def test_weights_kept_in_eight_bits_give_nearly_the_same(expected):
    model = tiny_unet()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    by_name = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1 and "time_emb" not in name}
    assert {parameter.dtype for parameter in by_name.values()} == {torch.float8_e4m3fn}
    assert is_near(predict(model, *inputs()), expected)


def test_what_is_near_is_nothing_else(expected):
    """Results that the test above must not take for right; most of them are within half the largest value."""
    order = torch.randperm(expected.numel(), generator=torch.Generator().manual_seed(0))
    wrong = {
        "zeros": torch.zeros_like(expected),
        "shuffled": expected.flatten()[order].view_as(expected),
        "half as large": 0.5 * expected,
        "frames reversed": expected.flip(2),
        "clips exchanged": expected.flip(0),
        "another model": predict(tiny_unet(seed=1), *inputs()),
    }
    assert is_near(expected, expected)
    assert not [name for name, found in wrong.items() if is_near(found, expected)]


@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_groups_of_layers_are_moved_from_memory_or_disk(expected, tmp_path, kind, disk):
    model = tiny_unet()
    where = {"offload_to_disk_path": str(tmp_path)} if disk else {}
    model.enable_group_offload(torch.device("cpu"), offload_type=kind, num_blocks_per_group=1, **where)
    assert greatest_difference(predict(model, *inputs()), expected) <= 1e-5
    assert bool(list(tmp_path.iterdir())) == disk


REFUSED = {
    "enable_xformers_memory_efficient_attention": r"set_attention_backend\('xformers'\)",
    "enable_npu_flash_attention": r"set_attention_backend\('_native_npu'\)",
    "enable_xla_flash_attention": r"set_attention_backend\('_native_xla'\)",
    "fuse_qkv_projections": "query, key and value apart",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_replace_the_processors_is_refused_and_changes_nothing(expected, name):
    model = tiny_unet()
    with pytest.raises(NotImplementedError, match=REFUSED[name]):
        getattr(model, name)()
    assert torch.equal(predict(model, *inputs()), expected)


@pytest.mark.parametrize(
    "name",
    [
        "disable_xformers_memory_efficient_attention",
        "disable_npu_flash_attention",
        "disable_xla_flash_attention",
        "unfuse_qkv_projections",
    ],
)
def test_what_was_never_on_can_be_turned_off(expected, name):
    model = tiny_unet()
    getattr(model, name)()
    assert torch.equal(predict(model, *inputs()), expected)


def test_parallelism_within_a_clip_is_refused_before_anything_changes(expected):
    model = tiny_unet()
    with pytest.raises(NotImplementedError, match="DistributedDataParallel"):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=2))
    assert torch.equal(predict(model, *inputs()), expected)


def test_processors_are_set_by_name(expected):
    class Counting(VideoAttnProcessor):
        calls = 0

        def __call__(self, *arguments, **options):
            Counting.calls += 1
            return super().__call__(*arguments, **options)

    model = tiny_unet()
    present = model.attn_processors
    model.set_attn_processor(present)
    assert model.attn_processors == present
    assert torch.equal(predict(model, *inputs()), expected)
    counting = {
        name: processor if isinstance(processor, TimeAttnProcessor) else Counting() for name, processor in present.items()
    }
    model.set_attn_processor(counting)
    assert torch.equal(predict(model, *inputs()), expected)
    assert Counting.calls == sum(isinstance(processor, Counting) for processor in counting.values()) == 13
    assert counting.keys() == present.keys()


@pytest.mark.parametrize(
    "processor", [AttnProcessor2_0(), VideoAttnProcessor(), TimeAttnProcessor(), {}], ids=lambda p: type(p).__name__
)
def test_a_processor_that_fits_not_every_layer_is_refused(expected, processor):
    model = tiny_unet()
    with pytest.raises(ValueError, match=r"processor needs a (Time|Video)AttnProcessor, and \w+ is none.*set_attention_backend"):
        model.set_attn_processor(processor)
    assert torch.equal(predict(model, *inputs()), expected)


def test_other_precisions_are_taken_without_a_warning_about_nothing(caplog):
    diffusers = logging.getLogger("diffusers")
    caplog.set_level(logging.WARNING, "diffusers")  # another test may have asked diffusers for errors alone
    diffusers.addHandler(caplog.handler)
    try:
        model = tiny_unet().to(torch.float16)
        assert caplog.messages == []
        model._keep_in_fp32_modules = ["conv_in"]
        model.to(torch.float32)
        assert len(caplog.messages) == 1
        assert "['conv_in']" in caplog.messages[0]
    finally:
        diffusers.removeHandler(caplog.handler)


@pytest.mark.parametrize(
    "layers", [r".*temp_convs.*(conv1\.2|conv4\.3)$", r".*(conv_in|conv_out|resnets\.\d\.conv1)$", "all-linear"], ids=str
)
def test_adapters_fit_every_kind_of_layer(expected, layers):
    model = tiny_unet()
    model.add_adapter(peft.LoraConfig(r=2, target_modules=layers))
    assert greatest_difference(predict(model, *inputs()), expected) <= 1e-6
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * noise(*parameter.shape))
    adapted = predict(model, *inputs())
    assert greatest_difference(adapted, expected) > 1e-2
    model.fuse_lora()
    assert greatest_difference(predict(model, *inputs()), adapted) <= 1e-4


def test_an_adapter_takes_the_place_of_another(tmp_path):
    adapted = []
    for rank in (4, 2):
        model = tiny_unet()
        model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_v"]))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(0.3 * noise(*parameter.shape, seed=rank))
        model.save_lora_adapter(tmp_path / str(rank))
        adapted.append(predict(model, *inputs()))
    model = tiny_unet()
    model.enable_lora_hotswap(target_rank=4)
    options = {"prefix": None, "adapter_name": "one", "use_safetensors": True}
    model.load_lora_adapter(tmp_path / "4", **options)
    assert greatest_difference(predict(model, *inputs()), adapted[0]) <= 1e-5
    model.load_lora_adapter(tmp_path / "2", **options, hotswap=True)
    assert greatest_difference(predict(model, *inputs()), adapted[1]) <= 1e-5
    assert greatest_difference(*adapted) > 1e-2
