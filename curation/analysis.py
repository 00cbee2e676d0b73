"""The one pass over a source: decodes it once, and finds its shots and every signal of every shot on the way.

`analyse` works in this process, `analyse_guarded` in a child process that may die of the file.
"""

from __future__ import annotations

import hashlib
import json
import resource
from array import array
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from videofactory.curation import signals
from videofactory.curation.decode import Skip, SmallFrames
from videofactory.curation.media import Guard, MediaError, Probe
from videofactory.curation.shots import ShotDetector, ShotSettings
from videofactory.curation.signals import Frame, Signal
from videofactory.curation.thumbnails import Thumbnails

ANALYSIS_VERSION = 1
"""Raised when the same file and settings would give other numbers than before."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class AnalysisSettings(ShotSettings):
    """What decides the numbers of an analysis; see `ShotSettings` for what counts as a cut.

    Attributes:
        width: pixels to which a landscape picture is scaled in width, and a portrait one in height.
        skip: `"nonreference"` decodes only frames that others refer to, where the file allows it; `"none"` decodes all.
        threads: decoder threads, 0 for one per processor; changes no number.
    """

    width: int = 256
    skip: Skip = "nonreference"
    threads: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threads <= 64:
            raise ValueError(f"analysis setting threads is {self.threads}; it must lie between 0 and 64")
        if not 32 <= self.width <= 4096:
            raise ValueError(f"analysis width {self.width} is outside 32 to 4096 pixels")
        if self.skip not in ("nonreference", "none"):
            raise ValueError(f"skip={self.skip!r} is unknown; 'nonreference' or 'none'")


@dataclass(frozen=True)
class Shot:
    """One shot: every instant of [start, end) certainly lies inside it.

    Attributes:
        start, end: seconds of the source's own timestamps.
        frames: number of frames of the source in [start, end), decoded or not.
        signals: every declared column; `None` where it was not measured.
        thumbnail: a small JPEG from about the middle; `None` where the shot is too short for one.
    """

    start: float
    end: float
    frames: int
    signals: dict[str, float | None]
    thumbnail: bytes | None = None


@dataclass(frozen=True)
class Analysis:
    """What one pass found.

    Attributes:
        probe: header and first frame.
        shots: in order, not overlapping; the frames between two shots could not be told to belong to either.
        frames: number of frames in the file.
        frames_decoded: how many of them were decoded.
        damaged: number of packets that did not decode.
        cpu_seconds: processor time of the pass, all threads.
        analysed_with: versions and a fingerprint of the settings: equal strings, equal numbers.
    """

    probe: Probe
    shots: list[Shot]
    frames: int
    frames_decoded: int
    damaged: int
    cpu_seconds: float
    analysed_with: str


def analyse(path: Path | str, settings: AnalysisSettings | None = None) -> Analysis:
    """Decode `path` once, in this process, and return its shots and signals.

    Memory does not grow with the film but by a few numbers per frame.

    Raises:
        MediaError: the file cannot be used; the class says why.
    """
    settings = settings or AnalysisSettings()
    began = _cpu_seconds()
    frames = SmallFrames(path, settings.width, settings.skip, settings.threads)
    measuring = [signal() for signal in signals.load()]
    pictures = Thumbnails()
    times, values, boundaries = _measure(frames, ShotDetector(settings), measuring, pictures)
    timeline = frames.packet_times()
    if not len(timeline):
        timeline = times
    shots = [
        Shot(start, end, count, _summarise(measuring, times[first:last], values[first:last]), pictures.inside(start, end))
        for (first, last), (start, end, count) in _spans(times, boundaries, timeline, frames.end)
    ]
    return Analysis(
        probe=frames.probe,
        shots=shots,
        frames=len(timeline),
        frames_decoded=frames.seen,
        damaged=frames.damaged,
        cpu_seconds=_cpu_seconds() - began,
        analysed_with=analysed_with(settings),
    )


def analyse_guarded(
    path: Path | str, settings: AnalysisSettings | None = None, guard: Guard | None = None, seconds: float | None = None
) -> Analysis:
    """`analyse` in the child process of `guard` (by default the one of this process), at most `seconds` of wall-clock time.

    Raises:
        MediaError: as `analyse`; and decoder_crashed, decoder_timeout, decoder_memory. The message names the file.
    """
    from videofactory.curation.media import shared_guard

    try:
        return (guard or shared_guard()).run(analyse, path, settings, seconds=seconds)
    except MediaError as error:
        name = Path(path).name
        if name in str(error):
            raise
        raise MediaError(error.error_class, f"{name}: {error}", error.retryable) from error


def analysed_with(settings: AnalysisSettings | None = None) -> str:
    """Version string of an analysis: our version, those of the libraries that decide the numbers, and a fingerprint of
    the settings and signal columns."""
    import av
    import cv2
    import scenedetect

    decisive = {name: value for name, value in asdict(settings or AnalysisSettings()).items() if name != "threads"}
    names = sorted(column.name for column in signals.columns())
    fingerprint = hashlib.sha256(json.dumps([decisive, names], sort_keys=True).encode()).hexdigest()[:12]
    codec = ".".join(map(str, av.library_versions["libavcodec"]))
    return (
        f"analysis {ANALYSIS_VERSION}; scenedetect {scenedetect.__version__}; av {av.__version__}; libavcodec {codec}; "
        f"opencv {cv2.__version__}; settings {fingerprint}"
    )


def _cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _measure(
    frames: SmallFrames, detector: ShotDetector, measuring: list[Signal], pictures: Thumbnails
) -> tuple[Floats, Floats, list[int]]:
    """Feed every frame to the detector and the signals: times [n], values [n, measures of all signals], places of new shots."""
    times, values = array("d"), array("d")
    previous: Frame | None = None
    for time, image in frames:
        frame = Frame(time, image)
        detector.push(frame)
        pictures.look(frame)
        times.append(time)
        for signal in measuring:
            measured = signal.measure(frame, previous)
            if len(measured) != signal.measures:
                raise ValueError(
                    f"{type(signal).__name__}.measure returned {len(measured)} floats and declares {signal.measures}"
                )
            values.extend(measured)
        previous = frame
    width = sum(signal.measures for signal in measuring)
    table = np.frombuffer(values, np.float64).reshape(len(times), width) if width else np.empty((len(times), 0))
    return np.frombuffer(times, np.float64), table, detector.finish()


def _spans(
    times: Floats, boundaries: list[int], timeline: Floats, film_end: float
) -> list[tuple[tuple[int, int], tuple[float, float, int]]]:
    """For every shot the range of its decoded frames, and (start, end, number of frames).

    A cut lies between the last decoded frame before it and the first one after it. Frames in between were not seen, so both
    shots are trimmed to what was: the first ends where its last seen frame ends, which is when the next frame of the file starts.
    """
    spans = []
    for first, last in pairwise([0, *boundaries, len(times)]):
        start, seen = float(times[first]), float(times[last - 1])
        end = film_end
        if last < len(times):
            after = int(np.searchsorted(timeline, seen, side="right"))
            following = float(timeline[after]) if after < len(timeline) else film_end
            end = min(following, float(times[last]))
        count = int(np.searchsorted(timeline, end, side="left") - np.searchsorted(timeline, start, side="left"))
        spans.append(((first, last), (start, end, count)))
    return spans


def _summarise(measuring: list[Signal], times: Floats, values: Floats) -> dict[str, float | None]:
    """Every declared column of one shot. NaN and infinities become `None`: not measured."""
    result: dict[str, float | None] = {}
    place = 0
    for signal in measuring:
        own = values[:, place : place + signal.measures].copy()
        place += signal.measures
        if signal.compares:
            # The first frame of the film has nothing to be compared with, that of a shot the shot before.
            own[0] = np.nan
        summary = signal.summarise(times, own)
        for column in signal.columns:
            value = summary.get(column.name)
            result[column.name] = float(value) if value is not None and np.isfinite(value) else None
    return result
