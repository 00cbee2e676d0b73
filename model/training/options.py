"""What the data code is told: the buckets, and how clips become samples. Plain values, checked when they are made.

A run's configuration (`settings.py`) declares what users set; these are the values that follow from it, and the ones of a notebook.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

FACTOR = 8
"""Pixels per latent position, in height and width, of the VAE of every Stable Diffusion model."""

LARGEST = 2**16
"""Of frames, pixels and samples each; more fits no memory and overflows where sizes are multiplied."""

_BUCKET = re.compile(r"(\d+)x(\d+)x(\d+)(?:@(\d+(?:\.\d+)?))?(?::(\d+))?")


@dataclass(frozen=True)
class Bucket:
    """Samples of one shape, which make up whole batches.

    Args:
        frames: frames of a sample, at least 1. With 1 it is a bucket of images: random frames of clips.
        height, width: size of the frames in pixels, multiples of 8.
        batch: samples that each process takes per step, at least 1.
        fps: frames per second that are taken from a random part of a clip; `None` spreads the frames over the whole clip.

    Raises:
        ValueError: a number is out of its range.
    """

    frames: int
    height: int
    width: int
    batch: int = 1
    fps: float | None = None

    def __post_init__(self) -> None:
        for name in ("frames", "height", "width", "batch"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
                raise ValueError(f"a bucket's {name} is {value!r}; a whole number from 1 to {LARGEST} is wanted")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value % FACTOR:
                below = value // FACTOR * FACTOR
                near = f"{below} or {below + FACTOR}" if below else str(FACTOR)
                raise ValueError(f"a bucket's {name} is {value}; a multiple of {FACTOR} is wanted, the VAE's factor: take {near}")
        if self.fps is not None and not 0 < self.fps <= 1000:
            raise ValueError(f"a bucket's fps is {self.fps!r}; above 0 and up to 1000 frames per second, or None, is wanted")

    @property
    def name(self) -> str:
        """`FRAMESxHEIGHTxWIDTH[@FPS]`, for example `16x192x344@8`: what a sample is like, whatever the batch."""
        # The frame of an image may come from anywhere in a clip, at whatever rate.
        rate = "" if self.fps is None or self.is_image else f"@{self.fps:g}"
        return f"{self.frames}x{self.height}x{self.width}{rate}"

    @property
    def is_image(self) -> bool:
        """Whether its samples are single frames."""
        return self.frames == 1

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """The bucket that `FRAMESxHEIGHTxWIDTH[@FPS][:BATCH]` names.

        Raises:
            ValueError: the text is not of this form, or a number is out of its range.
        """
        found = _BUCKET.fullmatch(text.strip())
        if found is None:
            raise ValueError(f"bucket {text!r} is not of the form FRAMESxHEIGHTxWIDTH[@FPS][:BATCH], for example 16x192x344@8:4")
        frames, height, width, fps, batch = found.groups()
        return cls(int(frames), int(height), int(width), int(batch or 1), float(fps) if fps else None)


@dataclass(frozen=True)
class DataOptions:
    """How a dataset's clips become batches.

    Args:
        seed: of the order, the windows, the captions and their dropout; at least 0.
        split: train, val or test; `None` takes all.
        where: condition in SQL on the columns of the clips.
        order: `shuffled`, clips in any order; `shards`, shards in random order and clips shuffled within `window` of them, so
            that few files are read at a time.
        window: shards that are shuffled together where the order is `shards`, at least 1.
        image_share: share of the steps that go to buckets of images, 0 to below 1 (1 where there are no others).
        max_upscale: factor up to which a smaller clip may be enlarged; 1 enlarges none.
        max_aspect_change: factor between the aspect ratios of clip and bucket up to which a clip is cropped to fit, at least 1.
        captions: where captions come from: `caption`, the column of the clips, and `SIDECAR.COLUMN`, the column (texts, or
            lists of texts) of the tables `index/SIDECAR`, by `clip_id`. Of several captions of a clip, one is drawn per visit.
        uncaptioned: what becomes of clips without a caption: `drop`, or `empty`, the empty text.
        caption_dropout: probability that a sample's caption is the empty text, which guidance needs.
        flip: mirror every other sample, by chance. Captions that say left or right, and letters, become wrong.
        max_bad_fraction: share of the clips (but at least 10 of them) that may be unreadable before the run stops, 0 to 1.
        workers: processes that read and decode; 0 does it in the process that trains.
        prefetch: batches that each of them holds ready, at least 1.
        decode_threads: threads of one decoder, at least 1.
        start_method: how the processes start; `None`: fork for a dataset on a disk, spawn for an object store, whose clients
            do not survive a fork.
        pin_memory: hand batches over in page-locked memory, from which copies to a GPU are faster.

    Raises:
        ValueError: a value is out of its range.
    """

    seed: int = 0
    split: str | None = "train"
    where: str | None = None
    order: Literal["shuffled", "shards"] = "shuffled"
    window: int = 8
    image_share: float = 0.0
    max_upscale: float = 1.0
    max_aspect_change: float = 1.5
    captions: tuple[str, ...] = ("caption",)
    uncaptioned: Literal["drop", "empty"] = "drop"
    caption_dropout: float = 0.0
    flip: bool = False
    max_bad_fraction: float = 0.01
    workers: int = 2
    prefetch: int = 2
    decode_threads: int = 1
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    pin_memory: bool = False

    def __post_init__(self) -> None:
        known = {
            "split": (None, "train", "val", "test"),
            "order": ("shuffled", "shards"),
            "uncaptioned": ("drop", "empty"),
            "start_method": (None, "fork", "spawn", "forkserver"),
        }
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; one of {', '.join(map(repr, values))} is wanted")
        ranges = {
            "seed": (0, math.inf),
            "window": (1, math.inf),
            "image_share": (0, 1),
            "max_upscale": (1e-3, 1e3),
            "max_aspect_change": (1, math.inf),
            "caption_dropout": (0, 1),
            "max_bad_fraction": (0, 1),
            "workers": (0, 1024),
            "prefetch": (1, math.inf),
            "decode_threads": (1, 1024),
        }
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name} is {getattr(self, name)!r}; {low} to {high} is wanted")
        if not self.captions:
            raise ValueError(f"captions is {self.captions!r}; a tuple of at least one of caption and SIDECAR.COLUMN is wanted")
