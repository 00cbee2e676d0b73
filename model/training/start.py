"""The models that a run begins with: the U-Net that is trained, and the frozen VAE, text encoder and scheduler around it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from videofactory.model.pipeline import TextToVideoSwapPipeline
from videofactory.model.unet import SwapUNet

from .objective import training_scheduler
from .settings import ModelSettings, NoiseSettings, StartSettings

MINIATURE = "miniature"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Models:
    """What training needs; only the U-Net is trained.

    Attributes:
        unet: float32.
        vae, text_encoder, tokenizer: frozen, in evaluation mode.
        scheduler: the noise schedule that is trained with, and stored in the trained pipeline.
        size: (frames, height, width in pixels) that the trained pipeline makes unless told otherwise.
    """

    unet: SwapUNet
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    size: tuple[int, int, int]

    def pipeline(self, unet: Any | None = None) -> TextToVideoSwapPipeline:
        """The pipeline of these parts, with another U-Net if one is given."""
        frames, height, width = self.size
        return TextToVideoSwapPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet if unet is None else unet,
            scheduler=self.scheduler,
            default_frames=frames,
            default_height=height,
            default_width=width,
        )

    def to(self, device: torch.device) -> Models:
        """All parts on a device."""
        for part in (self.unet, self.vae, self.text_encoder):
            torch.nn.Module.to(part, device)
        return self


def load_models(settings: ModelSettings, noise: NoiseSettings, size: tuple[int, int, int], seed: int = 0) -> Models:
    """The models as the configuration names them.

    Args:
        settings: `start`, `components` and the overrides of the U-Net.
        noise: what the scheduler has to predict.
        size: (frames, height, width) of the first bucket, for the trained pipeline's defaults.
        seed: of weights that are new.

    Raises:
        OSError: a model is not there, and cannot be fetched.
        ValueError: a model is of another kind, or two parts do not fit together.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = _unet(settings.start, settings.overrides, seed)
    vae, text_encoder, tokenizer, scheduler = _components(settings)
    for part in (vae, text_encoder):
        part.requires_grad_(False).eval()
    models = Models(unet.float(), vae, text_encoder, tokenizer, training_scheduler(scheduler, noise), size)
    _check_prediction(scheduler, noise, settings.start)
    models.pipeline()  # raises where two parts do not fit together
    return replace(models, unet=models.unet.train())


def _unet(start: StartSettings, overrides: dict[str, Any], seed: int) -> SwapUNet:
    if MINIATURE in (start.saved, start.image_model):
        from videofactory.model import miniature

        return miniature.unet(seed, **overrides) if start.saved else miniature.unet_of_images(seed, **overrides)
    options = {"revision": start.revision, "variant": start.variant, **overrides}
    options = {name: value for name, value in options.items() if value is not None}
    source, load = _source(start)
    where, subfolder = _place(source)
    return load(where, subfolder=subfolder, **options)


def _source(start: StartSettings) -> tuple[str, Callable[..., Any]]:
    if start.image_model is not None:
        return start.image_model, SwapUNet.from_unet2d
    if start.video_model is not None:
        return start.video_model, SwapUNet.from_unet3d
    assert start.saved is not None  # exactly one of the three is given
    return start.saved, SwapUNet.from_pretrained


def _place(source: str) -> tuple[str, str | None]:
    """Where the U-Net is: in the folder `unet` of a pipeline, or, in a folder on this disk, by itself."""
    folder = Path(source)
    return (source, None) if (folder / "config.json").is_file() and not (folder / "unet").is_dir() else (source, "unet")


def _components(settings: ModelSettings) -> tuple[Any, Any, Any, Any]:
    start = settings.start
    source = settings.components or start.saved or start.image_model or start.video_model
    assert source is not None  # one of the last three is given
    if source == MINIATURE:
        from videofactory.model import miniature

        return miniature.vae(), miniature.text_encoder(), miniature.tokenizer(), miniature.scheduler()
    if Path(source).is_dir() and not (Path(source) / "vae").is_dir():
        raise ValueError(
            f"{source!r} holds no VAE; name a pipeline that gives VAE, text encoder, tokenizer and scheduler in model.components"
        )
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    options = {} if settings.components else {"revision": start.revision}
    weights = options if settings.components else {**options, "variant": start.variant}
    return (
        AutoencoderKL.from_pretrained(source, subfolder="vae", use_safetensors=True, torch_dtype=torch.float32, **weights),
        CLIPTextModel.from_pretrained(source, subfolder="text_encoder", use_safetensors=True, dtype=torch.float32, **weights),
        CLIPTokenizer.from_pretrained(source, subfolder="tokenizer", **options),
        DDIMScheduler.from_pretrained(source, subfolder="scheduler", **options),
    )


def _check_prediction(scheduler: Any, noise: NoiseSettings, start: StartSettings) -> None:
    """Warn where trained weights have to learn another prediction first."""
    before = scheduler.config.get("prediction_type", "epsilon")
    if before != noise.prediction and start.saved != MINIATURE:
        logger.warning(
            "the start was trained to predict %s and noise.prediction is %s; its weights will have to learn that first",
            before,
            noise.prediction,
        )
