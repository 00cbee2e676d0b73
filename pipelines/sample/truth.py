"""What is true of every shot of a world, and which rule of the sample's recipe rejects it: the table that a build is compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from videofactory.pipelines.sample.encode import FADE, frame_timestamps, shot_moments
from videofactory.pipelines.sample.scenario import Video
from videofactory.pipelines.sample.scene import Renderer, Shot

RULES: dict[str, str] = {
    "duration": "duration >= 1.0",
    "resolution": "width >= 640 and height >= 360",
    "widescreen": "width / height between 1.7 and 1.85",
    "letterbox": "letterbox <= 0.02",
    "dark": "brightness >= 0.08",
    "still": "static_fraction <= 0.8 and motion >= 0.005",
}
"""The rules of the recipe `sample`, in order. The first that a shot does not satisfy is its verdict."""

KEPT = "kept"

SCHEMA = pa.schema(
    [
        ("video", pa.string()),
        ("kind", pa.string()),
        ("shot", pa.int32()),
        ("start", pa.float64()),
        ("end", pa.float64()),
        ("duration", pa.float64()),
        ("first_timestamp", pa.float64()),
        ("frames", pa.int32()),
        ("transition_in", pa.string()),
        ("transition_seconds", pa.float64()),
        ("colour", pa.string()),
        ("form", pa.string()),
        ("direction", pa.string()),
        ("speed", pa.float64()),
        ("background", pa.string()),
        ("camera", pa.string()),
        ("caption", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("fps", pa.float64()),
        ("codec", pa.string()),
        ("variable_rate", pa.bool_()),
        ("rotated", pa.bool_()),
        ("has_audio", pa.bool_()),
        ("logo", pa.bool_()),
        ("duplicate_of", pa.string()),
        ("letterbox", pa.float64()),
        ("brightness", pa.float64()),
        ("static_fraction", pa.float64()),
        ("motion", pa.float64()),
        ("verdict", pa.string()),
        ("error_class", pa.string()),
    ]
)
"""One row per shot; of a source that cannot be used one row with `error_class` and no shot.

`start` and `end` are seconds of the file's own timestamps, [start, end); `first_timestamp` is that of the file's first frame.
`transition_in` is "start", "cut" or "fade" (through black, `transition_seconds` long, half on either side of `start`).
`speed` and `motion` are in frame widths per second: of the shape, and of the camera over the background. `letterbox`,
`brightness` (mean luma at half time), `static_fraction` and `motion` are what the world was made with, not what a signal measures.
"""

_DECODERS = {
    "libx264": "h264",
    "libvpx-vp9": "vp9",
    "libx265": "hevc",
    "libsvtav1": "av1",
    "mpeg4": "mpeg4",
    "mpeg2video": "mpeg2video",
}


def truth_of(video: Video, path: Path, duplicate_of: str | None) -> list[dict[str, Any]]:
    """Rows of the truth about one source, with the timestamps that its file really has.

    Raises:
        ValueError: the file does not hold the frames that were written; the world would lie about it.
    """
    kind = video.kind
    common = {"video": video.name, "kind": kind.name, "duplicate_of": duplicate_of}
    if kind.fault:
        return [{**common, "error_class": kind.error_class}]
    counts = [len(moments) for moments in shot_moments(video)]
    stamps = frame_timestamps(path)
    if len(stamps) != sum(counts):
        raise ValueError(
            f"{path.name} holds {len(stamps)} frames where {sum(counts)} were written; check the encoder {kind.codec}"
        )
    ends = [*stamps, stamps[-1] + 1 / float(kind.fps)]
    rows = []
    first = 0
    for number, (shot, count) in enumerate(zip(video.shots, counts, strict=True)):
        start, end = ends[first], ends[first + count]
        row = {
            **common,
            "shot": number,
            "start": start,
            "end": end,
            "duration": end - start,
            "first_timestamp": stamps[0],
            "frames": count,
            "transition_in": "start" if number == 0 else "fade" if number in kind.fades else "cut",
            "transition_seconds": FADE if number in kind.fades else 0.0,
            "width": kind.size[0],
            "height": kind.size[1],
            "fps": float(kind.fps),
            "codec": _DECODERS[kind.codec],
            "variable_rate": kind.variable_rate,
            "rotated": kind.rotated,
            "has_audio": kind.audio,
            **_of_shot(shot, kind.size),
        }
        row["verdict"] = verdict_of(row)
        rows.append(row)
        first += count
    return rows


def verdict_of(row: dict[str, Any]) -> str:
    """`KEPT`, or the name of the first rule of `RULES` that is not true of `row`."""
    import duckdb

    names = ("duration", "width", "height", "letterbox", "brightness", "static_fraction", "motion")
    columns = ", ".join(f"{float(row[name])!r}::double as {name}" for name in names)
    verdicts = ", ".join(f"({rule})" for rule in RULES.values())
    (found,) = duckdb.sql(f"select {verdicts} from (select {columns})").fetchall()
    return next((name for name, holds in zip(RULES, found, strict=True) if not holds), KEPT)


def _of_shot(shot: Shot, size: tuple[int, int]) -> dict[str, Any]:
    luma = Renderer(shot, *size).frame(shot.duration / 2) @ (0.299, 0.587, 0.114)
    return {
        "colour": shot.colour,
        "form": shot.form,
        "direction": shot.direction,
        "speed": 0.0 if shot.frozen else shot.speed,
        "background": shot.background,
        "camera": shot.camera,
        "caption": shot.caption,
        "logo": shot.logo,
        "letterbox": shot.bars,
        "brightness": float(luma.mean() / 255),
        "static_fraction": 1.0 if shot.frozen else 0.0,
        "motion": 0.0 if shot.frozen else shot.camera_speed,
    }
