"""One process or many: who this one is, what is agreed with the others, and the U-Net wrapped for them.

With `torchrun` or `accelerate launch` every process finds its rank in the environment; without, there is one. The same code serves
both, on GPUs (NCCL) and processors (Gloo).
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from .parameters import shard

logger = logging.getLogger(__name__)

LOCK = ".lock"
"""In the folder of a run: locked by the kernel while a run writes there, so that a kill releases it; the file stays."""

LOCK_SECONDS = 10.0
"""How long to wait for it: processes that a killed run started may hold it for some seconds more."""


class OutputBusyError(ValueError):
    """Another run writes to the same folder; the message names it."""


@dataclass(frozen=True)
class Processes:
    """The processes of a run, seen from one of them.

    Attributes:
        rank: number of this one, from 0.
        world: how many there are.
        device: where this one computes.
    """

    rank: int
    world: int
    device: torch.device

    @property
    def main(self) -> bool:
        """Whether this is the one that writes and speaks."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all processes; changed in place."""
        if self.world > 1:
            distributed.all_reduce(tensor)
        return tensor

    def total(self, count: int) -> int:
        """The sum of the processes' counts; all have to ask."""
        return int(self.sum(torch.tensor(count, device=self.device)).item())

    def agree(self, flag: bool) -> bool:
        """Whether `flag` is true in any process; all have to ask."""
        if self.world == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())

    def as_main_says(self, value: Any) -> Any:
        """The main process's value, in all of them; all have to ask."""
        return as_main_says(value)


def as_main_says(value: Any) -> Any:
    """The main process's value, in all processes that are connected; all have to ask."""
    if not distributed.is_initialized():
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


@contextlib.contextmanager
def alone_in(folder: Path, processes: Processes) -> Iterator[None]:
    """Inside, no other run writes to `folder`, which is made if missing.

    Raises:
        OutputBusyError: another run does; in all processes.
    """
    lock, busy = FileLock(folder / LOCK), False
    if processes.main:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=LOCK_SECONDS)
        except Timeout:
            busy = True
        except (OSError, NotImplementedError) as error:
            logger.warning("%s cannot be locked (%s): see to it that no other run has this output", folder, error)
    if processes.agree(busy):
        raise OutputBusyError(f"another run writes to {folder}; wait for its end, stop it, or name another output")
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def joined(device: str = "auto") -> Iterator[Processes]:
    """The processes of this run, connected inside and released afterwards.

    Args:
        device: `auto`, a GPU of its own for every process if there are any, or `cpu`.

    Raises:
        ValueError: there are more processes than GPUs.
    """
    rank, world, local = (int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items())
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu and local >= torch.cuda.device_count():
        raise ValueError(
            f"process {local} of this machine finds {torch.cuda.device_count()} GPUs; start as many processes as there are GPUs "
            "(torchrun --nproc-per-node), or give --device cpu"
        )
    chosen = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(chosen)
    if world > 1:
        # The others wait while the first writes a checkpoint, which may be tens of gigabytes.
        distributed.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(hours=1))
    try:
        yield Processes(rank, world, chosen)
    finally:
        if world > 1:
            distributed.destroy_process_group()


_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
"""What torchrun and accelerate tell every process, and what holds without them."""


def wrap(unet: Any, processes: Processes, parallel: str, images: bool) -> nn.Module:
    """The U-Net as the training step calls it.

    Args:
        unet: on its device, its gradients chosen.
        parallel: `ddp` or `fsdp`; the latter shards the U-Net itself, in place, with one process too.
        images: whether some steps are images, in which temporal layers have no part and get no gradient.
    """
    if parallel == "fsdp":
        if not distributed.is_initialized():
            raise ValueError("parallel is fsdp, and there is one process; start several with torchrun, or set parallel to ddp")
        shard(unet)
        return unet
    if processes.world == 1:
        return unet
    return DistributedDataParallel(
        unet,
        device_ids=[processes.device] if processes.device.type == "cuda" else None,
        find_unused_parameters=images,
        gradient_as_bucket_view=True,
    )


@contextlib.contextmanager
def gradients_meet(model: nn.Module, now: bool) -> Iterator[None]:
    """Whether the gradients of the backward pass inside are brought together between processes: only in a step's last one."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)
    with contextlib.nullcontext() if now or not isinstance(model, DistributedDataParallel) else model.no_sync():
        yield


@contextlib.contextmanager
def signals_ask(ask: Callable[[], None]) -> Iterator[None]:
    """Inside, SIGINT and SIGTERM ask to stop at the next log line; a second one ends at once, as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, _frame: FrameType | None) -> None:
        ask()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
