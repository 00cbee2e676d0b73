"""`cut_score`: the largest jump of the picture inside a shot; high where a cut, a flash or a fast transition was kept inside."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from videofactory.curation.signals import Floats, Frame, Signal
from videofactory.shards.schema import Column


class CutScore(Signal):
    """Highest score of the shot detector between two neighbouring frames of the shot."""

    columns = (
        Column(
            name="cut_score",
            meaning="largest difference between two neighbouring decoded frames strictly inside the shot: "
            "mean absolute difference of hue, saturation and value",
            unit="levels of 255",
            low=0.0,
            high=255.0,
            cost="none: the shot detector needs it anyway",
            source="content score of PySceneDetect",
        ),
    )
    compares = True

    def measure(self, frame: Frame, previous: Frame | None) -> Sequence[float]:
        """The frame's score."""
        return (frame.cut_score,)

    def summarise(self, times: Floats, values: Floats) -> dict[str, float | None]:
        """The highest score; `None` for a shot of one frame."""
        scores = values[:, 0]
        return {"cut_score": None if np.isnan(scores).all() else float(np.nanmax(scores))}
