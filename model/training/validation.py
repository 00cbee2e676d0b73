"""What a run is worth in between: the loss on clips that are not trained on, by time step, and videos of the same prompts and noise.

Both use the moving average where there is one. Clips, noise and prompts are the same every time, so numbers and pictures of one run
can be compared with each other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videofactory.model.video_files import contact_sheet, evenly_spaced, write_video

from .buckets import BucketError
from .clips import DatasetError
from .config import TrainingConfig
from .data import Loader
from .encode import Encoder
from .objective import Draws, denoising_losses, draw
from .processes import Processes
from .start import Models

logger = logging.getLogger(__name__)

SHEET_COLUMNS = 8


class Validation:
    """The validations of a run.

    Args:
        config: of the run, with `validation`.
        models: whose U-Net is being trained.
        encoder: of its batches.
        processes: which share the work.

    Raises:
        ValueError: a time step is none of the scheduler's, or the pipeline cannot make such videos.
    """

    def __init__(self, config: TrainingConfig, models: Models, encoder: Encoder, processes: Processes) -> None:
        assert config.validation is not None
        self._config, self._settings = config, config.validation
        self._models, self._encoder, self._processes = models, encoder, processes
        train_timesteps = models.scheduler.config.num_train_timesteps
        if wrong := [number for number in self._settings.timesteps if number >= train_timesteps]:
            raise ValueError(f"validation.timesteps holds {wrong[0]}; the scheduler has the steps 0 to {train_timesteps - 1}")
        for prompt in self._settings.prompts:
            # Now, not after the first steps.
            settings = self._settings
            models.pipeline().check_inputs(prompt, num_inference_steps=settings.steps, guidance_scale=settings.guidance_scale)
        self._loaders = list(self._open()) if self._settings.split is not None else []

    def run(self, step: int) -> dict[str, Any]:
        """Losses and videos after `step` steps; every process calls it, inside `parameters.averaged`.

        Returns:
            `loss`, the mean over clips and time steps, and `loss_by_timestep`; empty where there is no split.
        """
        unet = self._models.unet
        unet.eval()
        try:
            with torch.no_grad():
                losses = self._losses()
            self._videos(step)
        finally:
            unet.train()
        return losses

    def _open(self) -> Iterator[tuple[Loader, int]]:
        """For every bucket, its clips of the split one by one, and how many of them are used."""
        data = self._config.data
        for bucket in data.loaded_buckets():
            # Latents made beforehand are those of the split that is trained on.
            options = data.loading(
                self._config.seed,
                split=self._settings.split,
                image_share=1.0 if bucket.is_image else 0.0,
                caption_dropout=0.0,
                order="shuffled",
                workers=0,
            )
            try:
                loader = Loader(data.dataset, [replace(bucket, batch=1)], options)
            except (BucketError, DatasetError) as error:
                logger.warning("no validation loss for %s: %s", bucket.name, str(error).partition("\n")[0])
                continue
            yield loader, min(self._settings.clips, loader.table.used)

    def _losses(self) -> dict[str, Any]:
        timesteps = self._settings.timesteps
        sums = torch.zeros(2, len(timesteps), device=self._processes.device)
        for loader, clips in self._loaders:
            for number in range(clips):
                # With FSDP every process has to take part in every pass.
                if self._config.parallel == "fsdp" or number % self._processes.world == self._processes.rank:
                    sums[0] += self._loss(loader.at(number), number)
                    sums[1] += 1
        if not self._loaders:
            return {}
        means = self._processes.sum(sums)
        values = (means[0] / means[1]).tolist()
        by_timestep = {str(timestep): value for timestep, value in zip(timesteps, values, strict=True)}
        return {"loss": sum(values) / len(values), "loss_by_timestep": by_timestep}

    def _loss(self, batch: dict[str, Any], number: int) -> torch.Tensor:
        """The loss of one clip at all time steps at once, (timesteps,)."""
        config, scheduler = self._config, self._models.scheduler
        latents = self._encoder.latents(batch, config.seed, 0, [number])
        text = self._encoder.texts(batch["captions"])
        steps = config.validation.timesteps if config.validation else ()
        drawn = [
            draw(config.seed, 0, [number], latents.shape, scheduler.config.num_train_timesteps, config.noise, timestep=timestep)
            for timestep in steps
        ]
        draws = Draws(*(torch.cat([getattr(one, name) for one in drawn]) for name in ("timesteps", "noise", "dropped")))
        shape = (len(steps), *latents.shape[1:])
        with torch.autocast(latents.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
            losses = denoising_losses(
                self._models.unet,
                scheduler,
                latents.expand(shape),
                text.expand(len(steps), -1, -1),
                draws.to(latents.device),
                config.noise,
            )
        return losses.plain

    def _videos(self, step: int) -> None:
        """Videos of the prompts into `OUTPUT/validation/step-…`, each with a picture of some of its frames."""
        settings, processes = self._settings, self._processes
        if not settings.prompts:
            return
        folder = Path(self._config.output) / "validation" / f"step-{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        pipeline: Any = self._models.pipeline()
        pipeline.set_progress_bar_config(disable=True)
        tasks = [(prompt, seed) for prompt in settings.prompts for seed in range(settings.videos)]
        for number, (prompt, seed) in enumerate(tasks):
            mine = number % processes.world == processes.rank
            if not mine and self._config.parallel != "fsdp":
                continue
            with torch.autocast(processes.device.type, torch.bfloat16, enabled=self._config.precision == "bfloat16"):
                frames = pipeline(
                    prompt,
                    num_inference_steps=settings.steps,
                    guidance_scale=settings.guidance_scale,
                    guidance_rescale=settings.guidance_rescale,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="np",
                ).frames[0]
            if mine:
                pixels = (np.nan_to_num(frames) * 255).round().astype("uint8")
                write_video(folder / f"{number:03d}.mp4", pixels, settings.fps)
                contact_sheet([(f"seed {seed}: {prompt}", evenly_spaced(pixels, SHEET_COLUMNS))]).save(
                    folder / f"{number:03d}.png"
                )
