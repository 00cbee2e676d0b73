"""One measurement of the model benchmark and its outcome: what is built, run, timed and released, within a budget of seconds."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional

from .measure import Kernel, Timing, forward_flops, kernel_times, matmul_rate, release_memory, synchronise, time_runs
from .subjects import PEER, Inputs, Scale, Size, build, build_bare, make_inputs

FORWARD = "forward"
TRAINING = "training"
EAGER = "eager"
COMPILED = "compiled"
EAGER_GRAPH = "eager, as one CUDA graph"
GRAPH = "compiled, as one CUDA graph"

_WARM_UPS = 2
_LONGEST_REASON = 200


@dataclass(frozen=True)
class Case:
    """What one row measures.

    Attributes:
        subject: one of `SUBJECTS`.
        work: `FORWARD`, without gradients, or `TRAINING`: forward, mean squared error, backward.
        size: of the clips.
        batch: clips at once.
        execution: `EAGER`, `COMPILED`, or either with the whole step captured as a CUDA graph: `EAGER_GRAPH`, `GRAPH`.
        checkpointing: whether activations are computed again in the backward pass.
        optimizer: whether the training step ends with fused AdamW.
        kernels: whether the kernels are listed as well.
    """

    subject: str
    work: str
    size: Size
    batch: int
    execution: str = EAGER
    checkpointing: bool = False
    optimizer: bool = False
    kernels: bool = False

    def __str__(self) -> str:
        extras = [", checkpointing"] * self.checkpointing + [", AdamW"] * self.optimizer
        return f"{self.work} {self.size} batch {self.batch}: {self.subject} {self.execution}{''.join(extras)}"

    @property
    def compiled(self) -> bool:
        """Whether torch.compile has a part in it."""
        return self.execution in (COMPILED, GRAPH)

    @property
    def captured(self) -> bool:
        """Whether the step is replayed from a CUDA graph, so that the host launches nothing."""
        return self.execution in (EAGER_GRAPH, GRAPH)

    @property
    def passes(self) -> int:
        """Forward passes that its operations amount to: a backward pass counts as two, and computing again not at all."""
        return 3 if self.work == TRAINING else 1


@dataclass(frozen=True)
class Row:
    """What a case measured.

    Attributes:
        case: what was measured.
        failure: why there are no figures; empty where there are.
        timing: of a step; None where it failed.
        first_seconds: of the first step, compilation included.
        clips_per_second: at the median.
        tflops: TFLOP/s at the median.
        of_matmul: `tflops` by the rate of the matrix product of this run.
        peak_bytes: most device memory in use after the warm-up, weights included; None on a processor, and where a graph was
            captured, whose memory PyTorch counts when it is recorded and not when it is replayed.
        kernels: those of a step, longest first, where asked for.
        note: what else is to be said.
    """

    case: Case
    failure: str = ""
    timing: Timing | None = None
    first_seconds: float = 0.0
    clips_per_second: float = 0.0
    tflops: float = 0.0
    of_matmul: float = 0.0
    peak_bytes: int | None = None
    kernels: tuple[Kernel, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        if self.timing is None:
            return f"{self.case!s:<78} {self.failure}"
        memory = "" if self.peak_bytes is None else f"  {self.peak_bytes / 1e9:5.1f} GB"
        return (
            f"{self.case!s:<78} {self.timing.milliseconds:8.2f} ms ({self.timing.lowest:.2f} to {self.timing.highest:.2f})"
            f"  {self.clips_per_second:7.2f} clips/s  {self.tflops:7.3f} TFLOP/s  {self.of_matmul:6.1%} of matmul{memory}"
            f"  first {self.first_seconds:.0f} s{self.note and '  ' + self.note}"
        )


@dataclass(frozen=True)
class Settings:
    """How everything is measured.

    Attributes:
        seconds: that each timing takes, about.
        compile: whether compiled cases run at all.
        compile_blocks: compile the repeated blocks of ours one by one in place of the whole model: sooner ready, and their graphs
            serve every later case of the run.
        compile_mode: `mode` of torch.compile where CUDA graphs are not asked for.
        channels_last: memory order of the convolution weights of ours.
        backend: attention backend of ours; None for diffusers' default.
    """

    seconds: float = 3.0
    compile: bool = True
    compile_blocks: bool = False
    compile_mode: str = "default"
    channels_last: bool = True
    backend: str | None = None


class Budget:
    """Wall-clock seconds of a whole run, and whether another case fits.

    A case is expected to take as long as the slowest of its kind so far, or what a first guess says.

    Args:
        seconds: of the run from now on; None for no limit.
        guesses: expected seconds of a kind before the first of it has run.
        clock: gives the time in seconds.
    """

    def __init__(self, seconds: float | None, guesses: dict[str, float], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds = seconds
        self._began = clock()
        self._guesses = dict(guesses)
        self._slowest: dict[str, float] = {}

    def refusal(self, kind: str) -> str:
        """Why a case of this kind no longer fits; empty if it does."""
        if self._seconds is None:
            return ""
        expected = self._slowest.get(kind, self._guesses[kind])
        left = self._seconds - (self._clock() - self._began)
        return "" if expected <= left else f"skipped: about {expected:.0f} s, and {max(left, 0):.0f} s of the budget are left"

    @contextlib.contextmanager
    def spend(self, kind: str) -> Iterator[None]:
        """Learn from what happens inside how long a case of this kind takes."""
        began = self._clock()
        try:
            yield
        finally:
            self._slowest[kind] = max(self._clock() - began, self._slowest.get(kind, 0.0))


GPU_GUESSES = {
    f"{EAGER} {FORWARD}": 15.0,
    f"{EAGER} {TRAINING}": 20.0,
    f"{COMPILED} {FORWARD}": 60.0,
    f"{COMPILED} {TRAINING}": 150.0,
}
CPU_GUESSES = {f"{EAGER} {FORWARD}": 3.0, f"{EAGER} {TRAINING}": 5.0, f"compiled {FORWARD}": 60.0, f"compiled {TRAINING}": 90.0}


class Runner:
    """Runs cases, each once, and says each row as soon as it is there. A case that fails is a row that says why.

    Args:
        device: where everything runs.
        dtype: of weights and inputs.
        scale: widths and sizes.
        settings: how to measure.
        budget: what may be spent.
        say: takes a line of output.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        scale: Scale,
        settings: Settings,
        budget: Budget,
        say: Callable[[str], None],
    ) -> None:
        self.device, self.dtype, self.scale, self.settings, self.budget, self.say = device, dtype, scale, settings, budget, say
        self.rows: dict[Case, Row] = {}
        self.gflop_per_clip: dict[tuple[str, Size], float] = {}
        self.parameters: dict[str, int] = {}
        self.matmul_tflops = matmul_rate(device, dtype, scale.matmul_side, seconds=min(settings.seconds, 1.0))

    def run(self, case: Case) -> Row:
        """The row of a case, measured unless it has been."""
        if case not in self.rows:
            self.rows[case] = row = self._try(case)
            self.say(str(row))
        return self.rows[case]

    def flops(self, subject: str, size: Size) -> float:
        """Floating-point operations of a forward pass of one clip, counted on shapes alone."""
        key = (subject, size)
        if key not in self.gflop_per_clip:
            device = torch.device("meta")
            model = build_bare(subject, self.scale, device)
            inputs = make_inputs(self.scale, size, 1, device, torch.float32)
            self.gflop_per_clip[key] = forward_flops(model, *inputs.arguments) / 1e9
            self.parameters[subject] = sum(parameter.numel() for parameter in model.parameters())
            self.say(f"{subject}: {self.parameters[subject]:,} parameters, {self.gflop_per_clip[key]:,.3f} GFLOP per clip {size}")
        return self.gflop_per_clip[key] * 1e9

    def _try(self, case: Case) -> Row:
        if case.compiled and not self.settings.compile:
            return Row(case, "skipped: nothing is to be compiled")
        kind = f"{COMPILED if case.compiled else EAGER} {case.work}"
        if refusal := self.budget.refusal(kind):
            return Row(case, refusal)
        with self.budget.spend(kind):
            try:
                row = self._measure(case)
            except Exception as error:  # noqa: BLE001 - whatever it is, the other rows are still wanted
                row = Row(case, reason(error))
            # Only now: the error held every tensor of the step that failed.
            release_memory(self.device, keep_graphs=self.settings.compile_blocks)
        return row

    def _measure(self, case: Case) -> Row:
        flops = self.flops(case.subject, case.size) * case.batch * case.passes
        model = self.build(case.subject)
        inputs = make_inputs(self.scale, case.size, case.batch, self.device, self.dtype)
        step = self._step(case, model, inputs)
        began = time.perf_counter()
        step()
        synchronise(self.device)
        first_seconds = time.perf_counter() - began
        for _ in range(_WARM_UPS):
            step()
        synchronise(self.device)
        if case.captured:
            step = capture(step)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        timing = time_runs(step, self.device, self.settings.seconds)
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" and not case.captured else None
        tflops = flops / timing.milliseconds / 1e9
        row = Row(
            case,
            "",
            timing,
            first_seconds,
            case.batch * 1000 / timing.milliseconds,
            tflops,
            tflops / self.matmul_tflops,
            peak,
        )
        return self._with_kernels(row, step) if case.kernels else row

    def _with_kernels(self, row: Row, step: Callable[[], object]) -> Row:
        try:
            return replace(row, kernels=tuple(kernel_times(step, self.device)))
        except Exception as error:  # noqa: BLE001 - the times are worth keeping without the kernels
            return replace(row, note=f"no kernels: {reason(error)}")

    def build(self, subject: str) -> nn.Module:
        """The subject on the device, with the attention backend that was asked for."""
        model = build(subject, self.scale, self.device, self.dtype, self.settings.channels_last)
        if self.settings.backend is not None and subject != PEER:
            cast(Any, model).set_attention_backend(self.settings.backend)
        return model

    def compile(self, model: nn.Module) -> Callable[..., Any]:
        """The model compiled for fixed shapes, without a break of the graph: whole, or block by block where asked for."""
        how: dict[str, Any] = {"fullgraph": True, "dynamic": False, "mode": self.settings.compile_mode}
        if self.settings.compile_blocks and getattr(model, "_repeated_blocks", None):
            cast(Any, model).compile_repeated_blocks(**how)
            return model
        return torch.compile(model, **how)

    def _step(self, case: Case, model: nn.Module, inputs: Inputs) -> Callable[[], object]:
        model.train(case.work == TRAINING)
        if case.checkpointing:
            cast(Any, model).enable_gradient_checkpointing()
        forward: Callable[..., Any] = self.compile(model) if case.compiled else model
        if case.work == FORWARD:
            return lambda: predict(forward, inputs)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True) if case.optimizer else None

        def train() -> None:
            model.zero_grad(set_to_none=True)
            predicted = forward(*inputs.arguments, return_dict=False)[0]
            torch.autograd.backward(functional.mse_loss(predicted.float(), inputs.target.float()))
            if optimizer is not None:
                optimizer.step()

        return train


def capture(step: Callable[[], object]) -> Callable[[], None]:
    """Record all that a step launches as a CUDA graph, and return what replays it.

    Gradients are made within the graph and written anew by every replay, as a training loop with fixed shapes would have it.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def predict(forward: Callable[..., Any], inputs: Inputs) -> torch.Tensor:
    """The output of a forward pass without gradients, (B, 4, F, H, W)."""
    with torch.no_grad():
        return cast(torch.Tensor, forward(*inputs.arguments, return_dict=False)[0])


def reason(error: Exception) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"failed: {type(error).__name__}: {lines[0] if lines else 'no message'}"[:_LONGEST_REASON]
