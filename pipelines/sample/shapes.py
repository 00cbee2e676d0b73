"""The actors of the miniature world: filled shapes of one colour, described without units of pixels and drawn at any size."""

from __future__ import annotations

import math

import cv2
import numpy as np
from numpy.typing import NDArray

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (218, 28, 34),
    "orange": (252, 132, 8),
    "yellow": (250, 230, 30),
    "green": (28, 168, 56),
    "cyan": (30, 216, 226),
    "blue": (36, 70, 226),
    "purple": (158, 40, 200),
    "white": (248, 248, 246),
}
"""Colour words and their RGB values, far enough apart to survive chroma subsampling, noise and a dim scene."""

FORMS: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "ring")

UNNAMED_FORMS: tuple[str, ...] = ("hexagon", "bar", "kite", "gear")
"""Forms that no caption names and no video shows: from them the tiny models learn colours, apart from the forms they shall name."""

_SUBPIXEL_BITS = 4


def outline(form: str) -> list[NDArray[np.float64]]:
    """Contours of `form` inside the unit circle, each [points, 2] as x, y. A second contour is a hole.

    Raises:
        ValueError: the form is not one of `FORMS` or `UNNAMED_FORMS`.
    """
    if form == "circle":
        return [_polygon(48, 0.9)]
    if form == "ring":
        return [_polygon(48, 0.95), _polygon(48, 0.5)]
    if form == "square":
        return [_polygon(4, 1.08, turn=math.pi / 4)]
    if form == "triangle":
        return [_polygon(3, 1.1, turn=-math.pi / 2)]
    if form == "star":
        points = _polygon(10, 1.1, turn=-math.pi / 2)
        points[1::2] *= 0.42
        return [points]
    if form == "cross":
        arm = 0.32
        quarter = np.array([(arm, -1.0), (arm, -arm), (1.0, -arm)])
        turns = [quarter @ np.array([(math.cos(a), math.sin(a)), (-math.sin(a), math.cos(a))]) for a in _QUARTERS]
        return [np.concatenate(turns)]
    if form == "hexagon":
        return [_polygon(6, 1.0)]
    if form == "bar":
        return [np.array([(-1.1, -0.4), (1.1, -0.4), (1.1, 0.4), (-1.1, 0.4)])]
    if form == "kite":
        return [np.array([(0.0, -1.1), (0.6, -0.2), (0.0, 1.1), (-0.6, -0.2)])]
    if form == "gear":
        points = _polygon(24, 1.0)
        points[1::2] *= 0.8
        return [points]
    raise ValueError(f"form {form!r} is none of {', '.join(FORMS)}")


_QUARTERS = tuple(i * math.pi / 2 for i in range(4))


def draw_shape(
    frame: NDArray[np.uint8],
    form: str,
    colour: tuple[float, float, float],
    centre: tuple[float, float],
    radius: float,
    angle: float,
) -> None:
    """Draw a shape into `frame`, with smooth edges.

    Args:
        frame: uint8 [height, width, 3] RGB, changed in place.
        form: one of `FORMS` or `UNNAMED_FORMS`.
        colour: RGB, 0 to 255.
        centre: x, y in frame widths from the upper left corner (so y ends at height / width).
        radius: in frame widths.
        angle: rotation in radians.
    """
    width = frame.shape[1]
    rotation = np.array([(math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))])
    contours = []
    for contour in outline(form):
        pixels = (contour @ rotation * radius + np.asarray(centre)) * width
        contours.append(np.round(pixels * (1 << _SUBPIXEL_BITS)).astype(np.int32))
    cv2.fillPoly(frame, contours, colour, lineType=cv2.LINE_AA, shift=_SUBPIXEL_BITS)


def _polygon(corners: int, radius: float, turn: float = 0.0) -> NDArray[np.float64]:
    angles = turn + np.arange(corners) * (2 * math.pi / corners)
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)
