"""`python -m videofactory.model.evaluate`: score videos, alone or against others; make samples of a model; compare results.

Exit codes: 0 done; 1 the memory did not suffice, a file could not be written, or a video holds no numbers; 2 wrong arguments, or
videos or results that cannot be scored or compared; 130 interrupted.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from typer.core import TyperGroup

MOST = 2**20
"""Of videos, frames and pixels each."""
DEFAULT = "score"


class _Group(TyperGroup):
    """What does not begin with the name of a command is an input of `score`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [DEFAULT, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_Group,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Score videos (`score`, which may be left out), make samples of a model, compare results.",
)
notes = Console(stderr=True, highlight=False)
console = Console(highlight=False)


def _stop(message: object, code: int = 2) -> NoReturn:
    """End with a message a person understands, and no traceback."""
    notes.print(f"[red]error:[/red] {escape(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


@contextmanager
def _mistakes(purpose: str) -> Iterator[None]:
    """What a user can mend ends in one line, what is our mistake in a traceback."""
    from videofactory.model.generate_models import is_lack_of_memory

    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        _stop(error)
    except FloatingPointError as error:
        _stop(error, 1)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "it was full"
        _stop(f"the memory did not suffice {purpose} ({reason}); a smaller --batch or --height and --width need less", 1)
    except KeyboardInterrupt:
        _stop(f"interrupted {purpose}", 130)


def _log_to_notes() -> None:
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=notes, show_path=False)])


@app.command()
def score(
    inputs: Annotated[list[str] | None, typer.Argument(metavar="[SCORED] [REFERENCE]", show_default=False)] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="The same: once what is scored, again what it is compared with.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the result.")] = Path("evaluation.json"),
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="fvd, fid, kid, clipsim, consistency, motion, displacement; repeat it.")
    ] = None,
    frames: Annotated[int, typer.Option(help="Of a video; shorter videos are left out.")] = 16,
    stride: Annotated[int, typer.Option(help="Take every so many frames of a file.")] = 1,
    fps: Annotated[
        float | None, typer.Option(help="Frames per second to sample at, instead of --stride.", show_default=False)
    ] = None,
    height: Annotated[int, typer.Option(help="Pixels that frames are scaled to.")] = 224,
    width: Annotated[int, typer.Option(help="Pixels that frames are scaled to.")] = 224,
    crop: Annotated[str, typer.Option(help="`centre` cuts off what stands over, `none` distorts.")] = "centre",
    window: Annotated[str, typer.Option(help="Where in a video: `centre`, `first` or `random` (by --seed).")] = "centre",
    count: Annotated[
        int | None, typer.Option(min=2, max=MOST, help="Videos of each set; all by default.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn: videos, windows, resamples.")] = 0,
    resamples: Annotated[int, typer.Option(min=5, max=MOST, help="Of the bootstrap intervals.")] = 200,
    video_extractor: Annotated[str, typer.Option(help="random, torchscript (I3D) or module:Class.")] = "random",
    video_weights: Annotated[
        str | None, typer.Option(help="Its local file; a TorchScript file is run.", show_default=False)
    ] = None,
    image_extractor: Annotated[str, typer.Option(help="random, torchscript (Inception), clip or module:Class.")] = "random",
    image_weights: Annotated[str | None, typer.Option(help="Its local file or folder, or Hub id.", show_default=False)] = None,
    text_extractor: Annotated[str | None, typer.Option(help="clip or module:Class; for clipsim.", show_default=False)] = None,
    text_weights: Annotated[str | None, typer.Option(help="Its local folder, or Hub id.", show_default=False)] = None,
    split: Annotated[str | None, typer.Option(help="Of datasets: train, val or test.", show_default=False)] = None,
    where: Annotated[str | None, typer.Option(help="Of datasets: SQL condition on clips.", show_default=False)] = None,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Videos at once.")] = 8,
    threads: Annotated[int, typer.Option(min=1, max=256, help="That decode.")] = 2,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be scored, and decode nothing.")] = False,
) -> None:
    """Score a dataset, a folder of videos or an .npz file, alone or against a second one; writes a JSON file with the protocol.

    Example: python -m videofactory.model.evaluate data/samples data/sample
    """
    from videofactory.model.evaluation.metrics import check_names
    from videofactory.model.evaluation.protocol import Sampling

    _log_to_notes()
    with _mistakes("while scoring"):
        sampling = Sampling(frames, stride, fps, height, width, crop, window, seed)  # type: ignore[arg-type]
        names = check_names(metric or [])
        _check_file(out)
        sets = _opened(_places([*(inputs or []), *(data or [])]), split, where)
        given: dict[Any, Any] = {"video": (video_extractor, video_weights), "image": (image_extractor, image_weights)}
        given.update({"text": (text_extractor, text_weights)} if text_extractor is not None else {})
        _score(names, sampling, given, (count, resamples, batch, device, threads), sets, out, dry_run)


def _score(names: list[str], sampling: Any, extractors: Any, limits: Any, sets: list[Any], out: Path, dry_run: bool) -> None:
    from videofactory.model.evaluation.scoring import Evaluation, choose_metrics, evaluate
    from videofactory.model.generate_models import choose_device

    count, resamples, batch, device, threads = limits
    device, _ = choose_device(device, "fp32", offload=False)
    names, left_out = choose_metrics(names, sets[0], len(sets) > 1, "text" in extractors)
    for note in left_out:
        notes.print(f"note: {note}", markup=False, soft_wrap=True)
    evaluation = Evaluation(names, sampling, extractors, count, resamples, batch, device, threads)
    if dry_run:
        _print_plan(evaluation, sets, out)
        return
    with _watching([min(count or MOST, len(videos.videos)) for videos in sets]) as (progress, stage):
        found = evaluate(evaluation, sets[0], sets[1] if len(sets) > 1 else None, progress, stage)
    _finish(found, out)


def _places(given: list[str]) -> list[str]:
    if 1 <= len(given) <= 2:
        return given
    was = "nothing was" if not given else f"{len(given)} were"
    raise ValueError(f"{was} given to score; name one set of videos, or two: what is scored and what it is compared with")


def _opened(places: list[str], split: str | None, where: str | None) -> list[Any]:
    """The sets; what chooses from datasets is for those alone, and one of them has to be there."""
    from videofactory.model.evaluation.inputs import open_videos

    are_datasets = ["://" in place or (Path(place) / "index").is_dir() for place in places]
    if not any(are_datasets):
        return [open_videos(place, split, where) for place in places]
    return [open_videos(p, split, where) if is_one else open_videos(p) for p, is_one in zip(places, are_datasets, strict=True)]


def _check_file(out: Path) -> None:
    """Whether the result can be written, before hours of work."""
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file, e.g. {out / 'evaluation.json'}")
    nearest = next(folder for folder in out.absolute().parents if folder.exists())
    if not nearest.is_dir():
        raise ValueError(f"--out {out} cannot be made, {nearest} is a file; name another")


def _print_plan(evaluation: Any, sets: list[Any], out: Path) -> None:
    from dataclasses import asdict

    for role, videos in zip(("scored", "reference"), sets, strict=False):
        notes.print(f"{role:<12}{videos.place} ({videos.kind}, {len(videos.videos)} videos)", markup=False, soft_wrap=True)
    for name, value in asdict(evaluation.sampling).items():
        notes.print(f"{name:<12}{'(as it is)' if value is None else value}", markup=False, soft_wrap=True)
    for use in evaluation.uses:
        name, weights = evaluation.extractors[use]
        notes.print(f"{use:<12}{name} {weights or ''}".rstrip(), markup=False, soft_wrap=True)
    notes.print(f"{'metrics':<12}{', '.join(evaluation.metrics)}", markup=False, soft_wrap=True)
    notes.print(f"{'out':<12}{out}\nnothing was done (--dry-run)", markup=False, soft_wrap=True)


@contextmanager
def _watching(totals: list[int]) -> Iterator[tuple[Callable[[Any, Any], None], Callable[[str], None]]]:
    """Show how far a run is: a display on a terminal, a line now and then in a log."""
    left = iter(totals)
    if not notes.is_terminal:
        last: dict[int, float] = {}

        def line(videos: Any, census: Any) -> None:
            total = min(len(videos.videos), max(totals))
            if time.monotonic() - last.setdefault(id(census), time.monotonic()) >= 30 or len(census.scored) >= total:
                last[id(census)] = time.monotonic()
                stamp = time.strftime("%H:%M:%S")
                notes.print(f"[{stamp}] {len(census.scored)}/{total} videos of {videos.place}", markup=False, soft_wrap=True)

        yield line, lambda name: notes.print(f"[{time.strftime('%H:%M:%S')}] {name}", markup=False, soft_wrap=True)
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=notes) as progress:
        bars: dict[int, Any] = {}

        def show(videos: Any, census: Any) -> None:
            if id(census) not in bars:
                bars[id(census)] = progress.add_task(escape(videos.place), total=next(left))
            progress.update(bars[id(census)], completed=len(census.scored))

        scoring = progress.add_task("scores", total=None, visible=False)

        def stage(name: str) -> None:
            progress.update(scoring, description=name, visible=True)

        yield show, stage


def _finish(found: dict[str, Any], out: Path) -> None:
    from videofactory.model.evaluation.results import cell, number, write

    write(found, out)
    table = Table("metric", "better", "value  [95 % interval]", "beside", "videos", box=None, pad_edge=False)
    for name, one in found["metrics"].items():
        beside = "" if one["reference"] is None else f"reference {number(one['reference'])}"
        beside = f"floor {number(one['floor']['mean'])}" if one["floor"] else beside
        count = str(one["videos"]) + (f" + {one['reference_videos']}" if one["reference_videos"] else "")
        table.add_row(name, one["better"], cell(one), beside, count)
    console.print(table)
    if halves := next((one["floor"]["videos"] for one in found["metrics"].values() if one["floor"]), None):
        console.print(f"floor: between random halves of the reference, {halves} videos each", soft_wrap=True)
    for warning in found["warnings"]:
        notes.print(f"[yellow]note:[/yellow] {escape(warning)}", soft_wrap=True)
    notes.print(f"wrote {out}", markup=False, soft_wrap=True)


@app.command()
def sample(
    model: Annotated[str, typer.Option(help="A saved pipeline's folder, a Hub id, or `miniature`.")],
    prompts: Annotated[Path, typer.Option(help="A prompt a line (.txt), or a column of a .csv, .tsv or .jsonl.")],
    count: Annotated[int, typer.Option(min=1, max=10**6, help="Videos; prompts are gone through again and again.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder; videos that are there already are kept.")],
    column: Annotated[str | None, typer.Option(help="Of a table of prompts.", show_default=False)] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of all videos.")] = 0,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Videos made at once.")] = 1,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Steps from noise to video.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Weight of the text; up to 1 without guidance.")] = 9.0,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show, for all.", show_default=False)] = None,
    frames: Annotated[int | None, typer.Option(max=MOST, help="By default the model's.", show_default=False)] = None,
    height: Annotated[int | None, typer.Option(max=MOST, help="Pixels; by default the model's.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(max=MOST, help="Pixels; by default the model's.", show_default=False)] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the files.")] = 8.0,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="`auto`, `fp32`, `fp16` or `bf16`.")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and do nothing.")] = False,
) -> None:
    """Make numbered videos of a model to be scored, with prompts.jsonl; begun folders are continued, torchrun's processes share them.

    Example: torchrun --nproc-per-node 8 -m videofactory.model.evaluate sample --model DIR --prompts FILE --count 2048 --out SAMPLES
    """
    from videofactory.model.evaluation import samples
    from videofactory.model.evaluation.prompts import read_prompts
    from videofactory.model.generate_models import Running, choose_device
    from videofactory.model.video_files import check_fps

    _log_to_notes()
    with _mistakes(f"while sampling; what is finished is in {out}, and the same command goes on"):
        texts, where = read_prompts(prompts, column), samples.place()
        check_fps(fps)
        if dtype not in ("auto", "fp32", "fp16", "bf16"):
            raise ValueError(f"--dtype is {dtype!r}; auto, fp32, fp16 or bf16 is wanted")
        chosen, number_format = choose_device(device, dtype, offload=False)
        chosen = f"cuda:{where.local_rank}" if chosen == "cuda" and where.processes > 1 else chosen
        wanted = samples.samples(texts, count, seed)
        settings = (model, count, seed, batch, steps, guidance_scale, frames, height, width, fps, negative_prompt, number_format)
        plan = samples.Plan(*settings, samples.hash_of(texts), samples.weights_hash(model))
        parts = samples.groups(texts, plan, where)
        running = Running(batch, chosen, number_format, offload=False, cuda_graph=True, attention_backend=None)
        if dry_run:
            _print_samples(plan, parts, where, out)
            return
        _make_samples(plan, running, wanted, parts, out)


def _print_samples(plan: Any, parts: list[Any], where: Any, out: Path) -> None:
    from dataclasses import asdict

    from videofactory.model.evaluation.samples import wanted_of

    for name, value in asdict(plan).items():
        notes.print(f"{name:<18}{'(the default)' if value is None else value}", markup=False, soft_wrap=True)
    mine = [sample for part in parts for sample in wanted_of(part, plan)]
    notes.print(f"{'process':<18}{where.rank} of {where.processes}, {len(mine)} videos", markup=False, soft_wrap=True)
    for one in mine[:3]:
        notes.print(f"{out / one.file}  seed {one.seed}  {one.prompt}", markup=False, soft_wrap=True)
    notes.print("nothing was done (--dry-run)")


def _make_samples(plan: Any, running: Any, wanted: list[Any], parts: list[Any], out: Path) -> None:
    from videofactory.model.evaluation import samples
    from videofactory.model.generate_models import load

    samples.prepare(plan, wanted, out)
    began = time.monotonic()
    total = sum(len(samples.wanted_of(part, plan)) for part in parts)
    missing = [samples.missing_of(part, plan, out) for part in parts]
    left = [part for part, lacking in zip(parts, missing, strict=True) if lacking]
    kept = total - sum(map(len, missing))
    made = 0
    if left:
        pipeline = load(plan.model, running)
        pipeline.check_inputs("", plan.frames, plan.height, plan.width, num_inference_steps=plan.steps)
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(*columns, console=notes, disable=not notes.is_terminal) as progress:
            bar = progress.add_task("videos", total=total, completed=kept)
            for number, one in enumerate(samples.make(pipeline, plan, left, out), start=1):
                made = number
                progress.advance(bar)
                if not notes.is_terminal:
                    notes.print(f"[{time.strftime('%H:%M:%S')}] {number} made: {one.file}", markup=False, soft_wrap=True)
    notes.print(
        f"{made} videos made in {time.monotonic() - began:.1f} s and {total - made} kept, in {out}", markup=False, soft_wrap=True
    )


@app.command()
def compare(
    results: Annotated[list[Path], typer.Argument(metavar="RESULT…", help="JSON files of `score`.", show_default=False)],
) -> None:
    """Print the scores of results side by side; refuses results of different protocols and names what differs."""
    from videofactory.model.evaluation.results import check_comparable, read, rows

    with _mistakes("while comparing"):
        if len(set(results)) < 2:
            raise ValueError("one result has nothing to be compared with; name two or more")
        found = {str(file): read(file) for file in results}
        check_comparable(found)
        table = Table("metric", "better", *found, box=None, pad_edge=False)
        for row in rows(found):
            table.add_row(*row)
        console.print(table)


if __name__ == "__main__":
    app()
