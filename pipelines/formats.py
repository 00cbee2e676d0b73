"""How numbers and strangers' texts are written out for people: on the card, on the report page, in tables."""

from __future__ import annotations

import math
import unicodedata


def count(value: int) -> str:
    """A count with separators: 12345 is `12,345`."""
    return f"{value:,}"


def counted(value: int, thing: str) -> str:
    """A count and what is counted: `1 shard`, `1,200 shards`."""
    return f"{value:,} {thing}" if value == 1 else f"{value:,} {thing}s"


def number(value: object) -> str:
    """A value of any column, floats with four significant digits; `not measured` for `None`."""
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        digits = 4 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        text = f"{value:,.{digits}f}"
        return text.rstrip("0").rstrip(".") if "." in text else text
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A duration in the unit that suits it: `12.5 s`, `3.2 min`, `1,234.5 h`."""
    if value is None:
        return "unknown"
    if value < 60:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:,.1f} h"


def size(value: float) -> str:
    """A number of bytes in decimal units, as disks and object stores count: `12.3 MB`."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if unit == "bytes" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:,.1f} PB"


def percent(fraction: float) -> str:
    """A fraction as a percentage that never rounds something to nothing: `12.3%`, `<0.1%`."""
    if 0 < fraction < 0.001:
        return "<0.1%"
    if 0.999 < fraction < 1:
        return ">99.9%"
    return f"{fraction:.1%}"


def line(text: object, limit: int = 300) -> str:
    """A stranger's text as one line: white space collapsed, control and invisible formatting characters (such as those that
    turn the direction of writing) removed, and cut after `limit` characters."""
    shown = "".join(" " if letter.isspace() else letter for letter in str(text) if letter.isspace() or _is_visible(letter))
    shown = " ".join(shown.split())
    return shown if len(shown) <= limit else shown[: limit - 1].rstrip() + "…"


def _is_visible(letter: str) -> bool:
    # Cc: control, Cf: formatting, Cs: halves of surrogate pairs, which no encoding can write, Co and Cn: no agreed look.
    # The joiners (U+200C, U+200D) are formatting too, but Persian, Indic scripts and emoji are misspelt without them.
    return letter in "\u200c\u200d" or unicodedata.category(letter) not in ("Cc", "Cf", "Cs", "Co", "Cn")
