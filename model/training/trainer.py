"""The training loop: what happens at a step, and what happens every so many of them.

    with joined() as processes:
        Trainer(load_config("miniature"), processes).run()

A step is a function of the weights, the optimiser's state, and (seed, step): the order of clips, their frames, captions, noise and
dropout follow from these numbers. So a run that was killed goes on from its last checkpoint to the same weights, bit by bit where
the machine computes the same, and several processes do what one would with the same clips per step.
"""

from __future__ import annotations

import logging
import math
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from videofactory.model.pipeline_inputs import check_size

from . import checkpoints
from .config import TrainingConfig, dump_config
from .data import Loader
from .encode import Encoder, cut_captions
from .latents import fingerprint
from .log import Log, Watch, check_trackers, watching
from .objective import denoising_losses, draw, seed_layers, sum_by_timestep
from .options import FACTOR
from .parameters import (
    averaged,
    build_optimizer,
    check_images,
    choose_trained,
    clip_gradients,
    count,
    count_table,
    learning_rate_share,
    moving_average,
    set_learning_rate,
    trained,
)
from .processes import Processes, alone_in, gradients_meet, signals_ask, wrap
from .rate import Rate, most_memory
from .start import Models, load_models
from .tensor_files import CheckpointError
from .validation import Validation

logger = logging.getLogger(__name__)

TIMESTEP_BINS = 10
PIPELINE = "pipeline"


class NotFiniteError(ArithmeticError):
    """A loss or gradient is not a number: the weights can be trusted no longer; the message says which checkpoint can."""


class Trainer:
    """One run, seen from one process.

    Args:
        config: of the run.
        processes: see `processes.joined`.

    Attributes:
        step: steps of the optimiser that are done; above 0 where the output held a checkpoint.
        stopping: whether a signal asked to end.
        models: the U-Net that is trained, and what is around it.
        loader: of the batches; `loader.table` says which clips went where.

    Raises:
        ConfigError: the output holds a run with other settings.
        CheckpointError: its checkpoint does not fit.
        DatasetError, BucketError, LatentsError: the dataset cannot be trained on so; see `data.Loader`.
        OSError, ValueError: a model is not there, or does not fit.
    """

    def __init__(self, config: TrainingConfig, processes: Processes) -> None:
        self.config, self.processes = config, processes
        check_trackers(config)
        self._precision = torch.bfloat16 if config.precision == "bfloat16" else torch.float32
        self.models = self._load()
        unet = self.models.unet
        encoder_precision = self._precision if processes.device.type == "cuda" else torch.float32
        self._encoder = Encoder(self.models, processes.device, encoder_precision)
        for bucket in config.data.buckets:
            check_size(*bucket.size, FACTOR, levels=len(unet.config.block_out_channels))
        self.loader = self._open()
        if processes.main and (cut := cut_captions(*self.loader.captions(), self.models.tokenizer)):
            logger.warning("%s", cut)
        if config.data.images:
            check_images(unet)
        self._model = wrap(unet, processes, config.parallel, images=bool(config.data.images))
        self._optimizer = build_optimizer(unet, config.optimiser, config.model.spatial)
        self._average = moving_average(unet, config.ema) if config.ema else None
        self._validation = Validation(config, self.models, self._encoder, processes) if config.validation else None
        self.step = self._resume()
        self.stopping = False

    def describe(self) -> str:
        """What is trained on what, before it begins."""
        batches = self.config.steps * self.config.optimiser.accumulate
        numbers = ", ".join(f"{name} {value:.3g}" for name, value in self._visits(batches).items())
        return "\n\n".join(
            (
                self.loader.table.text(),
                f"visits per clip in {self.config.steps} steps: {numbers}",
                count_table(count(self.models.unet)),
            )
        )

    def run(self) -> bool:
        """Train to the last step, with checkpoints, validations and log lines on the way.

        Returns:
            Whether the last step was reached; false where a signal (SIGINT, SIGTERM) asked to end before, after a checkpoint.

        Raises:
            NotFiniteError: a loss or gradient is not a number.
            BadClipsError: too many clips are unreadable.
            OutputBusyError: another run writes to the same output.
        """
        with alone_in(Path(self.config.output), self.processes):
            if self.processes.agree(self._begun_by_another()):
                raise CheckpointError(
                    f"another run has written to {self.config.output} since this one looked into it; start the command again"
                )
            return self._run()

    def _run(self) -> bool:
        config, main = self.config, self.processes.main
        trains = self.step < config.steps
        if main and trains:
            (Path(config.output) / "config.yaml").write_text(dump_config(config), encoding="utf-8")
        accumulate = config.optimiser.accumulate
        batches = self.loader.iterate(self.step * accumulate, config.steps * accumulate)
        with (
            self.loader,
            Log(config, self.step, main) as log,
            watching(self.step, config.steps, main) as watch,
            signals_ask(self._ask_to_stop),
        ):
            # A run that was killed between a checkpoint and its validation.
            if self.step and self._is_due(self._validation) and not self.processes.as_main_says(log.validated):
                log.write([self._validate()])
            if trains:
                self._loop(batches, log, watch)
        if self.step < config.steps:
            return False
        # A run that was killed while it wrote it has none.
        if trains or not (Path(config.output) / PIPELINE).is_dir():
            self._finish()
        return True

    def _begun_by_another(self) -> bool:
        """Whether the output holds another checkpoint than the one that this run goes on from."""
        found = checkpoints.latest(self.config.output) if self.processes.main else None
        return self.processes.main and (checkpoints.step_of(found) if found else 0) != self.step

    def _loop(self, batches: Iterator[dict[str, Any]], log: Log, watch: Watch | None) -> None:
        config = self.config
        rate = Rate(self.models.unet, self.processes, self._precision, config.optimiser.accumulate)
        pending: list[torch.Tensor] = []
        rates: list[dict[str, float]] = []
        by_timestep = torch.zeros(2, TIMESTEP_BINS, device=self.processes.device)
        rate.begin(self.loader.waited)
        while self.step < config.steps:
            numbers, sums, lr = self._train_step([next(batches) for _ in range(config.optimiser.accumulate)], rate)
            pending.append(numbers)
            rates.append(lr)
            by_timestep += sums
            self.step += 1
            if watch is not None:
                watch.advance(self.step)
            last = self.step == config.steps
            saves = last or self.step % config.checkpoints.every == 0
            validates = last or self.step % config.validation.every == 0 if config.validation else False
            # Several processes ask each other only where they wait for each other anyway.
            stops = self.stopping and self.processes.world == 1
            if stops or saves or validates or self.step % config.log.every == 0:
                lines = self._lines(pending, rates, by_timestep, rate)
                log.write(lines)
                if watch is not None:
                    watch.show(self.step, lines[-1])
                stops = self.processes.agree(self.stopping)
                if saves or stops:
                    self._save()
                if stops and not last:
                    logger.warning(
                        "stopped after step %d of %d, as asked; the same command goes on from there", self.step, config.steps
                    )
                    return
                if validates:
                    log.write([self._validate()])
                pending, rates = [], []
                by_timestep.zero_()
                rate.begin(self.loader.waited)

    def _train_step(self, batches: list[dict[str, Any]], rate: Rate) -> tuple[torch.Tensor, torch.Tensor, dict[str, float]]:
        """One step of the optimiser; nothing in it waits for the device.

        Returns:
            The loss and the norm of the gradient, (2,); sums and counts of losses by time step, (2, TIMESTEP_BINS), of this
            process; and the learning rates by group.
        """
        config, device = self.config, self.processes.device
        seed_layers(config.seed, self.step, self.processes.rank)
        lr = set_learning_rate(self._optimizer, learning_rate_share(self.step, config.optimiser, config.steps))
        self._optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=device)
        sums = torch.zeros(2, TIMESTEP_BINS, device=device)
        for number, batch in enumerate(batches):
            losses = self._losses(batch, self.step * len(batches) + number, last=number == len(batches) - 1)
            loss += losses.weighted.detach().mean() / len(batches)
            sums += sum_by_timestep(losses, self._train_timesteps, TIMESTEP_BINS)
            rate.add(batch["bucket"])
        parameters = trained(self.models.unet)
        norm = clip_gradients(parameters.values(), config.optimiser.clip_norm)
        self._optimizer.step()
        if self._average is not None:
            self._average.step(parameters.values())
        return torch.stack([loss, norm.to(loss)]), sums, lr

    def _losses(self, batch: dict[str, Any], number: int, last: bool) -> Any:
        """Forward and backward pass of a batch, the `number`-th since the first step."""
        config, device = self.config, self.processes.device
        first = self.processes.rank * len(batch["captions"])
        samples = range(first, first + len(batch["captions"]))
        latents = self._encoder.latents(batch, config.seed, number, samples)
        text = self._encoder.texts(batch["captions"])
        draws = draw(config.seed, number, samples, latents.shape, self._train_timesteps, config.noise).to(device)
        with gradients_meet(self._model, now=last):
            with torch.autocast(device.type, self._precision, enabled=self._precision != torch.float32):
                losses = denoising_losses(self._model, self.models.scheduler, latents, text, draws, config.noise)
            torch.autograd.backward(losses.weighted.mean() / config.optimiser.accumulate)
        return losses

    @property
    def _train_timesteps(self) -> int:
        return int(self.models.scheduler.config.num_train_timesteps)

    def _lines(
        self, pending: list[torch.Tensor], rates: list[dict[str, float]], by_timestep: torch.Tensor, rate: Rate
    ) -> list[dict[str, Any]]:
        """A line of the log per step since the last ones; the last has means and rates as well.

        Raises:
            NotFiniteError: a number in them is none.
        """
        numbers = torch.stack(pending)
        # The gradient is the same in all processes, the losses are each one's own.
        losses = self.processes.sum(numbers[:, 0].contiguous()) / self.processes.world
        first = self.step - len(pending) + 1
        lines: list[dict[str, Any]] = [
            {"step": first + place, "loss": loss, "gradient_norm": norm, "learning_rate": lr}
            for place, (loss, norm, lr) in enumerate(zip(losses.tolist(), numbers[:, 1].tolist(), rates, strict=True))
        ]
        self._check_finite(lines)
        totals, counts = self.processes.sum(by_timestep.clone()).tolist()
        width = self._train_timesteps // TIMESTEP_BINS
        means = {
            f"{place * width}": total / number for place, (total, number) in enumerate(zip(totals, counts, strict=True)) if number
        }
        lines[-1] |= {
            "mean_loss": sum(line["loss"] for line in lines) / len(lines),
            "loss_from_timestep": means,
            **rate.end(len(lines), self.loader.waited),
            "memory_gb": most_memory(self.processes.device) / 1e9,
            "bad_clips": self.processes.total(len(self.loader.bad)),
        }
        return lines

    def _validate(self) -> dict[str, Any]:
        assert self._validation is not None
        began = time.perf_counter()
        with averaged(self.models.unet, self._average):
            found = self._validation.run(self.step)
        return {"step": self.step, "validation": {**found, "seconds": time.perf_counter() - began}}

    def _load(self) -> Models:
        config = self.config
        video = next((bucket for bucket in config.data.buckets if bucket.frames > 1), config.data.buckets[0])
        models = load_models(config.model, config.noise, video.size, config.seed).to(self.processes.device)
        choose_trained(models.unet, config.model, config.seed)
        if config.gradient_checkpointing:
            models.unet.enable_gradient_checkpointing()
        if config.compile:
            models.unet.compile_repeated_blocks()
        return models

    def _open(self) -> Loader:
        data = self.config.data
        options = data.loading(self.config.seed, pin_memory=self.processes.device.type == "cuda")
        vae = fingerprint(self.models.vae) if data.latents is not None else None
        rank, world = self.processes.rank, self.processes.world
        return Loader(data.dataset, data.loaded_buckets(), options, rank=rank, world=world, latents=data.latents, vae=vae)

    def _visits(self, batches: int) -> dict[str, float]:
        """How often a clip of each bucket is seen in so many batches, on average."""
        table, images = self.loader.table, self.config.data.image_share
        videos = sum(len(share.clips) / table.global_batch(share) for share in table.shares if not share.bucket.is_image)
        pictures = sum(len(share.clips) / table.global_batch(share) for share in table.shares if share.bucket.is_image)
        return {
            share.bucket.name: batches * (images / pictures if share.bucket.is_image else (1 - images) / videos)
            for share in table.shares
        }

    def _check_finite(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            if not (math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"])):
                saved = checkpoints.latest(self.config.output)
                start = f"The last good state is {saved}: begin with model.start={saved}/unet" if saved else "Begin anew"
                raise NotFiniteError(
                    f"step {line['step']} has the loss {line['loss']} and the gradient norm {line['gradient_norm']}. {start} in another "
                    "output, with a lower optimiser.learning_rate, more optimiser.warmup_steps, or precision=float32"
                    + (" (and model.components, which names the pipeline of the other parts)" if saved else "")
                )

    def _save(self) -> None:
        data = {"processes": self.processes.world, "clips": self._clips()}
        checkpoints.save(self.config.output, self.step, self.models.unet, self._optimizer, self._average, self.config, data)

    def _clips(self) -> dict[str, int]:
        """How many clips each bucket has: with other numbers the order of all of them is another."""
        return {share.bucket.name: len(share.clips) for share in self.loader.table.shares}

    def _resume(self) -> int:
        """Go on from the latest checkpoint, if there is one: the one that the main process finds."""
        found = checkpoints.latest(self.config.output) if self.processes.main else None
        step = self.processes.as_main_says(checkpoints.step_of(found) if found else None)
        if step is None:
            return 0
        folder = checkpoints.checkpoint_folder(self.config.output, step)
        if self.processes.agree(not checkpoints.is_complete(folder)):
            raise CheckpointError(
                f"{folder} is not there for every process; `output` has to be on a disk that all machines share"
            )
        restored = checkpoints.restore(folder, self.models.unet, self._optimizer, self._average, self.config)
        before = restored.data or {}
        for name, value in {"processes": self.processes.world, "clips": self._clips()}.items():
            if before.get(name, value) != value:
                raise CheckpointError(
                    f"{folder} was made with {name} {before[name]}, and now it is {value}: the order of the clips would be another. "
                    f"Set it back, or begin with model.start={folder}/unet in another output"
                )
        if self.processes.main:
            logger.info("going on from %s", folder)
        return restored.step

    def _is_due(self, validation: Validation | None) -> bool:
        if validation is None or self.config.validation is None:
            return False
        return self.step == self.config.steps or self.step % self.config.validation.every == 0

    def _ask_to_stop(self) -> None:
        self.stopping = True
        if self.processes.main:
            sys.stderr.write("\nending soon, with a checkpoint; once more to end at once\n")

    def _finish(self) -> None:
        """Write the trained pipeline to `OUTPUT/pipeline`, with averaged weights; with adapters, these alone are in the checkpoint."""
        from videofactory.model.unet import SwapUNet

        if self.config.model.train == "lora" or not self.processes.main:
            return
        target = Path(self.config.output) / PIPELINE
        saved = checkpoints.latest(self.config.output)
        if saved is None:
            return
        partial = target.with_name(f".{PIPELINE}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        weights = saved / ("unet_ema" if self._average else "unet")
        self.models.pipeline(SwapUNet.from_pretrained(weights)).save_pretrained(partial)
        if target.is_dir():
            shutil.rmtree(target)  # of a run with fewer steps
        partial.rename(target)
