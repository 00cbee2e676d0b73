"""`python -m videofactory.model.generate PROMPT… --out DIR`: videos from texts, a contact sheet, and a record to repeat the run.

Exit codes: 0 done; 1 the memory did not suffice, a file could not be written, or a video holds no numbers; 2 wrong arguments or no
such model, found before any work; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from videofactory.model.generate_models import (
    MINIATURE,
    Running,
    check_attention_backend,
    choose_device,
    identity,
    is_lack_of_memory,
    load,
    machine,
    outline,
    ways_to_less_memory,
)
from videofactory.model.generate_tasks import (
    RECORD,
    SHEET,
    Settings,
    Task,
    check_outputs,
    check_seeds,
    plan,
    read_prompts,
)
from videofactory.model.video_files import check_fps

SHEET_ROWS, SHEET_COLUMNS = 50, 8
MOST = 2**20
"""Of videos, frames, pixels and steps each: more fit no memory, and overflow where sizes are multiplied."""

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
notes = Console(stderr=True, highlight=False)


def make(
    pipeline: Any, tasks: list[Task], settings: Settings, running: Running, on_step: Callable[[], None]
) -> Iterator[tuple[Task, Any]]:
    """Make the videos, `running.batch` at once, and yield each with its frames, uint8 (F, H, W, 3).

    Raises:
        FloatingPointError: a video holds values that are no numbers.
    """
    import torch

    from videofactory.model.video_files import to_pixels

    def step_done(_pipeline: Any, _number: int, _timestep: Any, tensors: Any) -> Any:
        on_step()
        return tensors

    for first in range(0, len(tasks), running.batch):
        part = tasks[first : first + running.batch]
        # On the CPU, noise is the same whatever the device is.
        generators = [torch.Generator().manual_seed(task.seed) for task in part]
        videos = pipeline(
            [task.prompt for task in part],
            num_frames=settings.frames,
            height=settings.height,
            width=settings.width,
            num_inference_steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            guidance_rescale=settings.guidance_rescale,
            negative_prompt=settings.negative_prompt,
            generator=generators,
            output_type="np",
            decode_chunk_size=running.decode_chunk_size,
            callback_on_step_end=step_done,
        ).frames
        for task, video in zip(part, videos, strict=True):
            yield task, to_pixels(video, f"{task.file} (seed {task.seed})")


def run(pipeline: Any, model: dict[str, Any], tasks: list[Task], settings: Settings, running: Running, out: Path) -> None:
    """Make the videos and write them, the sheet and the record; what is there when the run breaks off gets a record, too.

    `model` is the pipeline's `identity`, for the record.
    """
    from videofactory.model.video_files import contact_sheet, evenly_spaced, write_video

    out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Any]] = []
    made: list[dict[str, Any]] = []
    try:
        with watching(len(tasks), settings.steps, running.batch) as (step_done, video_done):
            for task, frames in make(pipeline, tasks, settings, running, step_done):
                write_video(out / task.file, frames, settings.fps)
                made.append({**asdict(task), "frames": len(frames), "height": frames.shape[1], "width": frames.shape[2]})
                if len(rows) < SHEET_ROWS:
                    rows.append((f"seed {task.seed}: {task.prompt}", evenly_spaced(frames, SHEET_COLUMNS)))
                video_done(task)
    finally:
        if made:
            contact_sheet(rows).save(out / SHEET)
            record = {
                "settings": asdict(settings),
                "model": model,
                "running": asdict(running),
                "machine": machine(running.device),
                "versions": versions(),
                "videos": made,
            }
            (out / RECORD).write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """What a repetition of the run has to have in common with it."""
    import diffusers
    import torch
    import transformers

    import videofactory

    modules = (videofactory, torch, diffusers, transformers)
    return {"python": platform.python_version(), **{module.__name__: str(module.__version__) for module in modules}}


@contextmanager
def watching(videos: int, steps: int, batch: int) -> Iterator[tuple[Callable[[], None], Callable[[Task], None]]]:
    """Show how a run comes along: a display on a terminal, a line per video in a log. Yields what to call for each step and video."""
    batches = -(-videos // batch)
    done = 0
    if notes.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
        with Progress(*columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=notes) as progress:
            bar = progress.add_task(f"0/{videos} videos", total=batches * steps)

            def show(_task: Task) -> None:
                nonlocal done
                done += 1
                progress.update(bar, description=f"{done}/{videos} videos")

            yield lambda: progress.advance(bar), show
        return

    def write(task: Task) -> None:
        nonlocal done
        done += 1
        notes.print(f"[{time.strftime('%H:%M:%S')}] {done}/{videos} videos: {task.file}", markup=False, soft_wrap=True)

    yield lambda: None, write


def _stop(message: object, code: int = 2) -> NoReturn:
    """End with a message a person understands, and no traceback."""
    notes.print(f"[red]error:[/red] {escape(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


def _print_plan(tasks: list[Task], settings: Settings, running: Running, out: Path) -> None:
    from videofactory.model.pipeline_texts import shortened

    for name, value in (*asdict(settings).items(), *asdict(running).items()):
        notes.print(f"{name:<18}{'(the default)' if value is None else value}", markup=False, soft_wrap=True)
    for task in tasks:
        notes.print(f"{out / task.file}  seed {task.seed}  {shortened(task.prompt)}", markup=False, soft_wrap=True)


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT…", help="What to show.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the files.", show_default=False)] = None,
    model: Annotated[
        str, typer.Option(help="A saved pipeline's folder, a Hub id, or `miniature` (tiny; never trained on videos).")
    ] = MINIATURE,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a Hub id.", show_default=False)] = None,
    variant: Annotated[str | None, typer.Option(help="Weights to load, e.g. `fp16`.", show_default=False)] = None,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.", show_default=False)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show, for all.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Steps from noise to video.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Weight of the text; up to 1 without guidance.")] = 9.0,
    guidance_rescale: Annotated[float, typer.Option(min=0, max=1, help="Against overexposure by guidance.")] = 0.0,
    frames: Annotated[
        int | None, typer.Option(max=MOST, help="Frames of a video; by default the model's.", show_default=False)
    ] = None,
    height: Annotated[int | None, typer.Option(max=MOST, help="Pixels; by default the model's.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(max=MOST, help="Pixels; by default the model's.", show_default=False)] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the files.")] = 8.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the first video; each further one has the next.")] = 0,
    videos_per_prompt: Annotated[int, typer.Option(min=1, max=MOST, help="Videos of each prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, max=MOST, help="Videos made at once.")] = 1,
    decode_chunk_size: Annotated[int, typer.Option(min=1, max=MOST, help="Frames the VAE decodes at once.")] = 16,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")] = "auto",
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], typer.Option(help="Number format of the models.")] = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="Keep only the model at work on the GPU.")] = False,
    cuda_graph: Annotated[bool, typer.Option(help="On an NVIDIA GPU, replay the U-Net as a CUDA graph: faster.")] = True,
    attention_backend: Annotated[
        str | None, typer.Option(help="One of diffusers' attention backends, e.g. `native`.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace files of an earlier run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and do nothing.")] = False,
) -> None:
    """Make videos from texts: an MP4 file for each, a contact sheet of the first 50, and generate.json with what a repetition needs.

    Example: python -m videofactory.model.generate "a red circle" "a blue star" --out videos
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=notes, show_path=False)])
    if out is None:
        _stop("no output; name a folder with --out, for example --out videos")
    try:
        tasks = plan(read_prompts(prompts or [], prompts_file), videos_per_prompt, seed)
        check_seeds(tasks)
        check_fps(fps)
        check_outputs(tasks, out, overwrite)
        where = choose_device(device, dtype, offload)
        running = Running(batch, *where, offload, cuda_graph, attention_backend, decode_chunk_size)
        check_attention_backend(running)
    except (ValueError, OSError) as error:
        _stop(_with_options(error))
    guidance, size = (guidance_scale, guidance_rescale), (frames, height, width)
    settings = Settings(model, revision, variant, negative_prompt, steps, *guidance, *size, fps, seed, videos_per_prompt)
    if dry_run:
        _dry_run(tasks, settings, running, out)
        return
    _guarded_run(tasks, settings, running, out)
    shown = f" (of the first {SHEET_ROWS})" if len(tasks) > SHEET_ROWS else ""
    videos = f"{len(tasks)} video{'s' * (len(tasks) > 1)}"
    notes.print(f"wrote {videos}, {out / SHEET}{shown} and {out / RECORD}", markup=False, soft_wrap=True)


def _with_options(error: Exception) -> str:
    """The message of an error with the command's option in the place of an argument's name."""
    options = {"num_frames": "frames", "num_inference_steps": "steps"}
    names = "fps|height|width|num_frames|num_inference_steps|guidance_scale|guidance_rescale"
    return re.sub(rf"^({names})(?= is )", lambda name: "--" + options.get(name[1], name[1]).replace("_", "-"), str(error))


def _check_call(pipeline: Any, settings: Settings) -> None:
    """Whether the pipeline can be called so; raises `ValueError`."""
    pipeline.check_inputs(
        "",
        settings.frames,
        settings.height,
        settings.width,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        guidance_rescale=settings.guidance_rescale,
        negative_prompt=settings.negative_prompt,
    )


def _dry_run(tasks: list[Task], settings: Settings, running: Running, out: Path) -> None:
    """Find the mistakes that the run would find, as far as that goes without the weights, and say what it would make."""
    try:
        pipeline = outline(settings.model, settings.revision, settings.variant)
        if pipeline is not None:
            _check_call(pipeline, settings)
    except (ValueError, OSError, ImportError) as error:
        _stop(_with_options(error))
    _print_plan(tasks, settings, running, out)
    if pipeline is None:
        notes.print(
            f"note: {settings.model} is no folder here, so whether it is on the Hub, and takes these sizes and steps, was not checked",
            markup=False,
            soft_wrap=True,
        )
    notes.print("nothing was done (--dry-run)")


def _guarded_run(tasks: list[Task], settings: Settings, running: Running, out: Path) -> None:
    """Load the model and run; what a user can mend ends in one line, what is our mistake in a traceback."""
    if settings.model == MINIATURE:
        notes.print(
            "note: the miniature was never trained on videos, so every frame is a picture of its own, of coloured shapes; "
            "`make train` teaches it to move; name a trained model with --model",
            soft_wrap=True,
        )
    purpose = "to load the model"
    try:
        try:
            pipeline = load(settings.model, running, settings.revision, settings.variant)
            _check_call(pipeline, settings)
            model = identity(settings.model, pipeline, settings.variant)
        except (ValueError, OSError, ImportError) as error:
            _stop(_with_options(error))
        frames, height, width = pipeline.video_size(settings.frames, settings.height, settings.width)
        at_once = min(running.batch, len(tasks))
        purpose = f"for {at_once} video{'s' * (at_once > 1)} at once of {frames} frames, {width} x {height} pixels"
        run(pipeline, model, tasks, settings, running, out)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        _stop(
            f"the memory of {running.device} does not suffice {purpose} ({_reason(error)}); "
            f"these need less memory: {ways_to_less_memory(running)}",
            1,
        )
    except FloatingPointError as error:
        _stop(error, 1)
    except OSError as error:
        _stop(f"a file cannot be written: {error}", 1)
    except KeyboardInterrupt:
        _stop(f"interrupted; the videos that were finished are in {out}", 130)


def _reason(error: BaseException) -> str:
    """What of the message of an allocator a person needs."""
    text = str(error).partition("\n")[0]
    tried = re.search(r"tried to allocate (\d+) bytes", text)
    return f"tried to allocate {int(tried[1]) / 2**30:,.1f} GiB" if tried else text or "it was full"


if __name__ == "__main__":
    app()
