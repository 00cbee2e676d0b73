"""Captioned frames of the miniature world for training its tiny models, with some pairs of colour and form held out altogether."""

from __future__ import annotations

import colorsys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context

import cv2
import numpy as np
from numpy.typing import NDArray

from videofactory.pipelines.sample.backgrounds import BACKGROUNDS
from videofactory.pipelines.sample.scene import Renderer, caption_of, draw_shot
from videofactory.pipelines.sample.shapes import COLOURS, FORMS, UNNAMED_FORMS

SIDE = 96
"""Width and height, in pixels, of what the tiny models see: the whole frame, squeezed."""

MASK = 32
"""Rows and columns of the masks that tell where the shape is."""

HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "star"),
        ("orange", "cross"),
        ("yellow", "circle"),
        ("green", "triangle"),
        ("blue", "ring"),
        ("purple", "square"),
        ("white", "star"),
    }
)
"""Pairs that no caption in training names: 7 of 48. Their forms are seen in other and in nameless colours (see
`train_vision.Batch`). That a model names them right shows that it has learned colours and forms, not a list."""

SEEN: tuple[tuple[str, str], ...] = tuple((c, f) for c in COLOURS for f in FORMS if (c, f) not in HELD_OUT)
ANY_COLOUR = "any"
"""In a pair: a random colour, far from every colour that has a name."""

FORMS_ALONE: tuple[tuple[str, str], ...] = tuple((ANY_COLOUR, form) for form in FORMS)
COLOURS_ALONE: tuple[tuple[str, str], ...] = tuple((c, f) for c in COLOURS for f in UNNAMED_FORMS)

_COLOUR_WORDS, _BACKGROUND_NAMES = tuple(COLOURS), tuple(BACKGROUNDS)
_FRAMES_PER_BACKGROUND = 4
_CHUNK = 200
_FAR = 20.0
"""Distance in RGB, 0 to 255 per channel, from every named colour beyond which a colour is one without a name."""


@dataclass(frozen=True)
class Frames:
    """Frames and what they show.

    Attributes:
        pixels: uint8 [n, SIDE, SIDE, 3] RGB.
        colour, form, background: int64 [n], indices into `COLOURS`, `FORMS`, `BACKGROUNDS`; -1 for a colour or a
            form without a name.
        masks: uint8 [n, MASK, MASK]: how much of each cell the shape covers, 0 to 255.
    """

    pixels: NDArray[np.uint8]
    colour: NDArray[np.int64]
    form: NDArray[np.int64]
    background: NDArray[np.int64]
    masks: NDArray[np.uint8]

    def caption(self, index: int) -> str:
        """The caption of one frame. A form without a name is a "shape"; for a colour without one the first of all words stands in."""
        form = "shape" if self.form[index] < 0 else FORMS[self.form[index]]
        return caption_of(_COLOUR_WORDS[max(0, self.colour[index])], form, _BACKGROUND_NAMES[self.background[index]])

    def __add__(self, other: Frames) -> Frames:
        """These frames and those of `other`."""
        return Frames(*(np.concatenate([getattr(self, field.name), getattr(other, field.name)]) for field in fields(self)))


def render_frames(count: int, seed: int, pairs: tuple[tuple[str, str], ...] = SEEN, processes: int = 2) -> Frames:
    """Render `count` frames of random shots at random moments, compressed as a clip's middle frame is, squeezed to `SIDE`.

    Args:
        count: number of frames.
        seed: same seed, same frames, whatever the number of processes.
        pairs: the colours and forms that occur, evenly.
        processes: that render at once.
    """
    seeds = np.random.SeedSequence(seed).spawn(-(-count // _CHUNK))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        chunks = list(pool.map(_render_chunk, seeds, [pairs] * len(seeds)))
    joined = [np.concatenate(parts)[:count] for parts in zip(*chunks, strict=True)]
    return Frames(*joined)


def _render_chunk(seed: np.random.SeedSequence, pairs: tuple[tuple[str, str], ...]) -> tuple[NDArray[np.generic], ...]:
    cv2.setNumThreads(1)
    rng = np.random.default_rng(seed)
    pixels = np.zeros((_CHUNK, SIDE, SIDE, 3), np.uint8)
    labels = np.zeros((_CHUNK, 3), np.int64)
    masks = np.zeros((_CHUNK, MASK, MASK), np.uint8)
    renderer: Renderer | None = None
    for i in range(_CHUNK):
        colour, form = pairs[rng.integers(len(pairs))]
        value = _any_colour(rng) if colour == ANY_COLOUR else COLOURS[colour]
        shot = draw_shot(rng, rng.uniform(1.5, 4.0), pair=(colour, form))
        if renderer is None or i % _FRAMES_PER_BACKGROUND == 0:
            renderer = Renderer(shot, 320, 180)
        else:
            # Another shape over the same scenery: painting it is most of the work.
            scenery = renderer.shot
            renderer.shot = shot = replace(shot, background=scenery.background, hue=scenery.hue, seed=scenery.seed)
        moment = shot.duration * rng.uniform(0.2, 0.8)
        pixels[i] = _as_seen(renderer.frame(moment, value), rng)
        labels[i] = (
            _COLOUR_WORDS.index(colour) if colour in COLOURS else -1,
            FORMS.index(form) if form in FORMS else -1,
            _BACKGROUND_NAMES.index(shot.background),
        )
        masks[i] = _mask(renderer, moment)
    return pixels, labels[:, 0], labels[:, 1], labels[:, 2], masks


def _any_colour(rng: np.random.Generator) -> tuple[float, float, float]:
    """A random RGB colour that stands out from the muted backgrounds, being either strong or light."""
    named = np.array(list(COLOURS.values()))
    while True:
        saturation = rng.uniform(0, 1)
        value = rng.uniform(0.88, 1.0) if saturation < 0.45 else rng.uniform(0.5, 1.0)
        red, green, blue = (255 * part for part in colorsys.hsv_to_rgb(rng.uniform(0, 1), saturation, value))
        if np.linalg.norm(named - (red, green, blue), axis=1).min() > _FAR:
            return red, green, blue


def _mask(renderer: Renderer, moment: float) -> NDArray[np.uint8]:
    blank = np.zeros((renderer.height, renderer.width, 3), np.uint8)
    renderer.draw(blank, moment, (255, 255, 255))
    return np.asarray(cv2.resize(blank[..., 0], (MASK, MASK), interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _as_seen(frame: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """The frame after compression (JPEG blocks stand in for the codecs') and the squeeze to a model's input."""
    quality = int(rng.integers(35, 95))
    _, coded = cv2.imencode(".jpg", frame, [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = cv2.imdecode(coded, cv2.IMREAD_COLOR)
    way = cv2.INTER_AREA if rng.random() < 0.7 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(decoded, (SIDE, SIDE), interpolation=way), dtype=np.uint8)
