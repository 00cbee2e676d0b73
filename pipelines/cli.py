"""The command line: `videofactory build`, `analyse`, `verify`, `stats`, `report`, `doctor`.

Exit codes: 0 done; 1 a promise is broken or a step failed; 2 wrong arguments, recipe or sources, found before any work; 3 every
source failed; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.table import Table

import videofactory

app = typer.Typer(
    name="videofactory",
    help="From the open web's videos to verified, captioned WebDataset shards.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
out = Console(highlight=False)
notes = Console(stderr=True, highlight=False)

SourceOption = Annotated[
    list[str] | None,
    typer.Option(
        "--sources",
        "-s",
        metavar="X…",
        help="Videos: files, folders, `-` (addresses on standard input), .txt lists, .csv/.tsv/.parquet/.jsonl with a column path "
        "or url, object-store URIs (s3://, gs://, abfs://). Several may follow.",
        show_default=False,
    ),
]
More = Annotated[list[str] | None, typer.Argument(metavar="[X…]", help="More of `--sources`.", show_default=False)]
Dataset = Annotated[str, typer.Argument(metavar="DIR", help="A dataset: a folder, or an object-store URI.", show_default=False)]


def _stop(message: object, code: int = 2) -> NoReturn:
    """End with a message a person understands, and no traceback."""
    notes.print(f"[red]error:[/red] {_escape(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


def _escape(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@app.callback()
def _main(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Also show what the steps log.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        out.print(videofactory.__version__)
        raise typer.Exit
    level = logging.INFO if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(message)s", handlers=[RichHandler(console=notes, show_path=False)])


@app.command()
def build(
    more: More = None,
    sources: SourceOption = None,
    out_dir: Annotated[
        str, typer.Option("--out", "-o", metavar="DIR", help="The dataset: a folder, or an object-store URI.")
    ] = "",
    recipe: Annotated[
        str,
        typer.Option(
            "--recipe", "-r", metavar="NAME|FILE", help="What to measure, keep and describe: `hdvg`, `sample`, or a file."
        ),
    ] = "hdvg",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change one setting, e.g. `--set caption=null` or `--set rules.still=null`.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N sources.", show_default=False)] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")] = False,
    retry: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CLASS",
            help="Try sources and clips again that failed with this error class (`all` for every one).",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Use the sample's miniature models on other videos, too.")] = False,
) -> None:
    """Build a dataset, or go on with one.

    Ctrl-C, a crash or a power loss lose nothing: the same command goes on where the last one stopped, and decodes nothing twice.
    More sources and other rules may be given later; clips whose verdict changes are judged, fetched and cut again.

    Example: `videofactory build --sources videos/ --out data/mine --set caption=null --set embed=null`
    """
    from videofactory.curation.rules import RuleError
    from videofactory.curation.sources import SourcesError, find_sources
    from videofactory.curation.weights import WeightsNotFound
    from videofactory.shards.index import IndexDamagedError
    from videofactory.shards.lease import DatasetBusyError, StaleRunError
    from videofactory.shards.storage import Storage, StorageError

    from . import build as building
    from .recipe import RecipeError, load_recipe

    named = [*(sources or []), *(more or [])]
    if not named:
        _stop("no sources; name videos with --sources, for example --sources videos/ (see videofactory build --help)")
    if not out_dir:
        _stop("no output; name a folder with --out, for example --out data/mine")
    try:
        chosen = load_recipe(recipe, settings or ())
        rows = find_sources(named)[:limit]
        if dry_run:
            building.check(chosen, rows, force)
            building.check_retry(tuple(retry or ()))
            _print_outlook(building.outlook(chosen, rows, Storage(out_dir), tuple(retry or ())), chosen)
            return
        index = _guarded_build(partial(building.build, chosen, rows, out_dir, retry=retry or (), force=force))
    except (RecipeError, RuleError, SourcesError, WeightsNotFound, DatasetBusyError, StorageError) as error:
        _stop(error)
    except (StaleRunError, IndexDamagedError) as error:
        _stop(error, 1)
    _print_funnel(index, chosen)
    _print_where(out_dir)
    if not index.query("select 1 from sources where status <> 'failed' limit 1").num_rows:
        _stop("every source failed; the table above says why", 3)


def _guarded_build(run: Callable[..., Any]) -> Any:
    """Run a build with progress; what ends it early ends in one line that says how to go on."""
    from .progress import watching

    again = "what was committed stays, and the same command goes on from there"
    try:
        return run(watch=partial(watching, console=notes))
    except KeyboardInterrupt:
        _stop(f"interrupted; {again}", 130)
    except OSError as error:
        _stop(f"the output cannot be written: {error}; {again}", 1)
    except Exception as error:
        from .graph import GraphError

        if isinstance(error, GraphError):
            _stop(f"{error}; {again}", 1)
        raise


def _print_outlook(outlook: Any, recipe: Any) -> None:
    from .plan import caption_model

    table = Table(title=f"recipe {recipe.name}", title_justify="left", show_header=False, box=None)
    table.add_row("sources", f"{outlook.sources} ({outlook.new} new, {outlook.todo} with something left to do)")
    table.add_row("stored clips judged otherwise", str(outlook.rejudged))
    table.add_row("steps", " -> ".join((*recipe.steps, "write")))
    for name, sql in recipe.rules.items():
        table.add_row(f"rule {name}", _escape(sql))
    table.add_row("embeddings", _escape(recipe.embed.model) if recipe.embed else "off")
    table.add_row("captions", _escape(caption_model(recipe.caption) or recipe.caption.captioner) if recipe.caption else "off")
    out.print(table)
    out.print("nothing was done (--dry-run)")


def _print_funnel(index: Any, recipe: Any) -> None:
    from .funnel import funnel

    found = funnel(index, list(recipe.rules) if recipe else ())
    sources = ", ".join(f"{count} {status}" for status, count in found.sources.items() if count)
    out.print(f"sources  {sources}; {found.source_hours * 60:.1f} minutes of video", markup=False)
    for error, count in found.failed_sources.items():
        out.print(f"         {count} failed: {error}", markup=False, style="dim")
    table = Table(box=None, pad_edge=False)
    for name in ("clips", "count", "left", "share"):
        table.add_column(name, justify="left" if name == "clips" else "right")
    for row in found.rows():
        name = row.kind if row.label == row.kind else f"{row.kind} {row.label}"
        table.add_row(_escape(name), str(row.count), str(row.left), f"{row.share:.1%}")
    out.print(table)
    splits = ", ".join(f"{split} {count}" for split, count in found.kept_by_split.items())
    out.print(
        f"kept     {found.kept_hours * 60:.1f} minutes, {found.kept_bytes / 1e6:.1f} MB in {found.shards} shards ({splits})",
        markup=False,
    )


def _print_where(dataset: str) -> None:
    for what, name in (("report", "report.html"), ("card", "README.md"), ("shards", "shards.json"), ("index", "index/")):
        out.print(f"{what:7} {dataset.rstrip('/')}/{name}", soft_wrap=True, markup=False)
    out.print(f"check it with: videofactory verify {dataset}", soft_wrap=True, markup=False)


@app.command()
def analyse(
    videos: Annotated[list[Path], typer.Argument(metavar="VIDEO…", help="Video files.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON array of clip rows.")] = False,
    recipe: Annotated[
        str, typer.Option("--recipe", "-r", metavar="NAME|FILE", help="Whose analysis settings and rules to use.")
    ] = "hdvg",
) -> None:
    """Look at videos: one row per shot with every signal, and what the recipe's rules would say.

    The pass that a build makes over a source, without Ray and without writing anything.
    """
    from videofactory.curation.guard import MediaError
    from videofactory.curation.look import look
    from videofactory.curation.rules import RuleError

    from .recipe import RecipeError, load_recipe

    failed = 0
    rows: list[dict[str, Any]] = []
    try:
        chosen = load_recipe(recipe)
        for video in videos:
            try:
                rows += look(video, chosen.analysis, chosen.rules)
            except MediaError as error:
                failed += 1
                notes.print(f"[red]error:[/red] {_escape(str(error))} ({error.error_class})", soft_wrap=True)
    except (RecipeError, RuleError) as error:
        _stop(error)
    if as_json:
        sys.stdout.write(json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    elif rows:
        _print_shots(rows)
    if failed == len(videos):
        raise typer.Exit(3)


app.command("analyze", hidden=True)(analyse)


# What the table of shots leaves out: the same for every shot, derived, or never known after an analysis.
_NOT_SHOWN = ("uri", "clip_id", "source_id", "duration", "frames", "width", "height", "fps", "rejected_by")


def _print_shots(rows: list[dict[str, Any]]) -> None:
    columns = [name for name in rows[0] if name not in _NOT_SHOWN]
    for uri in dict.fromkeys(row["uri"] for row in rows):
        shots = [row for row in rows if row["uri"] == uri]
        title = f"{uri}  {shots[0]['width']}x{shots[0]['height']}, {shots[0]['fps']:.3g} fps, {len(shots)} shots"
        table = Table(title=_escape(title), title_justify="left", box=None, pad_edge=False)
        for name in columns:
            table.add_column(name.replace("_", "\n"), justify="right", no_wrap=True)
        table.add_column("rejected by", no_wrap=True)
        for row in shots:
            table.add_row(*(_cell(row[name]) for name in columns), _escape(row["rejected_by"] or ""))
        # A narrow terminal wraps lines, a pipe has no width: neither is a reason to cut numbers off.
        out.print(table, width=max(out.width, 110), soft_wrap=True, crop=False)


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if 0.1 <= abs(value) < 1e4 or value == 0 else f"{value:.2g}"


@app.command()
def verify(
    dataset: Dataset,
    fast: Annotated[
        bool, typer.Option("--fast", help="Check the tables and the sizes of the shards, without reading the shards.")
    ] = False,
) -> None:
    """Check every promise a dataset makes; exit code 1 when one is broken, with each named."""
    from videofactory.shards.storage import StorageError
    from videofactory.shards.verify import verify as check

    try:
        report = check(dataset, fast=fast)
    except (FileNotFoundError, StorageError) as error:
        _stop(error)
    for promise, identity, found in report.broken:
        out.print(f"[red]broken[/red] {_escape(promise)}: {_escape(identity)} ({_escape(found)})", soft_wrap=True)
    for note in report.notes:
        out.print(f"[yellow]note[/yellow]   {_escape(note)}", soft_wrap=True)
    looked = ", ".join(f"{count} {what}" for what, count in report.checked.items())
    depth = "tables and sizes" if fast else "every byte"
    if not report.ok:
        out.print(f"[red]{len(report.broken)} broken[/red] in {looked} ({depth})")
        raise typer.Exit(1)
    out.print(f"[green]ok[/green]     {looked} ({depth})")


@app.command()
def stats(dataset: Dataset) -> None:
    """Print a dataset's funnel: sources, candidate clips, reasons of rejection, errors by class, totals."""
    from videofactory.shards.index import Index

    _print_funnel(_opened(dataset, Index), _stored_recipe(dataset))


@app.command()
def report(dataset: Dataset) -> None:
    """Derive a dataset's card, report page and shard list again from its index."""
    from videofactory.shards.index import Index

    from .build import finish
    from .recipe import Recipe

    index = _opened(dataset, Index)
    finish(index, _stored_recipe(dataset) or Recipe())
    _print_where(dataset)


def _opened(dataset: str, index: Any) -> Any:
    from videofactory.shards.index import IndexDamagedError
    from videofactory.shards.storage import StorageError

    try:
        found = index(dataset)
    except (StorageError, IndexDamagedError) as error:
        _stop(error)
    if not len(found.sources()):
        _stop(f"{dataset} holds no dataset; build one with `videofactory build`")
    return found


def _stored_recipe(dataset: str) -> Any:
    import yaml

    from videofactory.shards.storage import Storage

    from .recipe import RecipeError, parse_recipe

    storage = Storage(dataset)
    if not storage.exists("recipe.yaml"):
        return None
    try:
        return parse_recipe(yaml.safe_load(storage.get("recipe.yaml")), f"{dataset}/recipe.yaml")
    except RecipeError as error:
        _stop(error)


@app.command()
def doctor() -> None:
    """Say what this machine has, what is missing for which step, and how to get it."""
    from .doctor import examine

    table = Table(box=None, show_header=False, pad_edge=False)
    missing = 0
    for finding in examine():
        mark = {"ok": "[green]ok[/green]", "optional": "[yellow]--[/yellow]", "missing": "[red]missing[/red]"}[finding.state]
        missing += finding.state == "missing"
        table.add_row(mark, finding.what, _escape(finding.found), f"[dim]{_escape(finding.advice)}[/dim]")
    out.print(table)
    if missing:
        raise typer.Exit(1)


def main() -> None:
    """Entry point of the command `videofactory`."""
    app()


if __name__ == "__main__":
    main()
