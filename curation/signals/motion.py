"""`motion`: how fast the picture moves, in frame widths per second, whatever the frame rate and the encoder.

Dense optical flow between decoded frames about a tenth of a second apart, divided by the time between them: skipped frames,
variable frame rates and the encoder's own motion vectors play no part. Places that hardly change count as still, so that
sensor and coding noise do not pass for motion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from videofactory.curation.signals import Floats, Frame, Image, Signal
from videofactory.shards.schema import Column

INTERVAL = 0.25
"""Seconds from the start of one measured pair of frames to the start of the next."""

BASELINE = 0.12
"""Least seconds between the frames of a pair: long enough for slow moves to stand out, short enough for fast ones to be matched."""

WIDTH = 128
"""Width in pixels at which flow is computed (of a landscape picture; a portrait one has this height)."""

# A place has changed when its mean absolute difference, over 9 x 9 pixels, exceeds a multiple of the pair's noise, in levels of 255.
_NOISE_FACTOR = 1.6
_LEAST_CHANGE = 1.0
_MOST_NOISE_CHANGE = 6.0

# Side in pixels of the neighbourhood of a changed place in which flow counts.
_REACH = 25


class Motion(Signal):
    """Mean magnitude of optical flow over four pairs of frames a second."""

    columns = (
        Column(
            name="motion",
            meaning="magnitude of optical flow, averaged over the picture and over four pairs of frames a second of the whole shot, "
            "divided by the time between the frames; unchanged places count as still",
            unit="frame widths per second",
            low=0.0,
            cost="0.2 milliseconds on eight frames a second",
            source="dense inverse search flow: Kroeger et al. 2016",
        ),
    )
    measures = 3

    def __init__(self) -> None:
        self._flow: Any = None
        self._anchor: tuple[float, Image] | None = None
        self._next = -math.inf

    def measure(self, frame: Frame, previous: Frame | None) -> Sequence[float]:
        """(speed, time at which the pair began, time at which it ended) for the frame that completes a pair, NaN for others."""
        if self._anchor is None:
            if frame.time >= self._next:
                self._begin(frame)
            return math.nan, math.nan, math.nan
        since, before = self._anchor
        if frame.cut_score >= 15.0 and frame.time - since < BASELINE:
            # Probably a cut: the pair would straddle it and be thrown away, so begin again on this side.
            self._begin(frame)
            return math.nan, math.nan, math.nan
        if frame.time - since < BASELINE:
            return math.nan, math.nan, math.nan
        after = _small(frame.gray)
        speed = self._displacement(before, after) / (frame.time - since)
        self._anchor = None
        if frame.time >= self._next or frame.cut_score >= 15.0:
            self._begin(frame, after)
        return speed, since, frame.time

    def _begin(self, frame: Frame, small: Image | None = None) -> None:
        self._anchor = (frame.time, _small(frame.gray) if small is None else small)
        self._next = frame.time + INTERVAL

    def _displacement(self, before: Image, after: Image) -> float:
        """Mean displacement between two pictures, in frame widths."""
        import cv2

        change = cv2.blur(cv2.absdiff(before, after), (9, 9))
        noise = float(np.percentile(change, 10))
        changed = change > min(max(_NOISE_FACTOR * noise, _LEAST_CHANGE), _MOST_NOISE_CHANGE)
        if not changed.any():
            return 0.0
        # Plain surfaces show little change although they move with what surrounds them: the flow carries over to them.
        changed = cv2.dilate(changed.astype(np.uint8), np.ones((_REACH, _REACH), np.uint8))
        if self._flow is None:
            # The type stubs of OpenCV 5 lack this class.
            library: Any = cv2
            self._flow = library.DISOpticalFlow_create(library.DISOPTICAL_FLOW_PRESET_ULTRAFAST)
        flow = self._flow.calc(before, after, None)
        length = cv2.magnitude(flow[..., 0], flow[..., 1])
        return float(np.mean(length * changed)) / int(before.shape[1])

    def summarise(self, times: Floats, values: Floats) -> dict[str, float | None]:
        """Mean over the pairs that lie inside the shot; `None` where there is no such pair."""
        inside = values[:, 1] >= times[0]
        return {"motion": float(values[inside, 0].mean()) if inside.any() else None}


def _small(gray: Image) -> Image:
    """The picture at flow size, smoothed so that noise weighs less than structure."""
    import cv2

    height, width = gray.shape
    scale = min(1.0, WIDTH / max(height, width))
    # The flow needs sides of at least 16 pixels.
    size = max(16, round(width * scale)), max(16, round(height * scale))
    small = cv2.resize(gray, size, interpolation=cv2.INTER_AREA)
    return cv2.GaussianBlur(small, (3, 3), 0)  # type: ignore[no-any-return]
