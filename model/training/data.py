"""Batches for training from a dataset of clips: by step, the same on every machine, in processes that read ahead.

    options = DataOptions(seed=1, caption_dropout=0.1)
    with Loader("data/sample", [Bucket(16, 64, 112, batch=4, fps=8)], options, rank=0, world=1) as loader:
        print(loader.table.text())
        for batch in loader.iterate(start, stop):
            batch["video"]      # uint8 [4, 3, 16, 64, 112], 0 to 255
            batch["captions"]   # list of 4 strings

What step 1,000 consists of follows from the seed, the step, the rank and the number of processes alone: to resume, begin there.
"""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from videofactory.shards.storage import Storage

from .buckets import BucketError, BucketTable, assign
from .clips import Clips
from .latents import LatentSource
from .options import Bucket, DataOptions
from .plan import Plan, Stream
from .samples import Samples, Source, Task, VideoSource

__all__ = ["BadClipsError", "Bucket", "DataOptions", "Loader", "make_plan"]

logger = logging.getLogger(__name__)

_FEWEST_BAD = 10
"""So many clips may always be unreadable, however few there are."""


class BadClipsError(ValueError):
    """More clips are unreadable than `max_bad_fraction` allows; the message names the first few."""


class Loader:
    """Batches by step.

    Args:
        dataset: path or URI of a dataset.
        buckets: shapes of samples, at least one.
        options: how clips become batches.
        rank: number of this process, 0 to `world` - 1.
        world: number of processes; each takes a batch per step, all of the same bucket.
        latents: folder that `python -m videofactory.model.precompute` wrote; batches then have `latents` in place of `video`.
        vae: fingerprint of the VAE that the latents must come from (`latents.fingerprint(vae)`); required with `latents`.

    Attributes:
        table: which bucket got how many clips, and how many were dropped, by reason.
        bad: error of every clip that this process could not read so far, by `clip_id`.
        waited: seconds that `iterate` has waited for batches so far.

    Raises:
        DatasetError: the dataset holds no such clip, a shard is missing or of another size, or captions are not there.
        BucketError: a bucket has no clip, or fewer than a global batch, or the buckets and `image_share` do not fit together.
        LatentsError: the latents were made with another VAE, other buckets or settings, or are not complete.
        ValueError: the rank is none of the world's.
    """

    def __init__(
        self,
        dataset: Storage | str,
        buckets: Sequence[Bucket],
        options: DataOptions | None = None,
        *,
        rank: int = 0,
        world: int = 1,
        latents: str | None = None,
        vae: str | None = None,
    ) -> None:
        if not 0 <= rank < world:
            raise ValueError(f"rank {rank} of {world} processes; 0 to {world - 1} is wanted")
        self.options = options or DataOptions()
        self.rank, self.world = rank, world
        self._clips = Clips(dataset, self.options)
        self.table = assign(buckets, self._clips.measures, self.options, world)
        self.table.check()
        self._plan = make_plan(self._clips, self.table, self.options)
        source: Source
        if latents is None:
            source = VideoSource(self._clips, self.options)
        else:
            source = LatentSource(latents, self._clips, self.table, self.options, vae)
        self._samples = Samples(self._clips, self.table, self.options, source)
        self.bad: dict[str, str] = {}
        self.waited = 0.0
        self._running: list[Any] = []

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def captions(self, most: int = 4096) -> tuple[list[str], int]:
        """Captions of the clips that are used, at most so many, spread evenly over all of them; and how many these are."""
        return self._clips.captions.spread(np.unique(np.concatenate([share.clips for share in self.table.shares])), most)

    def at(self, step: int) -> dict[str, Any]:
        """This rank's batch of a step, made in this process.

        Returns:
            `video`, uint8 `[batch, 3, frames, height, width]`, RGB, 0 to 255 (or, with latents, `latents`, float32
            `[batch, channels, frames, height, width]`, sampled and scaled as the U-Net takes them); `captions`, a list of texts,
            empty where dropped; `clip_ids`; `bucket`, the `Bucket`; `step`.

        Raises:
            BadClipsError: too many clips are unreadable.
            DatasetError: a shard cannot be read.
        """
        return self._checked(self._samples[self._task(step)])

    def iterate(self, start: int = 0, stop: int | None = None) -> Iterator[dict[str, Any]]:
        """The batches of the steps `start` up to, without, `stop` (`None`: for ever), made ahead by `workers` processes.

        The processes live as long as the iteration: they end when it does, when it is closed, and with the loader.

        Raises: as `at`.
        """
        options = self.options
        context = options.start_method or ("fork" if self._clips.storage.is_local else "spawn")
        loader = torch.utils.data.DataLoader(
            self._samples,
            batch_size=None,
            sampler=_Tasks(self, start, stop),
            num_workers=options.workers,
            prefetch_factor=options.prefetch if options.workers else None,
            multiprocessing_context=context if options.workers else None,
            pin_memory=options.pin_memory,
            worker_init_fn=_leave_signals_to_the_trainer,
            # Or it would draw from the global state, and what is trained would depend on how often a run was resumed.
            generator=torch.Generator(),
        )
        running = [iter(loader)]
        self._running.append(running)
        try:
            while running:
                begin = time.perf_counter()
                batch = next(running[0], None)
                self.waited += time.perf_counter() - begin
                if batch is None:
                    return
                yield self._checked(batch)
        finally:
            # Its processes end when the last reference goes.
            running.clear()
            self._running = [other for other in self._running if other is not running]

    def close(self) -> None:
        """End the processes of every iteration; those iterations give no further batch."""
        for running in self._running:
            running.clear()
        self._running.clear()

    def _task(self, step: int) -> Task:
        turn = self._plan.at(step)
        batch = len(turn.members) // self.world
        first = self.rank * batch
        return Task(step, turn.bucket, first, turn.members[first : first + batch])

    def _checked(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`batch` without `bad`, after noting what it says."""
        for clip, error in batch.pop("bad"):
            if clip not in self.bad:
                logger.warning("clip %s is replaced by another: %s", clip, error)
                self.bad[clip] = error
        allowed = max(_FEWEST_BAD, int(self.options.max_bad_fraction * self.table.used))
        if len(self.bad) > allowed:
            first = "; ".join(f"{clip}: {error}" for clip, error in list(self.bad.items())[:3])
            raise BadClipsError(
                f"{len(self.bad)} of {self.table.used} clips are unreadable, and {allowed} may be (max_bad_fraction = "
                f"{self.options.max_bad_fraction:g}, at least {_FEWEST_BAD}); the first are {first}. Run `videofactory verify` on "
                f"{self._clips.storage.uri}, or raise max_bad_fraction"
            )
        return batch


def _leave_signals_to_the_trainer(_worker: int) -> None:
    """A signal to the whole process group asks the trainer to stop, which needs its workers for that; they end with it."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class _Tasks(torch.utils.data.Sampler[Task]):
    """The tasks of a range of steps; only the process that trains computes the order."""

    def __init__(self, loader: Loader, start: int, stop: int | None) -> None:
        self._loader, self._start, self._stop = loader, start, stop

    def __iter__(self) -> Iterator[Task]:
        step = self._start
        while self._stop is None or step < self._stop:
            yield self._loader._task(step)
            step += 1


def make_plan(clips: Clips, table: BucketTable, options: DataOptions) -> Plan:
    """The order of the clips of `table`.

    Raises:
        BucketError: the buckets and `image_share` do not fit together.
    """
    streams = []
    for share in table.shares:
        shards = clips.shards[share.clips] if options.order == "shards" else None
        streams.append(Stream(len(share.clips), options.seed, share.bucket.name, shards, options.window))
    batches = [table.global_batch(share) for share in table.shares]
    images = [share.bucket.is_image for share in table.shares]
    try:
        return Plan(streams, batches, images, options.image_share, options.seed)
    except ValueError as error:
        raise BucketError(str(error)) from None
