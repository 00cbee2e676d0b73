"""Tensors in safetensors files, whole on the disk and perhaps sharded in memory: gathered, written, checked, read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor, distribute_tensor


class CheckpointError(Exception):
    """A checkpoint cannot be used; the message names the folder, the cause and the way out."""


def gather(tensors: Iterable[tuple[str, torch.Tensor]], main: bool) -> dict[str, torch.Tensor]:
    """Whole tensors on the CPU of the first process; the others take part and keep nothing."""
    whole = {}
    for name, tensor in tensors:
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if main:
            whole[name] = full.detach().cpu().contiguous()
    return whole


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file, and wait until it is on the disk."""
    save_file(tensors, path, metadata)
    flush(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, and wait until it is on the disk."""
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    flush(path)


def flush(path: Path) -> None:
    """Wait until a file's content, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def tensor_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor in a file, by name. Raises `CheckpointError` where it cannot be read."""
    try:
        with safe_open(path, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{str(path)!r} cannot be read ({error}); take an earlier checkpoint") from None


def check_tensors(path: Path, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Whether a file holds exactly the tensors of these names and shapes; a `CheckpointError` names the first that it does not."""
    found = tensor_shapes(path)
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": sorted(name for name in wanted.keys() & found.keys() if wanted[name] != found[name]),
    }
    if any(problems.values()):
        told = "; ".join(f"{len(names)} {what} (first: {names[0]})" for what, names in problems.items() if names)
        raise CheckpointError(f"the tensors in {str(path)!r} are not those of this model: {told}. Set model.* back as it was")


def shaped_like(target: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A copy of a whole tensor on the device of `target` and with its order in memory; of a sharded one, this process's part.

    Every process has read the whole, so nothing is sent. AdamW's fused kernel refuses state in another order than the parameter's,
    which is `channels_last` for convolutions.
    """
    if isinstance(target, DTensor):
        moved = whole.to(target.device_mesh.device_type)
        whole = distribute_tensor(moved, target.device_mesh, target.placements, src_data_rank=None)
    return torch.empty_like(target, requires_grad=False).copy_(whole)


@torch.no_grad()
def read_into(path: Path, targets: Mapping[str, torch.Tensor]) -> None:
    """Copy the tensors of a file into those of the same name."""
    with safe_open(path, "pt") as file:
        for name, target in targets.items():
            target.copy_(shaped_like(target, file.get_tensor(name)))
