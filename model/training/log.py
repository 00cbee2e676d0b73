"""Numbers of a run on their way out: a line per step in `OUTPUT/log.jsonl`, trackers, and progress on a terminal.

A line of the file has `step` (steps done), `loss`, `gradient_norm` and `learning_rate`; every `log.every` steps one has means and
rates as well, and validations have lines of their own, with `validation`. When a run goes on from a checkpoint, lines of later
steps are removed: the file tells one story.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .config import TrainingConfig

FILE = "log.jsonl"


class Log:
    """The log of one run; in all processes but the main one it does nothing.

    Args:
        config: `output`, `log`, and everything, for trackers.
        step: steps that are done; lines after it are removed.
        main: whether this process is the main one.

    Attributes:
        validated: whether there is a line of the validation after `step`.
    """

    def __init__(self, config: TrainingConfig, step: int, main: bool) -> None:
        self._main, self.validated = main, False
        self._trackers = [_tracker(name, config) for name in config.log.trackers] if main else []
        if not main:
            return
        folder = Path(config.output)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / FILE
        self.validated = _cut(path, step)
        self._file = path.open("a", encoding="utf-8")

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._main:
            self._file.close()
        for tracker in self._trackers:
            tracker.finish()

    def write(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Append lines, each with its `step`, and pass their numbers on to the trackers."""
        if not self._main:
            return
        for line in lines:
            self._file.write(json.dumps(line) + "\n")
            for tracker in self._trackers:
                tracker.log(_numbers(line), step=line["step"])
        self._file.flush()


def _cut(path: Path, step: int) -> bool:
    """Remove the lines of later steps, and one that a kill left half written; whether the last is of a validation after `step`."""
    if not path.is_file():
        return False
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step(line) <= step]
    partial = path.with_name(f".{FILE}.partial")
    partial.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    os.replace(partial, path)  # noqa: PTH105  # in one go: a kill leaves the old one or the new one
    last = json.loads(kept[-1]) if kept else {}
    return "validation" in last and last["step"] == step


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def _numbers(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a line; those of a group within it have its name before theirs."""
    found: dict[str, float] = {}
    for name, value in line.items():
        if isinstance(value, Mapping):
            found |= _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, int | float) and name != "step":
            found[prefix + name] = value
    return found


def check_trackers(config: TrainingConfig) -> None:
    """Whether the packages of the trackers are installed. Raises `ValueError` where one is not."""
    for name in config.log.trackers:
        if find_spec(name) is None:
            raise ValueError(
                f"log.trackers holds {name}, whose package is not installed: pip install 'videofactory[trackers]', or leave it out"
            )


def _tracker(name: str, config: TrainingConfig) -> Any:
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # trackers ask it which process they are in
    made = LOGGER_TYPE_TO_CLASS[name]
    folder = Path(config.output) / "trackers"
    arguments = (config.log.project, str(folder)) if made.requires_logging_directory else (config.log.project,)
    tracker = made(*arguments, **({"id": _run_id(folder / name), "resume": "allow"} if name == "wandb" else {}))
    tracker.start()
    tracker.store_init_configuration(_numbers(config.model_dump(mode="json")))
    return tracker


def _run_id(path: Path) -> str:
    """The name of this run at a tracker, from a file that is made with the first one: so it goes on when training does."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(uuid.uuid4().hex[:8], encoding="utf-8")
    return path.read_text(encoding="utf-8")


class Watch:
    """Progress of the steps: a bar on a terminal, and elsewhere a line now and then, on the standard error."""

    def __init__(self, progress: Progress | None, task: Any, steps: int) -> None:
        self._progress, self._task, self._steps = progress, task, steps

    def show(self, step: int, line: Mapping[str, Any]) -> None:
        """What is known after `step` steps: a line as in the file, with `clips_per_second`."""
        text = f"loss {line['loss']:.4f}  {line['clips_per_second']:.3g} clips/s"
        if "share_of_peak" in line:
            text += f"  {line['share_of_peak']:.0%} of peak"
        text += f"  data {line['data_share']:.0%}  {line['memory_gb']:.2f} GB"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, numbers=text)
        else:
            sys.stderr.write(f"step {step} of {self._steps}  {text}\n")

    def advance(self, step: int) -> None:
        """One more step is launched."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)


@contextlib.contextmanager
def watching(step: int, steps: int, main: bool) -> Iterator[Watch | None]:
    """Progress from `step` on, in the main process."""
    if not main:
        yield None
        return
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Watch(None, None, steps)
        return
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[numbers]}"), console=console) as progress:
        task = progress.add_task("training", total=steps, completed=step, numbers="")
        yield Watch(progress, task, steps)
