"""Which clip goes to which bucket, a table of it, and an error where a bucket stays empty; nothing is dropped in silence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .options import Bucket, DataOptions

if TYPE_CHECKING:
    from rich.table import Table

NO_CAPTION = "no caption"

# In the order of the checks: a clip is counted where it came furthest.
REASONS = ("not described", "aspect too far", "too small", "too slow", "too short")
_FITS = len(REASONS)

_WAYS_OUT = {
    "not described": "the index lacks their sizes: run `videofactory verify`",
    "aspect too far": "add a bucket of their aspect ratio, or raise max_aspect_change",
    "too small": "add a smaller bucket, or raise max_upscale",
    "too slow": "lower the bucket's fps",
    "too short": "lower the bucket's frames, or raise its fps (fewer seconds)",
}

_SLOWEST = 0.8
"""Of the bucket's frames per second a clip must have at least this share, or more than every fifth frame would be shown twice."""

_ALIKE = 0.05
"""Aspect ratios nearer than this (natural logarithm) count as equal, so that rounding to multiples of 8 decides nothing."""


class BucketError(ValueError):
    """Buckets and clips do not fit together; the message names the numbers and the ways out."""


@dataclass(frozen=True)
class Measures:
    """What decides the bucket of each clip: one number per clip in each array, 0 where it is not known.

    Attributes:
        width, height: in pixels.
        frames: number of frames.
        fps: frames per second.
        captioned: whether the clip has a caption, or needs none.
    """

    width: np.ndarray
    height: np.ndarray
    frames: np.ndarray
    fps: np.ndarray
    captioned: np.ndarray


@dataclass(frozen=True)
class Share:
    """What a bucket got.

    Attributes:
        bucket: the bucket.
        clips: numbers of its clips, rising, int64.
        fitting: how many clips would fit, of which others may have gone to a bucket that fits better.
        dropped: clips that fit no bucket of this kind and came furthest with this one, by reason.
    """

    bucket: Bucket
    clips: np.ndarray
    fitting: int
    dropped: dict[str, int]


@dataclass(frozen=True)
class BucketTable:
    """The clips of every bucket.

    Attributes:
        shares: one per bucket, in their order.
        total: clips that were looked at.
        uncaptioned: clips among them that were dropped because they have no caption.
        world: processes that take a batch each.
    """

    shares: tuple[Share, ...]
    total: int
    uncaptioned: int
    world: int

    @property
    def used(self) -> int:
        """Clips that are in some bucket; a clip can be in one of videos and in one of images."""
        return len(np.unique(np.concatenate([share.clips for share in self.shares]))) if self.shares else 0

    def global_batch(self, share: Share) -> int:
        """Samples of a step of this bucket, over all processes."""
        return share.bucket.batch * self.world

    def check(self) -> None:
        """Whether every bucket can train.

        Raises:
            BucketError: one has no clip, or fewer than one global batch.
        """
        for share in self.shares:
            if not len(share.clips):
                raise BucketError(self._why_empty(share))
            batch = self.global_batch(share)
            if len(share.clips) < batch:
                fitting = len(share.clips) // self.world
                smaller = f"lower its batch to {fitting}, " if fitting else "use fewer processes, "
                raise BucketError(
                    f"bucket {share.bucket.name} has {len(share.clips)} clips, fewer than one global batch of {batch} (batch "
                    f"{share.bucket.batch} x {self.world} processes), and could never fill it; {smaller}drop the bucket, or "
                    f"take more clips\n{self.text()}"
                )

    def _why_empty(self, share: Share) -> str:
        if not self.total:
            return f"bucket {share.bucket.name} has no clips, for none were selected; look at split and where"
        reasons = [(NO_CAPTION, self.uncaptioned), *share.dropped.items()]
        found = ", ".join(f"{reason}: {count}" for reason, count in reasons if count)
        ways = [_WAYS_OUT[reason] for reason, count in share.dropped.items() if count]
        if self.uncaptioned:
            ways.append("name other captions, or set uncaptioned to empty")
        if share.fitting:
            found = f"{found}{', ' if found else ''}{share.fitting} fit and fit another bucket better"
            ways.append("drop this bucket, or the other one")
        return (
            f"bucket {share.bucket.name} has none of the {self.total} clips ({found or 'all fell nearer to another bucket'}); "
            f"{'; '.join(ways) or 'drop the bucket, or change its shape'}\n{self.text()}"
        )

    def _columns(self) -> list[str]:
        return [reason for reason in REASONS if any(share.dropped.get(reason) for share in self.shares)]

    def rows(self) -> list[list[str]]:
        """The table: a row of headings, one row per bucket, one of all."""
        reasons = self._columns()
        rows = [["bucket", "batch", "clips", "batches per epoch", *reasons]]
        for share in self.shares:
            batch = self.global_batch(share)
            counts = [str(share.dropped.get(reason, 0)) for reason in reasons]
            rows.append([share.bucket.name, str(batch), str(len(share.clips)), f"{len(share.clips) / batch:.1f}", *counts])
        totals = [str(sum(share.dropped.get(reason, 0) for share in self.shares)) for reason in reasons]
        batches = sum(len(share.clips) / self.global_batch(share) for share in self.shares)
        return [*rows, ["all", "", str(sum(len(share.clips) for share in self.shares)), f"{batches:.1f}", *totals]]

    def summary(self) -> str:
        """How many clips are used, and how many have no caption, in a sentence."""
        return f"{self.used} of {self.total} clips are used; {self.uncaptioned} were dropped because they have no caption"

    def text(self) -> str:
        """The table as plain text, for logs and errors."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = [
            "  ".join(
                cell.rjust(width) if column else cell.ljust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            )
            for row in rows
        ]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])

    def rich(self) -> Table:
        """The table for a `rich` console."""
        from rich.table import Table

        head, *body, total = self.rows()
        table = Table(title="Buckets", caption=self.summary())
        for number, name in enumerate(head):
            table.add_column(name, justify="right" if number else "left")
        for row in body:
            table.add_row(*row)
        table.add_section()
        table.add_row(*total)
        return table


def assign(buckets: Sequence[Bucket], measures: Measures, options: DataOptions, world: int = 1) -> BucketTable:
    """Every clip to the bucket of videos that fits it best, and to the bucket of images that does.

    A clip fits where it has enough frames at the bucket's rate, need not be enlarged by more than `max_upscale`, and has an
    aspect ratio within `max_aspect_change`. Of several, the nearest aspect ratio wins, then the most frames, then the most pixels.

    Args:
        buckets: at least one, no two of one name.
        measures: of the clips.
        options: limits.
        world: processes that take a batch each.

    Raises:
        BucketError: there is no bucket, or two are of one shape. (Call `check` of the result for what the clips cause.)
    """
    names = [bucket.name for bucket in buckets]
    if not names:
        raise BucketError("there is no bucket; name at least one, for example frames 16, height 192, width 344, batch 4")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BucketError(f"bucket {twice[0]} is there twice; give one of them another shape, or drop it")
    shares: dict[str, Share] = {}
    for kind in (False, True):
        group = [bucket for bucket in buckets if bucket.is_image == kind]
        shares.update({share.bucket.name: share for share in _assign(group, measures, options)})
    total, uncaptioned = len(measures.width), int((~measures.captioned).sum())
    return BucketTable(tuple(shares[name] for name in names), total, uncaptioned, world)


def _assign(group: Sequence[Bucket], measures: Measures, options: DataOptions) -> list[Share]:
    """The shares of buckets of one kind, of which a clip goes to at most one."""
    count = len(measures.width)
    best, furthest = np.full(count, -1), np.full(count, -1)
    distance, stage = np.full(count, np.inf), np.full(count, -1)
    fitting = {}
    # Of equal distance the first stays: the largest buckets go first.
    order = sorted(range(len(group)), key=lambda b: (-group[b].frames, -group[b].height * group[b].width))
    for number in order:
        stages, change = _stages(group[number], measures, options)
        nearness = np.floor(change / _ALIKE)
        fits = (stages == _FITS) & measures.captioned
        fitting[number] = int(fits.sum())
        better = fits & (nearness < distance)
        best[better], distance[better] = number, nearness[better]
        further = stages > stage
        furthest[further], stage[further] = number, stages[further]
    lost = (best < 0) & measures.captioned
    shares = []
    for number, bucket in enumerate(group):
        mine = lost & (furthest == number)
        dropped = {reason: int((mine & (stage == code)).sum()) for code, reason in enumerate(REASONS)}
        shares.append(Share(bucket, np.flatnonzero(best == number), fitting[number], dropped))
    return shares


def _stages(bucket: Bucket, measures: Measures, options: DataOptions) -> tuple[np.ndarray, np.ndarray]:
    """How far each clip comes with a bucket (the number of the reason against it, or `_FITS`), and the change of aspect (log)."""
    known = (measures.width > 0) & (measures.height > 0) & (measures.frames > 0) & (measures.fps > 0)
    width, height, fps = (np.where(known, values, 1) for values in (measures.width, measures.height, measures.fps))
    change = np.abs(np.log(width / height) - np.log(bucket.width / bucket.height))
    scale = np.maximum(bucket.width / width, bucket.height / height)
    slow = np.zeros(len(known), bool)
    if bucket.fps is None or bucket.is_image:
        short = measures.frames < bucket.frames
    else:
        slow = fps < _SLOWEST * bucket.fps
        # A hundredth of a frame: 29.97 is not 30, and times are rounded.
        short = (measures.frames - 1) / fps < (bucket.frames - 1) / bucket.fps - 0.01 / fps
    reasons = [~known, change > np.log(options.max_aspect_change) + 1e-9, scale > options.max_upscale + 1e-9, slow, short]
    return np.select(reasons, range(len(reasons)), _FITS), change
