"""`python -m videofactory.model.miniature.train --data data/sample`: make the miniature's files again, training its VAE on a dataset.

Everything follows from one seed. The text encoder and the scheduler are not trained.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.nn import functional

from videofactory.model.miniature import FRAMES, HEIGHT, WEIGHTS, WIDTH
from videofactory.model.miniature.training_frames import (
    FULL_HEIGHT,
    FULL_WIDTH,
    random_crops,
    read_clips,
    signal_to_noise,
)
from videofactory.model.miniature.words import build_text_encoder, build_tokenizer

logger = logging.getLogger(__name__)

CHANNELS = (16, 32, 40, 40)
BATCH, LEARNING_RATE, WARM_UP = 12, 3e-3, 50
DIVERGENCE_WEIGHT, EDGE_WEIGHT, CONTRAST_WEIGHT = 1e-3, 0.5, 4.0
_LOG_EVERY = 200


@dataclass(frozen=True)
class Fidelity:
    """How well the VAE gives frames back, in decibels of peak signal-to-noise, and the deviation of its latents."""

    train: float
    val: float
    deviation: float


def build_vae(seed: int = 0) -> Any:
    """An untrained `AutoencoderKL` of the miniature's size: 4 latent channels, factor 8."""
    from diffusers import AutoencoderKL

    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=CHANNELS,
        down_block_types=("DownEncoderBlock2D",) * len(CHANNELS),
        up_block_types=("UpDecoderBlock2D",) * len(CHANNELS),
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=4,
        sample_size=WIDTH,
        mid_block_add_attention=False,
    )


def train_vae(frames: torch.Tensor, steps: int, seed: int = 0, start: Any = None, learning_rate: float = LEARNING_RATE) -> Any:
    """A VAE trained on random crops of `frames`, uint8 `[n, 3, height, width]`; `start` is one to go on from.

    The loss is the squared error of pixels, those that stand out weighing more, and of their differences to the right and below
    (edges carry the shapes), and the divergence of the latents from a normal distribution, which only keeps them compact.
    """
    vae = (start or build_vae(seed)).to(memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(seed)
    optimiser = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _pace(step, steps))
    began = time.monotonic()
    for step in range(steps):
        pixels = random_crops(frames, BATCH, generator).contiguous(memory_format=torch.channels_last)
        loss, error = _losses(vae, pixels, generator)
        optimiser.zero_grad()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        if step % _LOG_EVERY == 0 or step == steps - 1:
            decibels = 10 * math.log10(4 / error.item())
            logger.info("step %d of %d: %.2f dB on crops, %.0f s", step, steps, decibels, time.monotonic() - began)
    return vae.eval()


def _pace(step: int, steps: int) -> float:
    """Share of the learning rate: a linear warm-up, then half a cosine down to a hundredth."""
    if step < WARM_UP:
        return (step + 1) / WARM_UP
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - WARM_UP) / max(1, steps - WARM_UP))) / 2


def _losses(vae: Any, pixels: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and the squared error of the pixels alone."""
    posterior = vae.encode(pixels).latent_dist
    pictures = vae.decode(posterior.sample(generator=generator)).sample
    error = functional.mse_loss(pictures, pixels)
    # A shape is a twentieth of the picture, and most of what a person looks for.
    contrast = (pixels - pixels.mean(dim=(2, 3), keepdim=True)).square().amax(dim=1, keepdim=True)
    weights = 1 + CONTRAST_WEIGHT * contrast
    weighted = ((pictures - pixels).square() * weights).mean() / weights.mean()
    edges = functional.mse_loss(pictures.diff(dim=-1), pixels.diff(dim=-1))
    edges = edges + functional.mse_loss(pictures.diff(dim=-2), pixels.diff(dim=-2))
    divergence = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    return weighted + EDGE_WEIGHT * edges + DIVERGENCE_WEIGHT * divergence, error.detach()


@torch.no_grad()
def measure(vae: Any, train: torch.Tensor, val: torch.Tensor) -> Fidelity:
    """How well `vae` gives back frames, uint8 `[n, 3, height, width]`, by the mean of its latents."""
    found, deviations = [], []
    for frames in (train, val):
        originals = frames.float() / 127.5 - 1
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in torch.split(originals, 32)])
        pictures = torch.cat([vae.decode(part).sample for part in torch.split(latents, 32)])
        found.append(signal_to_noise(pictures, originals))
        deviations.append(latents.std().item())
    return Fidelity(train=found[0], val=found[1], deviation=deviations[0])


def save(vae: Any, captions: list[str], out: Path, seed: int) -> None:
    """Write every component under `out`, each in its own folder: weights as safetensors, in half precision."""
    from diffusers import DDIMScheduler

    tokenizer = build_tokenizer(captions)
    vae.half().save_pretrained(out / "vae", safe_serialization=True)
    tokenizer.save_pretrained(out / "tokenizer")
    build_text_encoder(tokenizer, seed).half().save_pretrained(out / "text_encoder")
    DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    ).save_pretrained(out / "scheduler")


def describe(fidelity: Fidelity, out: Path, clips: int, steps: int, seed: int) -> None:
    """Write the model card."""
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors")) / 1e6
    lines = [
        "---",
        "license: apache-2.0",
        "---",
        "",
        "# The miniature's weights",
        "",
        "The parts of a text-to-video pipeline around its U-Net, of the classes that the big ones have, so that everything runs",
        f"offline: {size:.2f} MB of weights.",
        "",
        f"- `vae/`: an `AutoencoderKL` with channels {', '.join(map(str, CHANNELS))}, 4 latent channels and a factor of 8, stored in",
        f"  half precision. Trained on random crops of frames of {clips} clips of the sample dataset, which `make build-dataset`",
        f"  renders, and on nobody's pictures. At {WIDTH} x {HEIGHT} pixels it gives frames back with {fidelity.val:.1f} dB of peak",
        f"  signal-to-noise on clips that it was not trained on (split val), {fidelity.train:.1f} dB on its own. Shapes and colours",
        "  can be told; fine grain is lost, and the points of a star are worn. `scaling_factor` is one over the deviation of the",
        f"  latents of the split train, {fidelity.deviation:.3f}.",
        "- `text_encoder/`: a `CLIPTextModel` with 64 channels and 2 layers at **random weights**. It was never trained: it keeps",
        "  words apart, and no more. A U-Net trained on its states learns what they mean.",
        "- `tokenizer/`: a `CLIPTokenizer` in which every word of the sample's captions is one token; other words are spelt.",
        "- `scheduler/`: a `DDIMScheduler` with the noise schedule of Stable Diffusion.",
        "- `image_unet/`: a `UNet2DConditionModel` with 32 and 64 channels, in half precision, trained with the parts above on pictures of",
        "  the larger sample by `python -m videofactory.model.train miniature-image`, and kept by",
        "  `python -m videofactory.model.miniature.image_model`. Seven pairs of colour and form were held out of its captions. Another VAE",
        "  or text encoder needs it to be trained anew.",
        "- There is no video U-Net: `videofactory.model.miniature.unet_of_images()` makes one that begins with the image model, and",
        "  `unet()` an untrained one, whose videos are noise.",
        "",
        "**What it is not:** a model for your videos. It knows coloured shapes on plain patterns and nothing else.",
        "",
        f"Made by `python -m videofactory.model.miniature.train --data data/sample --steps {steps} --seed {seed}`.",
        "Licence: Apache-2.0, that of VideoFactory.",
    ]
    (out / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    data: Annotated[str, typer.Option(help="The sample dataset: a folder, or an object-store URI.")] = "data/sample",
    out: Annotated[Path, typer.Option(help="Where the components go; by default the package's own.")] = WEIGHTS,
    steps: Annotated[int, typer.Option(min=1, help="Training steps of the VAE, 12 crops each.")] = 4000,
    seed: Annotated[int, typer.Option(help="Same seed, same weights, on the same machine and versions.")] = 0,
    start: Annotated[Path | None, typer.Option(help="Folder of a saved VAE to go on from.", show_default=False)] = None,
    learning_rate: Annotated[float, typer.Option(help="At its highest; less for going on.")] = LEARNING_RATE,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the miniature's VAE on frames of the sample dataset, and write all of the miniature's files."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    from diffusers import AutoencoderKL

    from videofactory.shards.reader import MapDataset

    torch.set_num_threads(threads)
    captions = [sample["caption"] for sample in MapDataset(data, split="train")]  # type: ignore[attr-defined]
    frames = read_clips(data, "train", 24, FULL_HEIGHT, FULL_WIDTH)
    begun = None
    if start is not None:
        # A config that was loaded names the folder that it came from; one that was made does not.
        begun = build_vae(seed)
        begun.load_state_dict(AutoencoderKL.from_pretrained(start, use_safetensors=True).state_dict())
    vae = train_vae(frames, steps, seed, begun, learning_rate)
    save(vae, captions, out, seed)
    stored = AutoencoderKL.from_pretrained(out / "vae", use_safetensors=True)
    measured = (read_clips(data, split, FRAMES, HEIGHT, WIDTH) for split in ("train", "val"))
    fidelity = measure(stored.float().eval(), *measured)
    # Not of `stored`, which would name the folder that it came from.
    vae.register_to_config(scaling_factor=round(1 / fidelity.deviation, 5))
    vae.save_config(out / "vae")
    describe(fidelity, out, len(captions), steps, seed)
    logger.info("peak signal-to-noise: %.2f dB on train, %.2f dB on val; written to %s", fidelity.train, fidelity.val, out)


if __name__ == "__main__":
    typer.run(main)
