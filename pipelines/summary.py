"""What the index says about a dataset, gathered once for the dataset card and the report page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from videofactory.curation.signals import columns as signal_columns
from videofactory.shards.index import Index
from videofactory.shards.schema import CAPTION_SIMILARITY, Column

from .funnel import Funnel, funnel
from .recipe import Recipe

SAMPLE_MODEL = "sample:"
"""What the names of the sample's miniature models begin with."""

SOURCES_SHOWN = 100
ERRORS_SHOWN = 40


@dataclass(frozen=True)
class Licence:
    """What the sources of one licence contribute; `name` is `None` where the source states none."""

    name: str | None
    sources: int
    kept: int
    kept_seconds: float


@dataclass(frozen=True)
class ErrorClass:
    """Errors of one class.

    Attributes:
        of: "source" or "clip".
        name: the class.
        count: how many sources or clips have it.
        retryable: how many of them may succeed when tried again; `None` for clips, which are tried again with their source.
        example: one message.
    """

    of: str
    name: str
    count: int
    retryable: int | None
    example: str | None


@dataclass(frozen=True)
class Spread:
    """Distribution of one column over the kept clips; the numbers are `None` when no kept clip has a value."""

    column: Column
    measured: int
    unmeasured: int
    least: float | None
    low: float | None
    median: float | None
    high: float | None
    most: float | None


@dataclass(frozen=True)
class Summary:
    """A dataset in numbers.

    Attributes:
        recipe: the recipe, or `None` for a dataset without one.
        rules: the recipe's conditions by name.
        funnel: what became of sources and clips.
        columns: the signal columns that the index holds.
        spreads: the duration and these columns over the kept clips.
        models: which model made which column.
        analysed_with: versions that analysed the sources, with the number of sources.
        licences: by number of kept clips.
        errors: classes of errors, most frequent first.
        sources: the first sources by URI, as rows with `kept` besides.
        shard_samples: samples in the committed shards, also those that later rules rejected.
        shard_bytes: size of the committed shards in bytes.
    """

    recipe: Recipe | None
    rules: Mapping[str, str]
    funnel: Funnel
    columns: tuple[Column, ...]
    spreads: tuple[Spread, ...]
    models: Mapping[str, str]
    analysed_with: Mapping[str, int]
    licences: tuple[Licence, ...]
    errors: tuple[ErrorClass, ...]
    sources: tuple[Mapping[str, Any], ...]
    shard_samples: int
    shard_bytes: int

    @property
    def sample_models(self) -> dict[str, str]:
        """The miniature models among `models`."""
        return {column: model for column, model in self.models.items() if SAMPLE_MODEL in model}


def summarise(index: Index, recipe: Recipe | None) -> Summary:
    """Gather everything; `index` is all that is read."""
    rules = dict(recipe.rules) if recipe else {}
    columns = _columns(index)
    shards = index.shards()
    return Summary(
        recipe=recipe,
        rules=rules,
        funnel=funnel(index, rules),
        columns=columns,
        spreads=_spreads(index, (Column("duration", "length of the clip", "seconds", 0.0), *columns)),
        models=index.models(),
        analysed_with={
            row["analysed_with"]: row["n"]
            for row in index.query(
                "select analysed_with, count(*) as n from sources where analysed_with is not null group by 1 order by n desc, 1"
            ).to_pylist()
        },
        licences=_licences(index),
        errors=_errors(index),
        sources=_sources(index),
        shard_samples=sum(shard["nsamples"] for shard in shards),
        shard_bytes=sum(shard["filesize"] for shard in shards),
    )


def _columns(index: Index) -> tuple[Column, ...]:
    """The index's signal columns in the order of their declarations; a column of a package that is not installed comes last."""
    declared = {column.name: column for column in (*signal_columns(), CAPTION_SIMILARITY)}
    stored = index.signals
    known = [column for name, column in declared.items() if name in stored]
    return (*known, *(Column(name, "", "") for name in sorted(stored) if name not in declared))


def _spreads(index: Index, columns: tuple[Column, ...]) -> tuple[Spread, ...]:
    # One query, for each one works out the view anew; quantile_cont answers with NULL where there is no value.
    figures = ", ".join(
        f"""count("{name}"), count(*) - count("{name}"), min("{name}"), quantile_cont("{name}", 0.05),
        quantile_cont("{name}", 0.5), quantile_cont("{name}", 0.95), max("{name}")"""
        for name in (column.name for column in columns)
    )
    answers = index.query(f"select {figures} from clips where state = 'kept'")
    values = [answers.column(number)[0].as_py() for number in range(answers.num_columns)]
    return tuple(Spread(column, *values[7 * number : 7 * number + 7]) for number, column in enumerate(columns))


def _licences(index: Index) -> tuple[Licence, ...]:
    rows = index.query("""
        select nullif(trim(s.license), '') as name, count(*) as sources, coalesce(sum(c.kept), 0)::bigint as kept,
            coalesce(sum(c.kept_seconds order by s.source_id), 0.0) as kept_seconds
        from sources s left join (
            select source_id, count(*) as kept, sum(duration order by clip_id) as kept_seconds
            from clips where state = 'kept' group by 1) c using (source_id)
        group by 1 order by kept desc, sources desc, name""").to_pylist()
    return tuple(Licence(**row) for row in rows)


def _errors(index: Index) -> tuple[ErrorClass, ...]:
    rows = index.query(f"""
        select 'source' as "of", coalesce(error_class, 'unknown') as name, count(*) as count,
            count(*) filter (retryable) as retryable, arg_min(error, source_id) as example
        from sources where status = 'failed' group by 2
        union all
        select 'clip', coalesce(error_class, 'unknown'), count(*), null, arg_min(error, clip_id)
        from clips where state = 'failed' group by 2
        order by count desc, "of", name limit {ERRORS_SHOWN}""").to_pylist()
    return tuple(ErrorClass(**row) for row in rows)


def _sources(index: Index) -> tuple[Mapping[str, Any], ...]:
    rows = index.query(f"""
        select s.*, coalesce(c.kept, 0) as kept
        from (select * from sources order by uri, source_id limit {SOURCES_SHOWN}) s
        left join (select source_id, count(*) as kept from clips where state = 'kept' group by 1) c using (source_id)
        order by s.uri, s.source_id""").to_pylist()
    return tuple(rows)
