"""What the one-pass analysis costs, beside a bare decode of the same file by the ffmpeg command.

    python -m benchmarks.analysis_pass --seconds 300

Makes its own film (1280 x 720, 30 frames per second, H.264 with B-frames, textured scenes with camera moves, objects and sensor
noise, a cut every 4.5 s on average), then runs, in turn, `analyse` with every signal, `analyse` on all frames, PySceneDetect's
`detect()`, and `ffmpeg -i FILE -f null -`, and compares their processor time: user and system, all threads, after imports.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from tests.labelled_shots import Coding, shot_frames, write_video
from videofactory.curation import signals
from videofactory.curation.analysis import AnalysisSettings, analyse, analysed_with
from videofactory.curation.shots import ShotSettings, make_detector

GATE = 0.9
"""The analysis may cost at most this part of a bare decode."""

RATE = 30


def make_film(path: Path, seconds: int) -> int:
    """Write the film and return the number of its cuts."""
    rng = np.random.default_rng(2)
    lengths: list[int] = []
    while sum(lengths) < seconds * RATE:
        lengths.append(int(rng.uniform(2.5, 6.5) * RATE))
    coding = Coding(options=(("preset", "fast"), ("crf", "23")))
    write_video(path, shot_frames(5, 1280, 720, lengths, RATE), RATE, coding)
    return len(lengths) - 1


def processor_seconds(who: int, work: Callable[[], object]) -> float:
    """User and system time that `work` takes, of this process (`RUSAGE_SELF`) or of its children."""
    before = resource.getrusage(who)
    work()
    after = resource.getrusage(who)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def ffmpeg_command() -> str:
    """$FFMPEG, else the system's ffmpeg, else the one inside imageio-ffmpeg."""
    import imageio_ffmpeg

    return os.environ.get("FFMPEG") or shutil.which("ffmpeg") or imageio_ffmpeg.get_ffmpeg_exe()


def contestants(film: Path) -> dict[str, tuple[int, Callable[[], object]]]:
    """Name -> (whose time counts, work)."""
    import scenedetect

    decode = [ffmpeg_command(), "-v", "error", "-nostdin", "-i", str(film), "-f", "null", "-"]
    return {
        "ffmpeg -f null": (resource.RUSAGE_CHILDREN, lambda: subprocess.run(decode, check=True)),
        "analyse": (resource.RUSAGE_SELF, lambda: analyse(film)),
        "analyse, all frames": (resource.RUSAGE_SELF, lambda: analyse(film, AnalysisSettings(skip="none"))),
        "PySceneDetect detect()": (
            resource.RUSAGE_SELF,
            lambda: scenedetect.detect(str(film), make_detector(ShotSettings()), backend="pyav"),
        ),
    }


def main(
    seconds: Annotated[int, typer.Option(help="length of the film")] = 60,
    rounds: Annotated[int, typer.Option(help="how often each is run")] = 3,
    film: Annotated[Path | None, typer.Option(help="measure this file; made there if it does not exist")] = None,
) -> None:
    """Print the table, and exit with 1 if the analysis costs more than its gate."""
    with tempfile.TemporaryDirectory() as folder:
        path = film or Path(folder) / "film.mp4"
        if not path.exists():
            print(f"making {seconds} s of film with {make_film(path, seconds)} cuts", file=sys.stderr)
        signals.load()
        print(analysed_with())
        found = analyse(path)
        print(
            f"{path.stat().st_size / 1e6:.1f} MB, {found.frames} frames, {found.frames_decoded} decoded, {len(found.shots)} shots"
        )
        runs = contestants(path)
        spent: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(rounds):
            for name, (who, work) in runs.items():
                spent[name].append(processor_seconds(who, work))
    baseline = statistics.median(spent["ffmpeg -f null"])
    for name, values in spent.items():
        middle = statistics.median(values)
        print(
            f"{name:24} {middle:7.2f} s of processor time  {middle / baseline:5.2f} x ffmpeg  {found.frames / middle:7.0f} frames/s"
        )
    ratio = statistics.median(spent["analyse"]) / baseline
    print(f"gate: {ratio:.2f} <= {GATE}: {'kept' if ratio <= GATE else 'MISSED'}")
    if ratio > GATE:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
