"""Histograms of a dataset's measured columns with the thresholds of its rules, as geometry that a template draws as SVG.

Thresholds are read from the rules' SQL: every comparison of something with a constant is a line, whether that something is a
column (`motion >= 0.002`) or an expression over columns (`width / height between 1.7 and 1.85`), which gets a histogram too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from videofactory.curation.rules import expressions
from videofactory.shards.schema import Column

BINS = 40

# Beyond these quantiles values are counted in the outermost bins, so that one outlier does not squeeze everything else into one bin.
_TAIL = 0.005
# Where the upper end of the span is this many times the median, the axis is logarithmic.
_HEAVY_TAIL = 30.0
# ... and also where it is this many times a threshold, which would otherwise stand at the very edge.
_FAR_FROM_THRESHOLD = 100.0

_COMPARISONS = frozenset(
    f"COMPARE_{name}" for name in ("GREATERTHAN", "GREATERTHANOREQUALTO", "LESSTHAN", "LESSTHANOREQUALTO", "EQUAL", "NOTEQUAL")
)
_NO_ROW_EXPRESSION = frozenset(("SUBQUERY", "WINDOW", "STAR", "LAMBDA", "PARAMETER"))


# What the core columns that a rule may compare mean.
_CORE = (
    Column("duration", "length of the clip", "seconds", 0.0),
    Column("start", "where the clip begins in its source", "seconds"),
    Column("end", "where the clip ends in its source", "seconds"),
    Column("frames", "number of frames", "frames", 0.0),
    Column("width", "width of the picture", "pixels", 0.0),
    Column("height", "height of the picture", "pixels", 0.0),
    Column("fps", "frame rate", "frames per second", 0.0),
    Column("bytes", "size of the encoded clip", "bytes", 0.0),
    Column("lead_in_bytes", "size of what precedes the clip's first shown frame in its file", "bytes", 0.0),
)


@dataclass(frozen=True)
class Threshold:
    """A constant that a rule compares something with.

    Attributes:
        rule: name of the rule.
        subject: what is compared, in SQL; the column's name when it is just a column.
        value: the constant.
    """

    rule: str
    subject: str
    value: float


@dataclass(frozen=True)
class Axis:
    """The values that a histogram spans: from `low` to `high`, linear or logarithmic (then both are positive)."""

    low: float
    high: float
    logarithmic: bool = False

    def position(self, value: float) -> float:
        """Where `value` lies, 0 at the low end and 1 at the high end; values beyond lie at the end."""
        if self.logarithmic:
            return position(math.log10(max(value, self.low)), math.log10(self.low), math.log10(self.high))
        return position(value, self.low, self.high)

    def ticks(self) -> list[float]:
        """Round values between the ends."""
        if not self.logarithmic:
            return round_values(self.low, self.high, 6)
        powers = range(math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9) + 1)
        step = max(1, math.ceil(len(powers) / 6))
        return [10.0**power for power in powers if power % step == 0]


@dataclass(frozen=True)
class Histogram:
    """The distribution of one subject over the candidates.

    Attributes:
        subject: a column, or an expression in SQL.
        column: declaration of the column; empty meaning and unit where nothing is known.
        axis: the span of the bins.
        bins: for each of `BINS` bins: kept clips, clips rejected by a rule on this subject, clips rejected by other rules.
        thresholds: those of the rules, in ascending order.
        measured, unmeasured: number of candidates with and without a value. Those that failed or are pending count here and are
            not drawn.
        clamped: whether values beyond the axis are counted in the outermost bins.
    """

    subject: str
    column: Column
    axis: Axis
    bins: tuple[tuple[int, int, int], ...]
    thresholds: tuple[Threshold, ...]
    measured: int
    unmeasured: int
    clamped: bool

    @property
    def kept(self) -> int:
        """Kept clips with a value."""
        return sum(kept for kept, _, _ in self.bins)

    @property
    def rejected(self) -> int:
        """Rejected clips with a value."""
        return sum(here + elsewhere for _, here, elsewhere in self.bins)


def position(value: float, low: float, high: float) -> float:
    """Where `value` lies between `low` and `high`, as a fraction in [0, 1]."""
    return min(1.0, max(0.0, (value - low) / (high - low)))


def round_values(low: float, high: float, about: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from `low` to `high`, roughly `about` of them."""
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(number * step, 12) for number in range(first, math.floor(high / step + 1e-9) + 1)]


class RuleReader:
    """Reads rules with DuckDB's own parser: which columns they use, and which constants they compare with."""

    def __init__(self) -> None:
        self._connection = duckdb.connect(config={"enable_external_access": "false", "threads": "1"})

    def columns(self, sql: str) -> list[str]:
        """The columns that a rule uses, in the order of their first mention; none for a rule that does not parse."""
        return list(dict.fromkeys(node["column_names"][-1].lower() for node in expressions(self._parse(sql)) if _is_column(node)))

    def thresholds(self, name: str, sql: str) -> list[Threshold]:
        """The constants that the rule `name` compares something with, in the order in which it says so."""
        tree = self._parse(sql)
        if tree is None:
            return []
        found = []
        for left, right in _comparisons(tree["statements"][0]["node"]["select_list"][0]):
            for subject, constant in ((left, right), (right, left)):
                if _is_constant(constant) and _is_row_expression(subject):
                    value = self._value(tree, constant)
                    if value is not None and math.isfinite(value):
                        found.append(Threshold(name, self._subject(tree, subject), value))
        return found

    def _parse(self, sql: str) -> Any:
        answer = self._connection.execute("select json_serialize_sql(?)", [f"select (\n{sql}\n)"]).fetchall()[0][0]
        tree = json.loads(answer)
        return None if tree.get("error") else tree

    def _text(self, tree: Any, node: Mapping[str, Any]) -> str:
        statement = tree["statements"][0]
        alone = {**statement, "node": {**statement["node"], "select_list": [{**node, "alias": ""}]}}
        text = json.dumps({**tree, "statements": [alone]})
        sql = self._connection.execute("select json_deserialize_sql(?::json)", [text]).fetchall()[0][0]
        return str(sql).removeprefix("SELECT ")

    def _subject(self, tree: Any, node: Mapping[str, Any]) -> str:
        if _is_column(node):
            return str(node["column_names"][-1]).lower()
        return _without_brackets(self._text(tree, node))

    def _value(self, tree: Any, node: Mapping[str, Any]) -> float | None:
        try:
            sql = f"select try_cast(({self._text(tree, node)}) as double)"
            value = self._connection.execute(sql).fetchall()[0][0]
        except duckdb.Error:
            return None
        return None if value is None else float(value)


def _comparisons(node: Mapping[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The two sides of every comparison that the condition consists of, through `and`, `or` and `not`."""
    if node["class"] == "CONJUNCTION" or node["type"] == "OPERATOR_NOT":
        for child in node["children"]:
            yield from _comparisons(child)
    elif node["class"] == "COMPARISON" and node["type"] in _COMPARISONS:
        yield node["left"], node["right"]
    elif node["class"] == "BETWEEN":
        yield node["input"], node["lower"]
        yield node["input"], node["upper"]


def _without_brackets(text: str) -> str:
    """`text` without a pair of brackets around the whole of it, which DuckDB writes around every operation."""
    if not (text.startswith("(") and text.endswith(")")) or "'" in text:
        return text
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0 and place < len(text) - 1:
            return text
    return text[1:-1]


def _is_column(node: Mapping[str, Any]) -> bool:
    return bool(node["class"] == "COLUMN_REF")


def _is_constant(node: Any) -> bool:
    """A literal number, possibly cast or calculated; nothing that could answer otherwise tomorrow."""
    return all(
        inner["class"] in ("CONSTANT", "CAST", "TYPE") or (inner["class"] == "FUNCTION" and inner.get("is_operator"))
        for inner in expressions(node)
    )


def _is_row_expression(node: Any) -> bool:
    nodes = list(expressions(node))
    return any(map(_is_column, nodes)) and not any(inner["class"] in _NO_ROW_EXPRESSION for inner in nodes)


def histograms(clips: pa.Table, declared: Sequence[Column], rules: Mapping[str, str]) -> list[Histogram]:
    """A histogram of the duration, of every declared column, and of everything else that a rule compares with a constant.

    Args:
        clips: rows of `clips` with their `state`.
        declared: the measured columns, in the order in which they are to stand; those without any value are left out.
        rules: conditions in SQL by name.
    """
    reader = RuleReader()
    thresholds = [threshold for name, sql in rules.items() for threshold in reader.thresholds(name, sql)]
    users = {name: set(reader.columns(sql)) for name, sql in rules.items()}
    known = {column.name: column for column in (*_CORE, *declared)}
    subjects = dict.fromkeys(
        ["duration", *(column.name for column in declared), *(threshold.subject for threshold in thresholds)]
    )
    connection = duckdb.connect(config={"enable_external_access": "false"})
    connection.register("clips", clips)
    drawn = []
    for subject in subjects:
        lines = sorted((line for line in thresholds if line.subject == subject), key=lambda line: (line.value, line.rule))
        judges = [name for name, columns in users.items() if subject in columns or any(line.rule == name for line in lines)]
        sql = f'"{subject}"' if subject in clips.column_names else subject
        found = _histogram(connection, sql, known.get(subject, Column(subject, "", "")), lines, judges)
        if found is not None:
            drawn.append(found)
    return drawn


def _histogram(connection: Any, sql: str, column: Column, lines: Sequence[Threshold], judges: Sequence[str]) -> Histogram | None:
    """The histogram of one subject, or `None` where no clip has a value (or the subject is no number)."""
    try:
        connection.execute(
            f"""
            create or replace temp table measured as
            select value, state, rejected_by from (select try_cast((\n{sql}\n) as double) as value, state, rejected_by from clips)"""
        )
    except duckdb.Error:
        return None
    measured, unmeasured, *quantiles, least_positive = connection.execute(
        """
        select count(value), count(*) - count(value), min(value), quantile_disc(value, $tail),
            quantile_disc(value, 0.5), quantile_disc(value, 1 - $tail), max(value),
            quantile_disc(value, $tail) filter (value > 0)
        from measured where value is null or isfinite(value)""",
        {"tail": _TAIL},
    ).fetchall()[0]
    if not measured:
        return None
    axis = _axis(quantiles, least_positive, [line.value for line in lines])
    counts = connection.execute(
        f"""
        select {_bin_sql(axis)} as bin,
            count(*) filter (state = 'kept'),
            count(*) filter (state = 'rejected' and list_contains($judges::varchar[], rejected_by)),
            count(*) filter (state = 'rejected' and not list_contains($judges::varchar[], rejected_by))
        from measured where isfinite(value) group by 1""",
        {"judges": [*judges], "low": axis.low, "high": axis.high, "bins": BINS},
    ).fetchall()
    bins = {number: (kept, here, elsewhere) for number, kept, here, elsewhere in counts}
    return Histogram(
        subject=column.name,
        column=column,
        axis=axis,
        bins=tuple(bins.get(number, (0, 0, 0)) for number in range(BINS)),
        thresholds=tuple(lines),
        measured=measured,
        unmeasured=unmeasured,
        clamped=quantiles[0] < axis.low or quantiles[-1] > axis.high,
    )


def _bin_sql(axis: Axis) -> str:
    if axis.logarithmic:
        place = "(log10(greatest(value, $low)) - log10($low)) / (log10($high) - log10($low))"
    else:
        place = "(value - $low) / ($high - $low)"
    return f"least($bins - 1, greatest(0, floor({place} * $bins + 1e-9)))::integer"


def _axis(quantiles: Sequence[float], least_positive: float | None, thresholds: Sequence[float]) -> Axis:
    """A span that shows nearly all values and every threshold, in bins of which one begins at the first threshold."""
    least, low, middle, high, most = quantiles
    ends = [low, high, *thresholds]
    first, last = min(ends), max(ends)
    if first == last:
        first, last = first - (abs(first) * 0.1 or 0.5), last + (abs(last) * 0.1 or 0.5)
    positive = [value for value in thresholds if value > 0]
    heavy = middle > 0 and (last / middle > _HEAVY_TAIL or any(last / value > _FAR_FROM_THRESHOLD for value in positive))
    if least >= 0 and least_positive is not None and heavy:
        span = _aligned(math.log10(min(least_positive, *positive, last) / 1.2), math.log10(last * 1.2), map(math.log10, positive))
        return Axis(10 ** span[0], 10 ** span[1], logarithmic=True)
    margin = (last - first) * 0.03
    # Without a threshold at the end a margin would only reach over a bound that the values respect: a fraction ends at 1.
    start = first if first == least and first not in thresholds else first - margin
    end = last if last == most and last not in thresholds else last + margin
    return Axis(*_aligned(start, end, thresholds))


def _aligned(low: float, high: float, thresholds: Iterable[float]) -> tuple[float, float]:
    """The span moved and widened by less than a bin so that a bin begins at the first threshold: what a rule tells apart
    then stands in different bars."""
    threshold = next(iter(thresholds), None)
    if threshold is None:
        return low, high
    width = (high - low) / (BINS - 1)
    start = threshold - math.ceil((threshold - low) / width - 1e-9) * width
    return start, start + BINS * width
