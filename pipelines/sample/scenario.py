"""The cast list of the miniature world: which kinds of source there are, and the shots that each one holds."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Literal

import numpy as np

from videofactory.pipelines.sample.scene import Shot, draw_shot
from videofactory.pipelines.sample.shapes import COLOURS, FORMS

Fault = Literal["no_index", "cut_in_half", "text", "audio_only", "empty"]

LETTERBOX = 1 - (16 / 9) / 2.39
"""Fraction of a 16:9 frame's height that is black when a 2.39:1 picture lies in it."""


@dataclass(frozen=True)
class Kind:
    """A kind of source: how it is encoded, and what is wrong with it.

    Attributes:
        name: in lower case; part of the file's name.
        suffix: container, with the dot.
        codec: name of the encoder.
        fps: frames per second; of a variable rate, the mean.
        options: of the encoder.
        size: width and height as displayed.
        shots: what each shot is: "moving", "still", "dark", "short".
        fades: these shots (by index) begin with a fade through black.
        variable_rate: frames come at uneven distances.
        rotated: stored upright, with the instruction to turn it by a quarter when shown.
        bars: fraction of the height that black bars cover.
        logo: a mark lies in a corner of every shot.
        audio: there is a sound track.
        fault: what makes the file one that cannot be used; "" for none.
        error_class: under which the pipeline files the fault.
        copies: kind of which this file is an exact copy, under another name.
    """

    name: str
    suffix: str = ".mp4"
    codec: str = "libx264"
    fps: Fraction = Fraction(25)
    options: dict[str, str] = field(default_factory=dict)
    size: tuple[int, int] = (640, 360)
    shots: tuple[str, ...] = ("moving",) * 4
    fades: tuple[int, ...] = ()
    variable_rate: bool = False
    rotated: bool = False
    bars: float = 0.0
    logo: bool = False
    audio: bool = False
    fault: Fault | Literal[""] = ""
    error_class: str | None = None
    copies: str | None = None


_FIVE = ("moving",) * 5
_THREE = ("moving",) * 3
_ONE = ("moving",)

KINDS: tuple[Kind, ...] = (
    Kind("h264_24fps", fps=Fraction(24), options={"preset": "veryfast", "bf": "3"}, shots=_FIVE, audio=True),
    Kind("h264_fades", fps=Fraction(30), shots=_FIVE, fades=(2, 4)),
    Kind("h264_mixed", shots=("moving", "still", "moving", "dark", "short", "moving")),
    Kind("vp9_webm", ".webm", "libvpx-vp9", Fraction(30), {"deadline": "realtime", "cpu-used": "8", "b": "900k"}),
    Kind("h264_copy", copies="h264_24fps"),
    Kind("h264_long_gop", options={"g": "600", "keyint_min": "600", "sc_threshold": "0", "bf": "2"}),
    Kind("h264_2997fps", fps=Fraction(30000, 1001), shots=_THREE, audio=True),
    Kind("h264_60fps", fps=Fraction(60), shots=_THREE),
    Kind("hevc_mkv", ".mkv", "libx265", Fraction(24), {"preset": "ultrafast"}, fades=(2,)),
    Kind("av1_mkv", ".mkv", "libsvtav1", Fraction(25), {"preset": "12", "crf": "38"}, shots=_THREE),
    Kind("mpeg4_avi", ".avi", "mpeg4", Fraction(25), {"b": "2500k", "g": "50"}),
    Kind("mpeg2_ts", ".ts", "mpeg2video", Fraction(30000, 1001), {"b": "5000k", "g": "15", "bf": "2"}),
    Kind("h264_variable_rate", fps=Fraction(30), variable_rate=True),
    Kind("h264_rotated", rotated=True, shots=_THREE),
    Kind("h264_stills", fps=Fraction(30), shots=("still", "moving", "still", "moving")),
    Kind("h264_shorts", fps=Fraction(24), shots=("short", "moving", "short", "moving", "short")),
    Kind("h264_low_resolution", size=(320, 180)),
    Kind("h264_portrait", size=(360, 640), shots=_THREE),
    Kind("h264_four_by_three", size=(640, 480), shots=_THREE),
    Kind("h264_letterbox", fps=Fraction(24), bars=LETTERBOX, shots=_THREE),
    Kind("h264_logo", fps=Fraction(30), logo=True, shots=_FIVE),
    Kind("no_index", fault="no_index", error_class="truncated", shots=_ONE),
    Kind("cut_in_half", fault="cut_in_half", error_class="truncated", shots=_THREE),
    Kind("text", fault="text", error_class="not_a_video", shots=()),
    Kind("audio_only", fault="audio_only", error_class="no_video_stream", shots=()),
    Kind("empty", fault="empty", error_class="not_a_video", shots=()),
)
"""The default world: every kind once."""


@dataclass(frozen=True)
class Video:
    """One source of one world: its kind, its file name and its shots, drawn from the world's seed."""

    kind: Kind
    name: str
    shots: tuple[Shot, ...]


def write_scenario(seed: int, sources: int | None = None, kinds: Sequence[str] | None = None) -> list[Video]:
    """The sources of the world of `seed`.

    Args:
        seed: same seed, same world.
        sources: how many; by default each kind once. More than there are kinds: the kinds without a fault and without a copy
            again, with other shots.
        kinds: only these, by name, in this order.

    Raises:
        ValueError: a kind that does not exist, a copy of a kind that does not come before it, or no sources at all.
    """
    chosen = list(_chosen(sources, kinds))
    decks = _decks(random.Random(seed))
    videos: list[Video] = []
    for number, kind in enumerate(chosen):
        rng = np.random.default_rng([seed, number])
        if kind.copies is not None:
            original = next((video for video in videos if video.kind.name == kind.copies), None)
            if original is None:
                raise ValueError(f"kind {kind.name!r} copies {kind.copies!r}, which has to come before it")
            as_original = replace(original.kind, name=kind.name, copies=kind.copies)
            videos.append(Video(as_original, f"{number:03d}_{kind.name}{original.kind.suffix}", original.shots))
            continue
        videos.append(Video(kind, f"{number:03d}_{kind.name}{kind.suffix}", tuple(_draw_shots(kind, decks, rng))))
    return videos


def _chosen(sources: int | None, kinds: Sequence[str] | None) -> Iterator[Kind]:
    by_name = {kind.name: kind for kind in KINDS}
    for name in kinds or ():
        if name not in by_name:
            raise ValueError(f"kind {name!r} is none of {', '.join(by_name)}")
    pool = [by_name[name] for name in kinds] if kinds else list(KINDS)
    wanted = len(pool) if sources is None else sources
    if wanted < 1:
        raise ValueError(f"{wanted} sources make no world; ask for 1 or more")
    yield from pool[:wanted]
    again = [kind for kind in pool if not kind.fault and kind.copies is None] or pool
    for extra in range(wanted - len(pool)):
        yield again[extra % len(again)]


def _decks(shuffler: random.Random) -> Iterator[tuple[str, str]]:
    """Pairs of colour and form, dealt from shuffled decks of all of them, so that even a small world shows each about as often."""
    while True:
        deck = [(colour, form) for colour in COLOURS for form in FORMS]
        shuffler.shuffle(deck)
        yield from deck


def _draw_shots(kind: Kind, decks: Iterator[tuple[str, str]], rng: np.random.Generator) -> Iterator[Shot]:
    previous: Shot | None = None
    for what in kind.shots:
        duration = rng.uniform(0.76, 0.84) if what == "short" else rng.uniform(1.6, 3.0)
        pair = next(decks)
        # Neighbours differ in colour and in form, so that anyone sees the cut.
        while previous is not None and (pair[0] == previous.colour or pair[1] == previous.form):
            pair = next(decks)
        shot = draw_shot(rng, float(duration), pair, previous)
        previous = shot
        yield replace(
            shot,
            frozen=what == "still",
            exposure=0.06 if what == "dark" else 1.0,
            bars=kind.bars,
            logo=kind.logo,
        )
