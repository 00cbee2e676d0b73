"""The metrics by name, what each needs, and their values from the features of one or two sets of videos."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from typing import Any, Literal

import torch
from torch import Tensor

from . import distances, measures
from .extractors import Extractor, Use

Distance = Callable[[Tensor, Tensor], float]
"""Of the videos with these numbers of one set, and those of another."""


@dataclass(frozen=True)
class Metric:
    """What a metric says and needs.

    Attributes:
        meaning: in a line, with its range.
        better: which values are better; `neither` of what is only to be read beside others.
        extractor: whose features it is made of, if any.
        is_distance: whether it compares two sets; else it is the mean of a number of each video.
    """

    meaning: str
    better: Literal["lower", "higher", "neither"]
    extractor: Use | None
    is_distance: bool


METRICS = {
    "fvd": Metric("Fréchet distance of videos, from 0", "lower", "video", True),
    "fid": Metric("Fréchet distance of single frames, from 0", "lower", "image", True),
    "kid": Metric("kernel distance of single frames, about 0 and more", "lower", "image", True),
    "clipsim": Metric("cosine of frames and their text, -1 to 1", "higher", "text", False),
    "consistency": Metric("cosine of consecutive frames, -1 to 1; look at motion, too", "higher", "image", False),
    "motion": Metric("difference of consecutive frames, 0 to 1", "neither", None, False),
    "displacement": Metric("way of brightness between frames, in widths of the picture", "neither", None, False),
}


def check_names(names: Iterable[str]) -> list[str]:
    """The metrics of these names, in our order and each once.

    Raises:
        ValueError: one is not known; the message has the nearest.
    """
    wanted = {name.lower(): name for name in names}
    for name, given in wanted.items():
        if name not in METRICS:
            nearest = get_close_matches(name, METRICS, 1)
            hint = f"; is {nearest[0]} meant?" if nearest else ""
            raise ValueError(f"--metric {given} is not known{hint} (known: {', '.join(METRICS)})")
    return [name for name in METRICS if name in wanted]


@dataclass
class Features:
    """What is kept of a set of videos, on the CPU: features and numbers, no frames.

    Attributes:
        parts: by name, the tensors of the batches: `video` (N, 1, D), `image` (N, F, D), and a number for each video (N,).
    """

    parts: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(self, name: str, values: Tensor) -> None:
        """Keep the values of a batch."""
        self.parts.setdefault(name, []).append(values.detach().cpu())

    def __getitem__(self, name: str) -> Tensor:
        """The values of all videos."""
        return torch.cat(self.parts[name])


def extract(features: Features, frames: Tensor, prompts: list[str], names: list[str], extractors: dict[Use, Extractor]) -> None:
    """Add to `features` what the metrics `names` need of a batch.

    Args:
        frames: uint8 (N, F, 3, H, W).
        prompts: a text for each video, for clipsim.
        extractors: by use, those that the metrics need.

    Raises:
        ValueError: an extractor gives features of another shape, or cannot take these videos.
    """
    count, length = frames.shape[:2]
    uses = {METRICS[name].extractor for name in names}
    if "video" in uses:
        features.add("video", _called(extractors["video"], frames, count, "video")[:, None])
    if "image" in uses:
        images = _called(extractors["image"], frames.flatten(0, 1), count * length, "image").unflatten(0, (count, length))
        if {"fid", "kid"} & set(names):
            features.add("image", images)
        features.add("consistency", measures.frame_consistency(images))
    if "clipsim" in names:
        text: Any = extractors["text"]
        images = _called(text, frames.flatten(0, 1), count * length, "text").unflatten(0, (count, length))
        features.add("clipsim", measures.text_agreement(images, text.texts(prompts).to(images.device)))
    features.add("motion", measures.motion(frames))
    features.add("displacement", measures.displacement(frames))


def _called(extractor: Extractor, pixels: Tensor, count: int, use: Use) -> Tensor:
    try:
        found: Any = extractor(pixels)
    # TorchScript has a class of its own, which is no RuntimeError.
    except (RuntimeError, torch.jit.Error) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if "out of memory" in str(error):
            raise torch.OutOfMemoryError(str(error).strip().splitlines()[-1]) from error
        lines = [line for line in str(error).strip().splitlines() if line.strip()]
        size = "x".join(map(str, pixels.shape))
        raise ValueError(
            f"the {use} extractor cannot take {size} pixels (I3D, for example, needs 10 frames): {lines[-1] if lines else error}"
        ) from error
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != count:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"the {use} extractor gave {shape} for {count} inputs; (N, D) with a row for each is wanted")
    if not bool(found.isfinite().all()):
        raise ValueError(f"the {use} extractor gave values that are no numbers")
    return found.float()


@dataclass(frozen=True)
class Score:
    """A metric's value.

    Attributes:
        value: of the videos that were scored.
        interval: how far it may be off, as a dictionary of `distances.Interval`.
        videos: how many it was made of.
        seconds: it took, without the features.
        reference: the value of the reference's own videos, of a metric that is no distance.
        reference_videos: of a distance: how many videos of the reference it was made of.
        floor: of a distance: the mean and the range between random halves of the reference, and the videos of a half.
        dimension: of the features of a distance.
    """

    value: float
    interval: dict[str, Any]
    videos: int
    seconds: float
    reference: float | None = None
    reference_videos: int | None = None
    floor: dict[str, Any] | None = None
    dimension: int | None = None


def score(
    name: str, scored: Features, reference: Features | None, resamples: int, seed: int, device: str = "cpu"
) -> tuple[Score, list[str]]:
    """A metric's value, and what has to be said about it.

    Args:
        reference: of the set that a distance is measured to; another metric gives its own value of it.
        device: that distances are computed on.
    """
    if not METRICS[name].is_distance:
        return _mean(scored[name], reference[name] if reference is not None else None, resamples, seed), []
    if reference is None:
        raise ValueError(f"{name} is a distance and needs a set to compare with")
    use = METRICS[name].extractor or "video"
    first, second = (_placed(features[use], device) for features in (scored, reference))
    return _distance(name, first, second, resamples, seed), [] if name == "kid" else _singular(name, first, second)


def _mean(values: Tensor, reference: Tensor | None, resamples: int, seed: int) -> Score:
    began, numbers = time.perf_counter(), values.double()
    value = float(numbers.mean())
    interval = distances.bootstrap(lambda drawn: float(numbers[drawn].mean()), (len(numbers),), value, resamples, seed)
    other = None if reference is None else float(reference.double().mean())
    return Score(value, asdict(interval), len(numbers), time.perf_counter() - began, reference=other)


def _distance(name: str, first: Tensor, second: Tensor, resamples: int, seed: int) -> Score:
    began = time.perf_counter()
    distance, between = (_kernel if name == "kid" else _frechet)(first, second)
    value = distance(torch.arange(len(first)), torch.arange(len(second)))
    interval = asdict(distances.bootstrap(distance, (len(first), len(second)), value, resamples, seed))
    if name != "kid":
        interval["low"] = max(0.0, interval["low"])
    return Score(
        value,
        interval,
        len(first),
        time.perf_counter() - began,
        reference_videos=len(second),
        floor=_floor(between, len(second), seed),
        dimension=first.shape[-1],
    )


def _floor(between: Distance, count: int, seed: int) -> dict[str, Any] | None:
    if count < 4:
        return None
    halves = distances.floor(between, count, seed=seed)
    return {
        "mean": statistics.mean(halves),
        "least": min(halves),
        "most": max(halves),
        "splits": len(halves),
        "videos": count // 2,
    }


def _frechet(first: Tensor, second: Tensor) -> tuple[Distance, Distance]:
    """The distance of drawn videos of both sets, and of drawn videos of the second set among themselves."""

    def distance(drawn: Tensor, other: Tensor) -> float:
        return distances.frechet_of_videos(first[drawn.to(first.device)], second[other.to(second.device)])

    def between(drawn: Tensor, other: Tensor) -> float:
        return distances.frechet_of_videos(second[drawn.to(second.device)], second[other.to(second.device)])

    return distance, between


def _kernel(first: Tensor, second: Tensor) -> tuple[Distance, Distance]:
    """The same for the kernel distance, whose sums are made once for all draws."""
    sums = distances.kernel_sums(first, second)
    own = distances.KernelSums(sums.other_within, sums.other_within, sums.other_within, sums.other_rows, sums.other_rows)

    def weights(drawn: Tensor, count: int) -> Tensor:
        return torch.bincount(drawn, minlength=count).double()

    def distance(drawn: Tensor, other: Tensor) -> float:
        return sums.mmd(weights(drawn, len(first)), weights(other, len(second)))

    def between(drawn: Tensor, other: Tensor) -> float:
        return own.mmd(weights(drawn, len(second)), weights(other, len(second)))

    return distance, between


def _placed(features: Tensor, device: str) -> Tensor:
    # Apple's GPUs have no float64.
    return features.to("cpu" if device.startswith("mps") else device)


def _singular(name: str, first: Tensor, second: Tensor) -> list[str]:
    """What to say where a set has too few rows for its covariance."""
    warnings = []
    for what, features in (("scored", first), ("reference", second)):
        rows, width = math.prod(features.shape[:2]), features.shape[2]
        if rows <= width:
            warnings.append(
                f"{name}: {rows} {'rows' if features.shape[1] > 1 else 'videos'} of the {what} set for {width} features: its "
                f"covariance is singular, of rank {rows - 1} at most, so {width - rows + 1} directions have no variance and the "
                f"value is mostly a matter of the number of videos; take more than {width}, better ten times as many"
            )
    return warnings
