"""Every measurement in one run, on the same generated film: `make bench`, or `python -m benchmarks`.

Prints one table and exits with 1 when a goal is missed. Figures compare within a run, not between machines: what counts is the
ratio. The measurements: `pass` (the analysis against a bare decode), `build` (a build against the PySceneDetect command),
`writer` (the shard writer against plain copying), `reader` (the training data against a plain PyAV loop), `ray` (Ray against the
same functions in a plain loop).
"""

from __future__ import annotations

import platform
import subprocess
import tempfile
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from .film import Film
    from .outcome import Outcome

console = Console(width=160, highlight=False)


class Measurement(StrEnum):
    """What can be measured."""

    PASS = "pass"
    BUILD = "build"
    WRITER = "writer"
    READER = "reader"
    RAY = "ray"


def main(
    seconds: Annotated[int, typer.Option(min=20, help="length of the film; the goals hold for 300")] = 300,
    only: Annotated[list[Measurement] | None, typer.Option(help="measure only this; may be given several times")] = None,
    rounds: Annotated[
        int, typer.Option(min=1, help="how often the pass, the writer, the reader and Ray are measured; the median counts")
    ] = 3,
    work: Annotated[Path | None, typer.Option(help="folder for what is written on the way; a temporary one unless given")] = None,
) -> None:
    """Measure, print the table, and exit with 1 if a goal is missed."""
    from .cpu import machine
    from .outcome import table

    console.print(machine())
    with tempfile.TemporaryDirectory(prefix="videofactory-bench-", dir=work) as folder:
        outcomes = []
        for measurement in only or list(Measurement):
            found = _measure(measurement, seconds, rounds, Path(folder) / measurement)
            for outcome in found:
                console.print(f"{outcome.what}: {outcome.ratio:.3g}")
            outcomes += found
    console.print(table(outcomes))
    console.print(f"{_versions()}; {datetime.now(UTC):%Y-%m-%d %H:%M} UTC; {machine()}")
    if missed := [outcome.what for outcome in outcomes if outcome.missed]:
        console.print("missed: " + "; ".join(missed))
        raise typer.Exit(1)


def _measure(measurement: Measurement, seconds: int, rounds: int, folder: Path) -> list[Outcome]:
    # Imported one by one: the processes that are started here import this module again.
    with console.status(f"measuring: {measurement}"):
        if measurement is Measurement.PASS:
            from . import analysis_pass

            return analysis_pass.measure([_film(seconds), *(_film(min(seconds, 60), codec) for codec in ("VP9", "AV1"))], rounds)
        if measurement is Measurement.BUILD:
            from . import build_cost

            return build_cost.measure(_film(seconds), folder)
        if measurement is Measurement.WRITER:
            from . import writer_speed

            return writer_speed.measure(folder, rounds)
        if measurement is Measurement.READER:
            from . import reader_speed

            return reader_speed.measure(_film(seconds), folder, rounds)
        from . import ray_cost

        return ray_cost.measure(_film(seconds), folder, rounds)


def _film(seconds: int, codec: str = "H.264") -> Film:
    from .film import FilmSettings, film

    return film(FilmSettings(seconds), codec)


def _versions() -> str:
    """Versions of what decides the figures."""
    from videofactory.curation.cut_encode import find_ffmpeg

    said = subprocess.run([find_ffmpeg(), "-version"], capture_output=True, text=True, check=True, timeout=60).stdout
    packages = ", ".join(f"{name} {version(name)}" for name in ("av", "scenedetect-headless", "ray", "pyarrow", "videofactory"))
    return f"Python {platform.python_version()}, {packages}, {' '.join(said.split()[:3])}"


if __name__ == "__main__":
    typer.run(main)
