"""A build's plan: the recipe with its models found, and the steps as plain functions of tables.

The same steps run on Ray (`graph.py`) and in a plain loop (`run_plainly`, for tests and benchmarks).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa

from videofactory.curation.caption import DEFAULT_CAPTIONER, DEFAULT_MODEL
from videofactory.curation.ingest import Ingest
from videofactory.curation.signals import columns as signal_columns
from videofactory.shards.schema import CAPTION_SIMILARITY, conform, table_of, travelling_schema
from videofactory.shards.storage import Storage
from videofactory.shards.writer import ShardSummary, ShardWriter

from .recipe import CaptionSettings, Recipe

_MODELS = Path(__file__).parent / "sample" / "models"
_SAMPLE = "sample:"


def model_path(name: str) -> str:
    """Where a model of a recipe is: `sample:NAME` means the miniature models that come with the package."""
    return str(_MODELS / name.removeprefix(_SAMPLE)) if name.startswith(_SAMPLE) else name


def caption_model(settings: CaptionSettings) -> str | None:
    """The model that a recipe's captioner loads, where it is known: an option, or the default of our own captioner."""
    default = DEFAULT_MODEL if settings.captioner == DEFAULT_CAPTIONER else None
    model = settings.options.get("model", default)
    return None if model is None else str(model)


@dataclass(frozen=True)
class Plan:
    """What one round of a run does.

    Attributes:
        recipe: the settings.
        storage: the dataset.
        run: id of the run.
        round: first or second pass over the run's sources.
    """

    recipe: Recipe
    storage: Storage
    run: str
    round: int = 1

    def again(self) -> Plan:
        """The plan of the next round."""
        return replace(self, round=self.round + 1)

    @cached_property
    def signals(self) -> tuple[str, ...]:
        """Names of the columns that this recipe measures."""
        similarity = [CAPTION_SIMILARITY.name] if self.recipe.embed and self.recipe.caption else []
        return (*(column.name for column in signal_columns()), *similarity)

    @cached_property
    def schema(self) -> pa.Schema:
        """Schema of the rows between the steps."""
        return travelling_schema(self.signals)

    @property
    def models(self) -> dict[str, str]:
        """Which model makes which column."""
        recipe = self.recipe
        made: dict[str, str] = {}
        if recipe.embed:
            made["embedding"] = " ".join(filter(None, (recipe.embed.model, recipe.embed.pretrained)))
        if recipe.caption:
            made["caption"] = caption_model(recipe.caption) or recipe.caption.captioner
        if recipe.embed and recipe.caption:
            made[CAPTION_SIMILARITY.name] = made["embedding"]
        return made

    @property
    def describes(self) -> bool:
        """Whether any model looks at the clips."""
        return self.recipe.embed is not None or self.recipe.caption is not None

    def part(self, task: int) -> str:
        """Name of the index part that write task `task` commits."""
        return f"{self.run}-{self.round}-{task:06d}"

    def ingest(self) -> Ingest:
        """The first step."""
        recipe, limits = self.recipe, self.recipe.execution
        return Ingest(
            storage=self.storage,
            run=self.run,
            analysis=recipe.analysis,
            clips=recipe.clips,
            rules=recipe.rules,
            steps=recipe.steps,
            val=recipe.split.val,
            test=recipe.split.test,
            decode_seconds=limits.decode_seconds,
            cut_seconds=limits.cut_seconds,
            decode_memory=limits.decode_memory,
            worker_deaths=limits.worker_deaths,
            thumbnails=limits.thumbnails,
            round=self.round,
        )

    def describer(self) -> Any:
        """The second step, its models loaded."""
        from videofactory.curation.caption import load_captioner
        from videofactory.curation.describe import Describer
        from videofactory.curation.embed import ImageTextEmbedder

        recipe = self.recipe
        embedder = captioner = None
        if recipe.embed:
            embedder = ImageTextEmbedder(
                model_path(recipe.embed.model), pretrained=recipe.embed.pretrained, batch_size=recipe.embed.batch_size
            )
        if recipe.caption:
            _silence_loading()
            options = dict(recipe.caption.options)
            if "model" in options:
                options["model"] = model_path(str(options["model"]))
            captioner = load_captioner(recipe.caption.captioner, **options)
        return Describer(embedder, captioner, recipe.rules, recipe.steps)

    def writer(self, task: int) -> ShardWriter:
        """The last step, for one bundle."""
        return ShardWriter(self.storage, self.run, self.part(task), self.signals, self.models)

    def table(self, rows: Sequence[dict[str, Any]]) -> pa.Table:
        """Rows as a table of the travelling schema."""
        return table_of(rows, self.schema)


def _silence_loading() -> None:
    """Keep transformers' bars for loading weights out of the build's own progress."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def rows_of(table: pa.Table, schema: pa.Schema) -> Iterator[dict[str, Any]]:
    """The rows of a table one by one, so that the bytes of only one clip are copied at a time."""
    table = conform(table, schema)
    for number in range(len(table)):
        yield table.slice(number, 1).to_pylist()[0]


def run_plainly(plan: Plan, todo: Sequence[dict[str, Any]]) -> list[ShardSummary]:
    """The whole graph as a loop in this process: the same steps in the same order, without Ray.

    Args:
        plan: what to do.
        todo: rows of `sources`, with `candidates` where a record exists.
    """
    ingest, describer = plan.ingest(), plan.describer() if plan.describes else None
    summaries: list[ShardSummary] = []
    bundle: list[dict[str, Any]] = []

    def write() -> None:
        writer = plan.writer(len(summaries))
        for row in bundle:
            writer.add(row)
        summaries.append(writer.commit())
        bundle.clear()

    waiting: list[dict[str, Any]] = []

    def describe() -> None:
        bundle.extend(describer(waiting) if describer else waiting)
        waiting.clear()
        if sum(len(row.get("video") or b"") for row in bundle) >= plan.recipe.execution.shard_bytes:
            write()

    for source in todo:
        for row in ingest(source):
            waiting.append(row)
            if len(waiting) >= plan.recipe.execution.describe_batch:
                describe()
    describe()
    if bundle:
        write()
    return summaries
