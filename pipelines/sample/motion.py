"""Captions that tell a motion, as a sidecar of a dataset of the miniature world: what one frame cannot show and a captioner cannot say.

python -m videofactory.pipelines.sample.motion --world data/sample-world --dataset data/sample

They are written from the world's truth, for the clips of its shots alone: `a red circle moving left in front of a striped
background`. Training takes them with `data.captions=[motion.caption]`, or with `data.captions=[motion.seen_caption]`, which are
missing for the pairs of colour and form that are held out: a model that was never told of them can be asked for them.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from videofactory.curation.sources import local_path
from videofactory.pipelines.sample.compare import overlap
from videofactory.pipelines.sample.scene import caption_of
from videofactory.pipelines.sample.training_frames import HELD_OUT
from videofactory.shards.index import Index
from videofactory.shards.writer import put_table

SIDECAR = "motion"
_LEAST_OVERLAP = 0.5
_SCHEMA = pa.schema([("clip_id", pa.string()), ("caption", pa.string()), ("seen_caption", pa.string())])


def motion_caption(shot: dict[str, Any]) -> str:
    """The caption of a shot of the truth, with the direction of its shape."""
    told = caption_of(shot["colour"], shot["form"], shot["background"])
    named = f"{shot['colour']} {shot['form']}"
    return told.replace(named, f"{named} moving {shot['direction']}", 1)


def motion_captions(world: Path, dataset: str) -> list[dict[str, str | None]]:
    """The captions of every kept clip that shows mostly one shot of `world`, as rows of the sidecar, by clip id.

    Raises:
        FileNotFoundError: there is no truth in `world`.
    """
    index = Index(dataset)
    names = {row["source_id"]: (local_path(row["uri"]) or Path(row["uri"])).name for row in index.sources().to_pylist()}
    shots: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for shot in pq.read_table(world / "truth.parquet").to_pylist():
        if shot["error_class"] is None:
            shots[shot["video"]].append(shot)
    rows: list[dict[str, str | None]] = []
    for clip in index.query("select clip_id, source_id, start, \"end\" from clips where state = 'kept'").to_pylist():
        shot = max(shots[names[clip["source_id"]]], key=lambda shot: overlap(shot, clip), default=None)
        if shot is not None and overlap(shot, clip) >= _LEAST_OVERLAP:
            caption = motion_caption(shot)
            seen = None if (shot["colour"], shot["form"]) in HELD_OUT else caption
            rows.append({"clip_id": clip["clip_id"], "caption": caption, "seen_caption": seen})
    return sorted(rows, key=lambda row: row["clip_id"] or "")


def main() -> None:
    """Write the sidecar, in place of an earlier one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", type=Path, required=True, help="folder that the sample was made in")
    parser.add_argument("--dataset", required=True, help="dataset built from its videos")
    arguments = parser.parse_args()
    try:
        rows = motion_captions(arguments.world, arguments.dataset)
    except FileNotFoundError as error:
        parser.error(
            f"{error.filename} is not there; make the world with python -m videofactory.pipelines.sample --out {arguments.world}"
        )
    put_table(Index(arguments.dataset).storage, f"index/{SIDECAR}/captions.parquet", pa.Table.from_pylist(rows, schema=_SCHEMA))
    held_out = sum(row["seen_caption"] is None for row in rows)
    Console(highlight=False).print(
        f"{len(rows)} clips of {arguments.dataset} have a caption in index/{SIDECAR}; {held_out} of them show a pair that is held out",
        soft_wrap=True,
    )


if __name__ == "__main__":
    main()
