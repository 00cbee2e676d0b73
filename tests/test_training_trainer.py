"""Training as a whole: that it learns, goes on after kills as if nothing had been, and does the same in one process and in two."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

import pyarrow as pa
import pytest
import torch
import yaml
from accelerate import tracking
from typer.testing import CliRunner

from videofactory.model import miniature, precompute, train
from videofactory.model.pipeline import TextToVideoSwapPipeline
from videofactory.model.training import checkpoints, encode, processes
from videofactory.model.training.config import ConfigError, parse_config
from videofactory.model.training.data import Bucket, DataOptions, Loader
from videofactory.model.training.log import Log
from videofactory.model.training.processes import OutputBusyError, Processes
from videofactory.model.training.tensor_files import CheckpointError
from videofactory.model.training.trainer import NotFiniteError, Trainer

from .training_datasets import add_captions, damage, kept, training_dataset

pytestmark = pytest.mark.usefixtures("one_thread")

ONE = Processes(0, 1, torch.device("cpu"))
TIME_LIMIT = 280


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    return training_dataset(tmp_path_factory.mktemp("training"))


def settings(dataset: str, output: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run that takes a fraction of a second per step."""
    values: dict[str, Any] = {
        "output": str(output),
        "steps": 6,
        "data": {
            "dataset": dataset,
            "split": None,
            "buckets": [
                {"frames": 4, "height": 24, "width": 40, "batch": 4},
                {"frames": 1, "height": 24, "width": 40, "batch": 4},
            ],
            "image_share": 0.25,
            "workers": 0,
        },
        "model": {"start": "miniature"},
        "optimiser": {"learning_rate": 2e-3, "warmup_steps": 0},
        "ema": {"decay": 0.9},
        "precision": "float32",
        "gradient_checkpointing": False,
        "checkpoints": {"every": 2},
        "log": {"every": 2},
    }
    for key, value in changes.items():
        place = values
        *path, name = key.split("__")
        for part in path:
            place = place.setdefault(part, {})
        place[name] = value
    return values


def trainer(dataset: str, output: Path, **changes: Any) -> Trainer:
    return Trainer(parse_config(settings(dataset, output, **changes), "test"), ONE)


def log(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]


def losses(output: Path) -> list[float]:
    lines = [line for line in log(output) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def start(file: Path, *command: str, session: bool = False) -> subprocess.Popen[bytes]:
    """A run of its own, with one thread per process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = [*(command or (sys.executable,)), "-m", "videofactory.model.train", str(file)]
    return subprocess.Popen(
        arguments, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=session
    )


def write(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.safe_dump(values))
    return path


def test_it_overfits_four_clips(dataset: str, tmp_path: Path) -> None:
    changes = {"data__buckets": [{"frames": 4, "height": 24, "width": 40, "batch": 4}], "data__image_share": 0.0}
    four = ", ".join(f"'{row['clip_id']}'" for row in kept(dataset)[:4])
    run = trainer(dataset, tmp_path, steps=120, checkpoints__every=120, data__where=f"clip_id in ({four})", **changes)
    assert run.loader.table.used == 4
    assert run.run()
    found = losses(tmp_path)
    assert sum(found[-20:]) < 0.5 * sum(found[:20])


def test_a_run_leaves_a_pipeline_a_log_and_its_settings(dataset: str, tmp_path: Path) -> None:
    validation = {"every": 4, "prompts": ["a red circle"], "steps": 2, "split": "train", "timesteps": [100, 900], "clips": 2}
    run = trainer(dataset, tmp_path, steps=4, validation=validation)
    assert "visits per clip" in run.describe() and "spatial" in run.describe()
    assert run.run()
    pipeline = TextToVideoSwapPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipeline.config.default_frames == 4 and pipeline.config.default_width == 40
    average = checkpoints.latest(tmp_path) / "unet_ema" / "diffusion_pytorch_model.safetensors"  # type: ignore[operator]
    assert (tmp_path / "pipeline" / "unet" / average.name).read_bytes() == average.read_bytes()
    last = log(tmp_path)[-2]
    assert last["step"] == 4 and last["clips_per_second"] > 0 and 0 <= last["data_share"] <= 1 and last["memory_gb"] > 0
    validated = log(tmp_path)[-1]["validation"]
    assert set(validated["loss_by_timestep"]) == {"100", "900"}
    assert (tmp_path / "validation" / "step-000004" / "000.mp4").stat().st_size > 0
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["steps"] == 4


def test_a_validation_changes_nothing_of_what_is_learned(dataset: str, tmp_path: Path) -> None:
    validation = {"every": 1, "prompts": ["a red circle"], "steps": 1, "split": "train", "timesteps": [100], "clips": 1}
    for name, value in (("with", validation), ("without", None)):
        assert trainer(dataset, tmp_path / name, steps=3, validation=value, model__dropout=0.2).run()
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


@pytest.mark.timeout(TIME_LIMIT)
@pytest.mark.parametrize("mode", ["video, shuffled", "latents, shard by shard"])
def test_killed_three_times_and_continued(dataset: str, tmp_path: Path, mode: str) -> None:
    """Losses, weights, average and optimiser at the end are those of an undisturbed run, bit by bit, with dropout and images."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    changes = {"steps": 12, "model__dropout": 0.1, "data__workers": 1, "log__every": 1}
    if "latents" in mode:
        changes |= {"data__order": "shards", "data__latents": str(tmp_path / "latents")}
        buckets = [option for frames in (4, 1) for option in ("--bucket", f"{frames}x24x40@8")]
        made = CliRunner().invoke(
            precompute.app,
            [dataset, *buckets, "--out", str(tmp_path / "latents"), "--vae", "miniature", "--split", "all", "--workers", "0"],
        )
        assert made.exit_code == 0, made.output
    assert start(write(settings(dataset, whole, **changes), tmp_path / "whole.yaml")).wait() == 0
    file = write(settings(dataset, killed, **changes), tmp_path / "killed.yaml")
    for after in (3, 6, 9):
        process = start(file)
        while process.poll() is None and len(_lines(killed / "log.jsonl")) < after:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert len(_lines(killed / "log.jsonl")) < 12
    assert start(file).wait() == 0
    assert losses(killed) == losses(whole)
    ends = [checkpoints.latest(output) for output in (whole, killed)]
    for name in ("unet/diffusion_pytorch_model", "unet_ema/diffusion_pytorch_model", "optimizer"):
        contents = [(end / f"{name}.safetensors").read_bytes() for end in ends]  # type: ignore[operator]
        assert contents[0] == contents[1], name


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.timeout(TIME_LIMIT)
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_processes_do_what_one_does(dataset: str, tmp_path: Path, parallel: str) -> None:
    """With the same clips per step, of which each process has a half; accumulation and images included."""
    one, two = tmp_path / "one", tmp_path / "two"
    buckets = [[{"frames": frames, "height": 24, "width": 40, "batch": batch} for frames in (4, 1)] for batch in (4, 2)]
    shared = {"optimiser__accumulate": 2, "log__every": 1}
    assert start(write(settings(dataset, one, data__buckets=buckets[0], **shared), tmp_path / "one.yaml")).wait() == 0
    launch = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    validation = {"every": 3, "prompts": ["a red circle"], "steps": 1, "split": "train", "timesteps": [500], "clips": 1}
    changes = {"data__buckets": buckets[1], "parallel": parallel, "validation": validation}
    process = start(write(settings(dataset, two, **changes, **shared), tmp_path / "two.yaml"), *launch)
    _, said = process.communicate()
    assert process.returncode == 0, said.decode()
    assert losses(two) == pytest.approx(losses(one), rel=1e-4)
    assert (two / "pipeline" / "unet").is_dir() and [line["step"] for line in log(two) if "validation" in line] == [3, 6]
    norms = [[line["gradient_norm"] for line in log(output) if "loss" in line] for output in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


def test_sigterm_ends_after_a_checkpoint(dataset: str, tmp_path: Path) -> None:
    run = trainer(dataset, tmp_path, steps=50, checkpoints__every=50, log__every=1)
    original = run._train_step

    def step(*arguments: Any) -> Any:
        if run.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(*arguments)

    run._train_step = step  # type: ignore[method-assign]
    before = signal.getsignal(signal.SIGTERM)
    assert not run.run()
    assert signal.getsignal(signal.SIGTERM) is before
    assert checkpoints.step_of(checkpoints.latest(tmp_path)) == 3  # type: ignore[arg-type]
    assert trainer(dataset, tmp_path, steps=50, checkpoints__every=50).step == 3


@pytest.mark.timeout(TIME_LIMIT)
def test_a_signal_to_the_whole_process_group_ends_after_a_checkpoint(dataset: str, tmp_path: Path) -> None:
    """As torchrun, systemd and Slurm send it: to the processes that decode, too, which must live until the trainer has ended."""
    out = tmp_path / "out"
    file = write(settings(dataset, out, steps=500, data__workers=2, log__every=1, checkpoints__every=500), tmp_path / "run.yaml")
    process = start(file, session=True)
    while process.poll() is None and len(_lines(out / "log.jsonl")) < 2:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.02)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 130, said.decode()
    assert checkpoints.latest(out) is not None and b"once more to end at once" in said


def test_a_pipeline_that_a_kill_left_out_is_written(dataset: str, tmp_path: Path) -> None:
    assert trainer(dataset, tmp_path, steps=2).run()
    weights = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    first = weights.read_bytes()
    shutil.rmtree(tmp_path / "pipeline")
    assert trainer(dataset, tmp_path, steps=2).run() and weights.read_bytes() == first
    assert trainer(dataset, tmp_path, steps=4).run() and weights.read_bytes() != first


@pytest.mark.parametrize("steps", [2, 4])
def test_a_validation_that_a_kill_left_out_is_made(dataset: str, tmp_path: Path, steps: int) -> None:
    validation = {"every": 2, "split": "train", "timesteps": [500], "clips": 1}
    assert trainer(dataset, tmp_path, steps=2, validation=validation).run()
    lines = _lines(tmp_path / "log.jsonl")
    assert "validation" in lines[-1]
    (tmp_path / "log.jsonl").write_text("\n".join(lines[:-1]) + "\n")
    assert trainer(dataset, tmp_path, steps=steps, validation=validation).run()
    assert [line["step"] for line in log(tmp_path) if "validation" in line] == list(range(2, steps + 1, 2))
    made, before = log(tmp_path)[2]["validation"], json.loads(lines[-1])["validation"]
    assert made["loss"] == before["loss"]


def test_a_run_that_another_one_overtook_is_refused(dataset: str, tmp_path: Path) -> None:
    late = trainer(dataset, tmp_path, steps=2)
    assert trainer(dataset, tmp_path, steps=2).run()
    with pytest.raises(CheckpointError, match="another run has written"):
        late.run()


@pytest.mark.parametrize(("name", "value"), [("processes", 3), ("clips", {"4x24x40@8": 7})])
def test_another_order_of_the_clips_is_refused(dataset: str, tmp_path: Path, name: str, value: Any) -> None:
    assert trainer(dataset, tmp_path, steps=2).run()
    path = checkpoints.latest(tmp_path) / "state.json"  # type: ignore[operator]
    state = json.loads(path.read_text())
    path.write_text(json.dumps(state | {"data": state["data"] | {name: value}}))
    with pytest.raises(CheckpointError, match=f"made with {name} .*the order of the clips would be another"):
        trainer(dataset, tmp_path, steps=4)


def test_numbers_that_are_none_end_the_run_and_are_not_saved(dataset: str, tmp_path: Path) -> None:
    run = trainer(dataset, tmp_path, steps=6)
    original = run._train_step

    def step(*arguments: Any) -> Any:
        if run.step == 3:
            with torch.no_grad():
                run.models.unet.conv_out.bias.fill_(float("nan"))
        return original(*arguments)

    run._train_step = step  # type: ignore[method-assign]
    with pytest.raises(NotFiniteError, match=r"step 4 .*step-000002.*learning_rate"):
        run.run()
    assert [checkpoints.step_of(folder) for folder in checkpoints.checkpoints(tmp_path)] == [2]


def test_another_configuration_is_refused_where_a_run_has_begun(dataset: str, tmp_path: Path) -> None:
    assert trainer(dataset, tmp_path, steps=2).run()
    with pytest.raises(ConfigError, match=r"(?s)optimiser.learning_rate: 0.002 there, 0.003 now"):
        trainer(dataset, tmp_path, steps=4, optimiser__learning_rate=3e-3)
    assert trainer(dataset, tmp_path, steps=4).step == 2


@pytest.mark.timeout(TIME_LIMIT)
def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    process = start(write(settings(dataset, out, steps=500, data__workers=1, log__every=1), tmp_path / "run.yaml"))
    try:
        while process.poll() is None and not _lines(out / "log.jsonl"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        with monkeypatch.context() as patch, pytest.raises(OutputBusyError, match=f"another run writes to {out};"):
            patch.setattr(processes, "LOCK_SECONDS", 0.1)
            trainer(dataset, out, steps=500, log__every=1).run()
        assert process.poll() is None
    finally:
        process.kill()
        process.wait()
    done = len(_lines(out / "log.jsonl"))
    assert trainer(dataset, out, steps=done + 4, log__every=1).run()


def test_unreadable_clips_of_all_processes_are_counted(dataset: str, tmp_path: Path) -> None:
    own = str(shutil.copytree(dataset, tmp_path / "copy"))
    damage(own, 2)
    run = trainer(own, tmp_path / "out", steps=4)

    class AsIfThree(Processes):
        def sum(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor.mul_(3)

    run.processes = AsIfThree(0, 1, torch.device("cpu"))
    assert run.run()
    assert log(tmp_path / "out")[-1]["bad_clips"] == 3 * len(run.loader.bad) > 0


def test_captions_that_are_cut_are_counted_before_the_first_step(
    dataset: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clips = [str(row["clip_id"]) for row in kept(dataset)[:3]]
    own = str(shutil.copytree(dataset, tmp_path / "copy"))
    texts = [["a red circle", "a " * 30 + "first"], ["a blue square"], ["the " * 22 + "second"]]
    add_captions(own, "long", pa.table({"clip_id": clips, "caption": texts}))
    add_captions(own, "short", pa.table({"clip_id": clips, "caption": ["a red circle"] * 3}))
    changes = {"data__image_share": 0.0, "data__buckets": [{"frames": 4, "height": 24, "width": 40, "batch": 1}]}
    trainer(own, tmp_path / "out", data__captions=["long.caption"], **changes)
    said = [record.getMessage() for record in caplog.records if "captions" in record.getMessage()]
    assert said == [
        "2 of 4 captions have more than the 24 tokens that the text encoder reads, and are cut; "
        f"the first is {'a ' * 30 + 'first'!r}"
    ]
    caplog.clear()
    trainer(own, tmp_path / "out", data__captions=["short.caption"], **changes)
    assert not caplog.records


def test_of_many_captions_some_are_looked_at(dataset: str) -> None:
    loader = Loader(dataset, [Bucket(4, 24, 40)], DataOptions(split=None))
    everything, total = loader.captions(100)
    assert len(everything) == total == loader.table.used == 18
    some, total = loader.captions(3)
    assert some == [everything[0], everything[8], everything[17]] and total == 18
    said = encode.cut_captions(["a red circle", *["the " * 23] * 2], 18, miniature.tokenizer())
    assert said is not None and said.startswith("2 of 3 captions (of 18) have more than the 24 tokens")
    assert encode.cut_captions([], 0, miniature.tokenizer()) is None


def test_a_run_goes_on_under_its_name_at_wandb(dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Tracker:
        requires_logging_directory = False
        begun: ClassVar[list[dict[str, Any]]] = []

        def __init__(self, project: str, **arguments: Any) -> None:
            self.begun.append(arguments)

        def __getattr__(self, name: str) -> Any:
            return lambda *_, **__: None

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "wandb", Tracker)
    for output in ("one", "one", "two"):
        config = parse_config(settings(dataset, tmp_path / output, log__trackers=["wandb"]), "test")
        with Log(config, 0, main=True):
            pass
    first, again, other = Tracker.begun
    assert first == again == {"id": first["id"], "resume": "allow"} and other["id"] != first["id"]


def test_adapters_are_trained_and_continued(dataset: str, tmp_path: Path) -> None:
    changes = {
        "model__train": "lora",
        "data__image_share": 0.0,
        "data__buckets": [{"frames": 4, "height": 24, "width": 40, "batch": 4}],
    }
    assert trainer(dataset, tmp_path / "whole", steps=4, **changes).run()
    assert trainer(dataset, tmp_path / "parts", steps=2, **changes).run()
    assert trainer(dataset, tmp_path / "parts", steps=4, **changes).run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert (checkpoints.latest(tmp_path / "parts") / "unet_lora_ema").is_dir()  # type: ignore[operator]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["steps=0"], "steps"),
        (["stepz=3"], "did you mean 'steps'?"),
        (["data.dataset=/nowhere"], "/nowhere"),
        (["data.buckets.0.frames=600"], "too short"),
        (["data.buckets.0.height=25"], "take 24 or 32"),
        (["model.start=/no/such/model"], "/no/such/model"),
        (["validation={timesteps: [1000], split: null, prompts: [x]}"], "0 to 999"),
        (["validation={steps: 2000, split: null, prompts: [x]}"], "at most 1000"),
        (["log.trackers=[wandb]"], "pip install 'videofactory[trackers]'"),
        (["parallel=fsdp"], "torchrun"),
    ],
)
def test_mistakes_are_said_before_the_first_step(dataset: str, tmp_path: Path, changes: list[str], said: str) -> None:
    file = write(settings(dataset, tmp_path / "out"), tmp_path / "run.yaml")
    done = CliRunner().invoke(train.app, [str(file), *changes])
    assert done.exit_code == 2, done.output
    assert said in " ".join(done.output.split()), done.output
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_what_would_be_trained_and_writes_nothing(dataset: str, tmp_path: Path) -> None:
    file = write(settings(dataset, tmp_path / "out"), tmp_path / "run.yaml")
    done = CliRunner().invoke(train.app, [str(file), "--dry-run"])
    assert done.exit_code == 0, done.output
    assert "4x24x40" in done.output and "trained" in done.output
    assert not (tmp_path / "out").exists()
