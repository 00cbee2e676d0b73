"""Batches: clips read from the shards and decoded, with captions. All chance comes from (seed, step, place in the global batch)."""

from __future__ import annotations

import hashlib
import logging
import tarfile
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from videofactory.shards.reader import members_of
from videofactory.shards.storage import Storage

from .buckets import BucketTable
from .clips import Clips, DatasetError
from .frames import ClipError, decode
from .options import Bucket, DataOptions
from .plan import draws

logger = logging.getLogger(__name__)

_ATTEMPTS = 100
"""Clips that are tried for one sample; the run stops at `max_bad_fraction` long before."""

_READS = 3
"""How often a read that the file system refuses is tried, half a second and then a second apart."""


@dataclass(frozen=True)
class Task:
    """What a process shall make: the part of a step's global batch that one rank trains on.

    Attributes:
        step: number of the step.
        bucket: number of the bucket.
        first: place of the part's first sample in the global batch.
        members: clip numbers in the bucket, int64 `[batch]`.
    """

    step: int
    bucket: int
    first: int
    members: np.ndarray


class Source(Protocol):
    """Where samples come from: videos of the shards, or latents made beforehand."""

    key: str

    def read(self, clip: int, bucket: Bucket, chances: np.ndarray, *key: int | str) -> torch.Tensor:
        """A sample of the clip number `clip`.

        Args:
            clip: number in `Clips`.
            bucket: the sample's shape.
            chances: three numbers in [0, 1): where in the clip, mirrored or not, and one that is left.
            key: decides further chance, with `draws`.

        Raises:
            ClipError: this clip cannot give one.
        """


class ShardFiles:
    """Reads ranges of shards and keeps the last few shards open; a pickled copy opens its own.

    Args:
        storage: the dataset.
        count: how many stay open.
    """

    def __init__(self, storage: Storage, count: int = 16) -> None:
        self._storage, self._count = storage, count
        self._files: OrderedDict[str, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type[ShardFiles], tuple[Storage, int]]:
        return ShardFiles, (self._storage, self._count)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes of the file `name` from `offset`; fewer where it ends before.

        Raises:
            DatasetError: the file cannot be read, three times.
        """
        for attempt in range(_READS):
            try:
                return self._once(name, offset, size)
            except OSError as error:
                # Not the clip's fault: an object store that is away for a moment must not change the samples.
                self._files.pop(name, None)
                if attempt == _READS - 1:
                    raise DatasetError(f"{name} in {self._storage.uri} cannot be read: {error}") from error
                time.sleep(0.5 * (attempt + 1))
        raise AssertionError("unreachable")

    def _once(self, name: str, offset: int, size: int) -> bytes:
        if name not in self._files:
            self._files[name] = self._storage.open(name)
        self._files.move_to_end(name)
        while len(self._files) > self._count:
            self._files.popitem(last=False)[1].close()
        return bytes(self._files[name].read_at(size, offset))


class VideoSource:
    """Samples decoded from the shards: uint8 `[3, frames, height, width]`."""

    key = "video"

    def __init__(self, clips: Clips, options: DataOptions) -> None:
        self._clips, self._options = clips, options
        self._files = ShardFiles(clips.storage)

    def read(self, clip: int, bucket: Bucket, chances: np.ndarray, *key: int | str) -> torch.Tensor:
        """A random window of the clip; see `Source.read`."""
        video = decode(self.encoded(clip), bucket, float(chances[0]), self._options.decode_threads)
        return video.flip(-1) if self._options.flip and chances[1] < 0.5 else video

    def encoded(self, clip: int) -> bytes:
        """The clip as a file, after a check of its hash.

        Raises:
            ClipError: the bytes in the shard are not those that were written.
            DatasetError: the shard cannot be read.
        """
        clips, name = self._clips, self._clips.clip_id(clip)
        offset, size = int(clips.offsets[clip]), int(clips.sizes[clip])
        shard = clips.shard_names[clips.shards[clip]]
        try:
            video = members_of(self._files.read(shard, offset, size)).get(f"{name}.mp4")
        except tarfile.TarError as error:
            raise ClipError(f"{shard} holds no sample at {offset}: {error}") from error
        if video is None:
            raise ClipError(f"{shard} holds another sample at {offset}")
        expected = clips.sha256[clip].as_py()
        if expected and hashlib.sha256(video).hexdigest() != expected:
            raise ClipError(f"its bytes in {shard} at {offset} are not those that were written (SHA-256 differs)")
        return video


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Batches by task; it holds no state that a result depends on, so any process may make any batch.

    Args:
        clips: the clips.
        table: which clips are in which bucket.
        options: how clips become samples.
        source: where samples come from.
    """

    def __init__(self, clips: Clips, table: BucketTable, options: DataOptions, source: Source) -> None:
        self._clips, self._options, self._source = clips, options, source
        self._shares = table.shares

    def __getitem__(self, task: Task) -> dict[str, Any]:
        """One rank's part of a batch: what `Loader.at` gives, and `bad`, the (clip_id, error) of clips that were replaced."""
        share = self._shares[task.bucket]
        bad: list[tuple[str, str]] = []
        batch: torch.Tensor | None = None
        captions, names = [], []
        for number, member in enumerate(task.members.tolist()):
            place = task.first + number
            clip, sample = self._sample(task, place, int(share.clips[member]), bad)
            if batch is None:
                batch = torch.empty(len(task.members), *sample.shape, dtype=sample.dtype)
            batch[number] = sample
            choice, dropped = draws(2, self._options.seed, "caption", task.step, place)
            kept = dropped >= self._options.caption_dropout
            captions.append(self._clips.captions.draw(clip, float(choice)) if kept else "")
            names.append(self._clips.clip_id(clip))
        return {
            self._source.key: batch,
            "captions": captions,
            "clip_ids": names,
            "bucket": share.bucket,
            "step": task.step,
            "bad": bad,
        }

    def _sample(self, task: Task, place: int, clip: int, bad: list[tuple[str, str]]) -> tuple[int, torch.Tensor]:
        """The sample at a place of the global batch, and the clip it came from: `clip`, or one that chance puts there."""
        share, seed = self._shares[task.bucket], self._options.seed
        for attempt in range(_ATTEMPTS):
            key = (seed, "sample", task.step, place, attempt)
            chances = draws(4, *key)
            try:
                return clip, self._source.read(clip, share.bucket, chances[:3], *key)
            except ClipError as error:
                bad.append((self._clips.clip_id(clip), str(error)))
                clip = int(share.clips[int(chances[3] * len(share.clips))])
        raise DatasetError(f"{_ATTEMPTS} clips of bucket {share.bucket.name} in a row are unreadable, last {': '.join(bad[-1])}")
