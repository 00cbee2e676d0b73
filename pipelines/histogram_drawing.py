"""A histogram as SVG geometry: paths, ticks and lines in the user units of a fixed view box, which the template only writes out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from . import formats
from .histogram import BINS, Axis, Histogram, round_values

WIDTH, HEIGHT = 360, 178
_LEFT, _RIGHT, _BOTTOM = 40.0, 352.0, 150.0
# Labels of the thresholds stand above the bars, one row each, so that close lines stay readable.
_LABEL_ROW = 12.0
_MOST_LABELS = 4


@dataclass(frozen=True)
class Mark:
    """Something at a place along an axis, with its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """A threshold: a vertical line at `x` from `top` down to the axis, its text to the `anchor` side ("start": to the right)."""

    x: float
    top: float
    anchor: str
    text_x: float
    text: str


@dataclass(frozen=True)
class Hover:
    """A bin's column, with what to say when it is pointed at."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class Drawing:
    """A histogram ready to be written as SVG in a view box of `WIDTH` x `HEIGHT`.

    Attributes:
        kept, here, elsewhere: path data of the stacked bars: kept, rejected by a rule on this subject, rejected by other rules.
        across: ticks of the horizontal axis, `up`: ticks of the vertical one (clips per bin).
        lines: thresholds.
        hovers: one per bin that holds something.
        left, right, top, bottom: the plot area.
    """

    kept: str
    here: str
    elsewhere: str
    across: tuple[Mark, ...]
    up: tuple[Mark, ...]
    lines: tuple[Line, ...]
    hovers: tuple[Hover, ...]
    left: float
    right: float
    top: float
    bottom: float


def draw(histogram: Histogram) -> Drawing:
    """The geometry of a histogram."""
    values = list(dict.fromkeys(line.value for line in histogram.thresholds))
    top = 10.0 + _LABEL_ROW * min(len(values), _MOST_LABELS)
    highest = max((sum(bin) for bin in histogram.bins), default=0) or 1
    scale = (_BOTTOM - top) / highest
    step = (_RIGHT - _LEFT) / BINS
    stacked: tuple[list[str], list[str], list[str]] = ([], [], [])
    for number, bin in enumerate(histogram.bins):
        base = _BOTTOM
        for path, clips in zip(stacked, bin, strict=True):
            if clips:
                base -= clips * scale
                path.append(f"M{_LEFT + number * step + 0.5:.1f} {base:.1f}h{step - 1:.1f}v{clips * scale:.1f}h{1 - step:.1f}z")
    kept, here, elsewhere = ("".join(path) for path in stacked)
    return Drawing(
        kept=kept,
        here=here,
        elsewhere=elsewhere,
        across=tuple(Mark(round(_x(histogram.axis, value), 1), _short(value)) for value in histogram.axis.ticks()),
        up=tuple(Mark(round(_BOTTOM - value * scale, 1), _short(value)) for value in _whole(highest)),
        lines=tuple(_lines(histogram.axis, values)),
        hovers=tuple(_hovers(histogram, step)),
        left=_LEFT,
        right=_RIGHT,
        top=top,
        bottom=_BOTTOM,
    )


def _x(axis: Axis, value: float) -> float:
    return _LEFT + axis.position(value) * (_RIGHT - _LEFT)


def _whole(highest: int) -> list[float]:
    """Round counts up to `highest`; there are no half clips."""
    return [value for value in round_values(0, highest, 3) if value == int(value) and value > 0]


def _lines(axis: Axis, values: Sequence[float]) -> Iterator[Line]:
    for row, value in enumerate(values):
        x = round(_x(axis, value), 1)
        anchor = "start" if x < (_LEFT + _RIGHT) / 2 else "end"
        labelled = row < _MOST_LABELS
        yield Line(
            x=x,
            top=4.0 + _LABEL_ROW * min(row, _MOST_LABELS),
            anchor=anchor,
            text_x=x + (4 if anchor == "start" else -4),
            text=formats.number(value) if labelled else "",
        )


def _hovers(histogram: Histogram, step: float) -> Iterator[Hover]:
    axis = histogram.axis
    for number, (kept, here, elsewhere) in enumerate(histogram.bins):
        if kept + here + elsewhere:
            low, high = (_value(axis, edge / BINS) for edge in (number, number + 1))
            text = f"{formats.number(low)} to {formats.number(high)}: {kept:,} kept, {here + elsewhere:,} rejected"
            yield Hover(round(_LEFT + number * step, 1), round(step, 2), text)


def _value(axis: Axis, place: float) -> float:
    if axis.logarithmic:
        return float(axis.low * (axis.high / axis.low) ** place)
    return axis.low + place * (axis.high - axis.low)


def _short(value: float) -> str:
    """A tick's text: thousands and millions abbreviated, as there is little room."""
    for unit, factor in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= 10 * factor or (abs(value) >= factor and value % (factor / 10) == 0):
            return f"{formats.number(value / factor)}{unit}"
    return formats.number(value)
