"""The ablation: every interaction trained, sampled and scored alike, gone on with where it broke off, and its table in closed form."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from typer.testing import CliRunner

from videofactory.model import ablate
from videofactory.model.ablation import costs, study, table
from videofactory.model.ablation.study import Arm
from videofactory.model.training.config import load_config
from videofactory.model.training.trainer import Trainer

from .test_training_trainer import ONE, settings, write
from .training_datasets import training_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

FAST = ["--count", "4", "--steps", "2", "--split", "all", "--device", "cpu", "--reader", "tests.test_ablation:sizes"]


def sizes(videos: Sequence[tuple[str, NDArray[np.uint8]]]) -> dict[str, tuple[int, int]]:
    """A reader: how many videos have the size that was trained, and how many prompts are about a circle."""
    return {
        "whole": (sum(frames.shape == (4, 24, 40, 3) for _, frames in videos), len(videos)),
        "circle": (sum("circle" in prompt for prompt, _ in videos), len(videos)),
    }


def mute(videos: Sequence[tuple[str, NDArray[np.uint8]]]) -> int:
    """A reader that is none."""
    return len(videos)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training_dataset(tmp_path_factory.mktemp("ablation"))


@pytest.fixture
def given(dataset: str, tmp_path: Path) -> list[str]:
    """Arguments of the command, for a training of two steps."""
    values = settings(
        dataset, tmp_path / "unused", steps=2, validation={"every": 2, "clips": 2, "steps": 2, "split": None, "prompts": ["x"]}
    )
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\na blue star\n")
    config = str(write(values, tmp_path / "config.yaml"))
    return [config, "--prompts", str(prompts), "--reference", dataset, "--out", str(tmp_path / "out")]


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(ablate.app, list(arguments), env={"COLUMNS": "300"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


@pytest.mark.timeout(280)
def test_runs_are_trained_scored_and_kept(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run(*given, *FAST, "--interactions", "swap", "--seeds", "3")
    assert first[0] == 0, first[1]
    made = {path: path.read_bytes() for path in (tmp_path / "out").glob("*/result.json")}
    assert [path.parent.name for path in made] == ["swap-3"]
    code, printed = run(*given, *FAST, "--interactions", "swap,none", "--seeds", "3")
    assert code == 0, printed
    assert "2 runs of 2 steps, 1 of them done" in printed
    assert all(path.read_bytes() == content for path, content in made.items())

    found = json.loads((tmp_path / "out/ablation.json").read_text())
    assert {(one["interaction"], one["seed"]) for one in found["runs"]} == {("swap", 3), ("none", 3)}
    for one in found["runs"]:
        assert one["readings"] == {"whole": [4, 4], "circle": [2, 4]}
        assert all(math.isfinite(value) for value in one["metrics"].values())
    fvd = {one["interaction"]: one["metrics"]["fvd"] for one in found["runs"]}
    assert {name: one["mean"] for name, one in found["values"]["fvd"].items()} == fvd
    assert found["differences"]["fvd"]["none"]["values"] == [fvd["none"] - fvd["swap"]]
    assert found["costs"]["none"]["parameters"] < found["costs"]["swap"]["parameters"]
    assert found["costs"]["none"]["step_bytes"] < found["costs"]["swap"]["step_bytes"]
    text = (tmp_path / "out/ablation.md").read_text()
    assert text in printed and "| swap | " in text and "| circle read |" in text.splitlines()[0]

    # Killed after training, and before scoring: what is left is made, and the same comes out.
    swap = tmp_path / "out/swap-3"
    for lost in (swap / "result.json", swap / "evaluation.json", swap / "samples/000002.mp4"):
        lost.unlink()
    code, printed = run(*given, *FAST, "--interactions", "swap,none", "--seeds", "3")
    assert code == 0, printed
    assert json.loads((swap / "result.json").read_text()) == json.loads(made[swap / "result.json"])
    assert "note: the random extractor was used" in printed

    refused = run(*given, *FAST, "--interactions", "swap", "optimiser.learning_rate=1e-5")
    assert refused[0] == 2 and "another study" in refused[1] and "training was" in refused[1]


def test_a_configuration_that_was_edited_in_between_is_refused(given: list[str], tmp_path: Path) -> None:
    one = study.Study(given[0], ("a",), given[4], tmp_path / "out", split=None)
    study.check(one)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / study.RECORD).write_text(json.dumps(one.identity()))
    config = Path(given[0])
    config.write_text(config.read_text().replace("learning_rate: 0.002", "learning_rate: 0.001"))
    with pytest.raises(ValueError, match=r"another study: training was .* and is"):
        study.run(one, Arm("swap", 0), ONE)


def test_a_signal_in_the_last_step_ends_the_study(given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(trainer: Trainer) -> bool:
        trainer.stopping = True
        return True

    monkeypatch.setattr(Trainer, "run", asked)
    one = study.Study(given[0], ("a",), given[4], tmp_path / "out", split=None)
    with pytest.raises(study.InterruptedRunError, match="swap-0"):
        study.run(one, Arm("swap", 0), ONE)


def test_a_dry_run_measures_and_trains_nothing(given: list[str], tmp_path: Path) -> None:
    code, printed = run(*given, *FAST, "--interactions", "global", "--dry-run")
    assert code == 0, printed
    assert "global: " in printed and "nothing was trained" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["--interactions", "swop"], "'swop'"),
        (["--seeds", "one"], "'one'"),
        (["--against", "nothing"], "'nothing'"),
        (["--split", "most"], "'most'"),
        (["--reader", "tests.test_ablation:absent"], "absent"),
        (["--reader", "nowhere"], "module:function"),
        (["--prompts", "/nowhere.txt"], "/nowhere.txt"),
        (["--reference", "/nowhere"], "/nowhere"),
        (["optimizer.betas=[0,0]"], "optimiser"),
        (["model.train=lora"], "model.train is lora"),
        (["--seeds", "0,4294967296"], "4294967296"),
        (["--reader", "os:sep"], "no function, but str"),
        (["--reader", "tests.test_ablation:mute"], "(right, asked)"),
        (["--video-extractor", "radnom"], "random"),
        (["--interactions", "none,global", "--against", "swap"], "none, global"),
        (["data.dataset=/nowhere"], "/nowhere"),
    ],
)
def test_mistakes_are_said_before_any_work(given: list[str], changes: list[str], said: str, tmp_path: Path) -> None:
    code, printed = run(*given, *FAST, *changes)
    assert code == 2 and said in printed, printed
    assert not list((tmp_path / "out").glob("*/run"))


def test_the_runs_of_a_seed_differ_in_the_interaction_alone(given: list[str], tmp_path: Path) -> None:
    one = study.Study(given[0], ("a",), given[4], tmp_path / "out")
    swap, none = (one.training(Arm(name, 1)) for name in ("swap", "none"))
    different = {key for key, value in swap.model_dump().items() if value != none.model_dump()[key]}
    assert different == {"model", "output"}
    assert {arm.seed for arm in one.arms()[: len(study.INTERACTIONS)]} == {0}


def test_student_intervals_are_those_of_the_tables() -> None:
    known = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262, 10: 2.228, 30: 2.042}
    assert {freedom: round(table.student_quantile(0.975, freedom), 3) for freedom in known} == known
    found = table.estimate([1.0, 2.0, 3.0])
    assert found.mean == 2 and found.half == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert str(found) == "2.0 ± 2.5" and table.estimate([2.5]).half is None and str(table.estimate([1, 1])) == "1.00 ± 0.00"
    with pytest.raises(ValueError, match="no values"):
        table.estimate([])


def test_intervals_hold_the_mean_as_often_as_they_say() -> None:
    rng = np.random.default_rng(0)
    hits = [abs((found := table.estimate(list(rng.normal(5, 2, 3)))).mean - 5) <= (found.half or 0) for _ in range(2000)]
    assert 0.935 < np.mean(hits) < 0.965


def test_differences_are_taken_seed_by_seed() -> None:
    def result(interaction: str, seed: int, value: float) -> dict[str, Any]:
        return {"interaction": interaction, "seed": seed, "validation_loss": None, "metrics": {"fvd": value}, "readings": {}}

    results = [
        result("swap", 0, 1.0),
        result("swap", 1, 10.0),
        result("none", 0, 2.0),
        result("none", 1, 11.0),
        result("global", 5, 3.0),
    ]
    found = table.summary(results, "swap")
    assert found["differences"]["fvd"]["none"].mean == 1 and found["differences"]["fvd"]["none"].half == 0
    assert "global" not in found["differences"]["fvd"]
    assert found["values"]["fvd"]["none"].half > 50


def test_costs_are_of_the_same_batch(dataset: str, tmp_path: Path) -> None:
    values = settings(dataset, tmp_path / "unused")
    file = str(write(values, tmp_path / "config.yaml"))
    configs = {name: load_config(file, [f"model.interaction={name}"]) for name in ("global", "swap", "none")}
    found = costs.measure(configs, torch.device("cpu"), against="swap", rounds=1)
    assert found["swap"].parameters == found["global"].parameters > found["none"].parameters
    assert found["swap"].step_ratio == 1 != found["global"].step_ratio and all(cost.step_seconds > 0 for cost in found.values())


def test_bytes_of_a_step_are_those_of_the_closed_form() -> None:
    class Square(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(64, 64, bias=False)

        def forward(self, inputs: torch.Tensor, return_dict: bool = True) -> Any:
            return (self.layer(inputs).square(),)

    # Weight and gradient; the backward pass of the layer keeps its input, that of the square the layer's output.
    assert costs._step_bytes(Square(), (torch.zeros(32, 64),), "float32") == 2 * 64 * 64 * 4 + 2 * 32 * 64 * 4
