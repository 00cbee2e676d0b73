"""The model benchmark: its small run, its instruments, its budget and its goals."""

from __future__ import annotations

import io
import json
import math
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from videofactory.model.benchmark import __main__ as benchmark
from videofactory.model.benchmark.cases import (
    COMPILED,
    CPU_GUESSES,
    EAGER,
    FORWARD,
    TRAINING,
    Budget,
    Case,
    Row,
    Runner,
    Settings,
)
from videofactory.model.benchmark.goals import SwapShare, judge, table
from videofactory.model.benchmark.measure import (
    ATTENTION,
    CONVOLUTION,
    COPIES,
    MATMUL,
    POINTWISE,
    Timing,
    forward_flops,
    kernel_group,
    largest_difference,
)
from videofactory.model.benchmark.memory import training_bytes
from videofactory.model.benchmark.subjects import OURS, OURS_WITHOUT_SWAP, PEER, SMALL, Size, build, build_bare

CPU = torch.device("cpu")
SIZE = SMALL.sizes[0]


def run(*arguments: str) -> str:
    """What the benchmark prints."""
    with redirect_stdout(io.StringIO()) as printed:
        assert benchmark.main(["--device", "cpu", *arguments]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    """A whole run without compilation: what it printed and its JSON."""
    file = tmp_path_factory.mktemp("benchmark") / "run.json"
    said = run("--no-compile", "--seconds", "0", "--size", "2x4x5", "--size", "2x4x6", "--batch", "2", "--json", str(file))
    return said, json.loads(file.read_text(encoding="utf-8"))


def make_runner(said: list[str], budget: Budget | None = None) -> Runner:
    return Runner(CPU, torch.float32, SMALL, Settings(seconds=0), budget or Budget(None, CPU_GUESSES), said.append)


def test_a_run_without_gpu_says_so_and_prints_every_section(whole: tuple[str, dict[str, Any]]) -> None:
    said, _ = whole
    assert "No GPU" in said
    assert "not judged" in said
    assert all(f"-- {section}\n" in said for section in benchmark.DEFAULT_SECTIONS)
    for wanted in ("copy ", "GFLOP per clip", "share of swap attention in a training step", "ms in all", "_native_math", "2x4x6"):
        assert wanted in said
    assert "section failed" not in said


def test_rows_agree_with_their_times(whole: tuple[str, dict[str, Any]]) -> None:
    _, found = whole
    measured = [row for row in found["rows"] if row["timing"]]
    assert {(row["case"]["subject"], row["case"]["work"]) for row in measured} >= {
        (subject, work) for subject in (PEER, OURS) for work in (FORWARD, TRAINING)
    }
    for row in measured:
        case, seconds = row["case"], row["timing"]["milliseconds"] / 1000
        operations = (
            found["gflop_per_clip"][f"{case['subject']} {case['size']}"] * case["batch"] * (3 if case["work"] == TRAINING else 1)
        )
        assert row["clips_per_second"] == pytest.approx(case["batch"] / seconds)
        assert row["tflops"] == pytest.approx(operations / 1000 / seconds)
        assert row["timing"]["lowest"] <= row["timing"]["milliseconds"] <= row["timing"]["highest"]


def test_what_is_not_compiled_is_a_row_that_says_so(whole: tuple[str, dict[str, Any]]) -> None:
    skipped = [row for row in whole[1]["rows"] if row["case"]["execution"] != EAGER]
    assert skipped
    assert all(row["timing"] is None and "skipped" in row["failure"] for row in skipped)


def test_backends_are_held_against_float32_and_failures_say_why(whole: tuple[str, dict[str, Any]]) -> None:
    rows = {row["backend"]: row for row in whole[1]["backends"]}
    assert list(rows)[:2] == ["default", "native"]
    assert rows["default"]["difference"] == rows["native"]["difference"] == 0  # this run is in float32 itself
    assert 0 < rows["_native_math"]["difference"] < 1e-4
    assert rows["_native_cudnn"]["milliseconds"] is None
    assert "failed: " in rows["_native_cudnn"]["failure"]


def test_share_and_kernels_are_of_the_same_step(whole: tuple[str, dict[str, Any]]) -> None:
    found = whole[1]
    looked_into = [row for row in found["rows"] if row["kernels"]]
    assert [row["case"]["subject"] for row in looked_into] == [OURS, OURS_WITHOUT_SWAP]
    assert {CONVOLUTION, MATMUL, ATTENTION} <= {kernel["group"] for kernel in looked_into[0]["kernels"]}
    assert found["share"]["flops"] == pytest.approx(
        1 - found["gflop_per_clip"][f"{OURS_WITHOUT_SWAP} 2x4x5"] / found["gflop_per_clip"][f"{OURS} 2x4x5"]
    )
    assert 0 < found["share"]["flops"] < 0.5


def test_a_budget_that_is_spent_skips_every_row_and_says_so() -> None:
    said = run("--only", "forward,training", "--budget", "0", "--compile")
    rows = [line for line in said.splitlines() if line.startswith(("forward ", "training "))]
    assert len(rows) >= 6
    assert all("skipped: about" in row for row in rows)


def test_a_budget_learns_from_what_cases_take() -> None:
    now = [0.0]
    budget = Budget(100, {"step": 10.0}, clock=lambda: now[0])
    assert budget.refusal("step") == ""
    with budget.spend("step"):
        now[0] = 60.0
    assert budget.refusal("step") == "skipped: about 60 s, and 40 s of the budget are left"
    assert Budget(None, {}).refusal("step") == ""


def test_a_row_survives_the_failure_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    runner = make_runner(said)
    monkeypatch.setattr(
        runner, "compile", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory.\nTried ..."))
    )
    failed = runner.run(Case(OURS, FORWARD, SIZE, 1, COMPILED))
    assert failed.failure == "failed: OutOfMemoryError: CUDA out of memory."
    assert runner.run(Case(OURS, FORWARD, SIZE, 1)).timing is not None
    assert any("out of memory" in line for line in said)


def test_checkpointing_and_the_optimizer_run() -> None:
    row = make_runner([]).run(Case(OURS, TRAINING, Size(2, 4, 5), 1, checkpointing=True, optimizer=True))
    assert row.failure == ""
    assert str(row.case).endswith("ours eager, checkpointing, AdamW")


@pytest.mark.slow
@pytest.mark.timeout(900)  # the compiler of the processor's code is slow where cores are few
def test_compiled_passes_run() -> None:
    row = make_runner([]).run(Case(OURS, FORWARD, SIZE, 1, COMPILED, kernels=True))
    assert row.failure == ""
    assert row.first_seconds > 0
    assert row.kernels


def test_operations_of_a_linear_layer_are_exact() -> None:
    with torch.device("meta"):
        assert forward_flops(nn.Linear(48, 96), torch.empty(5, 48)) == 2 * 5 * 48 * 96


def test_nothing_that_is_measured_is_zero_and_kernels_lie_channels_last() -> None:
    for subject in (PEER, OURS):
        model = build(subject, SMALL, CPU, torch.bfloat16)
        weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim > 1}
        assert not [name for name, weight in weights.items() if not weight.any()]
        assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
        kernels = [weight for weight in weights.values() if weight.ndim == 4 and weight.shape[2] > 1]
        assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels) == (subject == OURS)


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", CONVOLUTION),
        ("cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816wgrad_optimized_bf16_128x128>", CONVOLUTION),
        ("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", MATMUL),
        ("triton_tem_fused_addmm_3", MATMUL),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_6x64x128", ATTENTION),
        ("triton_tem_fused_flex_attention_0", ATTENTION),
        ("triton_poi_fused_convolution_native_group_norm_silu_12", POINTWISE),
        ("triton_red_fused__scaled_dot_product_cudnn_attention_backward_4", POINTWISE),
        ("void at::native::elementwise_kernel<128, 4, at::native::direct_copy_kernel_cuda>", COPIES),
        ("void cudnn::engines_precompiled::nchwToNhwcKernel<__nv_bfloat16>", COPIES),
        ("Memcpy DtoD (Device -> Device)", COPIES),
    ],
)
def test_kernels_are_grouped_by_what_they_compute(name: str, group: str) -> None:
    assert kernel_group(name) == group


def test_differences_are_relative_and_nan_never_passes() -> None:
    expected = torch.tensor([4.0, -8.0])
    assert largest_difference(expected + torch.tensor([0.0, 2.0]), expected) == 0.25
    assert math.isnan(largest_difference(torch.tensor([math.nan, 0.0]), expected))


@pytest.mark.parametrize("text", ["24", "24x", "0x40", "1x2x3x4", "axb"])
def test_a_wrong_size_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"size '{text}'"):
        Size.parse(text, 16)
    assert Size.parse("24x43", 16) == Size.parse("16X24X43", 8) == (16, 24, 43)


def judged(**milliseconds: float) -> dict[str, Any]:
    """Outcomes by goal, for invented times of the rows that goals are judged by."""
    runner = make_runner([])
    runner.parameters[OURS] = 1_500_000_000
    plain = Case(OURS, TRAINING, SIZE, SMALL.training_batches[0])
    cases = {
        "peer_forward": Case(PEER, FORWARD, SIZE, 1),
        "our_forward": Case(OURS, FORWARD, SIZE, 1, COMPILED),
        "peer_step": replace(plain, subject=PEER),
        "our_step": replace(plain, execution=COMPILED),
        "lean_step": replace(plain, execution=COMPILED, checkpointing=True),
    }
    for name, time in milliseconds.items():
        case = cases[name]
        gflop = (2.0 if case.subject == OURS else 1.0) * case.batch
        rate = gflop / time
        peak = {"peer_step": 100, "lean_step": 55}.get(name)
        timing = Timing(time, time, time, 3)
        runner.rows[case] = Row(case, "", timing, 0.0, case.batch * 1000 / time, rate, rate / 0.1, peak)
    return {outcome.goal: outcome for outcome in judge(runner, SwapShare(COMPILED, 0.13, 0.1, 0.1))}


def test_goals_are_judged_by_the_rows() -> None:
    found = judged(peer_forward=90, our_forward=31, peer_step=500, our_step=400, lean_step=600)
    speed = found["training clips/s by the peer's, FLOP-adjusted"]
    assert speed.measured == pytest.approx(500 / 400 * 2)
    assert speed.met
    assert speed.note == "compiled; raw 1.25"
    assert found["forward at batch 1, times faster than the peer"].met is False
    assert found["training memory by the peer's, checkpointing"].measured == pytest.approx(0.55)
    assert found["swap attention's share of a training step"].met is False
    assert found["parameters"].met
    assert any("NO" in line for line in table(list(found.values())))


def test_a_goal_whose_rows_are_missing_is_neither_met_nor_missed() -> None:
    found = judged(our_step=400)
    assert found["training clips/s by the peer's, FLOP-adjusted"].met is None
    assert "not measured" in "\n".join(table(list(found.values())))


def test_wrong_options_are_refused_with_the_way_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong: list[tuple[list[str], str]] = [
        (["--only", "speed"], "choose from ceilings"),
        (["--batch", "0"], "whole number from 1"),
        (["--seconds", "nan"], "0 or more"),
        (["--budget", "-1"], "0 or more"),
        (["--json", str(tmp_path / "missing" / "figures.json")], "a directory that exists"),
        (["--json", str(tmp_path)], "cannot be written"),
    ]
    if not torch.cuda.is_available():
        wrong.append((["--device", "cuda"], "no NVIDIA GPU"))
    for arguments, said in wrong:
        with pytest.raises(SystemExit):
            benchmark.main(arguments)
        assert said in capsys.readouterr().err


@pytest.mark.slow
def test_memory_computed_on_shapes() -> None:
    scale = replace(
        SMALL, channels=(8, 8), attention_levels=(False, False), windows=((2, 2, 2), (2, 2, 2)), sizes=(Size(4, 16, 16),)
    )
    weights = 2 * sum(parameter.numel() for parameter in build_bare(OURS, scale, torch.device("meta")).parameters())
    plain, lean = (training_bytes(OURS, scale, 2, checkpointing) for checkpointing in (False, True))
    assert 2 * weights < lean < 0.9 * plain
