"""A dataset with everything that a report can meet, written by the real writer: strangers' texts, missing values, errors."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from videofactory.curation.rules import Rules
from videofactory.curation.signals import columns as signal_columns
from videofactory.pipelines.recipe import Recipe, dump_recipe, parse_recipe
from videofactory.pipelines.report import RECIPE
from videofactory.shards.index import Index, add_sources, shard_list
from videofactory.shards.lease import Lease
from videofactory.shards.schema import clip_schema, source_schema, table_of
from videofactory.shards.storage import Storage
from videofactory.shards.writer import THUMBNAILS, ShardWriter, put_record, put_thumbnails

from .datasets import candidates, finished, source_row

SIGNALS = ("brightness", "motion", "static_fraction", "letterbox", "caption_similarity")
RULES = {
    "duration": "duration >= 0.5",
    "resolution": "least(width, height) >= 720",
    "widescreen": "width / height between 1.7 and 1.85",
    "dark": "brightness >= 0.06",
    "still": "static_fraction <= 0.8 and motion >= 0.002",
    "letterbox": "letterbox <= 0.02",
    "never": "fps < 1000",
}
HOSTILE = (
    "</style></title><script>document.title='taken'</script><img src=x onerror=alert(1)>\"'`|{{7*7}} "
    "\u202egnp.exe \u05e9\u05dc\u05d5\u05dd"
)
MODELS = {"caption": "sample:captioner", "caption_similarity": "sample:embedder"}


def recipe(**changes: Any) -> Recipe:
    values = {"name": "trial", "about": "A trial & <its> rules.", "rules": RULES, "split": {"val": 0.2, "test": 0.2}}
    return parse_recipe({**values, **changes}, "test")


def measured_rows(source: str, count: int, draw: random.Random) -> list[dict[str, Any]]:
    """Candidates with values like real ones: most are fine, every rule rejects some, a few values are missing."""
    rows = []
    for row in candidates(source, count):
        duration = round(draw.lognormvariate(0.6, 0.8), 3) if draw.random() < 0.9 else 0.3
        row |= {"duration": duration, "caption_similarity": None, "rejected_by": None}
        row["width"], row["height"] = draw.choice([(1280, 720)] * 7 + [(960, 720), (854, 480)])
        row["brightness"] = None if draw.random() < 0.04 else min(1.0, abs(draw.gauss(0.35, 0.18)))
        row["motion"] = draw.lognormvariate(-3.2, 1.2)
        row["static_fraction"] = draw.betavariate(1.2, 2.5)
        row["letterbox"] = draw.choice([0.0] * 7 + [0.24])
        rows.append(row)
    schema = clip_schema(SIGNALS)
    known = Rules(RULES, signal_columns())
    for row, verdict in zip(rows, known.judge(table_of(rows, schema), ["analyse"]), strict=True):
        row["rejected_by"] = verdict
    return rows


def thumbnail(number: int) -> bytes:
    """A JPEG of 192x108: a gradient whose tint follows from the number."""
    y, x = np.mgrid[0:108, 0:192]
    tint = np.random.default_rng(number).uniform(0.3, 1.0, 3)
    shade = (x + y + 40 * np.sin(x / 17 + number)) / 300 * 200 + 20
    picture = np.clip(shade[..., None] * tint, 0, 255).astype(np.uint8)
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG", quality=80)
    return stream.getvalue()


def build(root: Path, sources: int = 6, clips: int = 12, video: bytes = b"not decoded here") -> Storage:
    """A dataset with everything that a report can meet: kept, rejected, unmeasured, failed and pending clips; failed and pending
    sources; strangers' texts; thumbnails, one of them no picture."""
    storage = Storage(str(root))
    draw = random.Random(7)
    storage.put(RECIPE, dump_recipe(recipe()).encode())
    with Lease(storage) as lease:
        wanted = [source_row(number) for number in range(sources + 3)]
        add_sources(storage, lease.run, wanted)
        for number, source in enumerate(wanted[:sources]):
            rows = measured_rows(source["source_id"], clips, draw)
            about = {
                "title": HOSTILE if number == 0 else f"Holiday {number}",
                "license": [None, "Creative Commons Attribution license (reuse allowed)", HOSTILE][number % 3],
                "webpage_url": ["javascript:alert(1)", "https://example.org/watch?v=1&t=2"][number % 2],
                "duration": 90.0,
                "width": 1280,
                "height": 720,
                "fps": 25.0,
                "codec": "h264",
                "analysed_with": "analysis 1; settings 0123456789ab",
            }
            done = {**source, **about, "attempt": 1, "status": "done", "n_clips": len(rows)}
            put_record(storage, lease.run, done, rows, source_schema(SIGNALS))
            pictures: dict[str, bytes | None] = {row["clip_id"]: thumbnail(place) for place, row in enumerate(rows)}
            put_thumbnails(storage, f"{THUMBNAILS}/{lease.run}-{source['source_id']}.parquet", pictures)
        for number, source in enumerate(wanted[sources : sources + 2]):
            failed = {"status": "failed", "error_class": "not_a_video", "error": HOSTILE, "retryable": number == 0}
            put_record(storage, lease.run, {**source, **failed, "attempt": 1}, [], source_schema(SIGNALS))
        write_clips(storage, lease.run, video)
    storage.put("shards.json", json.dumps(shard_list(Index(storage), "trial")).encode())
    return storage


def write_clips(storage: Storage, run: str, video: bytes) -> None:
    """Final rows for what the rules keep: the last clip stays pending, the one before fails."""
    index = Index(storage)
    pending = index.pending_clips().to_pylist()
    writer = ShardWriter(storage, run, f"{run}-1-000000", SIGNALS, MODELS)
    for place, row in enumerate(pending[:-2]):
        caption = HOSTILE if place % 5 == 0 else f"a red circle drifts past {place} squares"
        writer.add(
            {**finished(row, video), "caption": caption, "duration": row["duration"], "caption_similarity": 0.2 + place % 7 / 50}
        )
    writer.add({**pending[-2], "error_class": "encode_failed", "error": HOSTILE})
    writer.commit()
