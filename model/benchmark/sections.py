"""The sections of the model benchmark: which cases each runs, and what is said about them beyond their rows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest import mock

import torch
from torch import nn

from videofactory.model import layers

from .cases import COMPILED, EAGER, EAGER_GRAPH, FORWARD, GRAPH, TRAINING, Case, Row, Runner, predict, reason
from .goals import SwapShare, swap_share
from .measure import KERNEL_GROUPS, Timing, copy_rate, largest_difference, release_memory, synchronise, time_runs
from .memory import training_bytes
from .subjects import OURS, OURS_WITHOUT_SWAP, PEER, Inputs, Size, make_inputs

_KERNELS_SHOWN = 25
_BACKEND_BATCH = 2
_DEFAULT = "default"
_NATIVE = "native"
_FLEX = "flex"


@dataclass(frozen=True)
class Choice:
    """What the sections are to cover.

    Attributes:
        peer: whether the peer runs.
        compile_peer: whether it is compiled too.
        optimizer: whether training steps end with AdamW.
        eager: whether the step that is looked into (share, profile) runs eagerly.
        kernels: whether a training step is looked into at all.
    """

    peer: bool = True
    compile_peer: bool = False
    optimizer: bool = False
    eager: bool = False
    kernels: bool = False


@dataclass(frozen=True)
class BackendRow:
    """An attention backend: why it did not run, or its milliseconds and largest difference from the same model in float32.

    The difference is a share of the largest value.
    """

    backend: str
    execution: str
    failure: str = ""
    milliseconds: float | None = None
    difference: float | None = None

    def __str__(self) -> str:
        if self.milliseconds is None:
            return f"{self.backend:<34} {self.execution:<9} {self.failure}"
        return f"{self.backend:<34} {self.execution:<9} {self.milliseconds:8.2f} ms  differs by {self.difference:.1e} of the largest value"


def ceilings(runner: Runner) -> dict[str, float]:
    """Rates that the machine reaches: copying in GB/s, the matrix product in TFLOP/s, measured when the run began."""
    rates = {
        "copy_gb_per_s": copy_rate(runner.device, runner.scale.copy_bytes, min(runner.settings.seconds, 1.0)),
        "matmul_tflops": runner.matmul_tflops,
    }
    release_memory(runner.device)
    side = runner.scale.matmul_side
    precision = str(runner.dtype).removeprefix("torch.")
    copying, product = rates["copy_gb_per_s"], rates["matmul_tflops"]
    runner.say(f"copy {copying:.0f} GB/s, read and written; {precision} matrix product of side {side}: {product:.3g} TFLOP/s")
    return rates


def forward(runner: Runner, choice: Choice) -> None:
    """Forward passes at the first size, for every batch."""
    for batch in runner.scale.forward_batches:
        _forward(runner, choice, runner.scale.sizes[0], batch)


def _forward(runner: Runner, choice: Choice, size: Size, batch: int) -> None:
    graphs = batch == 1
    peers = [Case(PEER, FORWARD, size, batch, execution) for execution in _peer_executions(runner, choice, graphs)]
    _run_all(runner, peers + [Case(OURS, FORWARD, size, batch, execution) for execution in _our_executions(runner, graphs)])


def training(runner: Runner, choice: Choice) -> None:
    """Training steps at the first size, for every batch; checkpointing at the batch that goals are judged at."""
    for batch in runner.scale.training_batches:
        plain = Case(OURS, TRAINING, runner.scale.sizes[0], batch, optimizer=choice.optimizer)
        peers = [replace(plain, subject=PEER, execution=execution) for execution in _peer_executions(runner, choice, graphs=True)]
        ours = [replace(plain, execution=execution) for execution in _our_executions(runner, graphs=True)]
        if batch == runner.scale.training_batches[0]:
            ours.append(replace(plain, execution=COMPILED, checkpointing=True))
        # Captured ones last: an error while a graph is recorded can leave the device unusable.
        cases = sorted(peers + ours, key=lambda case: case.captured)
        looked_into = looked_into_case(runner, choice)
        _run_all(runner, [looked_into if replace(case, kernels=looked_into.kernels) == looked_into else case for case in cases])


def other_sizes(runner: Runner, choice: Choice) -> None:
    """Forward passes and a training step at the sizes after the first, which the windows may not divide."""
    for size in runner.scale.sizes[1:]:
        for batch in runner.scale.other_batches:
            _forward(runner, choice, size, batch)
        step = Case(OURS, TRAINING, size, runner.scale.training_batches[0], COMPILED, optimizer=choice.optimizer)
        peers = [replace(step, subject=PEER, execution=execution) for execution in _peer_executions(runner, choice, graphs=False)]
        _run_all(runner, [*peers, step])


def _peer_executions(runner: Runner, choice: Choice, graphs: bool) -> list[str]:
    """The peer as it comes, and where ours is replayed as a graph, the peer is too."""
    if not choice.peer:
        return []
    wanted = [EAGER, EAGER_GRAPH, COMPILED, GRAPH] if choice.compile_peer else [EAGER, EAGER_GRAPH]
    return [execution for execution in wanted if execution in _our_executions(runner, graphs)]


def _our_executions(runner: Runner, graphs: bool) -> list[str]:
    return [EAGER, EAGER_GRAPH, COMPILED, GRAPH] if graphs and runner.device.type == "cuda" else [EAGER, COMPILED]


def _run_all(runner: Runner, cases: list[Case]) -> None:
    for case in cases:
        runner.run(case)


def looked_into_case(runner: Runner, choice: Choice) -> Case:
    """The training step of ours whose kernels are listed; the other sections measure no such step a second time."""
    execution = EAGER if choice.eager or not runner.settings.compile else COMPILED
    size, batch = runner.scale.sizes[0], runner.scale.training_batches[0]
    return Case(OURS, TRAINING, size, batch, execution, optimizer=choice.optimizer, kernels=choice.kernels)


def share(runner: Runner, choice: Choice) -> SwapShare | None:
    """What swap attention takes of a training step, in time and in operations."""
    case = looked_into_case(runner, choice)
    found = swap_share(runner, runner.run(case), runner.run(replace(case, subject=OURS_WITHOUT_SWAP)))
    if found is None:
        runner.say("share of swap attention: not measured, one of the two steps has no kernel times")
        return None
    runner.say(
        f"share of swap attention in a training step ({found.execution}): {found.kernel_time:.1%} of kernel time, "
        f"{found.step_time:.1%} of the step's time, {found.flops:.1%} of its operations"
    )
    return found


def kernel_profile(runner: Runner, choice: Choice) -> None:
    """Where a training step spends its time: the longest kernels, and all of them by group."""
    row = runner.run(looked_into_case(runner, choice))
    if row.timing is None or not row.kernels:
        runner.say("kernels: not measured")
        return
    total = sum(kernel.milliseconds for kernel in row.kernels)
    runner.say(f"kernels of {row.case}: {total:.2f} ms in all, of a step of {row.timing.milliseconds:.2f} ms")
    for group, (milliseconds, count) in group_totals(row).items():
        runner.say(f"  {group:<26} {milliseconds:9.3f} ms  {milliseconds / total:6.1%}  {count:8.0f} launches")
    for kernel in row.kernels[:_KERNELS_SHOWN]:
        runner.say(f"  {kernel.milliseconds:9.3f} ms  {kernel.launches:7.0f} x  {kernel.group:<26} {kernel.name[:120]}")


def group_totals(row: Row) -> dict[str, tuple[float, float]]:
    """Milliseconds and launches of a step by group of kernels."""
    totals = dict.fromkeys(KERNEL_GROUPS, (0.0, 0.0))
    for kernel in row.kernels:
        milliseconds, count = totals[kernel.group]
        totals[kernel.group] = (milliseconds + kernel.milliseconds, count + kernel.launches)
    return totals


def memory(runner: Runner, keep: dict[str, int]) -> None:
    """Memory of an eager training step, computed on shapes; minutes for each row."""
    for subject, checkpointing in ((PEER, False), (OURS, False), (OURS, True)):
        name = f"{subject}{', checkpointing' * checkpointing}"
        scale = runner.scale
        keep[name] = training_bytes(subject, scale, scale.training_batches[0], checkpointing)
        size, batch = scale.sizes[0], scale.training_batches[0]
        runner.say(f"training {size} batch {batch}: {name}: {keep[name] / 1e9:.4g} GB, computed")


def backends(runner: Runner, keep: Callable[[BackendRow], None]) -> None:
    """Our forward pass as it comes and on every attention backend that is installed, held against the same weights in float32.

    As it comes (`default`), attention over time runs in our own kernel; a backend that is chosen, `native` too, takes its place.
    FlexAttention runs compiled. Backends that would be downloaded (`*_hub`) are left out. `keep` gets each row as soon as it is there.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend

    names = [_DEFAULT, *(backend.value for backend in AttentionBackendName if not backend.value.endswith("_hub"))]
    # Compiling last, since it may leave the blocks of the model compiled.
    names.sort(key=lambda name: (name == _FLEX, name != _DEFAULT, name != _NATIVE, not name.startswith("_native")))
    runner.say(f"attention backends, forward pass, batch {_BACKEND_BATCH}, {runner.scale.sizes[0]}:")
    model = runner.build(OURS).eval()
    inputs = make_inputs(runner.scale, runner.scale.sizes[0], _BACKEND_BATCH, runner.device, runner.dtype)
    # What is set for a model, diffusers makes the default of the process, too; afterwards it is again what it was.
    with attention_backend(_NATIVE):
        reference = _in_float32(model, inputs)
        release_memory(runner.device)
        for name in names:
            row = _backend(runner, model, inputs, name, reference)
            release_memory(runner.device)  # here, where an error no longer holds the tensors of the step that failed
            keep(row)
            runner.say(f"  {row}")


def _in_float32(model: nn.Module, inputs: Inputs) -> torch.Tensor:
    """What the model predicts with the same weights and inputs in float32, without TF32 and without our kernels."""
    exact = copy.deepcopy(model)
    nn.Module.float(exact)
    cast(Any, exact).set_attention_backend(_NATIVE)
    wider = replace(inputs, sample=inputs.sample.float(), text=inputs.text.float(), target=inputs.target.float())
    with torch.backends.cudnn.flags(allow_tf32=False), mock.patch.object(layers, "group_norm", None):
        return predict(exact, wider)


def _backend(runner: Runner, model: nn.Module, inputs: Inputs, name: str, reference: torch.Tensor) -> BackendRow:
    execution = COMPILED if name == _FLEX else EAGER
    if execution == COMPILED and not runner.settings.compile:
        return BackendRow(name, execution, "skipped: nothing is to be compiled")
    kind = f"{execution} {FORWARD}"
    if refusal := runner.budget.refusal(kind):
        return BackendRow(name, execution, refusal)
    with runner.budget.spend(kind):
        try:
            if name != _DEFAULT:
                cast(Any, model).set_attention_backend(name)
            output, timing = _timed_backend(runner, model, inputs, execution)
        except Exception as error:  # noqa: BLE001 - the other backends are still wanted
            return BackendRow(name, execution, reason(error))
        finally:
            cast(Any, model).reset_attention_backend()
    return BackendRow(name, execution, "", timing.milliseconds, largest_difference(output.float(), reference))


def _timed_backend(runner: Runner, model: nn.Module, inputs: Inputs, execution: str) -> tuple[torch.Tensor, Timing]:
    forward = runner.compile(model) if execution == COMPILED else model
    output = predict(forward, inputs).clone()
    predict(forward, inputs)
    synchronise(runner.device)
    return output, time_runs(lambda: predict(forward, inputs), runner.device, runner.settings.seconds)
