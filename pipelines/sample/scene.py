"""One shot of the miniature world: everything that decides its pixels, drawn from a seed, and the frame at any moment and size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from videofactory.pipelines.sample.backgrounds import BACKGROUNDS, MARGIN, paint_background
from videofactory.pipelines.sample.shapes import COLOURS, FORMS, draw_shape

DIRECTIONS: dict[str, tuple[float, float]] = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
CAMERAS = ("pan", "zoom", "shake")

_NOISE_SLACK = 64


@dataclass(frozen=True)
class Shot:
    """What is seen in one shot. Lengths are in frame widths, times in seconds from the start of the shot.

    Attributes:
        colour, form, background: what a caption tells (keys of `COLOURS`, `FORMS`, `BACKGROUNDS`).
        hue, lightness: of the background, 0 to 1.
        direction, speed: of the shape, in frame widths per second.
        middle: where the shape is at half time (x in widths, y in heights).
        radius: of the shape's circle.
        angle, spin: tilt at half time in radians, and radians per second.
        camera: how the camera moves over the background (one of `CAMERAS`).
        camera_speed: in frame widths per second.
        camera_angle: direction of a pan, radians.
        noise: standard deviation of the sensor noise, in 1/255.
        exposure: factor on every pixel; 1 is a well-lit scene.
        frozen: every frame is the one at half time, noise included.
        bars: fraction of the height that black bars cover (half above, half below).
        logo: a mark lies in a corner.
        duration: seconds.
        seed: of the background's details and the noise.
    """

    colour: str
    form: str
    background: str
    hue: float
    lightness: float
    direction: str
    speed: float
    middle: tuple[float, float]
    radius: float
    angle: float
    spin: float
    camera: str
    camera_speed: float
    camera_angle: float
    noise: float
    duration: float
    seed: int
    exposure: float = 1.0
    frozen: bool = False
    bars: float = 0.0
    logo: bool = False

    @property
    def caption(self) -> str:
        """What one frame shows, in the manner of a captioner: ten words or so, nothing about motion."""
        return caption_of(self.colour, self.form, self.background)

    def position(self, moment: float, aspect: float) -> tuple[float, float]:
        """Centre of the shape `moment` seconds into the shot: x and y in frame widths, in a frame `aspect` times as wide as high."""
        step = DIRECTIONS[self.direction]
        way = self.speed * (moment - self.duration / 2)
        return self.middle[0] + step[0] * way, self.middle[1] / aspect + step[1] * way


def caption_of(colour: str, form: str, background: str) -> str:
    """The caption of a shape before a background. The article suits the colour's first sound."""
    article = "an" if colour[0] in "aeiou" else "a"
    return f"{article} {colour} {form} in front of {BACKGROUNDS[background]}"


def draw_shot(
    rng: np.random.Generator,
    duration: float,
    pair: tuple[str, str] | None = None,
    previous: Shot | None = None,
) -> Shot:
    """A random well-lit, moving shot.

    Args:
        rng: source of every choice.
        duration: seconds.
        pair: colour and form; by default drawn evenly.
        previous: the shot before this one; background, tint and lightness then differ clearly from its.
    """
    colour, form = pair or (str(rng.choice(list(COLOURS))), str(rng.choice(FORMS)))
    kinds = [kind for kind in BACKGROUNDS if previous is None or kind != previous.background]
    if previous is None:
        hue, lightness = rng.uniform(0, 1), rng.uniform(0.34, 0.62)
    else:
        hue = (previous.hue + rng.uniform(0.3, 0.7)) % 1.0
        lightness = rng.uniform(0.5, 0.62) if previous.lightness < 0.48 else rng.uniform(0.34, 0.44)
    direction = str(rng.choice(list(DIRECTIONS)))
    # The way that a shape has, so that at half time it stands well inside the frame and never leaves it entirely.
    way = 0.46 if direction in ("left", "right") else 0.2
    return Shot(
        colour=colour,
        form=form,
        background=str(rng.choice(kinds)),
        hue=hue,
        lightness=lightness,
        direction=direction,
        speed=min(rng.uniform(0.08, 0.2), way / duration),
        middle=(rng.uniform(0.33, 0.67), rng.uniform(0.4, 0.6)),
        radius=rng.uniform(0.12, 0.165),
        angle=rng.uniform(-0.25, 0.25),
        spin=rng.uniform(-0.12, 0.12),
        camera=str(rng.choice(CAMERAS)),
        camera_speed=rng.uniform(0.06, 0.12),
        camera_angle=rng.uniform(0, 2 * math.pi),
        noise=rng.uniform(1.0, 4.0),
        duration=duration,
        seed=int(rng.integers(2**32)),
    )


class Renderer:
    """Renders one shot at one size. Frames depend on nothing but the shot, the moment and the size."""

    def __init__(self, shot: Shot, width: int, height: int) -> None:
        """Paint what stays the same through the shot: the background and a stock of noise."""
        self.shot, self.width, self.height = shot, width, height
        rng = np.random.default_rng(shot.seed)
        self._background = paint_background(shot.background, width, height, shot.hue, shot.lightness, rng)
        # One field larger than the frame, of which every moment sees another part: drawing noise anew costs more than the picture.
        spread = shot.noise * math.sqrt(shot.exposure)
        field = rng.standard_normal((height + _NOISE_SLACK, width + _NOISE_SLACK, 3), dtype=np.float32)
        self._noise = np.round(field * spread).astype(np.int16)

    def frame(self, moment: float, colour: tuple[float, float, float] | None = None) -> NDArray[np.uint8]:
        """The frame `moment` seconds into the shot, uint8 [height, width, 3] RGB; the shape in `colour` instead of its own."""
        shot = self.shot
        if shot.frozen:
            moment = shot.duration / 2
        frame = self._backdrop(moment)
        self.draw(frame, moment, colour or COLOURS[shot.colour])
        if shot.exposure != 1.0:
            frame = cv2.convertScaleAbs(frame, alpha=shot.exposure)
        if shot.logo:
            _draw_logo(frame)
        tick = round(moment * 1000)
        down, across = tick * 29 % _NOISE_SLACK, tick * 47 % _NOISE_SLACK
        noise = self._noise[down : down + self.height, across : across + self.width]
        frame = np.asarray(cv2.add(frame, noise, dtype=cv2.CV_8U), dtype=np.uint8)
        if shot.bars:
            bar = round(shot.bars * self.height / 2)
            frame[:bar] = frame[self.height - bar :] = 0
        return frame

    def draw(self, frame: NDArray[np.uint8], moment: float, colour: tuple[float, float, float]) -> None:
        """Draw the shape alone, in `colour`, where it is `moment` seconds into the shot; `frame` changes in place."""
        shot = self.shot
        centre = shot.position(moment, self.width / self.height)
        tilt = shot.angle + shot.spin * (moment - shot.duration / 2)
        draw_shape(frame, shot.form, colour, centre, shot.radius, tilt)

    def _backdrop(self, moment: float) -> NDArray[np.uint8]:
        """The part of the background that the camera sees."""
        shot = self.shot
        travelled = (moment - shot.duration / 2) * shot.camera_speed * self.width
        zoom, dx, dy = 1.0, 0.0, 0.0
        if shot.camera == "zoom":
            # The edge of the frame, half a width from its centre, moves at the camera's speed.
            zoom = 1.0 + 2 * travelled / self.width
        else:
            dx, dy = travelled * math.cos(shot.camera_angle), travelled * math.sin(shot.camera_angle)
        if shot.camera == "shake":
            swing = 0.006 * self.width
            dx += swing * math.sin(moment * 11.0 + shot.camera_angle)
            dy += swing * math.sin(moment * 13.7 + 2 * shot.camera_angle)
        middle_x, middle_y = self.width * MARGIN / 2 + dx, self.height * MARGIN / 2 + dy
        matrix = np.array(
            [
                (1 / zoom, 0, middle_x - self.width / 2 / zoom),
                (0, 1 / zoom, middle_y - self.height / 2 / zoom),
            ]
        )
        warped = cv2.warpAffine(
            self._background,
            matrix,
            (self.width, self.height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REFLECT_101,
        )
        return np.asarray(warped, dtype=np.uint8)


def _draw_logo(frame: NDArray[np.uint8]) -> None:
    """A broadcaster's mark in the upper right corner: a pale lozenge with letters, opaque."""
    height, width = frame.shape[:2]
    left, top, right, bottom = round(0.84 * width), round(0.06 * height), round(0.96 * width), round(0.16 * height)
    cv2.rectangle(frame, (left, top), (right, bottom), (232, 232, 224), thickness=-1)
    place = (left + round(0.012 * width), bottom - round(0.028 * height))
    cv2.putText(frame, "MINI", place, cv2.FONT_HERSHEY_SIMPLEX, width / 1000, (40, 40, 48), max(1, width // 300), cv2.LINE_AA)
