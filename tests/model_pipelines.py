"""A small pipeline for tests: the miniature with a U-Net whose every layer counts."""

import numpy as np
import torch

from videofactory.model import miniature
from videofactory.model.pipeline import TextToVideoSwapPipeline

SMALL = {"num_frames": 3, "height": 32, "width": 48, "num_inference_steps": 3}
TINY_UNET = {"block_out_channels": (16, 16), "norm_num_groups": 4, "swap_windows": ((4, 4, 4), (4, 2, 2))}


def small_pipeline() -> TextToVideoSwapPipeline:
    """The miniature with a still smaller U-Net, whose layers over time count: a fresh one has zeros at their ends."""
    unet = miniature.unet(seed=1, **TINY_UNET)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(5)
        for parameter in unet.parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    pipeline = miniature.pipeline(unet=unet)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make_video(
    pipe: TextToVideoSwapPipeline, prompt: str | list[str] | None = "a red circle", seed: int = 0, **settings
) -> np.ndarray:
    """The frames of a small video, by default as (B, F, H, W, 3)."""
    options = {**SMALL, "generator": seeded(seed), "output_type": "np", **settings}
    return pipe(prompt, **options).frames
