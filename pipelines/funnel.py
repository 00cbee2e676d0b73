"""The funnel: how many sources went in, how many candidate clips each rule took away, and what is left.

Computed from the index alone, so that `videofactory stats`, the end of a build, the dataset card and the report page all show
the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from videofactory.shards.index import Index

UNMEASURED = "unmeasured:"
"""What `rejected_by` begins with when a rule could not be judged, because the column named after it was not measured."""

Kind = Literal["candidates", "rejected", "unmeasured", "failed", "pending", "kept"]


@dataclass(frozen=True)
class FunnelRow:
    """One line of the funnel.

    Attributes:
        kind: what the line counts.
        label: the rule, the column that was not measured, or the error class; for the other kinds, the kind itself.
        count: number of candidate clips.
        left: candidates that remain after this line and all lines above it.
        share: `count` as a fraction of all candidates, in [0, 1]; 0 when there are none.
    """

    kind: Kind
    label: str
    count: int
    left: int
    share: float


@dataclass(frozen=True)
class Funnel:
    """What became of every source and of every candidate clip. Counts are of rows; durations are in seconds.

    Attributes:
        sources: sources by status: done, failed, pending.
        failed_sources: failed sources by error class, most frequent first.
        analysed: sources in which candidates were looked for; some of them may still have clips pending.
        candidates: clips found in these sources.
        rejected: clips by the rule that rejected them: the recipe's rules in its order (also those that rejected none), then
            rules of earlier recipes, by name.
        unmeasured: clips by the column whose missing value rejected them, by name.
        failed: clips by error class, most frequent first.
        pending: clips that no rule has rejected so far and that are not written yet.
        kept: clips that stand in a shard.
        kept_by_split: kept clips by split: train, val, test (only those that occur).
        source_seconds: duration of the sources that were analysed.
        candidate_seconds, kept_seconds: duration of the candidates and of the kept clips.
        kept_bytes: size of the kept clips' videos, in bytes.
        shards: number of shards that hold a kept clip.
    """

    sources: dict[str, int]
    failed_sources: dict[str, int]
    analysed: int
    candidates: int
    rejected: dict[str, int]
    unmeasured: dict[str, int]
    failed: dict[str, int]
    pending: int
    kept: int
    kept_by_split: dict[str, int] = field(default_factory=dict)
    source_seconds: float = 0.0
    candidate_seconds: float = 0.0
    kept_seconds: float = 0.0
    kept_bytes: int = 0
    shards: int = 0

    @property
    def source_hours(self) -> float:
        """Hours of video in the sources that were analysed."""
        return self.source_seconds / 3600

    @property
    def kept_hours(self) -> float:
        """Hours of video in the kept clips."""
        return self.kept_seconds / 3600

    def rows(self) -> list[FunnelRow]:
        """The clips' way from candidates to kept, line by line; the counts between the first and the last line add up to the
        difference of the two."""
        taken: list[tuple[Kind, str, int]] = [
            *(("rejected", rule, count) for rule, count in self.rejected.items()),
            *(("unmeasured", column, count) for column, count in self.unmeasured.items()),
            *(("failed", error_class, count) for error_class, count in self.failed.items()),
        ]
        if self.pending:
            taken.append(("pending", "pending", self.pending))
        left = self.candidates
        rows = [FunnelRow("candidates", "candidates", left, left, self._share(left))]
        for kind, label, count in taken:
            left -= count
            rows.append(FunnelRow(kind, label, count, left, self._share(count)))
        return [*rows, FunnelRow("kept", "kept", self.kept, self.kept, self._share(self.kept))]

    def _share(self, count: int) -> float:
        return count / self.candidates if self.candidates else 0.0


def funnel(index: Index, rules: Iterable[str] = ()) -> Funnel:
    """Count what became of every source and candidate of a dataset.

    Args:
        index: the dataset's index.
        rules: names of the recipe's rules, in its order.
    """
    rejections = _counts(index, "select rejected_by as label, count(*) as n from clips where state = 'rejected' group by 1")
    named = {name: count for name, count in rejections.items() if not name.startswith(UNMEASURED)}
    wanted = list(dict.fromkeys(rules))
    earlier = sorted(set(named) - set(wanted))
    totals = _totals(index)
    splits = _counts(index, "select split as label, count(*) as n from clips where state = 'kept' group by 1")
    return Funnel(
        sources={"done": 0, "failed": 0, "pending": 0}
        | _counts(index, "select status as label, count(*) as n from sources group by 1 order by 1"),
        failed_sources=_counts(index, _frequent("sources", "status = 'failed'")),
        rejected={rule: named.get(rule, 0) for rule in (*wanted, *earlier)},
        unmeasured={name.removeprefix(UNMEASURED): rejections[name] for name in sorted(set(rejections) - set(named))},
        failed=_counts(index, _frequent("clips", "state = 'failed'")),
        kept_by_split={name: splits[name] for name in sorted(splits, key=_split_order)},
        **totals,
    )


def _totals(index: Index) -> dict[str, Any]:
    clips = index.query("""
        select count(*) as candidates,
            count(*) filter (state = 'pending') as pending,
            count(*) filter (state = 'kept') as kept,
            coalesce(sum(duration order by clip_id), 0.0) as candidate_seconds,
            coalesce(sum(duration order by clip_id) filter (state = 'kept'), 0.0) as kept_seconds,
            coalesce(sum(bytes) filter (state = 'kept'), 0)::bigint as kept_bytes,
            count(distinct shard) filter (state = 'kept') as shards
        from clips""").to_pylist()[0]
    sources = index.query(
        "select count(*) as analysed, coalesce(sum(duration order by source_id), 0.0) as source_seconds "
        "from sources where n_clips is not null"
    ).to_pylist()[0]
    return {**clips, **sources}


def _frequent(table: str, condition: str) -> str:
    return f"""
        select coalesce(error_class, 'unknown') as label, count(*) as n from {table} where {condition}
        group by 1 order by n desc, label"""


def _counts(index: Index, sql: str) -> dict[str, int]:
    """What a query of the columns `label` and `n` answers, as a mapping in the query's order."""
    return {str(row["label"] if row["label"] is not None else "none"): row["n"] for row in index.query(sql).to_pylist()}


def _split_order(split: str) -> tuple[int, str]:
    order = ("train", "val", "test")
    return order.index(split) if split in order else len(order), split
