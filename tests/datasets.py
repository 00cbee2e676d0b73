"""Small datasets written by the real writer, for tests of what reads them; and the program that the kill tests kill."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from videofactory.shards.index import Index, add_sources
from videofactory.shards.lease import Lease
from videofactory.shards.schema import clip_id, source_id, source_schema, split_of
from videofactory.shards.storage import Storage
from videofactory.shards.writer import ShardWriter, put_record

SIGNALS = ("brightness", "motion")


def source_row(number: int) -> dict[str, Any]:
    uri = f"file:///videos/{number}.mp4"
    return {"source_id": source_id(uri), "uri": uri, "attempt": 1}


def candidates(source: str, count: int = 4, seconds: float = 0.96) -> list[dict[str, Any]]:
    """Candidate clips of a source, `seconds` long; the first is rejected."""
    starts = [float(number * math.ceil(seconds)) for number in range(count)]
    return [
        {
            "clip_id": clip_id(source, start),
            "source_id": source,
            "start": start,
            "end": start + seconds,
            "duration": seconds,
            "width": 640,
            "height": 360,
            "fps": 25.0,
            "brightness": 0.5,
            "motion": number / 10,
            "split": split_of(source, 0.2, 0.2),
            "rejected_by": "still" if number == 0 else None,
        }
        for number, start in enumerate(starts)
    ]


def finished(row: dict[str, Any], video: bytes | None = None) -> dict[str, Any]:
    """A candidate as the row of a kept clip with its payload; the bytes follow from the id unless given."""
    content = video if video is not None else hashlib.sha256(row["clip_id"].encode()).digest() * 50
    return {
        **row,
        "frames": round(row["duration"] * row["fps"]),
        "codec": "h264",
        "has_audio": False,
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "lead_in_bytes": 0,
        "caption": f"a thing at {row['start']} s, “quoted”",
        "video": content,
        "embedding": np.full(4, 0.5, np.float16),
    }


def write_dataset(root: Path, sources: int = 3, per_shard: int = 4, video: bytes | None = None, seconds: float = 0.96) -> Storage:
    """A build in miniature: goes on from whatever stands in `root`, in the order of the real one."""
    storage = Storage(str(root))
    with Lease(storage) as lease:
        known = set(Index(storage).sources()["source_id"].to_pylist())
        wanted = [source_row(number) for number in range(sources)]
        add_sources(storage, lease.run, [row for row in wanted if row["source_id"] not in known])
        index = Index(storage)
        for source in index.incomplete().to_pylist():
            if source["n_clips"] is None:
                rows = candidates(source["source_id"], seconds=seconds)
                done = {
                    "source_id": source["source_id"],
                    "uri": source["uri"],
                    "attempt": 1,
                    "status": "done",
                    "n_clips": len(rows),
                }
                put_record(storage, lease.run, done, rows, source_schema(SIGNALS))
        index.refresh()
        pending = index.pending_clips().to_pylist()
        for task, begin in enumerate(range(0, len(pending), per_shard)):
            writer = ShardWriter(storage, lease.run, f"{lease.run}-1-{task:06d}", SIGNALS, {"caption": "test"})
            for row in pending[begin : begin + per_shard]:
                writer.add(finished(row, video))
            writer.commit()
    return storage


def contents(root: Path) -> dict[str, tuple[str, str, str]]:
    """What a dataset holds, without where: state, SHA-256 and caption of every clip by id."""
    rows = Index(str(root)).clips().to_pylist()
    return {row["clip_id"]: (row["state"], row["sha256"], row["caption"]) for row in rows}


def _die_at_event(number: int) -> None:
    """Kill this process with SIGKILL at its n-th file-system event below the output folder."""
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in ("open", "os.rename", "fcntl.flock", "os.mkdir"):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


if __name__ == "__main__":
    _die_at_event(int(sys.argv[2]))
    write_dataset(Path(sys.argv[1]))
