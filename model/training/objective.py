"""The diffusion loss, as small functions over a diffusers scheduler, with noise that depends on nothing but its sample's number.

Each sample's time step and noise follow from (seed, step, number of the sample in the step over all processes). So one process
and many draw the same, and a run that was interrupted goes on as if it had not been; there is no state of a generator to keep.

    draws = draw(seed, step, numbers, latents.shape, 1000, settings)
    losses = denoising_losses(unet, scheduler, latents, text, draws, settings)     # one per sample
    losses.weighted.mean().backward()
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import compute_snr

if TYPE_CHECKING:
    from .settings import NoiseSettings

TERMINAL_SNR_FLOOR = 1.0
"""What the signal-to-noise ratio counts at least, in weights, where the terminal step has none (Salimans & Ho 2022)."""


@dataclass(frozen=True)
class Draws:
    """What is random about B samples.

    Attributes:
        timesteps: int64 (B,), from 0 to below the scheduler's number.
        noise: float32 (B, C, F, H, W), offset noise included.
        dropped: bool (B,), whose text is to be replaced by the empty one.
    """

    timesteps: torch.Tensor
    noise: torch.Tensor
    dropped: torch.Tensor

    def to(self, device: torch.device | str) -> Draws:
        """The same on a device; copies from page-locked memory do not wait."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("timesteps", "noise", "dropped")}
        return replace(self, **moved)


@dataclass(frozen=True)
class Losses:
    """What a step learns from, per sample: float32 (B,), with gradients in `weighted` alone.

    Attributes:
        weighted: `plain` by the weights of the signal-to-noise ratio; its mean is to be minimised.
        plain: squared error, the mean over channels, frames, height and width; to be shown by time step.
        timesteps: int64 (B,).
    """

    weighted: torch.Tensor
    plain: torch.Tensor
    timesteps: torch.Tensor


def training_scheduler(scheduler: Any, settings: NoiseSettings) -> DDIMScheduler:
    """The noise schedule of `scheduler` with the prediction that is trained, to train with and to store in the trained pipeline.

    With `zero_terminal_snr` the betas are rescaled (Lin et al. 2023, arXiv:2305.08891, algorithm 1; diffusers'
    `rescale_zero_terminal_snr`), and sampling begins at the last step (`timestep_spacing="trailing"`), as it then must.

    Args:
        scheduler: any scheduler of diffusers with betas, for example the DDPM or DDIM scheduler of the start's pipeline.
        settings: see `NoiseSettings`.

    Raises:
        ValueError: the scheduler's configuration has no betas, so it is of no diffusion model in the sense meant here.
    """
    config = dict(scheduler.config)
    if "beta_start" not in config and config.get("trained_betas") is None:
        raise ValueError(f"{type(scheduler).__name__} has no betas; a DDPM or DDIM scheduler is wanted, as Stable Diffusion's")
    changes: dict[str, Any] = {"prediction_type": settings.prediction, "rescale_betas_zero_snr": settings.zero_terminal_snr}
    if settings.zero_terminal_snr:
        changes["timestep_spacing"] = "trailing"
    return DDIMScheduler.from_config(config, **changes)


def generators(seed: int, step: int, samples: Sequence[int], purpose: str) -> list[torch.Generator]:
    """A generator on the CPU per sample, which depends on nothing but its four arguments.

    PyTorch's generator on the CPU keeps the lower 32 bits of a seed only, so a hash makes them. In a run of 10 million samples
    about one in 400 gets noise that some other sample had before, which does no harm.

    Args:
        seed: of the run.
        step: of the optimiser.
        samples: number of each sample in this step, over all processes and accumulated batches.
        purpose: what is drawn; different purposes draw apart from each other, whatever the number of draws.
    """
    made = []
    for sample in samples:
        digest = hashlib.blake2b(f"{seed}/{step}/{sample}/{purpose}".encode(), digest_size=4).digest()
        made.append(torch.Generator().manual_seed(int.from_bytes(digest, "big")))
    return made


def seed_layers(seed: int, step: int, rank: int) -> None:
    """Seed PyTorch's global generators for one step of one process: dropout inside the layers has no generator of its own."""
    torch.manual_seed(int.from_bytes(hashlib.blake2b(f"{seed}/{step}/{rank}/layers".encode(), digest_size=4).digest(), "big"))


def draw(
    seed: int,
    step: int,
    samples: Sequence[int],
    shape: Sequence[int],
    train_timesteps: int,
    settings: NoiseSettings,
    caption_dropout: float = 0.0,
    timestep: int | None = None,
) -> Draws:
    """Time steps, noise and dropped captions of a batch, on the CPU.

    Args:
        seed, step, samples: see `generators`; as many samples as the batch has.
        shape: of the latents, (B, C, F, H, W).
        train_timesteps: the scheduler's `num_train_timesteps`; time steps are drawn evenly from all of them.
        settings: strength of offset noise, and whether it is per clip or frame.
        caption_dropout: probability, 0 to 1, that a caption is dropped; 0 where the data loader has dropped them already.
        timestep: the time step of all samples, instead of drawn ones, for the loss of a validation.

    Raises:
        ValueError: there are more or fewer samples than the batch has, or the time step is none of the scheduler's.
    """
    if len(samples) != shape[0] or len(shape) != 5:
        raise ValueError(f"{len(samples)} samples and latents of the shape {tuple(shape)}; (samples, C, F, H, W) is wanted")
    if timestep is not None and not 0 <= timestep < train_timesteps:
        raise ValueError(f"time step {timestep}; the scheduler has the steps 0 to {train_timesteps - 1}")
    if timestep is None:
        chosen = [
            torch.randint(train_timesteps, (1,), generator=source) for source in generators(seed, step, samples, "timestep")
        ]
    else:
        chosen = [torch.tensor([timestep])] * len(samples)
    noise = torch.stack([torch.randn(shape[1:], generator=source) for source in generators(seed, step, samples, "noise")])
    if settings.offset_noise:
        noise = offset_noise(
            noise, settings.offset_noise, settings.offset_noise_per, generators(seed, step, samples, "offset noise")
        )
    chances = [torch.rand(1, generator=source) for source in generators(seed, step, samples, "caption")]
    return Draws(torch.cat(chosen), noise, torch.cat(chances) < caption_dropout)


def offset_noise(noise: torch.Tensor, strength: float, per: str, sources: Sequence[torch.Generator]) -> torch.Tensor:
    """Noise with a random constant added to every channel of a picture, so that the mean brightness is noisy, too.

    noise + strength * n, where n is normal and one number per channel of a clip, or of a frame (Guttenberg 2023,
    https://www.crosslabs.org/blog/diffusion-with-offset-noise; per frame in VGen's `noise_strength`).

    Args:
        noise: (B, C, F, H, W).
        strength: deviation of the constant; the noise's is 1.
        per: `clip`, the same for all frames, or `frame`.
        sources: a generator per sample.
    """
    _, channels, frames, _, _ = noise.shape
    shape = (channels, frames if per == "frame" else 1, 1, 1)
    constants = torch.stack([torch.randn(shape, generator=source) for source in sources])
    return noise + strength * constants.to(noise)


def drop_captions(text: torch.Tensor, empty: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    """Embedded texts (B, T, C) with the embedded empty text (1, T, C) or (T, C) where `dropped` (B,) is true."""
    return torch.where(dropped.to(text.device)[:, None, None], empty.to(text), text)


def training_target(
    scheduler: Any, prediction: str, latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What the U-Net should predict of sqrt(a) latents + sqrt(1 - a) noise, where a is `alphas_cumprod` at the time step.

    The noise (Ho et al. 2020, arXiv:2006.11239), or the velocity sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho 2022,
    arXiv:2202.00512, appendix D).

    Args:
        scheduler: with `alphas_cumprod` and `get_velocity`.
        prediction: `epsilon` or `v_prediction`.
        latents, noise: (B, C, F, H, W).
        timesteps: (B,).

    Raises:
        ValueError: the prediction is another one.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "v_prediction":
        return scheduler.get_velocity(latents, noise, timesteps)
    raise ValueError(f"prediction is {prediction!r}; epsilon or v_prediction is wanted")


def signal_to_noise(scheduler: Any, timesteps: torch.Tensor) -> torch.Tensor:
    """a / (1 - a) for `alphas_cumprod` a at each time step; from 0 upwards; the shape of `timesteps`, float32."""
    return compute_snr(scheduler, timesteps)


def min_snr_weights(snr: torch.Tensor, gamma: float, prediction: str, floor: float = 0.0) -> torch.Tensor:
    """Weights of a loss by its signal-to-noise ratio s: min(s, gamma) / s for epsilon, and / (s + 1) for velocity.

    Both are the weight min(s, gamma) of an error in the clean sample (Hang et al. 2023, arXiv:2303.09556, section 3.4). With a
    floor it is min(max(s, floor), gamma), so that under velocity a step of pure noise (s = 0) has the weight `floor` rather than
    none: the truncated ratio max(s, 1) of Salimans & Ho (2022, arXiv:2202.00512, section 4).

    Args:
        snr: (B,), from 0.
        gamma: above 0; 5 in the paper.
        prediction: `epsilon` or `v_prediction`.
        floor: from 0 to gamma.

    Raises:
        ValueError: another prediction, or a floor above gamma.
    """
    if floor > gamma:
        floor_and_gamma = f"floor {floor} is above gamma {gamma}"
        raise ValueError(f"{floor_and_gamma}, so every step would weigh the same in the clean sample; raise gamma")
    counted = snr.clamp(floor, gamma)
    if prediction == "epsilon":
        # min(s, gamma) / s is 1 wherever s does not exceed gamma, and so at its limit s = 0, where the quotient is not a number.
        return torch.where(snr > 0, counted / snr.clamp(min=torch.finfo(snr.dtype).tiny), torch.ones_like(snr))
    if prediction == "v_prediction":
        return counted / (snr + 1)
    raise ValueError(f"prediction is {prediction!r}; epsilon or v_prediction is wanted")


def loss_weights(scheduler: Any, timesteps: torch.Tensor, settings: NoiseSettings) -> torch.Tensor:
    """The weight of each sample's squared error, float32 (B,): ones, or those of min-SNR."""
    if settings.min_snr_gamma is None:
        return torch.ones(len(timesteps), device=timesteps.device)
    floor = min(TERMINAL_SNR_FLOOR, settings.min_snr_gamma) if settings.zero_terminal_snr else 0.0
    return min_snr_weights(signal_to_noise(scheduler, timesteps), settings.min_snr_gamma, settings.prediction, floor)


def denoising_losses(
    unet: Callable[..., Any], scheduler: Any, latents: torch.Tensor, text: torch.Tensor, draws: Draws, settings: NoiseSettings
) -> Losses:
    """Add noise to latents, let the U-Net predict, and compare.

    Args:
        unet: the U-Net, or what wraps it for several processes; called under the caller's autocast.
        scheduler: see `training_scheduler`.
        latents: scaled latents (B, C, F, H, W), of any floating precision; the noise is added, and the loss taken, in float32.
        text: embedded texts (B, T, C), in the precision that the U-Net takes.
        draws: see `draw`; on the device of the latents.
        settings: prediction and weights.
    """
    clean = latents.float()
    noisy = scheduler.add_noise(clean, draws.noise, draws.timesteps)
    target = training_target(scheduler, settings.prediction, clean, draws.noise, draws.timesteps)
    prediction = unet(noisy.to(text.dtype), draws.timesteps, text, return_dict=False)[0]
    plain = (prediction.float() - target).square().mean(dim=(1, 2, 3, 4))
    weights = loss_weights(scheduler, draws.timesteps, settings)
    return Losses(plain * weights, plain.detach(), draws.timesteps)


def sum_by_timestep(losses: Losses, train_timesteps: int, bins: int = 10) -> torch.Tensor:
    """Sums and counts of the plain losses in `bins` equal ranges of time steps: float32 (2, bins), on the losses' device.

    Such sums can be added over steps and processes without waiting for the device; the first row by the second is the mean.
    """
    places = (losses.timesteps * bins).div(train_timesteps, rounding_mode="floor")
    sums = torch.zeros(2, bins, device=losses.plain.device)
    sums[0].index_add_(0, places, losses.plain.float())
    sums[1].index_add_(0, places, torch.ones_like(losses.plain, dtype=torch.float32))
    return sums
