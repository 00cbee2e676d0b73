"""`brightness` and `brightness_spread`: how light the picture is, and how much of the scale a single picture uses."""

from __future__ import annotations

from collections.abc import Sequence

from videofactory.curation.signals import Floats, Frame, Signal, mean_or_none
from videofactory.shards.schema import Column


class Brightness(Signal):
    """Mean luma, and its spread within a frame."""

    columns = (
        Column(
            name="brightness",
            meaning="luma, averaged over all pixels of all decoded frames; 0 is black, 1 is white",
            unit="fraction of full scale",
            low=0.0,
            high=1.0,
            cost="5 microseconds a frame",
            source="luma weights of ITU-R BT.601",
        ),
        Column(
            name="brightness_spread",
            meaning="standard deviation of luma within a frame, averaged over the frames; near 0 for blank pictures",
            unit="fraction of full scale",
            low=0.0,
            high=0.5,
            cost="none beyond brightness",
            source="root-mean-square contrast: Peli 1990, Contrast in complex images",
        ),
    )
    measures = 2

    def measure(self, frame: Frame, previous: Frame | None) -> Sequence[float]:
        """Mean and standard deviation of the frame's luma, 0 to 1."""
        import cv2

        mean, spread = cv2.meanStdDev(frame.gray)
        return float(mean[0, 0]) / 255, float(spread[0, 0]) / 255

    def summarise(self, times: Floats, values: Floats) -> dict[str, float | None]:
        """Means over the frames."""
        return {"brightness": mean_or_none(values[:, 0]), "brightness_spread": mean_or_none(values[:, 1])}
