"""Where a model's weights are: answered cheaply and without loading them, so that a build fails before its first download.

A model is named in one of three ways: a local directory, a repository on the Hugging Face Hub (`owner/name`, with or without
`hf-hub:`), or, for open_clip alone, an architecture together with the name of its pretrained weights. Only safetensors are
accepted: a pickle can run code while it is read.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable
from pathlib import Path

HUB_PREFIX = "hf-hub:"
MARKER = "made_for.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors")
TRANSFORMERS_WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
HUB_TIMEOUT = 5.0
"""Seconds that a question to the Hub may take."""

_WAYS_OUT = (
    "Three ways out: name a local directory that holds the weights as safetensors; switch captions off; "
    "or run the sample, which brings tiny weights of its own."
)


class WeightsNotFound(Exception):  # noqa: N818  (reads as what happened; DESIGN names errors so)
    """The weights of a model cannot be had here. Carries the model's name, the cause, and the three ways out."""

    def __init__(self, model: str, cause: str) -> None:
        super().__init__(f"no weights for model {model!r}: {cause}. {_WAYS_OUT}")
        self.model = model
        self.cause = cause

    def __reduce__(self) -> tuple[type[WeightsNotFound], tuple[str, str]]:
        # The default would call the constructor with the finished message, which fails when an error crosses processes.
        return (type(self), (self.model, self.cause))


def local_directory(model: str) -> Path | None:
    """The directory that `model` names, or `None` when it is the name of something else.

    A name counts as a directory when it exists, or when it can be nothing else: it starts with `/`, `.` or `~`.
    """
    path = Path(model).expanduser()
    if path.is_dir() or model.startswith(("/", ".", "~")):
        return path
    return None


def model_name(model: str) -> str:
    """A name fit for a table: of a directory only its last part, because a path means nothing on another machine."""
    directory = local_directory(model)
    return model.removeprefix(HUB_PREFIX) if directory is None else directory.resolve().name


def made_for(model: str) -> str | None:
    """What the weights in the directory `model` are made for, when they are good for nothing else; else `None`.

    Read from the field `made_for` of `made_for.json`, for example `{"made_for": "sample", "says": "..."}`.

    Raises:
        ValueError: the marker is there and cannot be read; to take it as absent would let the weights loose.
    """
    directory = local_directory(model)
    marker = directory / MARKER if directory is not None else None
    if marker is None or not marker.is_file():
        return None
    try:
        purpose = json.loads(marker.read_text(encoding="utf-8"))["made_for"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{marker}: expected a JSON object with the field 'made_for', found {error!r}; restore or remove it"
        ) from error
    return str(purpose)


def check_weights(model: str, pretrained: str | None = None) -> None:
    """Make sure that the weights of `model` are here or can be downloaded, without loading them.

    A local directory is checked for its configuration and for whole safetensors files (header against file size); a Hub
    repository is looked up in the local cache first and then asked for, once, for at most `HUB_TIMEOUT` seconds.
    `HF_HUB_OFFLINE=1` leaves only the cache.

    Args:
        model: a local directory, a Hub repository (`owner/name` or `hf-hub:owner/name`), or an open_clip architecture.
        pretrained: for an open_clip architecture, the name of its weights or a safetensors file.

    Raises:
        WeightsNotFound: with the cause and the ways out.
    """
    directory = local_directory(model)
    if directory is not None:
        _check_directory(model, directory)
    elif pretrained is not None:
        _check_architecture(model, pretrained)
    elif "/" in model or model.startswith(HUB_PREFIX):
        _check_hub(model, model.removeprefix(HUB_PREFIX))
    else:
        raise WeightsNotFound(
            model, "it is neither a directory nor a Hub repository (owner/name), and no pretrained weights are named"
        )


def _check_directory(model: str, directory: Path) -> None:
    if not directory.is_dir():
        raise WeightsNotFound(model, "there is no such directory")
    if (directory / OPEN_CLIP_CONFIG).is_file():
        names: tuple[str, ...] = OPEN_CLIP_WEIGHTS
    elif (directory / TRANSFORMERS_CONFIG).is_file():
        names = TRANSFORMERS_WEIGHTS
    else:
        raise WeightsNotFound(model, f"the directory holds neither {TRANSFORMERS_CONFIG} nor {OPEN_CLIP_CONFIG}")
    found = next((directory / name for name in names if (directory / name).is_file()), None)
    if found is None:
        raise WeightsNotFound(model, f"the directory holds none of {', '.join(names)}")
    for file in _shards_of(model, found) if found.suffix == ".json" else [found]:
        _check_file(model, file)


def _shards_of(model: str, index: Path) -> list[Path]:
    """The files among which a large checkpoint is divided, as its index lists them."""
    try:
        names: Iterable[str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [index.parent / name for name in sorted(set(names))]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise WeightsNotFound(model, f"{index.name} is not an index of safetensors files ({error!r})") from error


def _check_file(model: str, file: Path) -> None:
    """A safetensors file opens with the length of a JSON header (8 bytes, little endian) that gives every tensor's place."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except FileNotFoundError as error:
        raise WeightsNotFound(model, f"{file.name} is missing") from error
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsNotFound(model, f"{file.name} is not a safetensors file ({error!r})") from error
    if (size := file.stat().st_size) != expected:
        raise WeightsNotFound(model, f"{file.name} has {size} bytes where its header tells of {expected}; copy it again")


def _check_architecture(model: str, pretrained: str) -> None:
    """An open_clip architecture: `pretrained` is a file, or a name that open_clip maps to a Hub repository."""
    if Path(pretrained).suffix:
        file = Path(pretrained).expanduser()
        if file.suffix != ".safetensors":
            raise WeightsNotFound(model, f"{pretrained!r} is not a .safetensors file, and pickles are never loaded")
        _check_file(model, file)
        return
    import open_clip

    known = open_clip.get_pretrained_cfg(model, pretrained)
    if not known:
        named = ", ".join(open_clip.list_pretrained_tags_by_model(model)) or "none: the architecture is unknown"
        raise WeightsNotFound(model, f"open_clip knows no weights {pretrained!r} for it (it knows {named})")
    repository = str(known.get("hf_hub", "")).rsplit("/", 1)[0]
    if not repository:
        raise WeightsNotFound(model, f"the weights {pretrained!r} are published only as a pickle, and pickles are never loaded")
    _check_hub(model, repository)


def _check_hub(model: str, repository: str) -> None:
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    if _is_cached(repository):
        return
    if constants.HF_HUB_OFFLINE or os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}:
        raise WeightsNotFound(model, "HF_HUB_OFFLINE is set and the local cache does not hold it")
    try:
        published = HfApi().model_info(repository, timeout=HUB_TIMEOUT).siblings or []
    except HFValidationError as error:
        raise WeightsNotFound(model, f"{repository!r} is not a valid name of a Hub repository") from error
    except RepositoryNotFoundError as error:
        raise WeightsNotFound(model, "the Hub has no such repository, or it asks for a token with access (HF_TOKEN)") from error
    except Exception as error:  # the client raises a dozen kinds of network error, and to us each means the same
        raise WeightsNotFound(
            model, f"the local cache does not hold it and the Hub cannot be reached ({type(error).__name__})"
        ) from error
    if not any(file.rfilename.endswith(".safetensors") for file in published):
        raise WeightsNotFound(model, "the repository holds no safetensors, and pickles are never loaded")


def _is_cached(repository: str) -> bool:
    """Whether the local Hub cache holds weights of `repository` (of a divided checkpoint: every part of it)."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(name: str) -> Path | None:
        try:
            found = try_to_load_from_cache(repository, name)
        except HFValidationError:
            return None
        return Path(found) if isinstance(found, str) else None

    if any(cached(name) for name in (*OPEN_CLIP_WEIGHTS, TRANSFORMERS_WEIGHTS[0])):
        return True
    index = cached(TRANSFORMERS_WEIGHTS[1])
    return index is not None and all(shard.is_file() for shard in _shards_of(repository, index))
