"""The protocol of a score: everything that changes it other than the videos judged, and whether two scores may be compared."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Crop = Literal["centre", "none"]
Window = Literal["centre", "first", "random"]
CROPS, WINDOWS = get_args(Crop), get_args(Window)
MOST = 2**16
"""Of frames, pixels and strides each."""


@dataclass(frozen=True)
class Sampling:
    """Which frames of a video are scored, and at which size.

    Args:
        frames: of a video; a shorter one is left out.
        stride: of the file's frames every first, every second, … is taken.
        fps: frames per second to sample at instead, whatever the file has; `stride` is then 1.
        height, width: in pixels, that every frame is scaled to (bicubic).
        crop: `centre` keeps the shape and cuts off what stands over, `none` distorts.
        window: where in a longer video the frames lie; `random` depends on the seed and the video's name alone.
        seed: of everything that is drawn: videos, windows and resamples.

    Raises:
        ValueError: a value is out of its range; the message has the range.
    """

    frames: int = 16
    stride: int = 1
    fps: float | None = None
    height: int = 224
    width: int = 224
    crop: Crop = "centre"
    window: Window = "centre"
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("frames", 1), ("stride", 1), ("height", 8), ("width", 8)):
            if not least <= (value := getattr(self, name)) <= MOST:
                raise ValueError(f"--{name} is {value}; it has to lie between {least} and {MOST}")
        if self.fps is not None and not 0.1 <= self.fps <= 1000:
            raise ValueError(f"--fps is {self.fps}; it has to lie between 0.1 and 1000 frames per second")
        if self.fps is not None and self.stride != 1:
            raise ValueError(f"--fps {self.fps} and --stride {self.stride} exclude each other; give one of them")
        for name, known in (("crop", CROPS), ("window", WINDOWS)):
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"--{name} is {value!r}; it has to be {' or '.join(known)}")

    def number(self, name: str) -> int:
        """A number below 2**64 that depends on the seed and a video's name alone."""
        return int.from_bytes(hashlib.sha256(f"{self.seed}:{name}".encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Protocol:
    """What two results must have in common to be compared.

    Args:
        sampling: of the frames.
        videos: how many videos were scored.
        form: `encoded` files, or `frames` that were never encoded.
        reference_videos: how many they were compared with; 0 without a reference.
        reference_form: likewise; empty without one.
        reference_hash: of the names and contents of the reference's videos, so that it is the same set; empty without one.
        prompts_hash: of the texts that the videos were compared with, in order of the videos' names; empty without.
        extractors: by use (`video`, `image`, `text`): `name` and `hash`.
    """

    sampling: Sampling
    videos: int
    form: str = "encoded"
    reference_form: str = ""
    reference_videos: int = 0
    reference_hash: str = ""
    prompts_hash: str = ""
    extractors: dict[str, dict[str, Any]] = field(default_factory=dict)

    def flat(self) -> dict[str, Any]:
        """Each value by its name; those of parts with the part's name in front."""
        values: dict[str, Any] = asdict(self.sampling)
        values.update({f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("sampling", "extractors")})
        for use, extractor in self.extractors.items():
            values.update({f"{use} extractor {name}": value for name, value in extractor.items()})
        return values

    def differences(self, other: Protocol) -> dict[str, tuple[Any, Any]]:
        """By name, the values that forbid a comparison.

        An extractor or a reference that only one of the results used is no difference: the scores it made are not in the other.
        """
        mine, theirs = self.flat(), other.flat()
        names = [name for name in mine if name in theirs]
        unused = [
            name
            for name in ("reference_videos", "reference_hash", "reference_form", "prompts_hash")
            if not (mine[name] and theirs[name])
        ]
        names = [name for name in names if name not in unused]
        return {name: (mine[name], theirs[name]) for name in names if mine[name] != theirs[name]}


def protocol_from(values: dict[str, Any]) -> Protocol:
    """A protocol as `asdict` wrote it.

    Raises:
        ValueError: it was not written so.
    """
    try:
        return Protocol(**{**values, "sampling": Sampling(**values["sampling"])})
    except (TypeError, KeyError) as error:
        raise ValueError(f"its protocol is not one of this version: {error}") from error
