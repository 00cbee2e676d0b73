"""The state of training on disk: whole or not there, in formats that other programs read, and without pickle.

    OUTPUT/checkpoints/step-000100/
        unet/           the U-Net as `SwapUNet.from_pretrained` reads it; with adapters `unet_lora/`, for `load_lora_adapter`
        unet_ema/       the same with averaged weights, where there is an average (`unet_lora_ema/`)
        optimizer.safetensors    AdamW's tensors by parameter name: `conv_in.weight.exp_avg`
        config.json     every setting of the run
        state.json      step, groups of the optimiser, position in the data, versions, and the size of every other file

A checkpoint is written beside its place, flushed to the disk, and renamed: a run that is killed at any moment leaves the one before
as it was. There is no state of random generators in it, for noise, order and dropout follow from (seed, step, sample).

With FSDP2 every process has a part of each tensor. `save` puts them together one at a time (`DTensor.full_tensor`, so every process
must call it) and the first process writes; `restore` reads whole tensors in every process and keeps its part. So the files are the
same whatever the number of processes, and a run may go on with another. (`get_optimizer_state_dict` of
`torch.distributed.checkpoint` would do the same, but it makes up state for parameters that have had no gradient yet.)
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY, LORA_WEIGHT_NAME_SAFE
from diffusers.training_utils import EMAModel
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import safe_open
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from .config import TrainingConfig, check_same, parse_config
from .parameters import ADAPTER, averaged, trained
from .processes import as_main_says
from .settings import CheckpointSettings
from .tensor_files import (
    CheckpointError,
    check_tensors,
    flush,
    gather,
    read_into,
    shaped_like,
    tensor_shapes,
    write_json,
    write_tensors,
)

__all__ = [
    "CheckpointError",
    "Restored",
    "check_none_later",
    "checkpoint_folder",
    "checkpoints",
    "is_complete",
    "latest",
    "restore",
    "rotate",
    "save",
    "step_of",
]

logger = logging.getLogger(__name__)

FORMAT = 1
STATE, CONFIG, OPTIMIZER = "state.json", "config.json", "optimizer.safetensors"
_FOLDER = re.compile(r"step-(\d{6,})")
_ADAM = ("exp_avg", "exp_avg_sq", "step")


@dataclass(frozen=True)
class Restored:
    """Where a run goes on.

    Attributes:
        step: steps that are done.
        data: what `save` was given of the data loader's state.
        config: the settings that the run was begun with.
    """

    step: int
    data: Any
    config: TrainingConfig


def checkpoint_folder(output: str | Path, step: int) -> Path:
    """Where the checkpoint after `step` steps is, or would be."""
    return Path(output) / "checkpoints" / f"step-{step:06d}"


def step_of(folder: Path) -> int:
    """The steps that were done at a checkpoint, by its name. Raises `CheckpointError` where the name is of another form."""
    found = _FOLDER.fullmatch(folder.name)
    if found is None:
        raise CheckpointError(f"{str(folder)!r} is not named as a checkpoint, for example step-000100")
    return int(found[1])


def checkpoints(output: str | Path) -> list[Path]:
    """Every complete checkpoint of a run, the earliest first."""
    folder = Path(output) / "checkpoints"
    found = [entry for entry in folder.iterdir() if _FOLDER.fullmatch(entry.name)] if folder.is_dir() else []
    return sorted(filter(is_complete, found), key=step_of)


def latest(output: str | Path) -> Path | None:
    """The latest complete checkpoint of a run; `None` where there is none. What is not complete is passed over."""
    return next(reversed(checkpoints(output)), None)


def is_complete(folder: Path) -> bool:
    """Whether every file is there, and has the size that it was written with."""
    try:
        files = json.loads((folder / STATE).read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in files.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def check_none_later(output: str | Path, step: int) -> None:
    """Before a run goes on from an earlier step than its latest: the later ones would be taken for its own.

    Raises:
        CheckpointError: there are later ones.
    """
    if later := [folder.name for folder in checkpoints(output) if step_of(folder) > step]:
        raise CheckpointError(
            f"{str(output)!r} has checkpoints later than step {step}: {', '.join(later)}. Move them away, or choose another output"
        )


def save(
    output: str | Path,
    step: int,
    unet: Any,
    optimizer: torch.optim.Optimizer,
    average: EMAModel | None,
    config: TrainingConfig,
    data: Any = None,
) -> Path:
    """Write the checkpoint after `step` steps, and remove those that `config.checkpoints` does not keep. Every process calls it.

    Args:
        output: folder of the run, on a disk.
        step: steps that are done.
        unet: the U-Net itself, sharded or not, never what wraps it.
        optimizer: AdamW over its trained parameters.
        average: their moving average.
        config: stored beside them.
        data: position in the data and whatever else a run needs to go on: what JSON can say, the same in all processes.

    Returns:
        The folder. One that is complete already is left as it is, for a step has one state.

    Raises:
        OSError: the disk is full, or cannot be written; what was there before is still there.
    """
    main, folder = _is_main(), checkpoint_folder(output, step)
    if as_main_says(main and is_complete(folder)):  # another node may not see this disk
        if main:
            _clear(folder.parent)
            rotate(output, config.checkpoints)
        return folder
    partial = folder.with_name(f".{folder.name}.partial")
    if main:
        _clear(folder.parent)
        partial.mkdir(parents=True)
    kept = "unet_lora" if _is_adapted(unet) else "unet"
    _write_weights(partial / kept, unet, main)
    if average is not None:
        with averaged(unet, average):
            _write_weights(partial / f"{kept}_ema", unet, main)
    tensors = gather(_optimizer_tensors(unet, optimizer), main)
    if not main:
        return folder
    write_tensors(partial / OPTIMIZER, tensors)
    write_json(partial / CONFIG, config.model_dump(mode="json"))
    files = {str(path.relative_to(partial)): path.stat().st_size for path in sorted(partial.rglob("*")) if path.is_file()}
    optimizing = {"class": type(optimizer).__name__, "groups": _groups(unet, optimizer)}
    average_steps = None if average is None else average.optimization_step
    state = {"step": step, "average_steps": average_steps, "optimizer": optimizing, "data": data, "files": files}
    write_json(partial / STATE, {"format": FORMAT, "fingerprint": config.fingerprint(), "versions": _versions(), **state})
    _publish(partial, folder)
    rotate(output, config.checkpoints)
    logger.info("checkpoint %s, %.1f MB", folder, sum(files.values()) / 1e6)
    return folder


def _versions() -> dict[str, str]:
    return {name: version(name) for name in ("videofactory", "torch", "diffusers", "safetensors")}


def rotate(output: str | Path, settings: CheckpointSettings) -> None:
    """Remove every checkpoint but the last `keep` and those at multiples of `keep_every`."""
    if settings.keep is None:
        return
    for folder in checkpoints(output)[: -settings.keep]:
        if settings.keep_every is None or step_of(folder) % settings.keep_every:
            removed = folder.with_name(f".{folder.name}.removed")
            os.rename(folder, removed)  # noqa: PTH104  # half a checkpoint never bears its name
            shutil.rmtree(removed)


def restore(
    folder: Path,
    unet: Any,
    optimizer: torch.optim.Optimizer | None = None,
    average: EMAModel | None = None,
    config: TrainingConfig | None = None,
) -> Restored:
    """Put a checkpoint's state into a U-Net, its optimiser and its average, after all of it has been checked.

    Args:
        folder: of one checkpoint, see `latest`.
        unet: the U-Net itself, as it was when saved: after `choose_trained`, moved and sharded as wished.
        optimizer: as `build_optimizer` makes it; left out, weights alone are read.
        average: as `moving_average` makes it.
        config: of the run that is to go on.

    Raises:
        CheckpointError: it is not complete, or a tensor's name or shape is not that of the model; nothing was changed.
        ConfigError: `config` differs in a key that may not change.
    """
    if not is_complete(folder):
        raise CheckpointError(f"{str(folder)!r} is no complete checkpoint; take an earlier one, or start anew in another output")
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if state.get("format") != FORMAT:
        raise CheckpointError(f"{str(folder)!r} has the format {state.get('format')!r}; this version reads {FORMAT}")
    stored = parse_config(json.loads((folder / CONFIG).read_text(encoding="utf-8")), str(folder / CONFIG))
    if config is not None:
        check_same(stored, config, str(folder))

    adapted = _is_adapted(unet)
    kept, file = ("unet_lora", LORA_WEIGHT_NAME_SAFE) if adapted else ("unet", SAFETENSORS_WEIGHTS_NAME)
    weights = _saved_tensors(unet)
    steps = {folder / kept / file: weights}
    if average is not None:
        if state["average_steps"] is None:
            raise CheckpointError(f"{str(folder)!r} has no moving average; set ema to null, or take another checkpoint")
        shadows = dict(zip(map(_file_name, trained(unet)), average.shadow_params, strict=True))
        steps[folder / f"{kept}_ema" / file] = {**weights, **shadows}
    for path, targets in steps.items():
        check_tensors(path, {name: tuple(target.shape) for name, target in targets.items()})
    if optimizer is not None:
        _check_optimizer(folder, unet, optimizer, state["optimizer"])

    # Frozen weights are in both files, and the same; the average's own go where `shadows` says.
    for path, targets in steps.items():
        read_into(path, targets)
    if average is not None:
        average.optimization_step = state["average_steps"]
    if optimizer is not None:
        _restore_optimizer(folder / OPTIMIZER, unet, optimizer)
    return Restored(state["step"], state["data"], stored)


def _is_main() -> bool:
    return not distributed.is_initialized() or distributed.get_rank() == 0


def _is_adapted(unet: Any) -> bool:
    return ADAPTER in getattr(unet, "peft_config", {})


def _file_name(name: str) -> str:
    """A parameter's name in files: that of an adapter's without the adapter's name, as diffusers and peft have it."""
    return re.sub(rf"(\.lora_[A-Za-z_]+)\.{ADAPTER}\b", r"\1", name)


def _saved_tensors(unet: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a U-Net: all of its state, or its adapters; by name in the file."""
    if _is_adapted(unet):
        return {_file_name(name): parameter.data for name, parameter in trained(unet).items()}
    return dict(unet.state_dict())


def _write_weights(folder: Path, unet: Any, main: bool) -> None:
    tensors = gather(_saved_tensors(unet).items(), main)
    if not main:
        return
    folder.mkdir()
    metadata = {"format": "pt"}
    if _is_adapted(unet):
        settings = unet.peft_config[ADAPTER].to_dict()
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in settings.items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(plain, indent=2, sort_keys=True)
        write_tensors(folder / LORA_WEIGHT_NAME_SAFE, tensors, metadata)
    else:
        settings = {key: value for key, value in json.loads(unet.to_json_string()).items() if key != "_name_or_path"}
        # `fully_shard` gives the model a class of its own, with another name.
        settings["_class_name"] = next(cls.__name__ for cls in type(unet).__mro__ if not issubclass(cls, FSDPModule))
        write_json(folder / "config.json", settings)
        write_tensors(folder / SAFETENSORS_WEIGHTS_NAME, tensors, metadata)


def _publish(partial: Path, folder: Path) -> None:
    """Give a written checkpoint its name, once all of it is on the disk."""
    for inner in [*(path for path in partial.rglob("*") if path.is_dir()), partial]:
        flush(inner)
    if folder.exists():
        shutil.rmtree(folder)  # not complete, or `save` would have left it
    os.rename(partial, folder)  # noqa: PTH104
    flush(folder.parent)


def _clear(folder: Path) -> None:
    """Remove what a killed run left half written or half removed."""
    for pattern in (".step-*.partial", ".step-*.removed"):
        for left in folder.glob(pattern):
            shutil.rmtree(left)


def _names(unet: Any) -> dict[torch.nn.Parameter, str]:
    return {parameter: name for name, parameter in trained(unet).items()}


def _optimizer_tensors(unet: Any, optimizer: torch.optim.Optimizer) -> list[tuple[str, torch.Tensor]]:
    """Every tensor of the optimiser's state; a parameter that has had no gradient yet has none."""
    state = optimizer.state
    return [
        (f"{name}.{key}", state[parameter][key])
        for name, parameter in trained(unet).items()
        if parameter in state
        for key in sorted(state[parameter])
    ]


def _groups(unet: Any, optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    names = _names(unet)
    return [
        {
            **{key: value for key, value in group.items() if isinstance(value, str | int | float | bool)},
            "params": [names[parameter] for parameter in group["params"]],
        }
        for group in optimizer.param_groups
    ]


def _check_optimizer(folder: Path, unet: Any, optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> None:
    wanted = {name for group in _groups(unet, optimizer) for name in group["params"]}
    found = {name for group in stored["groups"] for name in group["params"]}
    if wanted != found or stored["class"] != type(optimizer).__name__:
        raise CheckpointError(
            f"the optimiser in {str(folder)!r} is {stored['class']} over {len(found)} parameters, this one {type(optimizer).__name__} "
            f"over {len(wanted)}; {len(wanted ^ found)} are in one of them only. Set model.train and model.spatial back as they were"
        )
    shapes: dict[str, tuple[int, ...]] = {}
    present = tensor_shapes(folder / OPTIMIZER).keys()
    for name, parameter in trained(unet).items():
        # AdamW has all of its tensors for a parameter, or none before its first gradient.
        if any(f"{name}.{key}" in present for key in _ADAM):
            shapes |= {f"{name}.{key}": () if key == "step" else tuple(parameter.shape) for key in _ADAM}
    check_tensors(folder / OPTIMIZER, shapes)


def _restore_optimizer(path: Path, unet: Any, optimizer: torch.optim.Optimizer) -> None:
    names, described = _names(unet), optimizer.state_dict()
    # PyTorch numbers parameters through all groups, and decides by itself on which device a step is counted.
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = {}
    with safe_open(path, "pt") as file:
        present = set(file.keys())
        for number, parameter in enumerate(parameters):
            name = names[parameter]
            if f"{name}.step" in present:
                tensors = {key: file.get_tensor(f"{name}.{key}") for key in _ADAM}
                state[number] = {
                    key: tensor if key == "step" else shaped_like(parameter, tensor) for key, tensor in tensors.items()
                }
    optimizer.load_state_dict({"state": state, "param_groups": described["param_groups"]})
