"""A whole build in a plain loop, against the PySceneDetect command on the same file.

Ours: analysis with every signal, a rule that keeps what lasts a second, cutting, writing shards, the report; captions off.
Theirs: `detect-adaptive split-video`, which finds shots and encodes each into a file. Whole processes, start and imports
included, with the same ffmpeg.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

from videofactory.curation.cut import ClipSettings
from videofactory.curation.cut_encode import find_ffmpeg
from videofactory.curation.sources import find_sources
from videofactory.pipelines.build import build
from videofactory.pipelines.recipe import Recipe

from .cpu import Mark, processor_seconds, run_marked
from .film import Film
from .outcome import Outcome

GOAL = 1.0
"""The build measures more than the peer and must not cost more."""

RULES = {"duration": "duration >= 1.0"}

ENCODED = ClipSettings(mode="encode", preset="veryfast", crf=22)
"""What `split-video` asks x264 for."""


def measure(film: Film, folder: Path) -> list[Outcome]:
    """The default, which copies packets where that is safe, and a build that encodes every clip as the peer does; one run each."""
    peer = processor_seconds(resource.RUSAGE_CHILDREN, lambda: _scenedetect(film.path, folder / "scenes"))
    scenes = len(list((folder / "scenes").glob("*.mp4")))
    minutes = film.seconds / 60
    outcomes = []
    for mode, clips, goal in (("copy or encode", ClipSettings(), GOAL), ("all encoded", ENCODED, None)):
        recipe = Recipe(rules=RULES, clips=clips)
        reading = run_marked(_build, recipe, film.path, folder / mode.replace(" ", "-"))["built"]
        outcomes.append(
            Outcome(
                what=f"build without models, {mode}, {film.codec}, {film.seconds:.0f} s",
                ours=f"{reading.cpu / minutes:.1f} CPU s per source minute",
                peer=f"{peer / minutes:.1f} CPU s (scenedetect detect-adaptive split-video)",
                ratio=reading.cpu / peer,
                goal=goal,
                note=f"{reading.value} clips of a second and more, against {scenes}; the film has {film.cuts} cuts",
            )
        )
    return outcomes


def _build(mark: Mark, recipe: Recipe, film: Path, out: Path) -> None:
    index = build(recipe, find_sources([str(film)]), str(out), plainly=True)
    mark("built", index.query("select count(*) as kept from clips where state = 'kept'")["kept"][0].as_py())


def _scenedetect(film: Path, out: Path) -> None:
    """Run the command with the ffmpeg that we use: it takes the first one on the PATH."""
    tools = out / "bin"
    tools.mkdir(parents=True)
    (tools / "ffmpeg").symlink_to(shutil.which(find_ffmpeg()) or find_ffmpeg())
    environment = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "scenedetect", "-q", "-i", str(film)]
    split = ["detect-adaptive", "split-video", "--quiet", "--output", str(out)]
    subprocess.run([*command, *split], check=True, env=environment, timeout=3600)
