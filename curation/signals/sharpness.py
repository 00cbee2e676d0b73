"""`sharpness`: how much fine detail the picture holds at analysis size; low for blurred, upscaled or empty pictures."""

from __future__ import annotations

import math
from collections.abc import Sequence

from videofactory.curation.signals import Floats, Frame, Signal, mean_or_none
from videofactory.shards.schema import Column

INTERVAL = 0.1
"""Seconds between measured frames: blur changes slowly, and the filter is the dearest of the per-frame measures."""


class Sharpness(Signal):
    """Variance of the Laplacian, averaged over about ten frames a second."""

    columns = (
        Column(
            name="sharpness",
            meaning="variance over the picture of the 3x3 Laplacian of luma (0 to 255), averaged over frames, at analysis width; "
            "numbers of different analysis widths do not compare",
            unit="squared levels of 255",
            low=0.0,
            cost="80 microseconds on ten frames a second",
            source="LAPV of Pech-Pacheco et al. 2000, in the review of Pertuz et al. 2013",
        ),
    )

    def __init__(self) -> None:
        self._next = -math.inf

    def measure(self, frame: Frame, previous: Frame | None) -> Sequence[float]:
        """Variance of the frame's Laplacian; NaN between the measured frames."""
        import cv2

        # A cut starts a new measurement at once, so that every shot has at least one.
        if frame.time < self._next and frame.cut_score < 15.0:
            return (math.nan,)
        self._next = frame.time + INTERVAL
        _, spread = cv2.meanStdDev(cv2.Laplacian(frame.gray, cv2.CV_16S))
        return (float(spread[0, 0]) ** 2,)

    def summarise(self, times: Floats, values: Floats) -> dict[str, float | None]:
        """Mean over the measured frames."""
        return {"sharpness": mean_or_none(values[:, 0])}
