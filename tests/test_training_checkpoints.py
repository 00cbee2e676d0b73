"""Checkpoints: exact resumption, files that other programs read, and a usable one whenever a run is killed."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch import distributed, multiprocessing

from videofactory.model import miniature
from videofactory.model.training import checkpoints as module
from videofactory.model.training import tensor_files
from videofactory.model.training.checkpoints import (
    CheckpointError,
    check_none_later,
    checkpoint_folder,
    checkpoints,
    latest,
    restore,
    save,
    step_of,
)
from videofactory.model.training.config import ConfigError, TrainingConfig, load_config
from videofactory.model.training.objective import denoising_losses, draw, seed_layers
from videofactory.model.training.parameters import averaged, build_optimizer, choose_trained, moving_average, trained
from videofactory.model.training.parameters import shard as shard_unet
from videofactory.model.unet import SwapUNet

from .tiny_unets import greatest_difference, inputs, noise, predict, tiny_unet

pytestmark = pytest.mark.usefixtures("one_thread")

LIMIT = 240
# Files and steps are many here, so layers are few.
SHORT: dict[str, Any] = {"block_out_channels": (16,), "attention_levels": (True,), "swap_windows": ((2, 4, 4),), "dropout": 0.1}


class Run:
    """A run on noise, whose first step is of images, and which has dropout in its layers."""

    def __init__(self, output: Path, *changes: str, shard: bool = False) -> None:
        self.config = load_config("miniature", [f"output={output}", "model.spatial=0.5", *changes])
        self.unet: Any = tiny_unet(**SHORT).train()
        choose_trained(self.unet, self.config.model, self.config.seed)
        if shard:
            shard_unet(self.unet)
        self.optimizer = build_optimizer(self.unet, self.config.optimiser, self.config.model.spatial)
        self.average: EMAModel | None = moving_average(self.unet, self.config.ema) if self.config.ema else None
        self.step = 0

    def train(self, steps: int) -> None:
        scheduler = miniature.scheduler()
        while self.step < steps:
            latents = noise(2, 4, 1 if self.step == 0 else 3, 6, 7, seed=self.step)
            draws = draw(0, self.step, range(2), latents.shape, 1000, self.config.noise)
            seed_layers(0, self.step, 0)
            losses = denoising_losses(self.unet, scheduler, latents, inputs()[1], draws, self.config.noise)
            losses.weighted.mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            if self.average is not None:
                self.average.step(trained(self.unet).values())
            self.step += 1

    def save(self, data: Any = None) -> Path:
        return save(self.config.output, self.step, self.unet, self.optimizer, self.average, self.config, data)

    def restore(self, folder: Path, config: TrainingConfig | None = None) -> Any:
        found = restore(folder, self.unet, self.optimizer, self.average, config)
        self.step = found.step
        return found

    def tensors(self) -> dict[str, torch.Tensor]:
        state = self.optimizer.state
        found = {name: parameter.detach() for name, parameter in self.unet.named_parameters()}
        for name, parameter in trained(self.unet).items():
            found |= {f"{name}.{key}": value for key, value in state[parameter].items()} if parameter in state else {}
        if self.average is not None:
            found |= {f"average.{number}": shadow for number, shadow in enumerate(self.average.shadow_params)}
        return found


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def kept(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.tensors().items()}


@pytest.mark.parametrize(
    "changes", [(), ("model.train=lora", "model.spatial=trained"), ("ema=null",)], ids=["full", "lora", "no ema"]
)
@pytest.mark.parametrize("middle", [1, 2])
def test_a_resumed_run_ends_as_one_that_went_through(tmp_path: Path, changes: tuple[str, ...], middle: int) -> None:
    straight, first, second = (Run(tmp_path, *changes) for _ in range(3))
    straight.train(4)
    first.train(middle)
    folder = first.save({"epoch": 1, "clips": [3, 4]})
    found = second.restore(folder, first.config)
    assert (found.step, found.data, found.config) == (middle, {"epoch": 1, "clips": [3, 4]}, first.config)
    assert same(first.tensors(), second.tensors())
    second.train(4)
    assert same(straight.tensors(), second.tensors())
    other = Run(tmp_path, *changes)
    other.train(4)
    assert same(straight.tensors(), other.tensors())


def test_state_lies_in_memory_as_its_parameter_does(tmp_path: Path) -> None:
    first, second = Run(tmp_path), Run(tmp_path)
    first.train(2)
    second.restore(first.save())
    weight = second.unet.conv_in.weight
    assert not weight.is_contiguous()
    assert second.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


def test_what_is_in_the_folder_is_read_by_others(tmp_path: Path) -> None:
    run = Run(tmp_path)
    run.train(3)
    folder = run.save()
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    weights = "diffusion_pytorch_model.safetensors"
    of_models = {f"{kind}/{name}" for kind in ("unet", "unet_ema") for name in ("config.json", weights)}
    assert files == {*of_models, "optimizer.safetensors", "config.json", "state.json"}
    assert folder == tmp_path / "checkpoints" / "step-000003"

    for name, average in (("unet", None), ("unet_ema", run.average)):
        loaded = SwapUNet.from_pretrained(folder, subfolder=name).eval()
        with averaged(run.unet, average):
            assert same(loaded.state_dict(), run.unet.state_dict())
            assert greatest_difference(predict(loaded, *inputs()), predict(run.unet.eval(), *inputs())) <= 1e-5
        assert same(loaded.state_dict(), run.unet.state_dict()) == (average is None)
    assert TrainingConfig.model_validate_json((folder / "config.json").read_text(), strict=False) == run.config
    state = json.loads((folder / "state.json").read_text())
    assert state["fingerprint"] == run.config.fingerprint()
    assert "conv_in.weight.exp_avg" in load_file(folder / "optimizer.safetensors")


def test_adapters_are_read_by_diffusers(tmp_path: Path) -> None:
    run = Run(tmp_path, "model.train=lora", "model.spatial=trained", "optimiser.learning_rate=1e-2")
    run.train(4)
    folder = run.save()
    assert {path.name for path in folder.iterdir() if path.is_dir()} == {"unet_lora", "unet_lora_ema"}
    run.unet.eval()
    for name, average in (("unet_lora", None), ("unet_lora_ema", run.average)):
        with averaged(run.unet, average):
            expected = predict(run.unet, *inputs())
        other = tiny_unet(**SHORT)
        assert greatest_difference(predict(other, *inputs()), expected) > 1e-3
        other.load_lora_adapter(folder / name, prefix=None, use_safetensors=True)
        assert greatest_difference(predict(other, *inputs()), expected) <= 1e-5


class TestRefusals:
    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        run = Run(tmp_path_factory.mktemp("run"))
        run.train(2)
        return run.save()

    def test_other_settings_are_named(self, folder: Path, tmp_path: Path) -> None:
        other = Run(tmp_path, "seed=5", "steps=900", "data.workers=3")
        with pytest.raises(ConfigError, match=r"step-000002' ?began|seed: 0 there, 5 now") as error:
            other.restore(folder, other.config)
        assert "steps:" not in str(error.value)
        assert "workers:" not in str(error.value)

    @pytest.mark.parametrize(
        ("settings", "problem"),
        [
            ({"interaction": "none"}, "unexpected"),
            ({"cross_attention_dim": 24}, "of another shape"),
            ({"layers_per_block": 2}, "missing"),
        ],
    )
    def test_another_model_is_refused_and_not_touched(self, folder: Path, settings: dict[str, Any], problem: str) -> None:
        unet = tiny_unet(**{**SHORT, **settings})
        before = {name: weight.clone() for name, weight in unet.state_dict().items()}
        with pytest.raises(CheckpointError, match=rf"not those of this model: .*{problem}.*Set model"):
            restore(folder, unet)
        assert all(torch.equal(weight, before[name]) for name, weight in unet.state_dict().items())

    def test_other_trained_parameters_are_refused(self, folder: Path, tmp_path: Path) -> None:
        other = Run(
            tmp_path, "model.spatial=frozen", "data.image_share=0", "data.buckets=[{frames: 3, height: 64, width: 64, batch: 1}]"
        )
        before = kept(other)
        with pytest.raises(CheckpointError, match="are in one of them only"):
            other.restore(folder)
        assert same(before, other.tensors())

    def test_an_average_that_was_not_kept_is_missed(self, tmp_path: Path) -> None:
        without = Run(tmp_path, "ema=null").save()
        with pytest.raises(CheckpointError, match="has no moving average; set ema to null"):
            Run(tmp_path).restore(without)

    @pytest.mark.parametrize("harm", ["missing", "short", "no state", "half a state", "empty"])
    def test_what_is_not_whole_is_passed_over(self, folder: Path, tmp_path: Path, harm: str) -> None:
        for step in (1, 2):
            shutil.copytree(folder, checkpoint_folder(tmp_path, step))
        damaged = checkpoint_folder(tmp_path, 2)
        weights = damaged / "unet" / "diffusion_pytorch_model.safetensors"
        if harm == "missing":
            weights.unlink()
        elif harm == "short":
            os.truncate(weights, weights.stat().st_size - 1)
        elif harm == "no state":
            (damaged / "state.json").unlink()
        elif harm == "half a state":
            os.truncate(damaged / "state.json", 50)
        else:
            shutil.rmtree(damaged)
            damaged.mkdir()
        assert latest(tmp_path) == checkpoint_folder(tmp_path, 1)
        with pytest.raises(CheckpointError, match="no complete checkpoint"):
            restore(damaged, tiny_unet(**SHORT))

    def test_later_ones_stand_in_the_way_of_an_earlier_start(self, folder: Path) -> None:
        check_none_later(folder.parents[1], 2)
        with pytest.raises(CheckpointError, match="later than step 1: step-000002"):
            check_none_later(folder.parents[1], 1)

    def test_a_folder_of_another_name_has_no_step(self) -> None:
        with pytest.raises(CheckpointError, match="not named as a checkpoint"):
            step_of(Path("latest"))


def test_there_is_none_before_the_first(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    assert latest(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("changes", "left"),
    [
        (["checkpoints.keep=2"], [4, 5]),
        (["checkpoints.keep=null"], [1, 2, 3, 4, 5]),
        (["checkpoints.keep=1", "checkpoints.every=1", "checkpoints.keep_every=2"], [2, 4, 5]),
    ],
)
def test_old_ones_are_removed(tmp_path: Path, changes: list[str], left: list[int]) -> None:
    run = Run(tmp_path, "ema=null", *changes)
    for step in range(1, 6):
        run.step = step
        run.save()
    assert [step_of(folder) for folder in checkpoints(tmp_path)] == left
    assert len(list((tmp_path / "checkpoints").iterdir())) == len(left)


def test_the_same_step_is_written_once(tmp_path: Path) -> None:
    run = Run(tmp_path, "ema=null")
    written = (run.save() / "state.json").stat().st_mtime_ns
    assert (run.save() / "state.json").stat().st_mtime_ns == written


class Killed(BaseException):
    """The process is gone: nothing else of it runs. (There is no clean-up in the code that could pretend otherwise.)"""


class Killer:
    """Counts what is done to files, and stops at the given one: before it, or where `halfway`, in the midst of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, halfway: bool) -> None:
        self.at, self.halfway, self.done = at, halfway, 0
        for owner, name in (
            (tensor_files, "save_file"),
            (Path, "write_text"),
            (Path, "mkdir"),
            (os, "fsync"),
            (os, "rename"),
            (shutil, "rmtree"),
        ):
            monkeypatch.setattr(owner, name, self.watched(name, getattr(owner, name)))

    def watched(self, name: str, original: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            self.done += 1
            if self.done == self.at:
                if self.halfway:
                    self.half(name, original, arguments, options)
                raise Killed(f"{name} {arguments}")
            return original(*arguments, **options)

        return call

    @staticmethod
    def half(name: str, original: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if name == "rmtree":
            files = sorted(path for path in Path(arguments[0]).rglob("*") if path.is_file())
            for path in files[: len(files) // 2]:
                path.unlink()
        else:
            original(*arguments, **options)
            path = {"save_file": lambda: arguments[1], "write_text": lambda: arguments[0]}.get(name, lambda: None)()
            if path is not None:
                os.truncate(path, path.stat().st_size // 2)


@pytest.fixture
def two(tmp_path: Path) -> Iterator[tuple[Run, dict[int, dict[str, torch.Tensor]]]]:
    """A run with its state after each of two steps."""
    run = Run(tmp_path, "checkpoints.keep=1", "model.train=lora", "model.spatial=trained")
    states = {}
    for step in (1, 2):
        run.train(step)
        states[step] = kept(run)
    yield run, states


@pytest.mark.parametrize("halfway", [False, True], ids=["before", "in the midst of"])
def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(
    two: tuple[Run, dict[int, dict[str, torch.Tensor]]], tmp_path: Path, halfway: bool
) -> None:
    run, states = two
    first, other = (Run(tmp_path / "first", "model.train=lora", "model.spatial=trained") for _ in range(2))
    first.train(1)
    before = first.save()
    at, found = 0, []
    while True:
        at += 1
        output = tmp_path / f"killed-{at}"
        shutil.copytree(before, checkpoint_folder(output, 1))
        run.config = run.config.model_copy(update={"output": str(output)})
        with pytest.MonkeyPatch.context() as patch:
            killer = Killer(patch, at, halfway)
            try:
                run.save()
            except Killed:
                pass
            else:
                break
        assert killer.done == at
        folder = latest(output)
        assert folder is not None
        other.restore(folder)
        assert same(other.tensors(), states[step_of(folder)])
        found.append(step_of(folder))
        run.save()
        assert [entry.name for entry in (output / "checkpoints").iterdir()] == ["step-000002"]
        shutil.rmtree(output)
    assert {1, 2} == set(found)
    assert found == sorted(found)
    assert at > 15


def sharded(rank: int, folder: Path) -> None:
    """In each of two processes: train sharded, save, restore into another, go on; the first leaves whole tensors behind."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", timedelta(seconds=LIMIT / 2), world_size=2, rank=rank)
    run, other = Run(folder / "run", shard=True), Run(folder / "run", shard=True)
    run.train(2)
    checkpoint = run.save({"position": 7})
    distributed.barrier()
    assert other.restore(checkpoint, other.config).data == {"position": 7}
    for made in (run, other):
        made.train(3)
    whole = [{name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in made.tensors().items()} for made in (run, other)]
    assert same(*whole)
    if rank == 0:
        torch.save(whole[0], folder / "whole.pt")
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_state_is_written_whole_and_read_by_any_number_of_processes(tmp_path: Path) -> None:
    context = multiprocessing.spawn(sharded, (tmp_path,), nprocs=2, join=False)
    end = time.monotonic() + LIMIT
    try:
        while not context.join(timeout=1):
            assert time.monotonic() < end, f"the processes did not end in {LIMIT} seconds"
    finally:
        for process in context.processes:
            process.kill()
    folder = latest(tmp_path / "run")
    assert folder is not None
    SwapUNet.from_pretrained(folder, subfolder="unet_ema")
    alone = Run(tmp_path / "run")
    alone.restore(folder, alone.config)
    alone.train(3)
    expected = torch.load(tmp_path / "whole.pt")
    assert expected.keys() == alone.tensors().keys()
    for name, tensor in alone.tensors().items():
        assert greatest_difference(tensor, expected[name]) <= 1e-5, name
    assert module.step_of(folder) == 2
