"""Shot boundaries: PySceneDetect's adaptive detector, fed frame by frame from a decode that serves others too.

`ShotDetector` is pushed frames and tells the boundaries at the end; `detect(path)` does the whole work for one file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

from videofactory.curation.signals import Frame

_TICKS = 1_000_000
"""Ticks per second of the timestamps handed to PySceneDetect."""


@dataclass(frozen=True)
class ShotSettings:
    """What counts as a cut. The defaults did best in PySceneDetect's own sweep over three public test sets.

    Attributes:
        adaptive_threshold: how many times the mean score of its neighbours a frame's score must be.
        window: number of neighbours on either side.
        min_content: least score of a cut, in levels of 255.
        min_shot_seconds: a cut nearer than this to the cut before it is ignored.
    """

    adaptive_threshold: float = 3.5
    window: int = 3
    min_content: float = 15.0
    min_shot_seconds: float = 0.6

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("adaptive_threshold", self.adaptive_threshold, 0.0, 1000.0),
            ("window", self.window, 1, 100),
            ("min_content", self.min_content, 0.0, 255.0),
            ("min_shot_seconds", self.min_shot_seconds, 0.0, 3600.0),
        ):
            if not low <= value <= high:  # also false for NaN
                raise ValueError(f"analysis setting {name} is {value}; it must lie between {low} and {high}")


def make_detector(settings: ShotSettings) -> Any:
    """PySceneDetect's detector for `settings`, with its own score: the reference against which ours is tested."""
    from scenedetect import AdaptiveDetector

    return AdaptiveDetector(**_arguments(settings))


def _arguments(settings: ShotSettings) -> dict[str, Any]:
    return {
        "adaptive_threshold": settings.adaptive_threshold,
        "window_width": settings.window,
        "min_content_val": settings.min_content,
        # A float is seconds; an int would be frames, of which half are not seen.
        "min_scene_len": float(settings.min_shot_seconds),
    }


@cache
def _detector_class() -> type[Any]:
    """The adaptive detector with its frame score computed in one pass over the bytes: the same number for a third of the cost."""
    import cv2
    from scenedetect import AdaptiveDetector

    class FastAdaptiveDetector(AdaptiveDetector):
        """Takes HSV images in place of BGR ones."""

        _hsv: Any = None
        score = 0.0

        def _calculate_frame_score(self, timecode: Any, frame_img: Any) -> float:
            before, self._hsv = self._hsv, frame_img
            # The mean over three channels of equal weight is the mean over all bytes.
            self.score = 0.0 if before is None else cv2.norm(frame_img, before, cv2.NORM_L1) / frame_img.size
            return self.score

    return FastAdaptiveDetector


class ShotDetector:
    """Finds the boundaries of one video; make a new one for every video.

    The detector decides about a frame only when it has seen `window` more, so boundaries are known at the end.
    """

    def __init__(self, settings: ShotSettings | None = None) -> None:
        self._detector = _detector_class()(**_arguments(settings or ShotSettings()))
        self._start: float | None = None
        self._places: dict[int, int] = {}
        self._boundaries: list[int] = []
        self._count = 0

    def push(self, frame: Frame) -> float:
        """Take the next frame, write its score to `frame.cut_score`, and return it (0 to 255, 0 for the first frame)."""
        from scenedetect.common import FrameTimecode, Timecode

        if self._start is None:
            self._start = frame.time
        ticks = round((frame.time - self._start) * _TICKS)
        # Only the timestamp counts, because lengths are given in seconds; the rate is required and not used.
        timecode = FrameTimecode(Timecode(ticks, Fraction(1, _TICKS)), fps=Fraction(30))
        self._places[ticks] = self._count
        self._note(self._detector.process_frame(timecode, frame.hsv))
        # Boundaries lag behind by the window, so older places can be forgotten.
        if len(self._places) > 256:
            for old in list(self._places)[:128]:
                del self._places[old]
        self._last = timecode
        self._count += 1
        frame.cut_score = self._detector.score
        return frame.cut_score

    def finish(self) -> list[int]:
        """Places (counting pushed frames from 0) of the frames that begin a new shot, ascending; the first frame is not among them."""
        if self._count:
            self._note(self._detector.post_process(self._last))
        return sorted(set(self._boundaries))

    def _note(self, cuts: Sequence[Any]) -> None:
        self._boundaries += [place for cut in cuts if (place := self._places[cut.pts]) > 0]


def detect(path: Path | str, settings: ShotSettings | None = None) -> list[tuple[float, float]]:
    """The shots of a file as [start, end) in seconds of its own timestamps, from every frame of it.

    Decodes in this process; for files nobody vouches for use `analysis.analyse_guarded`.

    Raises:
        MediaError: the file cannot be used.
    """
    from videofactory.curation.decode import SmallFrames

    frames = SmallFrames(path, skip="none")
    detector = ShotDetector(settings)
    times = []
    for time, image in frames:
        detector.push(Frame(time, image))
        times.append(time)
    starts = [times[0], *(times[place] for place in detector.finish())]
    return list(zip(starts, [*starts[1:], frames.end], strict=True))
