"""A dataset of real clips for tests of the training data, and ways to break it."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from videofactory.shards.index import Index
from videofactory.shards.storage import Storage
from videofactory.shards.writer import put_table

from .datasets import write_dataset
from .videos import make_video

KEPT = "select clip_id, shard, \"offset\", size from clips where state = 'kept' order by clip_id"


def training_dataset(root: Path, sources: int = 6, per_shard: int = 4, seconds: int = 1) -> str:
    """A dataset of three clips a source, all the same video of so many seconds, told apart by id.

    They are 320 x 180, though the index says 640 x 360, and a frame longer than it says.
    """
    video = make_video(root / "clip.mp4", 5, seconds=[seconds])
    return write_dataset(root / "out", sources=sources, per_shard=per_shard, video=video.read_bytes(), seconds=seconds - 0.04).uri


def kept(dataset: str) -> list[dict[str, object]]:
    """`clip_id`, `shard`, `offset` and `size` of every kept clip."""
    return list(Index(dataset).query(KEPT).to_pylist())


def damage(dataset: str, clips: int) -> set[str]:
    """Overwrite the middle of some clips in their shards, whose sizes stay; returns their ids."""
    broken = kept(dataset)[:clips]
    for row in broken:
        with (Path(dataset) / str(row["shard"])).open("r+b") as file:
            file.seek(int(str(row["offset"])) + int(str(row["size"])) // 2)
            file.write(b"\xff" * 64)
    return {str(row["clip_id"]) for row in broken}


def add_captions(dataset: str, folder: str, table: pa.Table, part: str = "part") -> None:
    """Write a sidecar table of captions."""
    put_table(Storage(dataset), f"index/{folder}/{part}.parquet", table)
