"""The film that everything is measured on: generated once, kept in a cache, the same on every machine with the same encoders.

Five minutes of 1280 x 720 at 30 frames per second: textured scenes with camera moves, moving objects and sensor noise
(`tests/labelled_shots.py`), a cut every 4.5 s on average, in H.264 with B-frames; and the first minute in VP9 and AV1.
"""

from __future__ import annotations

import hashlib
import inspect
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from tests import labelled_shots
from tests.labelled_shots import Coding, shot_frames, write_video

CACHE = Path(__file__).parent.parent / ".cache" / "bench"

WIDTH, HEIGHT, RATE = 1280, 720, 30

CODINGS = {
    "H.264": Coding("libx264", ".mp4", (("preset", "veryfast"), ("crf", "23"), ("x264-params", "bframes=3"))),
    "VP9": Coding("libvpx-vp9", ".webm", (("deadline", "realtime"), ("cpu-used", "8"), ("row-mt", "1"), ("b", "3000000"))),
    "AV1": Coding("libsvtav1", ".mkv", (("preset", "9"), ("crf", "30"))),
}
"""Encoder settings of each version, as PyAV passes them to the encoder."""


@dataclass(frozen=True)
class FilmSettings:
    """What decides the pictures of a film.

    Attributes:
        seconds: least length; the last shot is completed.
        shortest, longest: range of the shots' lengths in seconds, drawn evenly.
        seed: of the lengths and of the scenes.
    """

    seconds: int = 300
    shortest: float = 2.5
    longest: float = 6.5
    seed: int = 5

    def shot_lengths(self) -> list[int]:
        """Lengths of the shots in frames."""
        rng = np.random.default_rng(self.seed)
        lengths: list[int] = []
        while sum(lengths) < self.seconds * RATE:
            lengths.append(int(rng.uniform(self.shortest, self.longest) * RATE))
        return lengths


@dataclass(frozen=True)
class Film:
    """A film on disk.

    Attributes:
        path: the file.
        codec: key of `CODINGS`.
        seconds: length.
        cuts: number of its cuts.
    """

    path: Path
    codec: str
    seconds: float
    cuts: int


def film(settings: FilmSettings, codec: str = "H.264", cache: Path = CACHE) -> Film:
    """The film of `settings` in `codec`, from the cache or made now (about 40 ms of processor time for each frame).

    The name of the file carries a digest of everything that decides its content, the code that draws the scenes included.
    """
    coding, lengths = CODINGS[codec], settings.shot_lengths()
    drawing = [inspect.getsource(part) for part in (labelled_shots.texture, labelled_shots.Scene, labelled_shots.shot_frames)]
    decisive = repr((asdict(settings), asdict(coding), WIDTH, HEIGHT, RATE, drawing))
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:12]
    path = cache / f"film-{settings.seconds}s-{coding.codec}-{digest}{coding.suffix}"
    if not path.exists():
        cache.mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("SVT_LOG", "1")  # errors alone; the AV1 encoder talks on the error stream otherwise
        part = path.with_name(f"part-{path.name}")
        write_video(part, shot_frames(settings.seed, WIDTH, HEIGHT, lengths, RATE), RATE, coding)
        part.replace(path)
    return Film(path, codec, sum(lengths) / RATE, len(lengths) - 1)


def excerpts(source: Film, folder: Path, count: int, seconds: float) -> list[Path]:
    """Copy `count` excerpts out of a film without encoding, evenly spread over it and overlapping where they must.

    Args:
        source: an H.264 film; its groups of pictures are closed, so each can stand at the beginning of a file.
        folder: where to write; made if missing.
        count: number of files.
        seconds: least length of each, completed to the next key frame, or to the end of the film.
    """
    folder.mkdir(parents=True, exist_ok=True)
    keys = [float(packet.pts * packet.time_base) for packet in _packets(source.path) if packet.is_keyframe]
    paths = []
    for number in range(count):
        wanted = (source.seconds - seconds) * number / max(1, count - 1)
        start = max(key for key in keys if key <= max(wanted, keys[0]))
        end = min((key for key in keys if key >= start + seconds), default=float("inf"))
        paths.append(_copy(source.path, folder / f"excerpt_{number:02d}.mp4", start, end))
    return paths


def _packets(path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        yield from (packet for packet in container.demux(video=0) if packet.size)


def _copy(source: Path, target: Path, start: float, end: float) -> Path:
    """Copy the closed groups of pictures whose key frames lie in [start, end), both in seconds."""
    with av.open(str(source)) as reading, av.open(str(target), "w") as writing:
        stream = reading.streams.video[0]
        copied = writing.add_stream_from_template(stream)
        base: int | None = None
        inside = False
        for packet in reading.demux(stream):
            if not packet.size:
                continue
            if packet.is_keyframe:
                inside = start <= float(packet.pts * packet.time_base) < end
            if inside:
                base = packet.dts if base is None else base
                packet.pts, packet.dts = packet.pts - base, packet.dts - base
                packet.stream = copied
                writing.mux(packet)
    return target
