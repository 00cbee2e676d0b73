"""Rules: NULL semantics, order by step, and errors that name the way out."""

from __future__ import annotations

import pyarrow as pa
import pytest

from videofactory.curation.rules import RuleError, Rules
from videofactory.shards.schema import Column

SIGNALS = [Column("motion", "m", "u"), Column("sharpness", "s", "u"), Column("aesthetic", "a", "u", step="embed")]


def rows(**columns: list[object]) -> pa.Table:
    return pa.table(columns)


def judged(rules: dict[str, str], table: pa.Table, *steps: str) -> list[str | None]:
    return Rules(rules, SIGNALS).judge(table, steps or ("analyse",))  # type: ignore[arg-type]


def test_only_true_keeps() -> None:
    table = rows(motion=[1.0, 0.0, None])
    assert judged({"moving": "motion > 0.5"}, table) == [None, "moving", "unmeasured:motion"]


def test_null_that_is_not_the_rules_answer() -> None:
    table = rows(motion=[None, None], sharpness=[9.0, 1.0])
    assert judged({"either": "motion > 0.5 or sharpness > 5"}, table) == [None, "unmeasured:motion"]
    assert judged({"absent": "motion is null"}, table) == [None, None]


def test_null_from_an_operation_is_the_rules_own() -> None:
    assert judged({"ratio": "nullif(motion, 0) > 1"}, rows(motion=[0.0])) == ["ratio"]


def test_first_rule_in_order_names_the_rejection() -> None:
    table = rows(motion=[0.0], sharpness=[0.0])
    assert judged({"b": "sharpness > 1", "a": "motion > 1"}, table) == ["b"]


def test_rules_run_after_the_step_that_measures_their_last_column() -> None:
    rules = Rules({"late": "caption_similarity > 0.2 and motion > 0", "size": "bytes > 10", "early": "height >= 720"}, SIGNALS)
    assert [(rule.name, rule.step) for rule in rules] == [("early", "analyse"), ("size", "cut"), ("late", "caption")]
    assert rules.judge(rows(motion=[0.0]), ["analyse"]) == ["unmeasured:height"]


def test_missing_column_of_a_table_is_unmeasured() -> None:
    assert judged({"moving": "motion > 0"}, rows(sharpness=[1.0])) == ["unmeasured:motion"]


def test_reserved_word_as_column() -> None:
    assert judged({"late": '"end" - start > 1'}, rows(start=[0.0], end=[2.0])) == [None]


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        ("motoin > 1", "did you mean 'motion'"),
        ("zzz > 1", "known are: .*motion"),
        ("motion >", "no SQL condition"),
        ("motion + 1", "not true or false"),
        ("count(*) > 1", "not true or false"),
        ("motion > (select 1)", "without subquerys"),
        ("exists(from read_csv('/etc/passwd'))", "without subquerys"),
        ("row_number() over () > 1", "without windows"),
        ("true) --", "no SQL condition"),
        ("true; drop table rows", "no SQL condition"),
        ("motion > 'abc'", "cannot be judged"),
        ("nosuch(motion)", "cannot be judged"),
        ("random() > 0.5", "same answer every time"),
        ("now() > timestamp '2020-01-01'", "same answer every time"),
    ],
)
def test_unusable_rules_are_refused(sql: str, message: str) -> None:
    with pytest.raises(RuleError, match=message):
        Rules({"x": sql}, SIGNALS)


def test_a_rule_on_a_step_that_is_off_says_so() -> None:
    with pytest.raises(RuleError, match=r"--set rules\.match=null"):
        Rules({"match": "caption_similarity > 0.2"}, SIGNALS, steps=("analyse", "cut"))


def test_comments_do_not_swallow_the_next_rule() -> None:
    assert judged({"a": "motion > 0 -- note", "b": "motion > 5"}, rows(motion=[1.0])) == ["b"]


def test_a_value_that_the_rule_cannot_digest_does_not_hold() -> None:
    table = rows(width=[1920, 2], height=[1080, 2], motion=[0.5, 0.9])
    assert judged({"cast": "width::tinyint > 0"}, table) == ["cast", None]
    assert judged({"overflow": "(width * height)::smallint > 0"}, table) == ["overflow", None]
    assert judged({"root": "sqrt(motion - 0.8) > 0"}, table) == ["root", None]
