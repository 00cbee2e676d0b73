"""What `SwapUNet` changes in diffusers' model class: loading that leaves nothing to chance, and clear refusals of what cannot work."""

import copy
import inspect
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NoReturn, Self

import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from torch import nn

from .attention import SwapAttention, TimeAttnProcessor, VideoAttnProcessor
from .settings import check_agreement, check_names

# Beside a model's settings, `diffusers.training_utils.EMAModel.save_pretrained` writes its own into the same file.
EMA_SETTINGS = {"decay", "min_decay", "optimization_step", "update_after_step", "use_ema_warmup", "inv_gamma", "power"}
# Arguments of diffusers' `from_pretrained` that are no settings, for hints where one is misspelt.
LOADING = (
    *("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision", "subfolder", "variant"),
    *("torch_dtype", "dtype", "use_safetensors", "disable_mmap", "output_loading_info", "quantization_config"),
    *("device_map", "max_memory", "offload_folder", "offload_state_dict", "low_cpu_mem_usage"),
    *("use_flashpack", "flashpack_kwargs"),
)
PARENTS = {"UNet2DConditionModel": "from_unet2d", "UNet3DConditionModel": "from_unet3d"}
BACKENDS_INSTEAD = "Choose how attention is computed with set_attention_backend(…)"

DROPPING = (
    'They are those of swap attention, which interaction="none" is without: it would be another model. To drop them on purpose, load '
    'the model as it was saved; then plain = SwapUNet.from_config(unet.config, interaction="none") and '
    "plain.load_state_dict(unet.state_dict(), strict=False)."
)
LACKING = (
    'They are all of swap attention, though its config.json names an interaction. Load it with interaction="none", save that, and load '
    "it with any other: the new weights then start at zero."
)

logger = logging.getLogger(__name__)


class StrictModelMixin(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """A model of diffusers that is loaded whole or not at all, knows every setting that it is given, and refuses what it cannot do.

    `from_pretrained` raises a `ValueError` where the file lacks a weight, has one too many, or has one of another shape; diffusers
    only warns, and leaves such weights without a value. One exception continues the saved model exactly: asked for an `interaction`
    where the saved model has none, it starts the new weights as the constructor does, with a zero at their end.
    """

    # The saved setting, whatever was asked for; read while weights are loaded.
    _saved_interaction: str | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str] | None, **kwargs: Any) -> Self:
        """As in diffusers; convolution weights come in the memory order that they run in.

        Args:
            pretrained_model_name_or_path: a directory or a Hub id.
            **kwargs: diffusers' arguments for loading, and settings: those in `settings.FREE` may differ from the saved ones.

        Raises:
            TypeError: the place is neither a text nor a path.
            ValueError: a setting is not known or contradicts the saved one, weights are not those of the model, or
                `ignore_mismatched_sizes` is asked for.
            OSError: there is no saved model.
        """
        if not isinstance(pretrained_model_name_or_path, str | os.PathLike):
            raise TypeError(
                f"A {cls.__name__} is loaded from a directory or a Hub id, as a text or a path; {pretrained_model_name_or_path!r} is none."
            )
        if kwargs.get("ignore_mismatched_sizes"):
            raise ValueError(
                f"ignore_mismatched_sizes = {kwargs['ignore_mismatched_sizes']!r} would leave weights without their saved values, and a "
                f"{cls.__name__} is loaded whole or not at all. For a new model of other sizes: {cls.__name__}.from_config(config, …)."
            )
        loaded: Self = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        return loaded

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """As in diffusers; settings that it hands back beside those of the file must not contradict them.

        Raises:
            ValueError: one does, or is not known; the message names it.
        """
        loaded = super().load_config(pretrained_model_name_or_path, *args, **kwargs)
        # `from_pretrained` asks for what is left of its arguments and makes the model of that: the last place before any weight.
        if isinstance(loaded, tuple) and isinstance(loaded[1], dict):
            saved, given = loaded[:2]
            cls._check_owner(saved)
            asked = {name: value for name, value in given.items() if not name.startswith("_")}
            check_names(asked, cls.setting_names(), cls.__name__, LOADING)
            defaults = {name: argument.default for name, argument in inspect.signature(cls.__init__).parameters.items()}
            check_agreement(asked, defaults | saved, f"the checkpoint {str(pretrained_model_name_or_path)!r}")
        return loaded

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As in diffusers; keyword arguments override settings.

        Raises:
            ValueError: a setting is not known, or the configuration is of another class.
        """
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        model = made[0] if return_unused_kwargs else made
        model._saved_interaction = config.get("interaction") if isinstance(config, Mapping) else None
        return made

    @classmethod
    def extract_init_dict(
        cls, config_dict: Mapping[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """As in diffusers, but a configuration of another class and a key that is not known are errors, not warnings."""
        cls._check_owner(config_dict)
        saved = {key: value for key, value in config_dict.items() if key not in EMA_SETTINGS | {"quantization_config"}}
        # Arguments for loading were taken out by `from_pretrained`; what is left over was meant to be a setting.
        for given in (saved, kwargs):
            check_names(
                {key: value for key, value in given.items() if not key.startswith("_")}, cls.setting_names(), cls.__name__
            )
        extracted: tuple[dict[str, Any], dict[str, Any], dict[str, Any]] = super().extract_init_dict(config_dict, **kwargs)
        return extracted

    @classmethod
    def _check_owner(cls, config: Mapping[str, Any]) -> None:
        owner = config.get("_class_name", cls.__name__)
        if owner != cls.__name__:
            hint = f" {cls.__name__}.{PARENTS[owner]} starts a video model from it." if owner in PARENTS else ""
            raise ValueError(f"The checkpoint is of the class {owner}, not {cls.__name__}.{hint}")

    @classmethod
    def setting_names(cls) -> set[str]:
        """Names of the constructor's arguments."""
        names: set[str] = cls._get_init_keys(cls) - {"self"}
        return names

    @classmethod
    def _load_pretrained_model(
        cls,
        model: Self,
        state_dict: dict[str, torch.Tensor] | None,
        files: list[Any],
        name: Any,
        loaded_keys: list[str],
        **options: Any,
    ) -> tuple[Any, ...]:
        """Called by `from_pretrained` between building the model and placing it on its devices: the only place to add weights."""
        fresh = {}
        if options.get("hf_quantizer") is None:  # a quantized file has other names, which its quantizer accounts for
            fresh = _fresh_weights(model, loaded_keys)
            loaded_keys = [*loaded_keys, *fresh]
            expected = model.state_dict().keys()
            check_weights(model, name, expected - set(loaded_keys), set(loaded_keys) - expected)
            # Else diffusers raises, and advises what is refused here; so it names all, and the check below raises.
            options["ignore_mismatched_sizes"] = True
        if state_dict is None:
            files = [*files, fresh] if fresh else files  # diffusers takes weights in the place of a file of weights
        else:
            state_dict = {**state_dict, **fresh}
        loaded, missing, unexpected, mismatched, *rest = super()._load_pretrained_model(
            model, state_dict, files, name, loaded_keys, **options
        )
        shapes = (f"{key}: {tuple(saved)} in the file, {tuple(wanted)} in the model" for key, saved, wanted in mismatched)
        check_weights(model, name, missing, unexpected, shapes)
        order_loaded(loaded)
        if fresh:
            logger.info("%d weights of swap attention are new; they change nothing before they are trained", len(fresh))
        return loaded, sorted(fresh), unexpected, mismatched, *rest

    def to(self, *args: Any, memory_format: torch.memory_format | None = None, **kwargs: Any) -> Self:
        """As in PyTorch; `memory_format=torch.channels_last` means all convolutions here, those over time (5D weights) included.

        Convolutions run in that order, and models have it when they are new and when they are loaded; weights in another are reordered
        at every call.
        """
        if args or kwargs:
            with _without_empty_warning():
                super().to(*args, **kwargs)
        if memory_format is not None:
            _order(self.parameters(), memory_format)
        return self

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers: compiles every layer by itself; layers of equal shape share a graph."""
        # Every combination of widths and resolutions is a graph; with PyTorch's usual limit of 8 per function compiling would fail.
        dynamo = torch._dynamo.config
        dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
        super().compile_repeated_blocks(*args, **kwargs)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers."""
        if kwargs.get("offload_to_disk_path") is not None:
            self.to(memory_format=torch.contiguous_format)  # the only order that safetensors writes
        super().enable_group_offload(*args, **kwargs)

    def set_attn_processor(self, processor: Any) -> None:
        """Set the processor of every attention layer, by the names of `attn_processors`.

        Args:
            processor: a dict of a `TimeAttnProcessor` for every layer that has one, and of a `VideoAttnProcessor` for the others.

        Raises:
            ValueError: a processor is of another kind, which would compute something else here, or one is missing.
        """
        given = processor if isinstance(processor, dict) else dict.fromkeys(self.attn_processors, processor)
        for name, present in self.attn_processors.items():
            wanted, new = TimeAttnProcessor if isinstance(present, TimeAttnProcessor) else VideoAttnProcessor, given.get(name)
            over_time = isinstance(new, TimeAttnProcessor)
            if not isinstance(new, VideoAttnProcessor) or over_time != isinstance(present, TimeAttnProcessor):
                raise ValueError(
                    f"{name} needs a {wanted.__name__}, and {type(new).__name__} is none: layers over space and over time differ in "
                    f"what they are given. {BACKENDS_INSTEAD}."
                )
        super().set_attn_processor(dict(given))

    def fuse_qkv_projections(self) -> NoReturn:
        """Not available: the projections of query, key and value stay apart here."""
        raise NotImplementedError(
            f"{type(self).__name__} keeps the projections of query, key and value apart and has no fused form. {BACKENDS_INSTEAD}."
        )

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Callable[..., Any] | None = None) -> None:
        """Refused where `valid`, for what diffusers would install cannot attend over time; else without effect."""
        self._refuse_processors(valid, "xformers")

    def set_use_npu_flash_attention(self, valid: bool) -> None:
        """Refused where `valid`, for what diffusers would install cannot attend over time; else without effect."""
        self._refuse_processors(valid, "_native_npu")

    def set_use_xla_flash_attention(
        self, use_xla_flash_attention: bool, partition_spec: Callable[..., Any] | None = None, **kwargs: Any
    ) -> None:
        """Refused where `use_xla_flash_attention`, for what diffusers would install cannot attend over time; else without effect."""
        self._refuse_processors(use_xla_flash_attention, "_native_xla")

    def enable_parallelism(self, **options: Any) -> NoReturn:
        """Not available: neither frames nor positions can be divided between devices here."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be divided along its tokens or heads. Divide the batch with DistributedDataParallel or FSDP, "
            'or the layers with from_pretrained(…, device_map="auto").'
        )

    def _refuse_processors(self, wanted: bool, backend: str) -> None:
        if wanted:
            raise NotImplementedError(f"{BACKENDS_INSTEAD}, here set_attention_backend({backend!r}), which reaches every layer.")


def order_loaded(model: nn.Module) -> None:
    """Bring convolution weights into the order that they run in; not those without memory yet, nor quantized ones, which have their own."""
    weights = (weight for weight in model.parameters() if not weight.is_meta)
    _order((weight for weight in weights if type(weight) is nn.Parameter and weight.is_floating_point()), torch.channels_last)


def _order(weights: Iterable[nn.Parameter], memory_format: torch.memory_format) -> None:
    over_time = torch.channels_last_3d if memory_format == torch.channels_last else memory_format
    for weight in weights:
        if weight.ndim in (4, 5):
            weight.data = weight.data.contiguous(memory_format=memory_format if weight.ndim == 4 else over_time)


def check_weights(
    model: Any, name: Any, missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str] = ()
) -> None:
    """Whether the weights in a file were those of the model.

    Raises:
        ValueError: some were not; the message says how many, and names the first of them.
    """
    missing, unexpected, mismatched = sorted(missing), sorted(unexpected), sorted(mismatched)
    if not missing + unexpected + mismatched:
        return
    counts = {"missing": missing, "unexpected": unexpected, "of another shape": mismatched}
    found = "; ".join(f"{len(names)} {what} (first: {names[:3]})" for what, names in counts.items() if names)
    way = ""
    if not missing + mismatched and all(map(_is_swap, unexpected)):
        way = " " + DROPPING
    if not unexpected + mismatched and missing == sorted(filter(_is_swap, model.state_dict())):
        way = " " + LACKING
    raise ValueError(f"The weights in {str(name)!r} are not those of this {type(model).__name__}: {found}.{way}")


def _is_swap(key: str) -> bool:
    return ".swap." in key


def _fresh_weights(model: Any, loaded_keys: Iterable[str]) -> dict[str, torch.Tensor]:
    """New weights of all swap attention, where there is none in a file that was saved without and the model has it."""
    if model._saved_interaction != "none" or any(_is_swap(key) for key in loaded_keys):
        return {}
    fresh = {}
    for name, module in model.named_modules():
        if isinstance(module, SwapAttention):
            # While a model is loaded its weights have no memory, or no values.
            started = copy.deepcopy(module).to_empty(device="cpu")
            started.reset_parameters()
            fresh.update({f"{name}.{key}": weight for key, weight in started.state_dict().items()})
    return fresh


@contextmanager
def _without_empty_warning() -> Iterator[None]:
    """Keeps one warning of diffusers 0.42 from users: that no module at all ("[]") should be kept in float32."""

    def is_meant(record: logging.LogRecord) -> bool:
        return "should be kept in float32: []" not in record.getMessage()

    warnings = logging.getLogger("diffusers.models.modeling_utils")
    warnings.addFilter(is_meant)
    try:
        yield
    finally:
        warnings.removeFilter(is_meant)
