"""The result of an evaluation as a JSON file, and the table that compares several."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .metrics import METRICS, Score
from .protocol import Protocol, protocol_from

FORMAT = "videofactory evaluation 1"


def result(
    protocol: Protocol, scores: dict[str, Score], places: dict[str, Any], warnings: list[str], seconds: dict[str, float]
) -> dict[str, Any]:
    """A result, ready to be written.

    Args:
        scores: by the names of metrics.
        places: `scored` and perhaps `reference`: where the videos came from, and what became of them.
        warnings: what has to be known when the scores are read.
        seconds: by what took them.
    """
    return {
        "format": FORMAT,
        "protocol": asdict(protocol),
        "metrics": {name: {"better": METRICS[name].better, **asdict(score)} for name, score in scores.items()},
        **places,
        "warnings": warnings,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    """Of what computes the scores; they do not decide whether two results are compared."""
    import av
    import numpy as np
    import torch

    import videofactory

    modules = (videofactory, torch, np, av)
    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    return {"python": platform.python_version(), **{m.__name__: str(m.__version__) for m in modules}, "libavcodec": ffmpeg}


def write(found: dict[str, Any], file: Path) -> None:
    """Write a result, whole or not at all; `file`'s folder is made."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(json.dumps(found, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def read(file: Path) -> dict[str, Any]:
    """A result that was written, its `protocol` as a `Protocol`.

    Raises:
        ValueError: the file holds none of this version.
        OSError: it cannot be read.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no result: {error}") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        kind = found.get("format") if isinstance(found, dict) else type(found).__name__
        raise ValueError(f"{file} is no result of this version: its format is {kind!r}, {FORMAT!r} is wanted")
    try:
        return {**found, "protocol": protocol_from(found["protocol"]), "metrics": dict(found["metrics"])}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is no whole result: {error}") from error


def check_comparable(results: dict[str, dict[str, Any]]) -> None:
    """Whether results, by their names, have one protocol.

    Raises:
        ValueError: they do not; the message names what differs, and the values.
    """
    names = list(results)
    problems = []
    for number, name in enumerate(names):
        for other in names[number + 1 :]:
            differences = results[name]["protocol"].differences(results[other]["protocol"])
            problems += [f"  {key}: {_short(a)} in {name}, {_short(b)} in {other}" for key, (a, b) in differences.items()]
    if problems:
        raise ValueError(
            "the results were made by different protocols and cannot be compared:\n" + "\n".join(problems) + "\nscore them alike"
        )


def _short(value: Any) -> str:
    text = str(value)
    return text[:12] + "…" if len(text) == 64 else text


def rows(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """A row for each metric that any result has: its name, which values are better, and each result's value and interval."""
    table = []
    for name, metric in METRICS.items():
        found = [one["metrics"].get(name) for one in results.values()]
        if any(found):
            arrow = {"lower": "lower", "higher": "higher", "neither": "–"}[metric.better]
            table.append([name, arrow, *(cell(score) if score else "–" for score in found)])
    return table


def cell(score: dict[str, Any]) -> str:
    """A value with its interval."""
    interval = score["interval"]
    return f"{number(score['value'])}  [{number(interval['low'])}, {number(interval['high'])}]"


def number(value: float) -> str:
    """Four digits that count."""
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
