"""`letterbox`: how much of the frame black bars cover, on any of the four sides.

A dark scene is not a bar. A bar is black in every frame of the shot, and the picture begins at its straight edge all along it;
in a dark scene light begins here and there, and elsewhere in the next frame.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from videofactory.curation.signals import Floats, Frame, Signal
from videofactory.shards.schema import Column

BLACK = 12
"""Luma, of 255, up to which a pixel may belong to a bar: video black, and what coding and scaling add to it."""

# From the first pixel that is not black to where three quarters of the line are lit, a bar's edge may take this part of the side.
_EDGE = 0.03
# Narrower bars are the blanking of old recordings and scaling residue, not letterboxes.
_LEAST_BAR = 0.01


class Letterbox(Signal):
    """Share of the frame's area covered by black bars."""

    columns = (
        Column(
            name="letterbox",
            meaning="share of the frame's area that black bars with straight edges cover in every frame of the shot, all four sides; "
            "not measured where the whole shot is black",
            unit="fraction",
            low=0.0,
            high=1.0,
            cost="30 microseconds a frame",
            source="our own definition",
        ),
    )
    # For each side (top, bottom, left, right): where the first light is, then where most of the line is lit.
    measures = 8

    def measure(self, frame: Frame, previous: Frame | None) -> Sequence[float]:
        """Depths of darkness from the four sides as fractions of height and width; NaN for a black frame."""
        import cv2

        lit = cv2.compare(frame.gray, BLACK, cv2.CMP_GT)
        rows = cv2.reduce(lit, 1, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[:, 0]
        columns = cv2.reduce(lit, 0, cv2.REDUCE_SUM, dtype=cv2.CV_32S)[0]
        if not rows.any():
            return (math.nan,) * 8
        first_row, last_row, full_row, last_full_row = _edges(rows)
        first_column, last_column, full_column, last_full_column = _edges(columns)
        return (
            *(first_row, last_row, first_column, last_column),
            *(full_row, last_full_row, full_column, last_full_column),
        )

    def summarise(self, times: Floats, values: Floats) -> dict[str, float | None]:
        """One minus the area of the picture within the bars."""
        lit = values[~np.isnan(values[:, 0])]
        if not len(lit):
            return {"letterbox": None}
        # A low quantile and not the minimum, so that one damaged frame does not hide the bars of a shot.
        first, full = np.quantile(lit, 0.05, axis=0, method="lower").reshape(2, 4)
        bars = np.where((full - first <= _EDGE) & (first >= _LEAST_BAR), first, 0.0)
        top, bottom, left, right = bars
        return {"letterbox": float(1.0 - (1.0 - top - bottom) * (1.0 - left - right))}


def _edges(lit: npt.NDArray[np.int32]) -> tuple[float, float, float, float]:
    """Depths from both ends to the first line with any light, and to the first that is nearly as lit as the fullest."""
    some = np.flatnonzero(lit)
    # Three quarters of the fullest line: a round lamp in a dark room gets there gradually, a picture's edge at once.
    full = np.flatnonzero(lit * 4 >= lit.max() * 3)
    size = len(lit)
    return some[0] / size, (size - 1 - some[-1]) / size, full[0] / size, (size - 1 - full[-1]) / size
