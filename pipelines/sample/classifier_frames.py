"""Frames and videos of the miniature world for the classifier: rendered anew, clean or spoilt as a weak model's pictures are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from videofactory.pipelines.sample.scene import Renderer, Shot, draw_shot
from videofactory.pipelines.sample.shapes import COLOURS, FORMS, UNNAMED_FORMS

HEIGHT, WIDTH = 64, 112
"""Of the frames that the classifier reads, in pixels: those of the miniature's videos."""

MASK_HEIGHT, MASK_WIDTH = 16, 28
"""Of its masks, in cells of 4 x 4 pixels."""

FPS = 8.0
"""Frames per second of the videos that it was measured with; it reads others too."""

PAIRS: tuple[tuple[str, str], ...] = tuple((colour, form) for colour in COLOURS for form in FORMS)
"""All pairs of colour and form. A judge has to know every one equally well, those among them that a model never saw."""

_COLOURS, _NAMED_FORMS = tuple(COLOURS), tuple(FORMS)
_RENDERED = 2
"""Scenes are rendered so many times larger and shrunk, as the clips of the dataset are: edges then have true, smooth borders."""
_EMPTY, _CHAOS, _UNNAMED, _RECOLOURED, _CLEAN = 0.07, 0.03, 0.06, 0.08, 0.2
"""Of training frames: shares without a shape, without a scene, with a form that has no name, with exchanged colours, unspoilt."""


@dataclass(frozen=True)
class Degradation:
    """What is wrong with a picture. Lengths are pixels of a frame of `WIDTH`, strengths 1/255; the defaults change nothing.

    Attributes:
        shrink: the picture was this many times smaller.
        blur: standard deviation of a Gaussian.
        block: side of the squares over which colour is smeared; 1 for none.
        stain, stain_size: standard deviation of smooth stains of colour, and the distance of their centres.
        noise: standard deviation of noise in single pixels.
        contrast, saturation: factors; 1 as it was.
        brightness: added.
        quality: of JPEG; 100 for none.
    """

    shrink: float = 1.0
    blur: float = 0.0
    block: int = 1
    stain: float = 0.0
    stain_size: float = 8.0
    noise: float = 0.0
    contrast: float = 1.0
    saturation: float = 1.0
    brightness: float = 0.0
    quality: int = 100


def draw_degradation(rng: np.random.Generator) -> Degradation:
    """A random mixture; each fault occurs in about half of all."""

    def sometimes(value: Any, otherwise: float) -> float:
        return float(value) if rng.random() < 0.5 else otherwise

    return Degradation(
        shrink=sometimes(np.exp(rng.uniform(0, np.log(6))), 1.0),
        blur=sometimes(rng.uniform(0.3, 2.4), 0.0),
        block=int(sometimes(rng.integers(2, 13), 1)),
        stain=sometimes(rng.uniform(2, 16), 0.0),
        stain_size=float(rng.uniform(5, 20)),
        noise=sometimes(rng.uniform(1, 14), 0.0),
        contrast=sometimes(rng.uniform(0.6, 1.25), 1.0),
        saturation=sometimes(rng.uniform(0.55, 1.15), 1.0),
        brightness=sometimes(rng.uniform(-28, 28), 0.0),
        quality=int(sometimes(rng.integers(12, 90), 100)),
    )


def degrade(frame: NDArray[np.uint8], how: Degradation, rng: np.random.Generator) -> NDArray[np.uint8]:
    """The frame with these faults, uint8 [height, width, 3]; `rng` draws stains and noise, anew for every frame."""
    height, width = frame.shape[:2]
    picture = frame.astype(np.float32)
    if how.shrink > 1:
        small = (max(2, round(width / how.shrink)), max(2, round(height / how.shrink)))
        picture = _resized(_resized(picture, small, cv2.INTER_AREA), (width, height), cv2.INTER_LINEAR)
    if how.blur > 0:
        picture = np.asarray(cv2.GaussianBlur(picture, (0, 0), how.blur), dtype=np.float32)
    grey = picture.mean(axis=2, keepdims=True)
    colour = (picture - grey) * how.saturation
    if how.block > 1:
        cells = (max(1, round(width / how.block)), max(1, round(height / how.block)))
        colour = _resized(_resized(colour, cells, cv2.INTER_AREA), (width, height), cv2.INTER_NEAREST)
    mean = float(grey.mean())
    picture = (grey - mean) * how.contrast + mean + how.brightness + colour
    if how.stain > 0:
        picture = picture + how.stain * _stains(rng, height, width, how.stain_size)
    if how.noise > 0:
        picture = picture + how.noise * rng.standard_normal(picture.shape, dtype=np.float32)
    spoilt: NDArray[np.uint8] = np.clip(np.round(picture), 0, 255).astype(np.uint8)
    if how.quality < 100:
        _, coded = cv2.imencode(".jpg", spoilt, [cv2.IMWRITE_JPEG_QUALITY, how.quality])
        spoilt = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR), dtype=np.uint8)
    return spoilt


def render_video(shot: Shot, frames: int = 16, fps: float = FPS, height: int = HEIGHT, width: int = WIDTH) -> NDArray[np.uint8]:
    """Frames about the middle of a shot, uint8 [frames, height, width, 3] RGB; beyond its ends the shape moves on."""
    renderer = Renderer(shot, _RENDERED * width, _RENDERED * height)
    begin = shot.duration / 2 - (frames - 1) / fps / 2
    pictures = [renderer.frame(begin + number / fps) for number in range(frames)]
    return np.stack([cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA) for picture in pictures])


def draw_videos(count: int, seed: int) -> list[Shot]:
    """Shots to judge a classifier by: every pair equally often, as far as `count` goes, everything else drawn from the seed."""
    rng = np.random.default_rng(seed)
    return [draw_shot(rng, float(rng.uniform(1.9, 3.0)), PAIRS[number % len(PAIRS)]) for number in range(count)]


@dataclass(frozen=True)
class Batch:
    """Frames to train on, and what they show.

    Attributes:
        pixels: uint8 [n, HEIGHT, WIDTH, 3] RGB.
        masks: float32 [n, MASK_HEIGHT, MASK_WIDTH], the part of each cell that the shape covers, 0 to 1.
        colour, form: int64 [n], indices into `COLOURS` and `FORMS`; -1 where there is none that has a name.
    """

    pixels: NDArray[np.uint8]
    masks: NDArray[np.float32]
    colour: NDArray[np.int64]
    form: NDArray[np.int64]


class Studio:
    """Sceneries that stay, and random shapes that are drawn over them: painting the scenery is most of the work of a scene."""

    def __init__(self, sceneries: int, seed: int) -> None:
        """Paint so many sceneries; the seed decides them and every batch after."""
        self._rng = np.random.default_rng(seed)
        shots = [draw_shot(self._rng, 2.0) for _ in range(sceneries)]
        self._renderers = [Renderer(shot, _RENDERED * WIDTH, _RENDERED * HEIGHT) for shot in shots]

    def batch(self, size: int) -> Batch:
        """The next frames."""
        frames = [self._frame() for _ in range(size)]
        pixels, masks, colours, forms = zip(*frames, strict=True)
        return Batch(np.stack(pixels), np.stack(masks), np.array(colours, np.int64), np.array(forms, np.int64))

    def _frame(self) -> tuple[NDArray[np.uint8], NDArray[np.float32], int, int]:
        rng = self._rng
        kind = rng.random()
        if kind < _CHAOS:
            chaos = 128 + rng.uniform(20, 80) * _stains(rng, HEIGHT, WIDTH, rng.uniform(2, 30))
            empty = np.zeros((MASK_HEIGHT, MASK_WIDTH), np.float32)
            return degrade(np.clip(chaos, 0, 255).astype(np.uint8), draw_degradation(rng), rng), empty, -1, -1
        renderer, moment, shown = self._scene()
        if kind < _CHAOS + _EMPTY:
            # Far outside the frame.
            renderer.shot, shown = replace(renderer.shot, middle=(-2.0, 0.5)), False
        value = np.array(COLOURS[renderer.shot.colour]) + rng.normal(0, 9, 3)
        red, green, blue = (float(part) for part in np.clip(value, 0, 255))
        frame = _shrunk(renderer.frame(moment, (red, green, blue)))
        mask = _mask(renderer, moment)
        if rng.random() > _CLEAN:
            frame = degrade(frame, draw_degradation(rng), rng)
        colour = _COLOURS.index(renderer.shot.colour) if shown else -1
        form = _NAMED_FORMS.index(renderer.shot.form) if shown and renderer.shot.form in FORMS else -1
        if rng.random() < _RECOLOURED:
            # Forms shall be known in colours without a name too, of which a weak model makes many.
            frame, colour = frame[..., rng.permutation(3)], -1
        if rng.random() < 0.5:
            # Every form stays what it is in a mirror.
            frame, mask = frame[:, ::-1], mask[:, ::-1]
        return frame, mask, colour, form

    def _scene(self) -> tuple[Renderer, float, bool]:
        """A random shot over one of the sceneries, and a moment of it."""
        rng = self._rng
        renderer = self._renderers[rng.integers(len(self._renderers))]
        colour, form = PAIRS[rng.integers(len(PAIRS))]
        if rng.random() < _UNNAMED:
            form = str(rng.choice(UNNAMED_FORMS))
        shot = draw_shot(rng, float(rng.uniform(1.6, 3.0)), (colour, form))
        scenery = renderer.shot
        same: dict[str, Any] = {
            "background": scenery.background,
            "hue": scenery.hue,
            "lightness": scenery.lightness,
            "seed": scenery.seed,
        }
        renderer.shot = replace(shot, logo=bool(rng.random() < 0.08), **same)
        return renderer, float(rng.uniform(0, shot.duration)), True


def _mask(renderer: Renderer, moment: float) -> NDArray[np.float32]:
    blank = np.zeros((renderer.height, renderer.width, 3), np.uint8)
    renderer.draw(blank, moment, (255, 255, 255))
    return _resized(np.float32(1 / 255) * blank[..., 0], (MASK_WIDTH, MASK_HEIGHT), cv2.INTER_AREA)


def _shrunk(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _resized(picture: NDArray[np.float32], size: tuple[int, int], way: int) -> NDArray[np.float32]:
    return np.asarray(cv2.resize(picture, size, interpolation=way), dtype=np.float32)


def _stains(rng: np.random.Generator, height: int, width: int, distance: float) -> NDArray[np.float32]:
    """Smooth noise in colour, [height, width, 3], of a standard deviation of about 1."""
    grid = (max(2, round(height / distance)), max(2, round(width / distance)), 3)
    return _resized(rng.standard_normal(grid, dtype=np.float32), (width, height), cv2.INTER_CUBIC)
