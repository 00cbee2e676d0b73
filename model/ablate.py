"""`python -m videofactory.model.ablate CONFIG [key=value…]`: train the U-Net with every interaction of space and time, and compare.

Exit codes: 0 done; 1 the memory did not suffice, or training went wrong; 2 wrong arguments, found before any work; 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape

app = typer.Typer(
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
notes = Console(stderr=True, highlight=False)
console = Console(highlight=False)

EPILOG = (
    "CONFIG and key=value are those of videofactory.model.train; seed, output and model.interaction are set for every run. Runs of "
    "one seed see the same clips and noise, so differences between them are taken seed by seed.",
    "What is done is kept: the same command goes on, and two commands with other --interactions or --seeds and the same --out "
    "share the work. A last command with all of them prints the table and writes OUT/ablation.json and OUT/ablation.md.",
    "python -m videofactory.model.ablate miniature --prompts prompts.txt --reference data/sample --out runs/ablation steps=50",
)


def _stop(message: object, code: int = 2) -> NoReturn:
    notes.print(f"[red]error:[/red] {escape(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


def _say(text: str) -> None:
    notes.print(f"[{time.strftime('%H:%M:%S')}] {text}", markup=False, soft_wrap=True)


@app.command(epilog="\n\n".join(EPILOG))
def main(
    config: Annotated[
        str, typer.Argument(help="a YAML file of training settings, or the name of one that comes with the package")
    ],
    prompts: Annotated[Path, typer.Option(help="A prompt a line, of the videos that are scored.")],
    reference: Annotated[str, typer.Option(help="Dataset that they are compared with.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the runs and the table.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]…", help="settings that differ from it")] = None,
    interactions: Annotated[str, typer.Option(help="Some of all, with commas between; all by default.", show_default=False)] = "",
    seeds: Annotated[str, typer.Option(help="Whole numbers with commas between.")] = "0,1,2",
    against: Annotated[
        str | None,
        typer.Option(help="The interaction that the others are compared with; swap, or the first.", show_default=False),
    ] = None,
    count: Annotated[int, typer.Option(min=2, max=2**20, help="Videos per run.")] = 64,
    batch: Annotated[int, typer.Option(min=1, max=2**20, help="Videos made at once.")] = 8,
    steps: Annotated[int, typer.Option(min=1, max=2**20, help="Steps from noise to video.")] = 25,
    guidance_scale: Annotated[float, typer.Option(help="Weight of the text.")] = 4.0,
    split: Annotated[str, typer.Option(help="Of the reference: train, val, test or all.")] = "train",
    video_extractor: Annotated[str, typer.Option(help="random, torchscript (I3D) or module:Class.")] = "random",
    video_weights: Annotated[str | None, typer.Option(help="Its local file.", show_default=False)] = None,
    image_extractor: Annotated[str, typer.Option(help="random, torchscript (Inception), clip or module:Class.")] = "random",
    image_weights: Annotated[str | None, typer.Option(help="Its local file or folder.", show_default=False)] = None,
    reader: Annotated[
        str | None,
        typer.Option(
            help="module:function that reads what the videos show (ablation.study.Reader); it is run.", show_default=False
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto: a GPU if there is one; or cpu")] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, measure the costs, and end.")] = False,
) -> None:
    """Compare the ways in which space and time meet: train each alike over several seeds, make videos, score them, print a table."""
    from videofactory.model.ablation.study import INTERACTIONS, Study
    from videofactory.model.evaluation.prompts import read_prompts

    with _mistakes():
        if device not in ("auto", "cpu"):
            raise ValueError(f"--device is {device!r}; auto or cpu is wanted")
        if split not in ("train", "val", "test", "all"):
            raise ValueError(f"--split is {split!r}; train, val, test or all is wanted")
        study = Study(
            config,
            prompts=tuple(read_prompts(prompts)),
            reference=reference,
            out=out,
            overrides=tuple(overrides or ()),
            interactions=_chosen(interactions, INTERACTIONS),
            seeds=_numbers(seeds),
            count=count,
            batch=batch,
            steps=steps,
            guidance_scale=guidance_scale,
            split=None if split == "all" else split,
            video_extractor=(video_extractor, video_weights),
            image_extractor=(image_extractor, image_weights),
            reader=reader,
        )
        _compare(study, against, device, dry_run)


@contextmanager
def _mistakes() -> Iterator[None]:
    """What a user can mend ends in one line, what is our mistake in a traceback."""
    from videofactory.model.ablation.study import InterruptedRunError
    from videofactory.model.generate_models import is_lack_of_memory
    from videofactory.model.training.config import ConfigError
    from videofactory.model.training.data import BadClipsError
    from videofactory.model.training.tensor_files import CheckpointError
    from videofactory.model.training.trainer import NotFiniteError

    try:
        yield
    except (InterruptedRunError, KeyboardInterrupt) as error:
        _stop(str(error) or "interrupted; the same command goes on", 130)
    except (ConfigError, CheckpointError, ValueError, OSError) as error:
        _stop(error)
    except (BadClipsError, NotFiniteError, FloatingPointError) as error:
        _stop(error, 1)
    except (RuntimeError, MemoryError) as error:
        if not is_lack_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        _stop(f"the memory did not suffice ({reason}); lower data.buckets.0.batch, or --batch, in another --out", 1)


def _compare(study: Any, against: str | None, device: str, dry_run: bool) -> None:
    """Check the study, and run it in this process."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    from videofactory.model.ablation.study import check
    from videofactory.model.training.processes import joined

    # A bar per model that is loaded says nothing that anyone waits for.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    base = against or ("swap" if "swap" in study.interactions else study.interactions[0])
    if base not in study.interactions:
        raise ValueError(f"--against is {base!r}; one of {', '.join(study.interactions)} is wanted")
    check(study)
    with joined(device) as processes:
        if processes.world > 1:
            raise ValueError("an ablation runs in one process; share it by --seeds or --interactions, with the same --out")
        _run_all(study, processes, base, dry_run)


def _chosen(text: str, known: tuple[Any, ...]) -> tuple[Any, ...]:
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip())) or known
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--interactions has {unknown[0]!r}; {', '.join(known)} are known")
    return names


def _numbers(text: str) -> tuple[int, ...]:
    try:
        found = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ValueError(f"--seeds is {text!r}; whole numbers with commas between are wanted, e.g. 0,1,2") from None
    if any(seed < 0 for seed in found):
        raise ValueError(f"--seeds is {text!r}; seeds are 0 or more")
    return found


def _run_all(study: Any, processes: Any, against: str, dry_run: bool) -> None:
    from videofactory.model.ablation import costs, table
    from videofactory.model.ablation import study as runs
    from videofactory.model.evaluation.results import check_comparable, read, versions, write
    from videofactory.model.training.trainer import Trainer

    arms = study.arms()
    done = [arm for arm in arms if runs.finished(study, arm)]
    _say(f"{len(arms)} runs of {study.training(arms[0]).steps} steps, {len(done)} of them done; {study.out}")
    measured = costs.measure(
        {name: study.training(runs.Arm(name, study.seeds[0])) for name in study.interactions}, processes.device, against
    )
    for name, cost in measured.items():
        _say(f"{name}: {cost.parameters:,} parameters, {cost.step_seconds:.3f} s per step, {cost.step_bytes / 1e6:.0f} MB")
    Trainer(study.training(arms[0]), processes)  # says what is wrong with the dataset, now
    if dry_run:
        _say("nothing was trained (--dry-run)")
        return
    results = []
    for number, arm in enumerate(arms, start=1):
        place = f"{number}/{len(arms)} {arm.name}: "
        results.append(runs.run(study, arm, processes, partial(_say_stage, place)))
        _say(place + _brief(results[-1]))
    # A reference or an extractor behind the same name may have changed in between.
    check_comparable({arm.name: read(study.folder(arm) / "evaluation.json") for arm in arms} if len(arms) > 1 else {})
    found = table.summary(results, against)
    text = table.markdown(found, measured, against)
    record = {
        "study": study.identity(),
        "against": against,
        **{kind: {name: {one: asdict(e) for one, e in by.items()} for name, by in found[kind].items()} for kind in found},
        "costs": {name: asdict(cost) for name, cost in measured.items()},
        "runs": results,
        "versions": versions(),
    }
    write(json.loads(json.dumps(record)), study.out / "ablation.json")
    (study.out / "ablation.md").write_text(text, encoding="utf-8")
    console.print(text, markup=False, soft_wrap=True)
    for warning in dict.fromkeys(warning for result in results for warning in result["warnings"]):
        _say(f"note: {warning}")
    if len(study.seeds) > 1:
        _say(f"± is half of the 95 % interval over {len(study.seeds)} seeds")
    _say(f"wrote {study.out / 'ablation.json'} and ablation.md")


def _say_stage(place: str, stage: str) -> None:
    _say(place + stage)


def _brief(result: dict[str, Any]) -> str:
    """A few numbers of a run, in a line."""
    numbers = {"loss": result["validation_loss"], "fvd": result["metrics"].get("fvd")}
    read = [f"{name} {right}/{asked}" for name, (right, asked) in result["readings"].items()]
    return ", ".join([*(f"{name} {value:.4g}" for name, value in numbers.items() if value is not None), *read])


if __name__ == "__main__":
    app()
