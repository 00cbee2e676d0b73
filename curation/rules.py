"""Rules: conditions in SQL over a clip's columns that decide what is kept.

A rule keeps a row only where it is TRUE. Otherwise the row's `rejected_by` becomes the rule's name, or `unmeasured:COLUMN`
when the rule is NULL because a column it uses was not measured. Each rule runs at the earliest step at which all of its
columns exist, so that a clip which must go is not cut, embedded or captioned first.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import pyarrow as pa

from videofactory.shards.schema import CAPTION_SIMILARITY, STEPS, Column, Step, clip_schema

# Core columns that a rule may use, by the step that fills them. `width`, `height`, `fps` and `frames` mean the shot in its source.
_CORE: dict[str, Step] = {
    **dict.fromkeys(("start", "end", "duration", "frames", "width", "height", "fps"), "analyse"),
    **dict.fromkeys(("codec", "has_audio", "bytes", "lead_in_bytes"), "cut"),
    **dict.fromkeys(("caption",), "caption"),
}


class RuleError(Exception):
    """A rule cannot be used; the message names the rule and the way out."""


@dataclass(frozen=True)
class Rule:
    """A named condition, with the columns it uses and the step after which it can be judged."""

    name: str
    sql: str
    columns: tuple[str, ...]
    step: Step


class Rules:
    """An ordered set of rules; the first one that does not hold rejects.

    Args:
        rules: condition in SQL (DuckDB's dialect) by name, in the order in which they count within a step.
        signals: the declared signal columns.
        steps: the steps that this build runs; a rule on a column of another step could never hold, and is an error.

    Raises:
        RuleError: a rule does not parse, is no condition on single rows, or uses a column that is unknown or not measured.
    """

    def __init__(self, rules: Mapping[str, str], signals: Iterable[Column], steps: Iterable[Step] = STEPS) -> None:
        signals = list(signals)
        self._known = {
            **_CORE,
            CAPTION_SIMILARITY.name: CAPTION_SIMILARITY.step,
            **{column.name: column.step for column in signals},
        }
        self._schema = clip_schema([name for name in self._known if name not in _CORE])
        self._connection = duckdb.connect(config={"enable_external_access": "false", "threads": "1"})
        # The square root of a negative number is an error, not a NaN that compares greater than everything.
        self._connection.execute("set ieee_floating_point_ops = false")
        self._volatile = {
            name
            for (name,) in self._connection.execute(
                "select distinct function_name from duckdb_functions() where stability <> 'CONSISTENT'"
            ).fetchall()
        }
        self._steps = set(steps)
        parsed = [self._parse(name, sql) for name, sql in rules.items()]
        # A stable sort: within a step the recipe's order counts.
        self.rules = sorted(parsed, key=lambda rule: STEPS.index(rule.step))

    def __iter__(self) -> Iterator[Rule]:
        return iter(self.rules)

    def _parse(self, name: str, sql: str) -> Rule:
        # The line ends keep a comment in one rule from swallowing what follows it.
        answer = self._connection.execute("select json_serialize_sql(?)", [f"select (\n{sql}\n)"]).fetchall()[0][0]
        tree = json.loads(answer)
        if tree.get("error"):
            raise RuleError(f"rule {name!r} is no SQL condition: {tree.get('error_message')} (in: {sql})")
        nodes = list(expressions(tree))
        for kind in ("SUBQUERY", "WINDOW", "STAR", "LAMBDA", "PARAMETER"):
            if any(node["class"] == kind for node in nodes):
                raise RuleError(f"rule {name!r} must be a condition on one row's columns, without {kind.lower()}s (in: {sql})")
        if changing := {str(node.get("function_name")) for node in nodes} & self._volatile:
            raise RuleError(
                f"rule {name!r} must give the same answer every time, and {', '.join(sorted(changing))} does not (in: {sql})"
            )
        columns = tuple(dict.fromkeys(node["column_names"][-1].lower() for node in nodes if node["class"] == "COLUMN_REF"))
        for column in columns:
            self._check_column(name, column)
        rule = Rule(name, sql, columns, max((self._known[column] for column in columns), key=STEPS.index, default="analyse"))
        self._check_type(rule)
        return rule

    def _check_column(self, rule: str, column: str) -> None:
        if column not in self._known:
            near = difflib.get_close_matches(column, self._known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(sorted(self._known))}"
            raise RuleError(f"rule {rule!r} uses the unknown column {column!r}; {hint}")
        step = self._known[column]
        if step in ("embed", "caption") and step not in self._steps:
            raise RuleError(
                f"rule {rule!r} uses {column!r}, which the step {step!r} measures, and this recipe switches that step off; "
                f"switch it on, or drop the rule with --set rules.{rule}=null"
            )

    def _check_type(self, rule: Rule) -> None:
        # One row of NULLs and one of ordinary values: a condition answers for each, an aggregate does not.
        trial = {field.name: pa.array([None, _ordinary(field.type)], field.type) for field in self._schema}
        self._connection.register("rows", pa.table(trial))
        try:
            found = self._connection.sql(f"select (\n{rule.sql}\n) as holds from rows").to_arrow_table()
        except duckdb.Error as error:
            raise RuleError(f"rule {rule.name!r} cannot be judged: {error} (in: {rule.sql})") from None
        if len(found) != 2 or not pa.types.is_boolean(found.schema.field("holds").type):
            raise RuleError(f"rule {rule.name!r} is not true or false for a single row (in: {rule.sql})")

    def at(self, step: Step) -> list[Rule]:
        """The rules that run right after `step`."""
        return [rule for rule in self.rules if rule.step == step]

    def judge(self, rows: pa.Table, steps: Iterable[Step]) -> list[str | None]:
        """For each row, what rejects it: the name of the first rule of `steps` that does not hold, `unmeasured:COLUMN`, or `None`.

        Args:
            rows: a table with at least the columns that these rules use; a missing one counts as not measured.
        """
        wanted = set(steps)
        branches = [branch for rule in self.rules if rule.step in wanted for branch in _branches(rule)]
        if not branches or not len(rows):
            return [None] * len(rows)
        names = [name for name in self._known if name in rows.column_names]
        missing = [pa.field(name, self._schema.field(name).type) for name in self._known if name not in rows.column_names]
        table = rows.select(names)
        for field in missing:
            table = table.append_column(field, pa.nulls(len(rows), field.type))
        self._connection.register("rows", table)
        verdicts = self._connection.execute(f"select case {' '.join(branches)} end from rows").fetchall()
        return [verdict for (verdict,) in verdicts]


def _ordinary(kind: pa.DataType) -> Any:
    if pa.types.is_boolean(kind):
        return True
    return "text" if pa.types.is_string(kind) else 1


def _branches(rule: Rule) -> list[str]:
    """The rule as branches of a SQL `case`: unmeasured columns first, then the rule's own name."""
    # A value that the condition cannot digest (a cast, an overflow) makes it NULL: it does not hold.
    condition = f"try((\n{rule.sql}\n))"
    unmeasured = [f"when {condition} is null and \"{column}\" is null then 'unmeasured:{column}'" for column in rule.columns]
    quoted = rule.name.replace("'", "''")
    return [*unmeasured, f"when {condition} is not true then '{quoted}'"]


def expressions(node: Any) -> Iterator[dict[str, Any]]:
    """All expression nodes of a serialised statement."""
    if isinstance(node, dict):
        if "class" in node:
            yield node
        for value in node.values():
            yield from expressions(value)
    elif isinstance(node, list):
        for value in node:
            yield from expressions(value)
