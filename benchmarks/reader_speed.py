"""Reading clips for training against a plain PyAV loop over the same clips as files of their own: clips per second of one core.

Ours: `model.training.data.Loader` without workers, from the shards, every clip's hash checked. Theirs: open the file, decode from
its beginning, lead-in included, up to the last frame that is wanted, and scale the wanted ones; which these are it is told. Both
with one decoding thread, and the batches are equal bit by bit, which is checked first.
"""

from __future__ import annotations

import resource
import statistics
from pathlib import Path

import av
import numpy as np
import torch

from videofactory.curation.sources import find_sources
from videofactory.model.training.clips import Clips
from videofactory.model.training.data import Bucket, DataOptions, Loader
from videofactory.model.training.frames import window_of
from videofactory.model.training.plan import draws
from videofactory.model.training.samples import VideoSource
from videofactory.pipelines.build import build
from videofactory.pipelines.recipe import Recipe

from .cpu import processor_seconds
from .film import Film, excerpts
from .outcome import Outcome

GOAL = 0.9
"""The reader's clips per second are to be at least this part of the plain loop's."""

SECONDS = 60
"""Of the film that become clips."""

RULES = {"duration": "duration >= 2.5"}

BUCKETS = {
    "16 frames at 8 fps from anywhere": Bucket(16, 192, 344, batch=4, fps=8),
    "16 frames over the whole clip": Bucket(16, 192, 344, batch=4),
}

OPTIONS = DataOptions(split=None, uncaptioned="empty", workers=0)


def measure(film: Film, folder: Path, rounds: int) -> list[Outcome]:
    """One outcome for each way of taking frames."""
    dataset = str(folder / "dataset")
    build(Recipe(rules=RULES), find_sources([str(excerpts(film, folder, 1, SECONDS)[0])]), dataset, plainly=True)
    clips = Clips(dataset, OPTIONS)
    source = VideoSource(clips, OPTIONS)
    files = {}
    for number in range(len(clips)):
        files[clips.clip_id(number)] = folder / f"{clips.clip_id(number)}.mp4"
        files[clips.clip_id(number)].write_bytes(source.encoded(number))
    return [_against_plain_loop(what, dataset, bucket, files, rounds) for what, bucket in BUCKETS.items()]


def _against_plain_loop(what: str, dataset: str, bucket: Bucket, files: dict[str, Path], rounds: int) -> Outcome:
    loader = Loader(dataset, [bucket], OPTIONS)
    steps = -(-loader.table.used // bucket.batch)
    wanted = []
    for batch in loader.iterate(0, steps):  # also warms every import and the files' pages
        wanted.append([_wanted(files[clip], bucket, batch["step"], place) for place, clip in enumerate(batch["clip_ids"])])
        if not torch.equal(batch["video"], plain_batch(wanted[-1], bucket)):
            raise ValueError(f"step {batch['step']} of bucket {bucket.name}: the two read different pictures")
    clips = steps * bucket.batch
    ours, peer = [], []
    for _ in range(rounds):
        ours.append(clips / processor_seconds(resource.RUSAGE_SELF, lambda: sum(1 for _ in loader.iterate(0, steps))))
        peer.append(clips / processor_seconds(resource.RUSAGE_SELF, lambda: [plain_batch(some, bucket) for some in wanted]))
    fast, floor = statistics.median(ours), statistics.median(peer)
    return Outcome(
        what=f"reader, {what}, to {bucket.width}x{bucket.height}",
        ours=f"{fast:.2f} clips/s per core",
        peer=f"{floor:.2f} clips/s (plain PyAV loop over files)",
        ratio=fast / floor,
        goal=GOAL,
        at_least=True,
        note=f"{clips} samples of {loader.table.used} clips; rounds "
        + ", ".join(f"{a / b:.2f}" for a, b in zip(ours, peer, strict=True)),
    )


Wanted = tuple[Path, list[int]]
"""A file, and the numbers of the frames that a sample takes of it."""


def _wanted(file: Path, bucket: Bucket, step: int, place: int) -> Wanted:
    with av.open(str(file)) as container:
        times = np.array([frame.time for frame in container.decode(video=0)])
    chance = float(draws(4, OPTIONS.seed, "sample", step, place, 0)[0])
    return file, window_of(times, bucket, chance).tolist()


def plain_batch(wanted: list[Wanted], bucket: Bucket) -> torch.Tensor:
    """The samples of a batch, uint8 `[batch, 3, frames, height, width]`, decoded in the plainest way."""
    return torch.stack([_plain_sample(file, numbers, bucket) for file, numbers in wanted])


def _plain_sample(file: Path, numbers: list[int], bucket: Bucket) -> torch.Tensor:
    pictures = {}
    with av.open(str(file)) as container:
        container.streams.video[0].thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                scale = max(bucket.height / frame.height, bucket.width / frame.width)
                size = {"width": round(frame.width * scale), "height": round(frame.height * scale)}
                picture = frame.reformat(**size, format="rgb24", interpolation="BICUBIC").to_ndarray()
                top, left = (picture.shape[0] - bucket.height) // 2, (picture.shape[1] - bucket.width) // 2
                pictures[number] = picture[top : top + bucket.height, left : left + bucket.width]
            if number == numbers[-1]:
                break
    return torch.from_numpy(np.stack([pictures[number] for number in numbers])).permute(3, 0, 1, 2)
