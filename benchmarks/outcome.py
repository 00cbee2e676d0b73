"""What a measurement found, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.table import Table


@dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Attributes:
        what: what was measured.
        ours, peer: our figure and the one it is held against, with their units.
        ratio: ours by peer.
        goal: what the ratio may be at most; `None` where it is reported only.
        note: what helps to understand it.
        at_least: whether the goal is the least ratio instead: of rates, where the others are of costs.
    """

    what: str
    ours: str
    peer: str
    ratio: float
    goal: float | None = None
    note: str = ""
    at_least: bool = False

    @property
    def missed(self) -> bool:
        """Whether there is a goal, and the ratio is on its wrong side."""
        return self.goal is not None and (self.ratio < self.goal if self.at_least else self.ratio > self.goal)


def table(outcomes: Iterable[Outcome]) -> Table:
    """The outcomes as a table."""
    shown = Table("what", "ours", "peer", "ratio", "goal", "met", "note", title="benchmarks", show_lines=True)
    for outcome in outcomes:
        goal = "reported" if outcome.goal is None else f"{'>=' if outcome.at_least else '<='} {outcome.goal:g}"
        met = "" if outcome.goal is None else "[red]NO[/]" if outcome.missed else "[green]yes[/]"
        shown.add_row(outcome.what, outcome.ours, outcome.peer, f"{outcome.ratio:.3g}", goal, met, outcome.note)
    return shown
