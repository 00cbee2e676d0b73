"""Where a saved pipeline lies: a local directory, or one that is fetched from the Hugging Face Hub first.

diffusers does not load a component of another package straight from the Hub, not even one whose module is imported; from a
directory it does.
"""

import hashlib
import json
from collections.abc import Collection, Iterable, MutableMapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

INDEX = "model_index.json"

LOADING_OPTIONS = (
    "cache_dir", "custom_pipeline", "custom_revision", "device_map", "disable_mmap", "dtype", "force_download",
    "load_connected_pipeline", "local_files_only", "low_cpu_mem_usage", "max_memory", "mirror", "offload_folder", "offload_state_dict",
    "output_loading_info", "provider", "provider_options", "proxies", "quantization_config", "revision", "sess_options", "token",
    "torch_dtype", "trust_remote_code", "use_flashpack", "use_onnx", "use_safetensors", "variant",
)  # fmt: skip
"""What `from_pretrained` of diffusers takes by name, and what it documents and ignores: its signature has `**kwargs` alone."""

_TEXTS = ("*.json", "*.txt", "*.model")
_WEIGHTS = ("diffusion_pytorch_model", "model")
_HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")


def check_options(options: Iterable[str], own: Collection[str]) -> None:
    """Whether the arguments of `from_pretrained` are known; diffusers ignores others.

    Args:
        options: names of the arguments.
        own: those of the pipeline itself: its components and settings.

    Raises:
        TypeError: one is unknown; the message has the nearest name that is not.
    """
    known = {*own, *LOADING_OPTIONS}
    for name in options:
        if name not in known:
            nearest = get_close_matches(name, sorted(known), 1)
            hint = f"did you mean {nearest[0]}?" if nearest else f"the pipeline's own are {', '.join(sorted(own))}"
            raise TypeError(f"from_pretrained knows no argument {name}, nor does diffusers; {hint}")


def fetch(name: str, components: Collection[str], options: MutableMapping[str, Any]) -> Path:
    """The directory of the saved pipeline `name`, fetched first where it is a Hub id.

    Of a Hub repository come the configurations, tokenizer files and safetensors weights in the folders of `components`, and nothing
    else. With `variant`, the plain weights come, too, for components that have no such variant.

    Args:
        name: a directory or a Hub id.
        components: names of the pipeline's components.
        options: arguments of `from_pretrained`; those of the Hub are used here and taken out, components that are passed there are
            not fetched.

    Raises:
        FileNotFoundError: there is no such pipeline here or on the Hub, or it cannot be reached.
        ValueError: its U-Net is of another class, and none is passed.
    """
    if not name.strip():
        raise FileNotFoundError("the name of the saved pipeline is empty; give a directory, or a Hub id such as owner/name")
    hub = {key: options.pop(key) for key in _HUB_OPTIONS if key in options}
    wanted = [component for component in components if component not in options]
    directory = Path(name)
    if directory.is_dir():
        if not (directory / INDEX).is_file():
            found = ", ".join(sorted(path.name for path in directory.iterdir())[:10]) or "nothing"
            raise FileNotFoundError(
                f"{name} holds no {INDEX}, so it is no saved pipeline (it holds {found}); "
                "a U-Net alone is loaded with SwapUNet.from_pretrained and passed as unet="
            )
        _check_unet(directory, wanted)
        return directory
    directory = _snapshot(name, [INDEX], hub)
    if not (directory / INDEX).is_file():
        raise FileNotFoundError(f"the Hub's repository {name} holds no {INDEX}, so it is no saved pipeline")
    _check_unet(directory, wanted)
    return _snapshot(name, [INDEX, *_patterns(wanted, options.get("variant"))], hub)


def digests(directory: Path, components: Collection[str], variant: str | None = None) -> dict[str, str]:
    """SHA-256 of the files that these components of a saved pipeline are loaded from, by name; several GB take some seconds."""
    found = {path for pattern in (INDEX, *_patterns(components, variant)) for path in directory.glob(pattern)}
    hashes = {}
    for path in sorted(found):
        with path.open("rb") as file:
            hashes[path.relative_to(directory).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _patterns(components: Collection[str], variant: str | None) -> list[str]:
    """Patterns of the files that these components are loaded from."""
    files = [*_TEXTS, *(f"{weights}{part}.safetensors" for weights in _WEIGHTS for part in ("", "-*"))]
    if variant is not None:
        files += [f"*.{variant}.safetensors", f"*.{variant}-*.safetensors"]
    return [f"{component}/{file}" for component in components for file in files]


def _snapshot(name: str, patterns: list[str], hub: dict[str, Any]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, allow_patterns=patterns, **hub))
    except HFValidationError as error:
        raise FileNotFoundError(f"{name} is no directory, and cannot be the name of a repository on the Hub") from error
    except (OSError, ValueError) as error:
        # Whatever the client meets (no network, no such repository, no permission, nothing in the cache) derives from these.
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileNotFoundError(f"{name} is no directory, and could not be fetched from the Hub: {reason}") from error


def _check_unet(directory: Path, wanted: Collection[str]) -> None:
    """Whether the U-Net of the saved pipeline, if it is wanted, is ours."""
    try:
        entry = json.loads((directory / INDEX).read_text(encoding="utf-8")).get("unet")
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{directory / INDEX} is no JSON object ({error}); save the pipeline again") from error
    found = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
    ways = {"UNet2DConditionModel": "from_unet2d", "UNet3DConditionModel": "from_unet3d"}
    if "unet" in wanted and found not in (None, "SwapUNet"):
        hint = f'; start from it with unet=SwapUNet.{ways[found]}({str(directory)!r}, subfolder="unet")' if found in ways else ""
        raise ValueError(f"the pipeline in {directory} has a U-Net of the class {found}, not SwapUNet{hint}")
