"""Signals: numbers measured on every shot during the one decode, one module each.

A signal is a subclass of `Signal` in a module of this package, or in any installed package that names it under the entry point
group `videofactory.signals`. Nothing else has to be touched to add one: its columns appear in the tables, the rules, and the
documentation by themselves.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cache, cached_property
from importlib.metadata import entry_points
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from videofactory.shards.schema import Column

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]

ENTRY_POINTS = "videofactory.signals"


class Frame:
    """One decoded frame at analysis size; what is derived from it is computed once and shared.

    Attributes:
        time: the frame's timestamp in the source, in seconds.
        bgr: uint8 [height, width, 3], as displayed (rotation and pixel aspect applied).
        cut_score: how much the picture differs from the frame before, 0 to 255 (PySceneDetect's content score); 0 for the first.
    """

    def __init__(self, time: float, bgr: Image, cut_score: float = 0.0) -> None:
        self.time = time
        self.bgr = bgr
        self.cut_score = cut_score

    @cached_property
    def gray(self) -> Image:
        """Luma, uint8 [height, width], 0 (black) to 255 (white)."""
        import cv2

        return cv2.cvtColor(self.bgr, cv2.COLOR_BGR2GRAY)  # type: ignore[no-any-return]

    @cached_property
    def hsv(self) -> Image:
        """Hue (0 to 179), saturation and value (0 to 255), uint8 [height, width, 3]."""
        import cv2

        return cv2.cvtColor(self.bgr, cv2.COLOR_BGR2HSV)  # type: ignore[no-any-return]


class Signal(ABC):
    """Measures a few floats on every decoded frame, and sums them up for every shot.

    An instance lives for one source, so it may remember frames. A measure that compares frames further apart than neighbours
    must report since when, and leave out in `summarise` what reaches back before the shot (see `motion`).

    Attributes:
        columns: the columns that `summarise` fills.
        measures: number of floats that `measure` returns for a frame.
        compares: whether `measure` compares with the frame before. The values of a shot's first frame are then NaN when they
            reach `summarise`, for they tell about the cut and not about the shot.
    """

    columns: ClassVar[tuple[Column, ...]]
    measures: ClassVar[int] = 1
    compares: ClassVar[bool] = False

    @abstractmethod
    def measure(self, frame: Frame, previous: Frame | None) -> Sequence[float]:
        """The `measures` floats of this frame; NaN where nothing is measured. `previous` is the frame decoded before it."""

    @abstractmethod
    def summarise(self, times: Floats, values: Floats) -> dict[str, float | None]:
        """The columns of one shot; `None` where nothing was measured.

        Args:
            times: timestamps in seconds of the shot's decoded frames, shape [n], n >= 1.
            values: what `measure` returned for them, shape [n, measures].
        """


@cache
def load() -> tuple[type[Signal], ...]:
    """Every signal class: those of this package in alphabetical order, then those of entry points by name.

    Raises:
        ImportError: an entry point cannot be loaded; the message names it.
        TypeError: an entry point names something that is no signal.
        ValueError: two signals declare the same column.
    """
    found: list[type[Signal]] = []
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        found += _declared_in(importlib.import_module(f"{__name__}.{module}"))
    for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name):
        try:
            signal = entry.load()
        except Exception as error:
            raise ImportError(
                f"signal {entry.name!r} = {entry.value!r} cannot be loaded: {error}; repair or uninstall it"
            ) from error
        if not (isinstance(signal, type) and issubclass(signal, Signal)):
            raise TypeError(f"entry point {entry.name!r} = {entry.value!r} is not a subclass of Signal")
        found.append(signal)
    owners: dict[str, type[Signal]] = {}
    for signal in found:
        for column in signal.columns:
            if (other := owners.setdefault(column.name, signal)) is not signal:
                raise ValueError(
                    f"column {column.name!r} is declared by {other.__module__} and by {signal.__module__}; rename one"
                )
    return tuple(found)


def _declared_in(module: object) -> list[type[Signal]]:
    return [
        value
        for _, value in sorted(vars(module).items())
        if isinstance(value, type)
        and issubclass(value, Signal)
        and value.__module__ == getattr(module, "__name__", "")
        and not getattr(value, "__abstractmethods__", None)
    ]


def columns() -> tuple[Column, ...]:
    """The columns of every signal, in the order of `load`."""
    return tuple(column for signal in load() for column in signal.columns)


def mean_or_none(values: Floats) -> float | None:
    """Mean of the values that are not NaN, `None` where there is none."""
    kept = values[~np.isnan(values)]
    return float(kept.mean()) if kept.size else None
