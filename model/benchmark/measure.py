"""The instruments of the model benchmark: clock, ceilings of the machine, floating-point operations, kernel times."""

from __future__ import annotations

import gc
import itertools
import platform
import re
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import NamedTuple

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

FEWEST_RUNS = 3
MOST_RUNS = 100

CONVOLUTION = "convolution"
MATMUL = "matrix product"
ATTENTION = "attention"
POINTWISE = "pointwise and reductions"
COPIES = "copies and other"
KERNEL_GROUPS = (CONVOLUTION, MATMUL, ATTENTION, POINTWISE, COPIES)

# The first pattern that is found decides. Fused kernels of Inductor are named after all the operations around them, the
# convolution or attention they only feed too, so their own prefix must come first; a template (`tem`) is a real product.
_KERNEL_PATTERNS = tuple(
    (group, re.compile(pattern, re.IGNORECASE))
    for group, pattern in (
        (ATTENTION, r"^_attend|^triton_tem.*(flex|attention)"),
        (POINTWISE, r"^_(gate|moments|normalize|sums|gradient|join)_"),
        (MATMUL, r"^triton_tem"),
        (POINTWISE, r"^triton_|^cpp_fused"),
        (COPIES, r"memcpy|memset|direct_copy|catarray|nchw_?to|nhwc_?to|transpose|aten::(copy_|cat|clone|contiguous)\b"),
        (ATTENTION, r"flash|fmha|sdpa|attention|efficient_attn"),
        (CONVOLUTION, r"conv|fprop|dgrad|wgrad|implicit_gemm"),
        (MATMUL, r"gemm|nvjet|cutlass|cublas|split_?k|aten::(add|b|baddb)?mm\b|aten::linear"),
        (POINTWISE, r"elementwise|reduce|norm|softmax|moments|gelu|silu|aten::(add|mul|sum|mean|div|sub)_?\b"),
    )
)


class Timing(NamedTuple):
    """Milliseconds that a piece of work took: median, least and most of `runs` runs."""

    milliseconds: float
    lowest: float
    highest: float
    runs: int


class Kernel(NamedTuple):
    """One kernel, by its name: its group, and how often and for how many milliseconds it ran per step."""

    name: str
    group: str
    launches: float
    milliseconds: float


def synchronise(device: torch.device) -> None:
    """Wait until the device has done what it was given; a processor always has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def release_memory(device: torch.device, keep_graphs: bool = False) -> None:
    """Forget compiled graphs, unless they are to be kept, and hand unused memory back: the next measurement begins as the first."""
    if not keep_graphs:
        torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def time_runs(work: Callable[[], object], device: torch.device, seconds: float) -> Timing:
    """Run `work` for about `seconds`, from 3 to 100 times, and take the median; the caller has warmed it up.

    On a GPU, events of the device mark each run and the host runs ahead, as in real use: where launching takes longer than
    computing, the launches are what is measured.
    """
    clock = _device_times if device.type == "cuda" else _host_times
    (first,) = clock(work, device, 1)
    runs = min(max(int(seconds * 1000 / max(first, 1e-6)), FEWEST_RUNS), MOST_RUNS)
    times = clock(work, device, runs)
    return Timing(statistics.median(times), min(times), max(times), runs)


def _device_times(work: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(runs + 1)]
    synchronise(device)
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    synchronise(device)
    return [earlier.elapsed_time(later) for earlier, later in itertools.pairwise(marks)]


def _host_times(work: Callable[[], object], device: torch.device, runs: int) -> list[float]:
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        times.append((time.perf_counter() - began) * 1000)
    return times


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int, seconds: float) -> float:
    """TFLOP/s of the product of two random matrices with `side` rows and columns."""
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    for _ in range(3):
        torch.mm(left, right, out=product)
    timing = time_runs(lambda: torch.mm(left, right, out=product), device, seconds)
    return 2 * side**3 / timing.milliseconds / 1e9


def copy_rate(device: torch.device, size: int, seconds: float) -> float:
    """GB/s of a copy of `size` bytes within the device's memory, read and written bytes counted."""
    source = torch.randint(0, 2**31, (size // 8,), device=device)
    target = torch.empty_like(source)
    for _ in range(3):
        target.copy_(source)
    timing = time_runs(lambda: target.copy_(source), device, seconds)
    return 2 * source.nbytes / timing.milliseconds / 1e6


def forward_flops(model: nn.Module, *arguments: object) -> int:
    """Floating-point operations of one forward pass: 2 for every multiply-add of products, convolutions and attention.

    On the meta device nothing is computed, and attention is counted as the two products it is made of.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(*arguments)
    return int(counter.get_total_flops())


def kernel_group(name: str) -> str:
    """To which of `KERNEL_GROUPS` a kernel belongs, by its name."""
    return next((group for group, pattern in _KERNEL_PATTERNS if pattern.search(name)), COPIES)


def kernel_times(step: Callable[[], object], device: torch.device) -> list[Kernel]:
    """The kernels of a step, longest first: the mean of 3 steps. On a processor, the operators of one step take their place.

    Kernels are timed on the device, so gaps between launches do not count.
    """
    on_gpu = device.type == "cuda"
    steps = 3 if on_gpu else 1
    synchronise(device)
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as recorded:
        for _ in range(steps):
            step()
        synchronise(device)
    kernels = []
    for event in recorded.key_averages():
        # Operators of the host carry the time of the kernels that they launch: counting both would count it twice.
        if (event.device_type.name == "CUDA") != on_gpu or getattr(event, "is_user_annotation", False):
            continue
        microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        kernels.append(Kernel(event.key, kernel_group(event.key), event.count / steps, microseconds / steps / 1000))
    return sorted(kernels, key=lambda kernel: -kernel.milliseconds)


def largest_difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of any element, relative to the largest value expected; not a number where one of them is not."""
    expected = expected.float()
    return float((found.float() - expected).abs().max() / expected.abs().max())


def machine_facts(device: torch.device) -> dict[str, str]:
    """What decides the figures: device, driver, and the versions of what computes."""
    facts = {"device": platform.processor() or platform.machine(), "python": platform.python_version()}
    facts |= {name: metadata.version(name) for name in ("torch", "diffusers")}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts["device"] = (
            f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {properties.multi_processor_count} processors"
        )
        facts |= {"cuda": str(torch.version.cuda), "driver": _driver()}
        facts["cudnn"] = str(torch.backends.cudnn.version())
    return facts


def _driver() -> str:
    program = shutil.which("nvidia-smi")
    if program is None:
        return "unknown (no nvidia-smi)"
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=60)
    return answer.stdout.splitlines()[0] if answer.returncode == 0 and answer.stdout else f"unknown (exit {answer.returncode})"
