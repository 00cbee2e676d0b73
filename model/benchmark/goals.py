"""The goals of the model and whether a run of the benchmark met them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from .cases import COMPILED, EAGER, EAGER_GRAPH, FORWARD, GRAPH, TRAINING, Case, Row, Runner
from .measure import Kernel
from .subjects import OURS, OURS_WITHOUT_SWAP, PEER

FEWEST_PARAMETERS, MOST_PARAMETERS = 1.4e9, 2.0e9
TRAINING_SPEED_UP = 1.6
MATMUL_SHARE = 0.45
FORWARD_SPEED_UP = 3.0
MEMORY_SHARE = 0.6
SWAP_SHARE = 0.12


@dataclass(frozen=True)
class Outcome:
    """One goal.

    Attributes:
        goal: what is compared.
        wanted: the bound, in words.
        measured: the figure; not a number where the rows it needs are missing.
        met: whether it is within the bound; None where it could not be measured.
        note: what the figure is made of.
    """

    goal: str
    wanted: str
    measured: float
    met: bool | None
    note: str = ""


@dataclass(frozen=True)
class SwapShare:
    """What swap attention takes of a training step, ours held against ours without it.

    Attributes:
        execution: how both ran.
        kernel_time: share of the sum of kernel times, the gaps between launches left out.
        step_time: share of the time of a step.
        flops: share of the floating-point operations.
    """

    execution: str
    kernel_time: float
    step_time: float
    flops: float


def swap_share(runner: Runner, with_swap: Row, without_swap: Row) -> SwapShare | None:
    """Compare two rows that differ in swap attention alone; None where either failed or has no kernels."""
    if with_swap.timing is None or without_swap.timing is None or not with_swap.kernels or not without_swap.kernels:
        return None
    size = with_swap.case.size
    return SwapShare(
        execution=with_swap.case.execution,
        kernel_time=1 - _total(without_swap.kernels) / _total(with_swap.kernels),
        step_time=1 - without_swap.timing.milliseconds / with_swap.timing.milliseconds,
        flops=1 - runner.flops(OURS_WITHOUT_SWAP, size) / runner.flops(OURS, size),
    )


def _total(kernels: tuple[Kernel, ...]) -> float:
    return sum(kernel.milliseconds for kernel in kernels)


def speed_up(ours: Row, peer: Row) -> float:
    """How many times the peer's clips per second ours makes."""
    return ours.clips_per_second / peer.clips_per_second


def adjusted_speed_up(ours: Row, peer: Row) -> float:
    """How many times the peer's operations per second ours does: the speed-up, weighted with the operations of a clip."""
    return ours.tflops / peer.tflops


def judge(runner: Runner, share: SwapShare | None) -> list[Outcome]:
    """All goals, by the rows that were measured at the first size: forward at batch 1, training at the batch looked into.

    Ours is taken as it runs fastest, and the peer as it comes, eager; how they compare run alike is in the notes.
    """
    peer_forward = _fastest(runner, lambda case: case.subject == PEER and case.execution == EAGER and _one_clip(case))
    our_forward = _fastest(runner, lambda case: case.subject == OURS and case.compiled and _one_clip(case))
    peer_step = _fastest(runner, lambda case: case.subject == PEER and case.execution == EAGER and _step(runner, case))
    our_step = _fastest(runner, lambda case: case.subject == OURS and case.compiled and _plain_step(runner, case))
    lean_step = _fastest(runner, lambda case: case.subject == OURS and case.compiled and _lean_step(runner, case))
    parameters = runner.parameters.get(OURS, math.nan)
    training = adjusted_speed_up(our_step, peer_step) if our_step and peer_step else math.nan
    forward = speed_up(our_forward, peer_forward) if our_forward and peer_forward else math.nan
    memory = (lean_step.peak_bytes or math.nan) / (peer_step.peak_bytes or math.nan) if lean_step and peer_step else math.nan
    of_matmul = our_step.of_matmul if our_step else math.nan
    swap = share.kernel_time if share else math.nan
    return [
        _between("parameters", FEWEST_PARAMETERS, parameters, MOST_PARAMETERS),
        _at_least(
            "training clips/s by the peer's, FLOP-adjusted",
            TRAINING_SPEED_UP,
            training,
            _raw(our_step, peer_step) + _alike(runner, lambda case: _plain_step(runner, case)),
        ),
        _at_least("training FLOP/s by the matrix product's", MATMUL_SHARE, of_matmul),
        _at_least(
            "forward at batch 1, times faster than the peer",
            FORWARD_SPEED_UP,
            forward,
            _made_of(our_forward, peer_forward) + _alike(runner, _one_clip),
        ),
        _at_most("training memory by the peer's, checkpointing", MEMORY_SHARE, memory, str(lean_step.case) if lean_step else ""),
        _at_most(
            "swap attention's share of a training step", SWAP_SHARE, swap, f"{share.execution}, kernel times" if share else ""
        ),
    ]


def table(outcomes: list[Outcome]) -> list[str]:
    """The goals as lines of text."""
    lines = [f"{'goal':<50} {'wanted':>14} {'measured':>10}  met?"]
    for outcome in outcomes:
        met = "not measured" if outcome.met is None else "yes" if outcome.met else "NO"
        lines.append(f"{outcome.goal:<50} {outcome.wanted:>14} {outcome.measured:>10.4g}  {met:<12} {outcome.note}".rstrip())
    return lines


def _fastest(runner: Runner, wanted: Callable[[Case], bool]) -> Row | None:
    first = runner.scale.sizes[0]
    found = [row for case, row in runner.rows.items() if row.timing is not None and case.size == first and wanted(case)]
    return max(found, key=lambda row: row.clips_per_second, default=None)


def _one_clip(case: Case) -> bool:
    return case.work == FORWARD and case.batch == 1


def _step(runner: Runner, case: Case) -> bool:
    return case.work == TRAINING and case.batch == runner.scale.training_batches[0]


def _plain_step(runner: Runner, case: Case) -> bool:
    return _step(runner, case) and not case.checkpointing


def _lean_step(runner: Runner, case: Case) -> bool:
    return _step(runner, case) and case.checkpointing


def _raw(ours: Row | None, peer: Row | None) -> str:
    return f"{ours.case.execution}; raw {speed_up(ours, peer):.3g}" if ours and peer else ""


def _made_of(ours: Row | None, peer: Row | None) -> str:
    return f"{ours.case.execution}; FLOP-adjusted {adjusted_speed_up(ours, peer):.3g}" if ours and peer else ""


def _alike(runner: Runner, wanted: Callable[[Case], bool]) -> str:
    """The adjusted speed-up where both ran the same way."""

    def fastest(subject: str, execution: str) -> Row | None:
        return _fastest(runner, lambda case: case.subject == subject and case.execution == execution and wanted(case))

    pairs = {
        execution: (fastest(OURS, execution), fastest(PEER, execution)) for execution in (EAGER, EAGER_GRAPH, COMPILED, GRAPH)
    }
    return "".join(f"; both {how}: {adjusted_speed_up(ours, peer):.3g}" for how, (ours, peer) in pairs.items() if ours and peer)


def _at_least(goal: str, bound: float, measured: float, note: str = "") -> Outcome:
    return Outcome(goal, f">= {bound:g}", measured, None if math.isnan(measured) else measured >= bound, note)


def _at_most(goal: str, bound: float, measured: float, note: str = "") -> Outcome:
    return Outcome(goal, f"<= {bound:g}", measured, None if math.isnan(measured) else measured <= bound, note)


def _between(goal: str, lowest: float, measured: float, highest: float) -> Outcome:
    met = None if math.isnan(measured) else lowest <= measured <= highest
    return Outcome(goal, f"{lowest:.2g}..{highest:.2g}", measured, met)
