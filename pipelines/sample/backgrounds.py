"""The scenery of the miniature world: muted, textured pictures, larger than the frame so that a camera can travel over them."""

from __future__ import annotations

import colorsys
import math

import cv2
import numpy as np
from numpy.typing import NDArray

BACKGROUNDS: dict[str, str] = {
    "stripes": "a striped background",
    "checker": "a checkered background",
    "clouds": "a cloudy background",
    "gradient": "a shaded background",
    "dots": "a dotted background",
}
"""Backgrounds and how a caption names them."""

MARGIN = 1.6
"""How many frame widths (and heights) of scenery there are."""


def paint_background(
    kind: str, width: int, height: int, hue: float, lightness: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """A picture of `MARGIN` times the frame's size, uint8 [height, width, 3] RGB.

    Colours are muted (saturation at most 0.3) so that a shape stands out; a fine grain lies over every kind, because motion
    cannot be seen on an even surface.

    Args:
        kind: a key of `BACKGROUNDS`.
        width, height: of the frame, in pixels. All structure scales with the width.
        hue: of the tint, 0 to 1.
        lightness: mean, 0 to 1.
        rng: decides phase, angle and grain.
    """
    if kind not in BACKGROUNDS:
        raise ValueError(f"background {kind!r} is none of {', '.join(BACKGROUNDS)}")
    rows, columns = round(height * MARGIN), round(width * MARGIN)
    y, x = np.mgrid[0:rows, 0:columns].astype(np.float32) / width
    angle, phase = rng.uniform(0, math.pi), rng.uniform(0, 2 * math.pi)
    u = x * math.cos(angle) + y * math.sin(angle)
    v = y * math.cos(angle) - x * math.sin(angle)
    period = rng.uniform(0.09, 0.13)
    if kind == "stripes":
        pattern = _steep(np.sin(u * (2 * math.pi / period) + phase))
    elif kind == "checker":
        wave = np.sin(u * (math.pi / period) + phase) * np.sin(v * (math.pi / period))
        pattern = _steep(wave * 2)
    elif kind == "clouds":
        pattern = 1.6 * _value_noise(rng, rows, columns, cells=7) + 0.8 * _value_noise(rng, rows, columns, cells=15)
    elif kind == "gradient":
        pattern = (u - u.mean()) * 1.9
    else:
        wave = np.cos(u * (2 * math.pi / period) + phase) + np.cos(v * (2 * math.pi / period))
        pattern = np.clip((wave - 0.75) * 5, -1, 1)
    grain = 0.35 * _value_noise(rng, rows, columns, cells=60) + 0.2 * _value_noise(rng, rows, columns, cells=140)
    value = np.clip(lightness * (1 + 0.38 * np.clip(pattern, -1, 1) + 0.5 * grain), 0, 1)
    tint = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.12, 0.3), 1.0), dtype=np.float32)
    return np.clip(value[..., None] * (255 * tint), 0, 255).astype(np.uint8)


def _steep(wave: NDArray[np.float32]) -> NDArray[np.float32]:
    """A sine with flat tops and soft edges."""
    return np.clip(wave * 4, -1, 1)


def _value_noise(rng: np.random.Generator, rows: int, columns: int, cells: int) -> NDArray[np.float32]:
    """Random values on a coarse grid of `cells` columns, interpolated smoothly. About -1 to 1."""
    grid = rng.uniform(-1, 1, (max(2, round(cells * rows / columns)), cells)).astype(np.float32)
    return np.asarray(cv2.resize(grid, (columns, rows), interpolation=cv2.INTER_CUBIC), dtype=np.float32)
