"""Test videos whose cuts are known exactly: textured scenes with camera moves, moving objects, sensor noise and flashes.

The scenes are synthetic, the coding is not: every file is encoded by a real encoder at a stated quality. Used by the tests of
shots and signals, and by `benchmarks/film.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import numpy.typing as npt

Image = npt.NDArray[np.uint8]


def texture(rng: np.random.Generator, width: int, height: int) -> Image:
    """A BGR image of `height` x `width` with detail at every scale, as photographs have, around a random colour."""
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        grain = rng.standard_normal((2**octave * 9 // 16 + 2, 2**octave, 3)).astype(np.float32)
        grain = 0.6 * grain.mean(axis=2, keepdims=True) + 0.4 * grain
        image += cv2.resize(grain, (width, height), interpolation=cv2.INTER_CUBIC) * (42.0 / octave)
    for _ in range(12):
        centre = (int(rng.integers(width)), int(rng.integers(height)))
        axes = (int(rng.integers(width // 40, width // 6)), int(rng.integers(height // 40, height // 4)))
        shade = rng.uniform(-70, 70, 3).tolist()
        patch = np.zeros_like(image)
        cv2.ellipse(patch, centre, axes, float(rng.uniform(0, 180)), 0, 360, shade, -1, cv2.LINE_AA)
        image += patch
    return np.clip(image + rng.uniform(60, 190, 3).astype(np.float32), 0, 255).astype(np.uint8)


@dataclass
class Scene:
    """One shot: a textured background under a moving camera, and objects that move on their own.

    Attributes:
        seed: what decides everything that is not given.
        width, height: frame size in pixels.
        speed: speed of the camera's pan in frame widths per second; drawn up to 0.25 when `None`.
        objects: number of objects that move on their own.
        noise: standard deviation of the sensor noise, in levels of 255.
    """

    seed: int
    width: int
    height: int
    speed: float | None = None
    objects: int = 2
    noise: float = 3.0
    zoom: float | None = None
    _grain: list[npt.NDArray[np.int8]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(self.seed)
        self.background = texture(rng, self.width * 3 // 2, self.height * 3 // 2)
        angle = rng.uniform(0, 2 * np.pi)
        speed = float(rng.uniform(0, 0.25)) if self.speed is None else self.speed
        self.velocity = np.array([np.cos(angle), np.sin(angle)]) * speed * self.width
        self.zoom_rate = float(rng.uniform(-0.06, 0.06)) if self.zoom is None else self.zoom
        self.sprites = [texture(rng, self.width // 6, self.height // 4) for _ in range(self.objects)]
        self.paths = rng.uniform(0.1, 0.9, (self.objects, 2)), rng.uniform(-0.3, 0.3, (self.objects, 2))
        if self.noise:
            shape = (self.height, self.width, 3)
            self._grain = [np.clip(rng.normal(0, self.noise, shape), -127, 127).astype(np.int8) for _ in range(4)]

    def frame(self, time: float, number: int) -> Image:
        """The scene `time` seconds after its start; `number` chooses the grain."""
        scale = 1.0 + self.zoom_rate * time
        centre = np.array([self.width * 0.75, self.height * 0.75]) + self.velocity * time
        shift = centre - scale * np.array([self.width / 2, self.height / 2])
        matrix = np.array([[scale, 0, shift[0]], [0, scale, shift[1]]])
        flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
        size = (self.width, self.height)
        image = cv2.warpAffine(self.background, matrix, size, flags=flags, borderMode=cv2.BORDER_REFLECT_101)
        for sprite, origin, step in zip(self.sprites, *self.paths, strict=True):
            place = (origin + step * time) % 1.0
            x = int(place[0] * (self.width - sprite.shape[1]))
            y = int(place[1] * (self.height - sprite.shape[0]))
            image[y : y + sprite.shape[0], x : x + sprite.shape[1]] = sprite
        if self._grain:
            grain = self._grain[number % len(self._grain)]
            image = cv2.add(image, np.roll(grain, 37 * number, axis=0), dtype=cv2.CV_8U)
        return np.asarray(image, np.uint8)


@dataclass(frozen=True)
class Coding:
    """How a test video is encoded: codec, file suffix, and options of the encoder."""

    codec: str = "libx264"
    suffix: str = ".mp4"
    options: tuple[tuple[str, str], ...] = (("preset", "veryfast"), ("crf", "23"))
    pixel_format: str = "yuv420p"


def write_video(path: Path, frames: Iterator[Image], rate: int | Fraction, coding: Coding = Coding()) -> Path:
    """Encode BGR `frames` at `rate` frames per second into `path`."""
    with av.open(str(path), "w") as container:
        stream = None
        for image in frames:
            if stream is None:
                stream = container.add_stream(coding.codec, rate=rate, options=dict(coding.options))
                stream.height, stream.width = image.shape[:2]
                stream.pix_fmt = coding.pixel_format
            frame = av.VideoFrame.from_ndarray(image, format="bgr24")
            container.mux(stream.encode(frame))
        if stream is None:
            raise ValueError(f"{path.name}: no frames to encode")
        container.mux(stream.encode(None))
    return path


@dataclass(frozen=True)
class Labelled:
    """A file and the numbers of the frames that begin a new shot (the first shot's 0 is left out)."""

    path: Path
    cuts: list[int]
    frames: int
    rate: float


def shot_frames(seed: int, width: int, height: int, lengths: list[int], rate: float, flashes: float = 0.0) -> Iterator[Image]:
    """Frames of consecutive scenes of `lengths` frames; `flashes` is the chance that a shot holds a camera flash of two frames."""
    rng = np.random.default_rng(seed)
    number = 0
    for index, length in enumerate(lengths):
        scene = Scene(seed * 1000 + index, width, height, noise=float(rng.uniform(0, 6)))
        flash = int(rng.integers(length)) if rng.random() < flashes else -9
        for place in range(length):
            image = scene.frame(place / rate, number)
            if 0 <= place - flash < 2:
                image = cv2.convertScaleAbs(image, alpha=1.0, beta=90)
            yield image
            number += 1


def _options(**values: str) -> tuple[tuple[str, str], ...]:
    return tuple((name.replace("_", "-"), value) for name, value in values.items())


CODINGS: tuple[Coding, ...] = (
    Coding(),
    Coding(options=_options(preset="fast", crf="18")),
    Coding(options=_options(preset="medium", crf="28")),
    Coding(options=_options(preset="veryfast", crf="40")),
    Coding(options=_options(preset="veryfast", b="120000", maxrate="120000", bufsize="240000")),
    Coding(options=(*_options(preset="veryfast", crf="30"), ("x264-params", "b-pyramid=none:bframes=3:scenecut=0:keyint=50"))),
    Coding(options=(*_options(preset="veryfast", crf="26"), ("x264-params", "bframes=8:b-adapt=2:ref=6:open-gop=1"))),
    Coding(options=_options(preset="ultrafast", tune="zerolatency", crf="30")),
    Coding("libx265", ".mp4", (*_options(preset="ultrafast", crf="30"), ("x265-params", "log-level=none:bframes=4"))),
    Coding("libx265", ".mkv", (*_options(preset="superfast", crf="34"), ("x265-params", "log-level=none"))),
    Coding("libvpx-vp9", ".webm", (("deadline", "realtime"), ("cpu-used", "8"), ("b", "400000"))),
    Coding("mpeg2video", ".mpg", (("b", "900000"), ("bf", "2"), ("g", "15"))),
    Coding("mpeg4", ".avi", (("b", "600000"), ("bf", "2"))),
    Coding("mjpeg", ".mov", (("q:v", "5"),), "yuvj420p"),
)


def labelled_set(folder: Path, files: int = 20, shots: int = 12, width: int = 320, height: int = 180) -> list[Labelled]:
    """Write `files` labelled videos of `shots` shots each, cycling through `CODINGS`; half of them contain flashes."""
    rates = (25, 30, 24, Fraction(30000, 1001), 25, 50, 24)
    made = []
    for index in range(files):
        rng = np.random.default_rng(7000 + index)
        rate = rates[index % len(rates)]
        lengths = [int(float(rate) * seconds) for seconds in rng.uniform(0.75, 1.4, shots)]
        coding = CODINGS[index % len(CODINGS)]
        if coding.codec in ("mpeg2video", "mpeg4") and rate not in (24, 25, 30, 50):
            rate = 25
        # Some files are large enough for the decoder's loop filter to be skipped.
        scale = 2 if index % 8 == 2 else 1
        frames = shot_frames(index, scale * width, scale * height, lengths, float(rate), flashes=0.5 if index % 2 else 0.0)
        path = write_video(folder / f"labelled_{index:02d}{coding.suffix}", frames, rate, coding)
        made.append(Labelled(path, np.cumsum(lengths)[:-1].tolist(), sum(lengths), float(rate)))
    return made
