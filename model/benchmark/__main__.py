"""Our U-Net against diffusers' UNet3DConditionModel of equal width, in one run: `python -m videofactory.model.benchmark`.

Both get random weights and the same random inputs. Forward pass and training step, eager and compiled, in time, memory and
floating-point operations; the rate against that of a matrix product of the same run; the share of swap attention; every attention
backend. Without a GPU a small size runs, which shows that everything works and says nothing about speed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging

from . import sections
from .cases import CPU_GUESSES, GPU_GUESSES, Budget, Row, Runner, Settings, reason
from .goals import Outcome, SwapShare, judge, table
from .measure import machine_facts
from .subjects import FULL, SMALL, Scale, Size

DEFAULT_SECTIONS = ("ceilings", "forward", "training", "share", "profile", "backends", "sizes")
SECTIONS = (*DEFAULT_SECTIONS, "memory")
_SECTIONS_HELP = (
    f"in this order: {','.join(DEFAULT_SECTIONS)}; or memory, computed on shapes in many minutes, with --full also without a GPU"
)
_KERNELS_KEPT = 100


class Report:
    """What a run has found so far: each line goes to the standard output at once, and all figures to a JSON file.

    Args:
        path: of the JSON file, written anew with every line, so that a run that is cut off leaves what it had; None for none.
        head: facts that hold for the whole run.
    """

    def __init__(self, path: Path | None, head: dict[str, Any]) -> None:
        self._path = path
        self._head = head
        self.runner: Runner | None = None
        self.ceilings: dict[str, float] = {}
        self.share: SwapShare | None = None
        self.backends: list[sections.BackendRow] = []
        self.memory: dict[str, int] = {}
        self.goals: list[Outcome] = []

    def say(self, line: str) -> None:
        """Write a line, and the file."""
        sys.stdout.write(line + "\n")
        sys.stdout.flush()
        if self._path is not None:
            self._path.write_text(json.dumps(self.as_dict(), indent=1), encoding="utf-8")

    def as_dict(self) -> dict[str, Any]:
        """Everything, as JSON has it."""
        rows = list(self.runner.rows.values()) if self.runner else []
        operations = self.runner.gflop_per_clip if self.runner else {}
        return self._head | {
            "ceilings": self.ceilings,
            "parameters": self.runner.parameters if self.runner else {},
            "gflop_per_clip": {f"{subject} {size}": gflop for (subject, size), gflop in operations.items()},
            "rows": [_row_as_dict(row) for row in rows],
            "share": asdict(self.share) if self.share else None,
            "backends": [asdict(row) for row in self.backends],
            "computed_training_bytes": self.memory,
            "goals": [asdict(outcome) for outcome in self.goals],
        }


def _row_as_dict(row: Row) -> dict[str, Any]:
    case = asdict(row.case) | {"size": str(row.case.size)}
    timing = row.timing._asdict() if row.timing else None
    kernels = [kernel._asdict() for kernel in row.kernels[:_KERNELS_KEPT]]
    return asdict(replace(row, kernels=())) | {"case": case, "timing": timing, "kernels": kernels}


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 if a goal was missed, else 0."""
    options = _options(arguments)
    logging.set_verbosity_error()  # that backends are experimental, once for each of them
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    on_gpu = device.type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.backends.cudnn.benchmark = options.cudnn_benchmark
    scale = _scale(options, FULL if options.full or (on_gpu and not options.small) else SMALL)
    facts = machine_facts(device)
    report = Report(options.json, {"machine": facts, "scale": scale.name, "dtype": str(dtype), "options": _plain(options)})
    report.say(", ".join(f"{name} {value}" for name, value in facts.items()))
    if not on_gpu:
        width = "the full width" if options.full else "a small width and size"
        report.say(f"No GPU: {width} in float32 on the processor. Nothing here says how fast the model is.")
    report.say(f"{scale.name}, {dtype}, clips of {' and '.join(map(str, scale.sizes))}, random weights and inputs")
    budget = Budget(options.budget, GPU_GUESSES if on_gpu else CPU_GUESSES)
    report.runner = Runner(device, dtype, scale, _settings(options, on_gpu), budget, report.say)
    for section in options.only:
        report.say(f"-- {section}")
        try:
            _run_section(section, report, report.runner, _choice(options))
        except Exception as error:  # noqa: BLE001 - the other sections are still wanted
            report.say(f"{section} {reason(error)}")
    if scale.name == FULL.name and on_gpu:
        report.goals = judge(report.runner, report.share)
        for line in table(report.goals):
            report.say(line)
    else:
        report.say("The goals hold for the full width on a GPU; they are not judged here.")
    return int(any(outcome.met is False for outcome in report.goals))


def _run_section(section: str, report: Report, runner: Runner, choice: sections.Choice) -> None:
    if section == "ceilings":
        report.ceilings = sections.ceilings(runner)
    elif section == "forward":
        sections.forward(runner, choice)
    elif section == "training":
        sections.training(runner, choice)
    elif section == "share":
        report.share = sections.share(runner, choice)
    elif section == "profile":
        sections.kernel_profile(runner, choice)
    elif section == "memory":
        sections.memory(runner, report.memory)
    elif section == "backends":
        sections.backends(runner, report.backends.append)
    else:
        sections.other_sizes(runner, choice)


def _scale(options: argparse.Namespace, scale: Scale) -> Scale:
    """The scale with the sizes and batches that were asked for."""
    if options.size:
        scale = replace(scale, sizes=tuple(Size.parse(text, scale.sizes[0].frames) for text in options.size))
    if options.batch:
        batches = tuple(options.batch)
        falling = tuple(sorted(batches, reverse=True))  # goals are judged at the first
        scale = replace(scale, forward_batches=batches, training_batches=falling, other_batches=batches)
    if options.training_batch:
        scale = replace(scale, training_batches=tuple(options.training_batch))
    return scale


def _settings(options: argparse.Namespace, on_gpu: bool) -> Settings:
    return Settings(
        seconds=options.seconds,
        compile=on_gpu if options.compile is None else options.compile,
        compile_blocks=options.compile_blocks,
        compile_mode=options.compile_mode,
        channels_last=options.channels_last,
        backend=options.backend,
    )


def _choice(options: argparse.Namespace) -> sections.Choice:
    return sections.Choice(
        peer=options.peer,
        compile_peer=options.compile_peer,
        optimizer=options.optimizer,
        eager=options.eager,
        kernels=not {"share", "profile"}.isdisjoint(options.only),
    )


def _plain(options: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}


def _section_list(text: str) -> list[str]:
    chosen = text.split(",")
    if unknown := [name for name in chosen if name not in SECTIONS]:
        raise argparse.ArgumentTypeError(f"no section is called {unknown[0]!r}; choose from {', '.join(SECTIONS)}")
    return chosen


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of clips; give a whole number from 1")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no time; give seconds, 0 or more")
    return seconds


def _device(text: str) -> str:
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError(
            "PyTorch finds no NVIDIA GPU here; leave the option out to run a small size on the processor"
        )
    return text


def _writable(text: str) -> Path:
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written: give a file in a directory that exists")
    return path


def _size(text: str) -> str:
    try:
        Size.parse(text, frames=1)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m videofactory.model.benchmark", description=__doc__)
    add, switch = parser.add_argument, argparse.BooleanOptionalAction
    add("--only", type=_section_list, default=list(DEFAULT_SECTIONS), metavar="SECTIONS", help=_SECTIONS_HELP)
    add("--size", type=_size, action="append", metavar="HxW", help="latent size, or FxHxW; repeatable, goals hold for the first")
    add("--batch", type=_positive, action="append", metavar="CLIPS", help="repeatable; replaces all batches of the sections")
    add("--training-batch", type=_positive, action="append", metavar="CLIPS", help="likewise for training steps alone")
    add("--budget", type=_seconds, metavar="SECONDS", help="skip what no longer fits into this time")
    add("--seconds", type=_seconds, default=3.0, help="of each timing (default: 3)")
    add("--json", type=_writable, metavar="FILE", help="write all figures there as well")
    add("--device", type=_device, choices=("cuda", "cpu"), help="default: the GPU if there is one")
    add("--small", action="store_true", help="the small width on a GPU too, to see that everything runs")
    add("--full", action="store_true", help="the full width without a GPU too; for the section memory")
    add("--peer", action=switch, default=True, help="measure diffusers' model")
    add(
        "--compile",
        action=switch,
        default=None,
        help="run compiled cases (default: on a GPU; a processor compiles for many minutes)",
    )
    add("--compile-peer", action="store_true", help="compile diffusers' model too")
    add("--compile-blocks", action="store_true", help="compile the repeated blocks of ours in place of the whole model")
    add("--compile-mode", default="default", help="mode of torch.compile")
    add("--eager", action="store_true", help="share and profile look into the eager step")
    add("--optimizer", action="store_true", help="training steps end with fused AdamW")
    add("--channels-last", action=switch, default=True, help="memory order of the convolution weights of ours")
    add("--backend", help="attention backend of ours, by diffusers' name")
    add("--cudnn-benchmark", action="store_true", help="let cuDNN try its convolutions")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
