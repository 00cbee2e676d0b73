"""Frames of a dataset for training the tiny VAE: whole clips in memory, random crops out of them, and the fidelity of pictures."""

from __future__ import annotations

import math

import torch
from torch.nn import functional

FULL_HEIGHT, FULL_WIDTH = 192, 344
CROP_HEIGHT, CROP_WIDTH = 48, 64
_SMALLEST_SCALE, _LARGEST_SCALE = 1 / 3.2, 1 / 2.4


def read_clips(dataset: str, split: str, frames: int, height: int, width: int) -> torch.Tensor:
    """Evenly spaced frames of every clip of a split, uint8 `[clips * frames, 3, height, width]`.

    Raises:
        ValueError: the split has no clip.
    """
    from videofactory.shards.reader import Decode, MapDataset

    clips = MapDataset(dataset, split=split, decode=Decode(frames=frames, height=height, width=width))
    return torch.cat([clips[number]["video"] for number in range(len(clips))])


def random_crops(frames: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Crops at random scale and place, mirrored and recoloured at random: float `[count, 3, CROP_HEIGHT, CROP_WIDTH]`, -1 to 1.

    The scale is about that of the miniature's frames, a third of `frames`. A few dozen clips show few colours;
    exchanged channels and another brightness and contrast make more of them.
    """
    total, _, height, width = frames.shape
    crops = []
    for _ in range(count):
        number, across, down, mirrors, order = (torch.rand((), generator=generator).item() for _ in range(5))
        scale, contrast, shift = torch.rand(3, generator=generator).tolist()
        factor = _SMALLEST_SCALE * (_LARGEST_SCALE / _SMALLEST_SCALE) ** scale
        rows, columns = min(height, round(CROP_HEIGHT / factor)), min(width, round(CROP_WIDTH / factor))
        top, left = int(down * (height - rows + 1)), int(across * (width - columns + 1))
        picture = frames[int(number * total), :, top : top + rows, left : left + columns]
        flips = [axis for axis, bit in ((1, 1), (2, 2)) if int(mirrors * 4) & bit]
        picture = picture.flip(flips)
        if order < 0.5:
            picture = picture[torch.randperm(3, generator=generator)]
        pixels = picture[None].float() / 127.5 - 1
        pixels = functional.interpolate(pixels, (CROP_HEIGHT, CROP_WIDTH), mode="bilinear", antialias=True, align_corners=False)
        crops.append((pixels * (0.8 + 0.4 * contrast) + 0.3 * (shift - 0.5)).clamp(-1, 1))
    return torch.cat(crops)


def signal_to_noise(pictures: torch.Tensor, originals: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in decibels of pictures in -1 to 1, over all pixels of all of them together."""
    error = functional.mse_loss(pictures.clamp(-1, 1).float(), originals.float()).item()
    return 10 * math.log10(4 / max(error, 1e-12))
