"""`static_fraction`: the part of a shot in which nothing changes, as in slides, stills and frozen pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from videofactory.curation.signals import Floats, Frame, Image, Signal
from videofactory.shards.schema import Column

INTERVAL = 0.2
"""Least seconds between two compared frames: long enough for slow moves to show."""

# The picture is averaged to this size, which removes sensor and coding noise but keeps a moving mouth.
_WIDTH, _HEIGHT = 64, 36
# A cell has changed when it differs by more than a multiple of the pair's median difference, within these levels of 255.
_NOISE_FACTOR = 4.0
_LEAST_CHANGE = 3.0
_MOST_NOISE_CHANGE = 8.0
# So many changed cells, about a thousandth of the picture, are a change.
_CHANGED_CELLS = 3


class StaticFraction(Signal):
    """Share of the shot's time between compared frames that show no change."""

    columns = (
        Column(
            name="static_fraction",
            meaning="share of the shot's time in which nothing changes: frames 0.2 s apart, averaged to 64 x 36 cells, "
            "of which at most 2 differ by more than noise",
            unit="fraction",
            low=0.0,
            high=1.0,
            cost="50 microseconds on five frames a second",
            source="our own definition",
        ),
    )
    measures = 3

    def __init__(self) -> None:
        self._anchor: tuple[float, Image] | None = None

    def measure(self, frame: Frame, previous: Frame | None) -> Sequence[float]:
        """(1 if nothing changed, else 0; time of the earlier frame; seconds between) for a compared frame, NaN for others."""
        import cv2

        if self._anchor is not None and frame.time - self._anchor[0] < INTERVAL and frame.cut_score < 15.0:
            return math.nan, math.nan, math.nan
        cells = cv2.resize(frame.gray, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_AREA)
        anchor, self._anchor = self._anchor, (frame.time, cells)
        if anchor is None:
            return math.nan, math.nan, math.nan
        since, before = anchor
        change = cv2.absdiff(before, cells)
        threshold = min(max(_NOISE_FACTOR * float(np.median(change)), _LEAST_CHANGE), _MOST_NOISE_CHANGE)
        still = np.count_nonzero(change > threshold) < _CHANGED_CELLS
        return float(still), since, frame.time - since

    def summarise(self, times: Floats, values: Floats) -> dict[str, float | None]:
        """Still seconds divided by compared seconds; `None` where no two frames of the shot were compared."""
        inside = values[:, 1] >= times[0]
        if not inside.any():
            return {"static_fraction": None}
        still, seconds = values[inside, 0], values[inside, 2]
        return {"static_fraction": float((still * seconds).sum() / seconds.sum())}
