"""The shard writer against plain copying: the same bytes, from memory to the same disk, flushed, in as many files."""

from __future__ import annotations

import hashlib
import os
import resource
import shutil
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from videofactory.curation.signals import columns
from videofactory.shards.lease import Lease
from videofactory.shards.schema import clip_id, source_id
from videofactory.shards.storage import Storage
from videofactory.shards.writer import ShardWriter

from .cpu import processor_seconds
from .outcome import Outcome

CLIP_BYTES = 2 << 20
CLIPS_PER_SHARD = 128
DISTINCT = 32
"""Different clips held in memory; more would measure the memory."""

Bundle = list[dict[str, Any]]


def measure(folder: Path, rounds: int, shards: int = 2) -> list[Outcome]:
    """Write `shards` shards of 128 clips of 2 MiB, and the same bytes as plain files of that size, in turn."""
    rng = np.random.default_rng(3)
    clips = [rng.bytes(CLIP_BYTES) for _ in range(DISTINCT)]
    bundles = [list(_rows(clips, number)) for number in range(shards)]
    ours, peer = _Times(), _Times()
    for number in range(rounds):
        peer.take(folder / f"copy{number}", bundles)
        ours.take(folder / f"shards{number}", bundles)
    size = shards * CLIPS_PER_SHARD * CLIP_BYTES / 1e6
    wall, floor = statistics.median(ours.wall), statistics.median(peer.wall)
    return [
        Outcome(
            what=f"writer, {size:.0f} MB in clips of 2 MiB, flushed to the disk",
            ours=f"{size / wall:.0f} MB/s",
            peer=f"{size / floor:.0f} MB/s (plain copying)",
            ratio=wall / floor,
            note=f"wall time; CPU s {statistics.median(ours.cpu):.2f} against {statistics.median(peer.cpu):.2f}, of which MD5 "
            f"{_md5_seconds(bundles):.2f}; rounds "
            + ", ".join(f"{a / b:.2f}" for a, b in zip(ours.wall, peer.wall, strict=True)),
        )
    ]


class _Times:
    """Seconds of each round."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []

    def take(self, folder: Path, bundles: list[Bundle]) -> None:
        """Write once, into a new folder that is removed again; its name says how."""
        write = _write if folder.name.startswith("shards") else _copy
        folder.mkdir(parents=True)
        os.sync()  # what earlier work left in memory is not to be waited for here
        began = time.monotonic()
        self.cpu.append(processor_seconds(resource.RUSAGE_SELF, lambda: write(folder, bundles)))
        self.wall.append(time.monotonic() - began)
        shutil.rmtree(folder)


def _write(folder: Path, bundles: list[Bundle]) -> None:
    storage = Storage(folder)
    names = [column.name for column in columns()]
    with Lease(storage) as lease:
        for number, bundle in enumerate(bundles):
            writer = ShardWriter(storage, lease.run, f"{lease.run}-1-{number:06d}", names)
            for row in bundle:
                writer.add(row)
            writer.commit()


def _copy(folder: Path, bundles: list[Bundle]) -> None:
    for number, bundle in enumerate(bundles):
        with (folder / f"{number}.tar").open("wb") as file:
            for row in bundle:
                file.write(row["video"])
            file.flush()
            os.fsync(file.fileno())


def _rows(clips: list[bytes], bundle: int) -> Iterator[dict[str, Any]]:
    """Rows as they reach the writer, every column filled."""
    measured = {column.name: 0.5 for column in columns()}
    source = source_id(f"bench:{bundle}")
    for number in range(CLIPS_PER_SHARD):
        video = clips[number % len(clips)]
        start = 5.0 * number
        yield {
            "clip_id": clip_id(source, start),
            "source_id": source,
            "start": start,
            "end": start + 4.5,
            "duration": 4.5,
            "frames": 135,
            "width": 1280,
            "height": 720,
            "fps": 30.0,
            "codec": "h264",
            "has_audio": False,
            "bytes": len(video),
            "sha256": hashlib.sha256(video).hexdigest(),
            "lead_in_bytes": 0,
            "caption": "a red boat crosses the harbour from left to right",
            "split": "train",
            **measured,
            "video": video,
        }


def _md5_seconds(bundles: list[Bundle]) -> float:
    """Processor seconds of the digest that `wids-shard-index-v1` asks for."""

    def digest() -> None:
        md5 = hashlib.md5(usedforsecurity=False)
        for bundle in bundles:
            for row in bundle:
                md5.update(row["video"])

    return processor_seconds(resource.RUSAGE_SELF, digest)
