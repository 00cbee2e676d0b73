"""Batches of videos and captions as the latents and embedded texts that the U-Net is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from videofactory.model.pipeline_texts import embed, shortened

from .objective import generators
from .start import Models

FRAMES_AT_ONCE = 64
"""Frames that pass through the VAE side by side; more take memory and no less time."""


def cut_captions(captions: Sequence[str], total: int, tokenizer: Any) -> str | None:
    """How many captions, of `total` that there are, the text encoder does not read to their end; `None` where there is none."""
    length = tokenizer.model_max_length
    read = tokenizer(list(captions), verbose=False).input_ids if captions else []
    longer = [text for text, tokens in zip(captions, read, strict=True) if len(tokens) > length]
    if not longer:
        return None
    all_of_them = f" (of {total})" if len(captions) < total else ""
    return (
        f"{len(longer)} of {len(captions)} captions{all_of_them} have more than the {length} tokens that the text encoder reads, and are "
        f"cut; the first is {shortened(longer[0])!r}"
    )


class Encoder:
    """Turns batches into latents and texts, without gradients.

    Args:
        models: with the frozen VAE and text encoder, on their device.
        device: where they are.
        precision: of both; the results are float32.
    """

    def __init__(self, models: Models, device: torch.device, precision: torch.dtype = torch.float32) -> None:
        self._models, self._device, self._precision = models, device, precision

    @torch.no_grad()
    def latents(self, batch: dict[str, Any], seed: int, step: int, samples: Sequence[int]) -> torch.Tensor:
        """The latents of a batch, as the U-Net takes them, float32 (B, C, F, H, W).

        Args:
            batch: with `video`, uint8 (B, 3, F, H, W), or with `latents` made beforehand.
            seed, step, samples: what the sample of the VAE's posterior follows from; see `objective.generators`.
        """
        if "latents" in batch:
            return batch["latents"].to(self._device, torch.float32, non_blocking=True)
        video = batch["video"].to(self._device, non_blocking=True)
        count, _, frames, _, _ = video.shape
        pictures = video.transpose(1, 2).flatten(0, 1)
        parts = [self._posterior(part) for part in pictures.split(FRAMES_AT_ONCE)]
        mean, deviation = (torch.cat(part).unflatten(0, (count, frames)).transpose(1, 2) for part in zip(*parts, strict=True))
        sources = generators(seed, step, samples, "posterior")
        noise = torch.stack([torch.randn(mean.shape[1:], generator=source) for source in sources]).to(mean)
        config = self._models.vae.config
        return (mean + deviation * noise - (config.shift_factor or 0.0)) * config.scaling_factor

    def _posterior(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        pixels = (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32):
            posterior = self._models.vae.encode(pixels).latent_dist
        return posterior.mean.float(), posterior.std.float()

    @torch.no_grad()
    def texts(self, captions: Sequence[str]) -> torch.Tensor:
        """Embedded captions, float32 (B, T, D)."""
        with torch.autocast(self._device.type, self._precision, enabled=self._precision != torch.float32):
            embedded = embed(captions, self._models.tokenizer, self._models.text_encoder, self._device)
        return embedded.float()
