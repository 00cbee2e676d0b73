"""Build a dataset: the whole pipeline on one screen.

The ledger (`shards/index.py`) says what is left to do; the graph does it; the ledger is asked again. Ending at any moment and
running the same command again therefore ends in the same dataset.
"""

from __future__ import annotations

import difflib
import inspect
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from videofactory.curation.caption import find_captioner
from videofactory.curation.guard import ERRORS
from videofactory.curation.ingest import ATTEMPTS, CARRIED, rules_of
from videofactory.curation.sources import local_path
from videofactory.curation.weights import check_weights, made_for
from videofactory.shards.clean import clean
from videofactory.shards.index import Index, add_sources, amend_clips, shard_list
from videofactory.shards.lease import Lease
from videofactory.shards.schema import clip_schema, conform, source_schema
from videofactory.shards.storage import Storage
from videofactory.shards.writer import SOURCES, put_record

from .plan import Plan, caption_model, model_path, run_plainly
from .recipe import Recipe, RecipeError, changed_content, dump_recipe, parse_recipe

log = logging.getLogger(__name__)

_RECIPE = "recipe.yaml"


@dataclass(frozen=True)
class Outlook:
    """What a build would do, for `--dry-run` and for the line before the work starts.

    Attributes:
        sources: sources that the dataset will know.
        new: those among them that it does not know yet.
        todo: sources with something left to do.
        rejudged: stored clips whose verdict the rules of this recipe change.
    """

    sources: int
    new: int
    todo: int
    rejudged: int


def build(
    recipe: Recipe,
    sources: Sequence[dict[str, Any]],
    out: str,
    *,
    retry: Iterable[str] = (),
    plainly: bool = False,
    force: bool = False,
    watch: Callable[[Storage, Outlook], AbstractContextManager[Any]] | None = None,
) -> Index:
    """Build or continue the dataset `out` and return its index.

    Args:
        recipe: the settings.
        sources: rows of `sources`, as `find_sources` gives them.
        out: path or URI of the dataset.
        retry: error classes whose failed sources and clips are tried again (`all` for every one).
        plainly: run the steps in a loop in this process instead of on Ray.
        force: use models that were made for the sample on other videos, too.
        watch: shows progress while the returned context is open.

    Raises:
        RecipeError, RuleError, WeightsNotFound: before any work.
        DatasetBusyError: another build is writing to `out`.
        GraphError: a step failed; what was committed stays, and the same call goes on.
    """
    check(recipe, sources, force)
    check_retry(retry := tuple(retry))
    storage = Storage(out)
    with Lease(storage) as lease:
        refuse_mixture(storage, recipe)
        clean(storage, Index(storage), lease.run)
        storage.put(_RECIPE, dump_recipe(recipe).encode())
        plan = Plan(recipe, storage, lease.run)
        outlook = prepare(plan, sources, retry)
        with (watch or _unwatched)(storage, outlook):
            if outlook.todo:
                _run(plan, plainly)
        index = Index(storage)
        finish(index, recipe)
        for entry in storage.list(ATTEMPTS):  # of this run and of dead ones
            storage.delete(entry.name)
        return index


def check(recipe: Recipe, sources: Sequence[dict[str, Any]], force: bool = False) -> None:
    """Everything that can be known to fail before any work: rules, weights, models that are not for these videos."""
    rules_of(tuple(recipe.rules.items()), recipe.steps)
    if recipe.caption:
        try:
            inspect.signature(find_captioner(recipe.caption.captioner)).bind(**recipe.caption.options)
        except (TypeError, ValueError) as error:
            raise RecipeError(f"caption: {error} (captioner {recipe.caption.captioner!r})") from None
    models = []
    if recipe.embed:
        check_weights(model_path(recipe.embed.model), recipe.embed.pretrained)
        models.append(recipe.embed.model)
    if recipe.caption and (model := caption_model(recipe.caption)):
        check_weights(model_path(model))
        models.append(model)
    for model in models:
        if not force and made_for(model_path(model)) == "sample" and (stranger := _first_stranger(sources)):
            raise RecipeError(
                f"the model {model!r} is a miniature that knows the sample world only, and {stranger} is not of it: its captions "
                "would be nonsense. Name a real model (--set caption.options.model=... and --set embed.model=...), "
                "switch both off (--set caption=null --set embed=null), or insist with --force"
            )


def check_retry(retry: tuple[str, ...]) -> None:
    """Refuse an error class that does not exist, naming the nearest."""
    for name in retry:
        if name not in ERRORS and name != "all":
            near = difflib.get_close_matches(name, ERRORS, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are: all, {', '.join(ERRORS)}"
            raise RecipeError(f"--retry {name!r} is no error class; {hint}")


def refuse_mixture(storage: Storage, recipe: Recipe) -> None:
    """Refuse a recipe that would put two kinds of data into one dataset.

    Raises:
        RecipeError: a content key differs from the one with which the first source was analysed.
    """
    begun = any(not entry.name.endswith("-inputs.parquet") for entry in storage.list(SOURCES, ".parquet"))
    if not begun or not storage.exists(_RECIPE):
        return
    stored = parse_recipe(yaml.safe_load(storage.get(_RECIPE)), f"{storage.uri}/{_RECIPE}")
    if differing := changed_content(stored, recipe):
        lines = [f"  {key}: {before!r} in the dataset, {after!r} now" for key, before, after in differing]
        raise RecipeError(
            f"{storage.uri} was begun with other settings, and one dataset cannot hold both:\n"
            + "\n".join(lines)
            + "\nRules and execution settings may change; for these, build into another folder, or set them back."
        )


def outlook(recipe: Recipe, sources: Sequence[dict[str, Any]], storage: Storage, retry: tuple[str, ...] = ()) -> Outlook:
    """What `build` would do, without doing it.

    Raises:
        RecipeError: `build` would refuse.
    """
    refuse_mixture(storage, recipe)
    index = Index(storage)
    known = set(index.sources()["source_id"].to_pylist())
    new = sum(row["source_id"] not in known for row in sources)
    changed = rejudged(index, Plan(recipe, storage, ""), retry)
    waiting = {
        row["source_id"]
        for row in index.query("select * from sources where status = 'failed'").to_pylist()
        if _wanted(row, retry)
    }
    waiting |= {row["source_id"] for row in index.incomplete().to_pylist()}
    waiting |= {row["source_id"] for row in changed.to_pylist() if row["rejected_by"] is None and row["shard"] is None}
    return Outlook(len(known) + new, new, len(waiting) + new, len(changed))


def prepare(plan: Plan, sources: Sequence[dict[str, Any]], retry: tuple[str, ...]) -> Outlook:
    """Bring the ledger up to date before the work: new sources, failures to try again, changed rules."""
    storage, run = plan.storage, plan.run
    index = Index(storage)
    known = set(index.sources()["source_id"].to_pylist())
    new = [row for row in sources if row["source_id"] not in known]
    again = [row for row in index.query("select * from sources where status = 'failed'").to_pylist() if _wanted(row, retry)]
    renewed = [{name: row[name] for name in CARRIED} for row in again]
    # A source that failed waits again under its next attempt's number.
    add_sources(storage, run, [*new, *({**row, "attempt": row["attempt"] + 1} for row in renewed)])
    changed = rejudged(index, plan, retry)
    amend_clips(storage, run, "before", changed, plan.signals)
    index.refresh()
    return Outlook(len(index.sources()), len(new), len(index.incomplete()), len(changed))


def rejudged(index: Index, plan: Plan, retry: tuple[str, ...] = ()) -> pa.Table:
    """The stored clip rows that `plan`'s rules judge otherwise than before (and failed ones to try again), with the new verdict.

    Rules see what they saw in the build: the shot in its source before the cut, the clip after it. A clip that is rejected
    now keeps its place in its shard, in case the next rules keep it again; one that is kept now and has no place is pending.
    """
    rules = rules_of(tuple(plan.recipe.rules.items()), plan.recipe.steps)
    rows = index.query("select * from clips order by clip_id").drop_columns(["state"]).to_pylist()
    candidates = {row["clip_id"]: row for row in index.candidates().to_pylist()}
    schema = clip_schema(plan.signals)
    first = conform(pa.Table.from_pylist([candidates.get(row["clip_id"], row) for row in rows], schema=schema), schema)
    final = conform(pa.Table.from_pylist(rows, schema=schema), schema)
    verdicts = zip(
        rules.judge(first, ["analyse"]), rules.judge(final, ["cut"]), rules.judge(final, ["embed", "caption"]), strict=True
    )
    changed = []
    for row, (analysed, cut, described) in zip(rows, verdicts, strict=True):
        # Only what a step has measured may be judged by its rules: a clip that failed or was rejected on the way has no caption.
        was_cut, was_described = row["sha256"] is not None, row["shard"] is not None or row["caption"] is not None
        verdict = analysed or (cut if was_cut else None) or (described if was_described else None)
        failed = row["error_class"] is not None
        if failed and not (verdict or _wanted(row, retry)):
            continue
        if verdict != row["rejected_by"] or failed:
            changed.append({**row, "rejected_by": verdict, "error": None, "error_class": None})
    return pa.Table.from_pylist(changed, schema=schema)


def _wanted(row: dict[str, Any], retry: tuple[str, ...]) -> bool:
    return row["error_class"] is not None and ("all" in retry or row["error_class"] in retry)


def todo(index: Index) -> list[dict[str, Any]]:
    """Sources with something left to do, as the first step takes them: with their pending clips where they were analysed."""
    pending: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in index.pending_clips().to_pylist():
        pending[row["source_id"]].append(row)
    return [
        {**row, "candidates": pending[row["source_id"]] if row["n_clips"] is not None else None}
        for row in index.incomplete().to_pylist()
    ]


def _run(plan: Plan, plainly: bool) -> None:
    """Run the graph, ask the ledger what is missing, run that once more; what is missing still becomes an error row."""
    if plainly:
        for attempt in (plan, plan.again()):
            if waiting := todo(Index(plan.storage)):
                run_plainly(attempt, waiting)
    else:
        from .graph import cluster, resources, run_graph

        with cluster(plan.recipe.execution):
            planned = resources(plan)
            log.info("%s", planned)
            for attempt in (plan, plan.again()):
                if waiting := todo(Index(plan.storage)):
                    run_graph(attempt, planned, waiting)
    give_up(plan)


def give_up(plan: Plan) -> None:
    """Turn what two rounds did not finish into error rows, so that the run ends with every source accounted for."""
    index = Index(plan.storage)
    error = {"error_class": "incomplete", "error": "two rounds did not finish it; try again with --retry incomplete"}
    lost = []
    for row in todo(index):
        if row["candidates"] is None:
            failed = {name: row[name] for name in CARRIED}
            failed.update(error, status="failed", retryable=True)
            put_record(plan.storage, plan.run, failed, [], source_schema(plan.signals))
        else:
            lost += [{**candidate, **error} for candidate in row["candidates"]]
    amend_clips(plan.storage, plan.run, "after", pa.Table.from_pylist(lost, schema=clip_schema(plan.signals)), plan.signals)


def finish(index: Index, recipe: Recipe) -> None:
    """Derive from the index what is for readers: the shard list, the card and the report."""
    from .report import write_report

    storage = index.storage
    storage.put("shards.json", json.dumps(shard_list(index, recipe.name), indent=1).encode())
    write_report(storage, recipe)


def _first_stranger(sources: Sequence[dict[str, Any]]) -> str | None:
    """The first source that is not a file of a sample world, told by the world's manifest and the file's hash."""
    from .sample.manifest import is_of_world

    for row in sources:
        path = local_path(row["uri"])
        if path is None or not is_of_world(path):
            return row["uri"] if path is None else Path(path).name
    return None


def _unwatched(storage: Storage, outlook: Outlook) -> AbstractContextManager[Any]:
    return nullcontext()
