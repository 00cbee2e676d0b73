"""The table of an ablation: means over seeds with their intervals, and the differences to one interaction, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .costs import Cost

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds.

    Attributes:
        mean: of them.
        half: half the width of the interval that has the mean over all seeds in it with 95 % confidence, were the values normal;
            None of a single seed.
        values: by seed.
    """

    mean: float
    half: float | None
    values: tuple[float, ...]

    def __str__(self) -> str:
        """The mean and its interval, in so many digits that the interval has two."""
        if self.half is None:
            return f"{self.mean:.3g}"
        digits = 2 if self.half == 0 else max(0, 1 - math.floor(math.log10(self.half)))
        return f"{self.mean:.{digits}f} ± {self.half:.{digits}f}"


def estimate(values: Sequence[float]) -> Estimate:
    """The mean of values with Student's interval: the mean ± t s / sqrt(n), s the deviation of n values.

    Raises:
        ValueError: there are none.
    """
    if not values:
        raise ValueError("there are no values to take a mean of")
    count = len(values)
    mean = math.fsum(values) / count
    if count == 1:
        return Estimate(mean, None, tuple(values))
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return Estimate(mean, student_quantile(0.5 + CONFIDENCE / 2, count - 1) * deviation / math.sqrt(count), tuple(values))


def student_quantile(probability: float, freedom: int) -> float:
    """The value that Student's t with so many degrees of freedom stays below with a probability of 0.5 to below 1.

    By bisection on the closed form of the distribution for whole degrees of freedom (Abramowitz & Stegun 1964, 26.7.3 and 26.7.4).
    """
    low, high = 0.0, 1.0
    while _student(high, freedom) < probability:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _student(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def _student(value: float, freedom: int) -> float:
    """The probability that t stays below `value`, from 0."""
    angle = math.atan2(value, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 or not odd else 0.0
    for power in range(2 if odd else 1, freedom - 2, 2):
        term *= cosine**2 * power / (power + 1)
        total += term
    within = 2 / math.pi * (angle + sine * total) if odd else sine * total
    return 0.5 + within / 2


def columns(results: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, int], float]]:
    """By column, the value of each run: the validation loss, the metrics, and the shares that were read right.

    Args:
        results: of the runs, see `study.run`.
    """
    found: dict[str, dict[tuple[str, int], float]] = {}
    for result in results:
        run = (result["interaction"], result["seed"])
        values = {"validation loss": result["validation_loss"], **result["metrics"]}
        values |= {f"{name} read": right / asked for name, (right, asked) in result["readings"].items() if asked}
        for name, value in values.items():
            if value is not None:
                found.setdefault(name, {})[run] = value
    return found


def summary(results: Sequence[Mapping[str, Any]], against: str) -> dict[str, Any]:
    """Estimates by column and interaction, of the values and of their differences to those of `against` with the same seed.

    Returns:
        `values` and `differences`: by column, by interaction, an `Estimate`.
    """
    values: dict[str, dict[str, Estimate]] = {}
    differences: dict[str, dict[str, Estimate]] = {}
    for name, by_run in columns(results).items():
        interactions = list(dict.fromkeys(interaction for interaction, _ in by_run))
        for interaction in interactions:
            mine = {seed: value for (one, seed), value in by_run.items() if one == interaction}
            values.setdefault(name, {})[interaction] = estimate(list(mine.values()))
            paired = [value - by_run[against, seed] for seed, value in mine.items() if (against, seed) in by_run]
            if interaction != against and paired:
                differences.setdefault(name, {})[interaction] = estimate(paired)
    return {"values": values, "differences": differences}


def markdown(found: Mapping[str, Any], costs: Mapping[str, Cost], against: str) -> str:
    """The summary as two tables of Markdown: values with costs, and differences."""
    values, differences = found["values"], found["differences"]
    interactions = list(dict.fromkeys(one for by_interaction in values.values() for one in by_interaction))
    names = list(values)
    rows = []
    for interaction in interactions:
        cost = costs.get(interaction)
        own = [str(values[name].get(interaction, "–")) for name in names]
        rows.append([interaction, *own, *(_cost_cells(cost) if cost else ["–"] * 3)])
    tables = [_table(["interaction", *names, "parameters", f"step time / {against}", "memory of a step, MB"], rows)]
    others = [one for one in interactions if one != against]
    if others and differences:
        rows = [[one, *(str(differences.get(name, {}).get(one, "–")) for name in names)] for one in others]
        tables.append(f"Differences to `{against}`, seed by seed:\n\n" + _table(["interaction", *names], rows))
    return "\n\n".join(tables) + "\n"


def _cost_cells(cost: Cost) -> list[str]:
    return [f"{cost.parameters:,}", f"{cost.step_ratio:.2f}", f"{cost.step_bytes / 1e6:.0f}"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
