"""`python -m videofactory.model.generate PROMPT… --out DIR`: videos from texts, a contact sheet, and a record to repeat the run.

Exit codes: 0 done; 1 the memory did not suffice or a file could not be written; 2 wrong arguments or no such model, found before any
work; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import platform
import re
import time
import unicodedata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
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

MINIATURE = "miniature"
SHEET, RECORD = "contact-sheet.png", "generate.json"
SHEET_ROWS, SHEET_COLUMNS = 50, 8

_SAVES_MEMORY = "these need less memory: --offload, --batch 1, fewer --frames, a smaller --height and --width, --dtype bf16"

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
notes = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Settings:
    """What a run does with each prompt; `None` is the model's own."""

    model: str
    negative_prompt: str | None
    steps: int
    guidance_scale: float
    guidance_rescale: float
    frames: int | None
    height: int | None
    width: int | None
    fps: float
    seed: int
    videos_per_prompt: int


@dataclass(frozen=True)
class Running:
    """How a run is done; the videos are the same but for rounding."""

    batch: int
    device: str
    dtype: str
    offload: bool
    compile: bool
    attention_backend: str | None


@dataclass(frozen=True)
class Task:
    """One video to make: its file's name, its prompt and the seed of its noise."""

    file: str
    prompt: str
    seed: int


def plan(prompts: list[str], videos_per_prompt: int, seed: int) -> list[Task]:
    """The videos of a run in order. Each has a seed of its own, so that it does not depend on the batch it is made in."""
    texts = [prompt for prompt in prompts for _ in range(videos_per_prompt)]
    digits = max(3, len(str(len(texts) - 1)))
    return [Task(f"{number:0{digits}}-{slug(text)}.mp4", text, seed + number) for number, text in enumerate(texts)]


def slug(text: str) -> str:
    """`text` as a part of a file's name: at most 60 lower-case letters and digits with hyphens between words."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().lower()
    return re.sub(r"[^a-z0-9]+", "-", plain)[:60].strip("-") or "video"


def read_prompts(given: list[str], file: Path | None) -> list[str]:
    """The prompts of the command line, then those of the file: one a line, empty lines left out.

    Raises:
        ValueError: there is none, one is empty, or the file is no text.
        OSError: the file cannot be read.
    """
    prompts = list(given)
    if file is not None:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"{file} is not UTF-8 text ({error.reason} at byte {error.start}); save it as UTF-8") from error
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError("no prompt; give one, e.g. 'a red circle', or a file of them with --prompts-file")
    if not all(prompt.strip() for prompt in prompts):
        raise ValueError(f"prompt {[bool(prompt.strip()) for prompt in prompts].index(False) + 1} is empty; leave it out")
    return prompts


def load(settings: Settings, running: Running) -> Any:
    """The pipeline, where and how it is to run.

    Raises:
        OSError: there is no such model.
        ValueError: the model is of another kind, or the machine or the U-Net cannot run it so.
    """
    import torch
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[running.dtype]
    if settings.model == MINIATURE:
        from videofactory.model import miniature

        pipeline = miniature.pipeline()
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            # The models' own `to` warns of a cast that is right here.
            torch.nn.Module.to(part, dtype)
    else:
        from videofactory.model.pipeline import TextToVideoSwapPipeline

        pipeline = TextToVideoSwapPipeline.from_pretrained(settings.model, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    if running.offload:
        pipeline.enable_model_cpu_offload(device=running.device)
    else:
        pipeline.to(running.device)
    if running.attention_backend is not None:
        pipeline.unet.set_attention_backend(running.attention_backend)
    if running.compile:
        pipeline.unet.compile_repeated_blocks()
    return pipeline


def choose_device(device: str, dtype: str, offload: bool) -> tuple[str, str]:
    """The device and the number format, `auto` resolved.

    Raises:
        ValueError: this machine has no such device, or none to offload from.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} is not there: {reason}; leave it out to take what there is") from error
    if offload and kind == "cpu":
        raise ValueError("--offload moves models between a GPU and the CPU, and the device is the CPU; leave it out")
    if dtype == "auto":
        dtype = "fp32" if kind == "cpu" else "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
    return device, dtype


def make(
    pipeline: Any, tasks: list[Task], settings: Settings, batch: int, on_step: Callable[[], None]
) -> Iterator[tuple[Task, Any]]:
    """Make the videos, `batch` at once, and yield each with its frames, uint8 (F, H, W, 3)."""
    import torch

    def step_done(_pipeline: Any, _number: int, _timestep: Any, tensors: Any) -> Any:
        on_step()
        return tensors

    for first in range(0, len(tasks), batch):
        part = tasks[first : first + batch]
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
            callback_on_step_end=step_done,
        ).frames
        yield from zip(part, (videos * 255).round().astype("uint8"), strict=True)


def run(pipeline: Any, tasks: list[Task], settings: Settings, running: Running, out: Path) -> None:
    """Make the videos and write them, the sheet and the record; what is there when the run breaks off gets a record, too."""
    from videofactory.model.video_files import contact_sheet, evenly_spaced, write_video

    out.mkdir(parents=True, exist_ok=True)
    rows: list[tuple[str, Any]] = []
    made: list[dict[str, Any]] = []
    try:
        with watching(len(tasks), settings.steps, running.batch) as (step_done, video_done):
            for task, frames in make(pipeline, tasks, settings, running.batch, step_done):
                write_video(out / task.file, frames, settings.fps)
                made.append({**asdict(task), "frames": len(frames), "height": frames.shape[1], "width": frames.shape[2]})
                if len(rows) < SHEET_ROWS:
                    rows.append((f"{task.prompt}  (seed {task.seed})", evenly_spaced(frames, SHEET_COLUMNS)))
                video_done(task)
    finally:
        if made:
            contact_sheet(rows).save(out / SHEET)
            record = {"settings": asdict(settings), "running": asdict(running), "versions": versions(), "videos": made}
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


def _check_outputs(tasks: list[Task], out: Path, overwrite: bool) -> None:
    """End the command if files of the run are there already."""
    if out.exists() and not out.is_dir():
        _stop(f"--out {out} is a file; name a folder")
    there = [name for name in (*(task.file for task in tasks), SHEET, RECORD) if (out / name).exists()]
    if there and not overwrite:
        more = f" and {len(there) - 1} more" if len(there) > 1 else ""
        _stop(f"{out / there[0]}{more} would be overwritten; name another folder with --out, or add --overwrite")


def _print_plan(tasks: list[Task], settings: Settings, running: Running, out: Path) -> None:
    for name, value in (*asdict(settings).items(), *asdict(running).items()):
        notes.print(f"{name:<18}{'(the default)' if value is None else value}", markup=False, soft_wrap=True)
    for task in tasks:
        notes.print(f"{out / task.file}  seed {task.seed}  {task.prompt}", markup=False, soft_wrap=True)
    notes.print("nothing was done (--dry-run)")


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT…", help="What to show.", show_default=False)] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for the files.", show_default=False)] = None,
    model: Annotated[
        str, typer.Option(help="A saved pipeline's folder, a Hub id, or `miniature` (untrained U-Net).")
    ] = MINIATURE,
    prompts_file: Annotated[Path | None, typer.Option(help="Text file with a prompt a line.", show_default=False)] = None,
    negative_prompt: Annotated[str | None, typer.Option(help="What not to show, for all.", show_default=False)] = None,
    steps: Annotated[int, typer.Option(min=1, help="Steps from noise to video.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="Weight of the text; up to 1 without guidance.")] = 9.0,
    guidance_rescale: Annotated[float, typer.Option(min=0, max=1, help="Against overexposure by guidance.")] = 0.0,
    frames: Annotated[int | None, typer.Option(help="Frames of a video; by default the model's.", show_default=False)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; by default the model's.", show_default=False)] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; by default the model's.", show_default=False)] = None,
    fps: Annotated[float, typer.Option(help="Frames per second of the files.")] = 8.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the first video; each further one has the next.")] = 0,
    videos_per_prompt: Annotated[int, typer.Option(min=1, help="Videos of each prompt.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Videos made at once.")] = 1,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`, `mps`.")] = "auto",
    dtype: Annotated[Literal["auto", "fp32", "fp16", "bf16"], typer.Option(help="Number format of the models.")] = "auto",
    offload: Annotated[bool, typer.Option("--offload", help="Keep only the model at work on the GPU.")] = False,
    compile_: Annotated[bool, typer.Option("--compile", help="Compile the U-Net: slow to start, then faster.")] = False,
    attention_backend: Annotated[
        str | None, typer.Option(help="One of diffusers' attention backends, e.g. `native`.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", "--force", help="Replace files of an earlier run.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be made, and do nothing.")] = False,
) -> None:
    """Make videos from texts: an MP4 file for each, a contact sheet, and generate.json with all that a repetition needs.

    Example: python -m videofactory.model.generate "a red circle" "a blue star" --out videos
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[RichHandler(console=notes, show_path=False)])
    if out is None:
        _stop("no output; name a folder with --out, for example --out videos")
    try:
        tasks = plan(read_prompts(prompts or [], prompts_file), videos_per_prompt, seed)
        if not fps > 0:
            raise ValueError(f"--fps is {fps}; it has to be above 0")
        device, number_format = choose_device(device, dtype, offload)
    except (ValueError, OSError) as error:
        _stop(error)
    _check_outputs(tasks, out, overwrite)
    settings = Settings(
        model, negative_prompt, steps, guidance_scale, guidance_rescale, frames, height, width, fps, seed, videos_per_prompt
    )
    running = Running(batch, device, number_format, offload, compile_, attention_backend)
    if dry_run:
        _print_plan(tasks, settings, running, out)
        return
    _guarded_run(tasks, settings, running, out)
    notes.print(
        f"wrote {len(tasks)} video{'s' * (len(tasks) > 1)}, {out / SHEET} and {out / RECORD}", markup=False, soft_wrap=True
    )


def _guarded_run(tasks: list[Task], settings: Settings, running: Running, out: Path) -> None:
    """Load the model and run; what a user can mend ends in one line, what is our mistake in a traceback."""
    import torch

    if settings.model == MINIATURE:
        notes.print(
            "note: the miniature has an untrained U-Net, so its videos are noise; name a trained one with --model", soft_wrap=True
        )
    try:
        try:
            pipeline = load(settings, running)
            sizes = {name: getattr(settings, name) for name in ("frames", "height", "width")}
            sizes = {name: pipeline.config[f"default_{name}"] if size is None else size for name, size in sizes.items()}
            pipeline.check_inputs("", sizes["frames"], sizes["height"], sizes["width"])
        except (ValueError, OSError, ImportError) as error:
            _stop(error)
        run(pipeline, tasks, settings, running, out)
    except torch.OutOfMemoryError as error:
        reason = str(error).partition("\n")[0]
        _stop(f"the memory of {running.device} does not suffice ({reason}); {_SAVES_MEMORY}", 1)
    except OSError as error:
        _stop(f"a file cannot be written: {error}", 1)
    except KeyboardInterrupt:
        _stop(f"interrupted; the videos that were finished are in {out}", 130)


if __name__ == "__main__":
    app()
