"""The one-pass analysis with every signal, against a bare decode of the same file by the ffmpeg command.

Both in processor seconds, all threads, in turn, the median of the rounds; the pass runs in this process, its imports done.
"""

from __future__ import annotations

import resource
import statistics
import subprocess

from videofactory.curation import signals
from videofactory.curation.analysis import analyse
from videofactory.curation.cut_encode import find_ffmpeg

from .cpu import processor_seconds
from .film import Film
from .outcome import Outcome

GOAL = 0.9
"""The pass may cost at most this part of a bare decode of H.264; other codecs have less to skip, and are reported."""


def measure(films: list[Film], rounds: int) -> list[Outcome]:
    """One outcome for each film."""
    signals.load()
    return [_against_decode(film, rounds) for film in films]


def _against_decode(film: Film, rounds: int) -> Outcome:
    decode = [find_ffmpeg(), "-v", "error", "-nostdin", "-i", str(film.path), "-f", "null", "-"]
    found = analyse(film.path)  # also warms every import and the file's pages
    ours, peer = [], []
    for _ in range(rounds):
        ours.append(processor_seconds(resource.RUSAGE_SELF, lambda: analyse(film.path)))
        peer.append(processor_seconds(resource.RUSAGE_CHILDREN, lambda: subprocess.run(decode, check=True)))
    pass_seconds, decode_seconds = statistics.median(ours), statistics.median(peer)
    return Outcome(
        what=f"pass with {len(signals.columns())} signal columns, {film.codec}, {film.seconds:.0f} s",
        ours=f"{pass_seconds:.1f} CPU s",
        peer=f"{decode_seconds:.1f} CPU s (ffmpeg -f null)",
        ratio=pass_seconds / decode_seconds,
        goal=GOAL if film.codec == "H.264" else None,
        note=f"{found.frames_decoded} of {found.frames} frames decoded; {len(found.shots) - 1} of {film.cuts} cuts; rounds "
        + ", ".join(f"{a / b:.2f}" for a, b in zip(ours, peer, strict=True)),
    )
