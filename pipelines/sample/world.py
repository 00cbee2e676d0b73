"""Makes a miniature world: videos, broken files and the truth about them, the same from the same seed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import pyarrow as pa
import pyarrow.parquet as pq

from videofactory.pipelines.sample.encode import write_video
from videofactory.pipelines.sample.scenario import Video, write_scenario
from videofactory.pipelines.sample.truth import SCHEMA, truth_of

VERSION = 1
"""Of the world's content: raised when the same seed gives another world."""


@dataclass(frozen=True)
class World:
    """A world on disk.

    Attributes:
        directory: holds `videos/`, `truth.parquet` and `sample.json`.
        seed: that it was made from.
        videos: every source, broken ones too, in order.
        truth: the table described in `truth.SCHEMA`.
    """

    directory: Path
    seed: int
    videos: tuple[Path, ...]
    truth: pa.Table


def make_world(
    out: Path,
    seed: int = 0,
    sources: int | None = None,
    kinds: Sequence[str] | None = None,
    processes: int | None = None,
) -> World:
    """Make the world of `seed` in the directory `out`.

    Args:
        out: made when it does not exist. A world that is there already is replaced; any other content stops the work.
        seed: decides everything. The same seed gives the same bytes, on the same versions of the encoders.
        sources: how many; by default one of each kind (26).
        kinds: names of `scenario.KINDS`, to make only these.
        processes: that render at once; by default one per CPU.

    Raises:
        FileExistsError: `out` holds something that is not a world.
        ValueError: see `write_scenario`.
    """
    scenario = write_scenario(seed, sources, kinds)
    folder = out / "videos"
    if folder.exists():
        if not (out / "sample.json").is_file():
            raise FileExistsError(f"{folder} is there and was not made by the sample; name another directory, or remove it")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    # Written first too, so that a world that was broken off is known as one and can be replaced.
    _write_manifest(out, seed, ())
    originals: dict[str, str] = {}
    jobs: list[tuple[Video, Path]] = []
    for video in scenario:
        originals.setdefault(video.kind.name, video.name)
        if video.kind.copies is None:
            jobs.append((video, folder / video.name))
    rows: dict[str, list[dict[str, Any]]] = {}
    with ProcessPoolExecutor(processes or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for (video, _), described in zip(jobs, pool.map(_make_source, *zip(*jobs, strict=True)), strict=True):
            rows[video.name] = described
    for video in scenario:
        if video.kind.copies is not None:
            original = originals[video.kind.copies]
            shutil.copyfile(folder / original, folder / video.name)
            same = {"video": video.name, "kind": video.kind.name, "duplicate_of": original}
            rows[video.name] = [{**row, **same} for row in rows[original]]
    truth = pa.Table.from_pylist([row for video in scenario for row in rows[video.name]], schema=SCHEMA)
    pq.write_table(truth, out / "truth.parquet")
    paths = tuple(folder / video.name for video in scenario)
    _write_manifest(out, seed, paths)
    return World(out, seed, paths, truth)


def _make_source(video: Video, path: Path) -> list[dict[str, Any]]:
    """Write one file and describe it; runs in a process of its own."""
    # The AV1 encoder reports on the standard error stream whatever its caller wants, unless told so here.
    os.environ.setdefault("SVT_LOG", "1")
    cv2.setNumThreads(1)
    write_video(video, path)
    return truth_of(video, path, None)


def _write_manifest(out: Path, seed: int, paths: Sequence[Path]) -> None:
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    manifest = {"made_by": "videofactory.pipelines.sample", "version": VERSION, "seed": seed, "sha256": files}
    (out / "sample.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
