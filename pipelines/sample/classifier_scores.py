"""What prompts of the miniature world ask for, what videos show of it, and the rates of both together.

scores = score([("a red circle moving left in front of a striped background", frames)])
scores.rates()["colour"].share      # 1.0
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from videofactory.pipelines.sample.classifier import Classifier, Reading
from videofactory.pipelines.sample.classifier_frames import FPS
from videofactory.pipelines.sample.scene import DIRECTIONS
from videofactory.pipelines.sample.shapes import COLOURS, FORMS
from videofactory.pipelines.sample.training_frames import HELD_OUT

WORDS: dict[str, tuple[str, ...]] = {"colour": tuple(COLOURS), "form": FORMS, "direction": tuple(DIRECTIONS)}
"""What a prompt may ask for, and the words for it."""

TOGETHER = "all asked"
_SUREST = 1.959964
"""Standard deviations of a normal distribution that 95 % lie within."""


@dataclass(frozen=True)
class Asked:
    """What a prompt asks for; the direction is None where it names none."""

    colour: str
    form: str
    direction: str | None

    @property
    def held_out(self) -> bool:
        """Whether no caption of training names the pair of colour and form."""
        return (self.colour, self.form) in HELD_OUT


def parse(prompt: str) -> Asked:
    """What a prompt asks for, by its words.

    Raises:
        ValueError: it does not name exactly one colour and one form, or names several directions.
    """
    spoken = re.findall(r"[a-z]+", prompt.lower())
    named = {kind: sorted({word for word in spoken if word in words}) for kind, words in WORDS.items()}
    for kind, least in (("colour", 1), ("form", 1), ("direction", 0)):
        if not least <= len(named[kind]) <= 1:
            found = " and ".join(named[kind]) or f"no {kind}"
            raise ValueError(f"the prompt {prompt!r} names {found}; one of {', '.join(WORDS[kind])} is wanted")
    return Asked(named["colour"][0], named["form"][0], next(iter(named["direction"]), None))


@dataclass(frozen=True)
class Judged:
    """One video: what was asked for, and what was read."""

    name: str
    prompt: str
    asked: Asked
    reading: Reading

    @property
    def right(self) -> dict[str, bool]:
        """Whether each of the things asked for is shown, and all of them together."""
        asked = {kind: getattr(self.asked, kind) for kind in WORDS}
        found = {kind: getattr(self.reading, kind) == word for kind, word in asked.items() if word is not None}
        return {**found, TOGETHER: all(found.values())}

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        asked = {kind: getattr(self.asked, kind) for kind in WORDS}
        read = self.reading.as_dict()
        return {
            "file": self.name,
            "prompt": self.prompt,
            "held_out": self.asked.held_out,
            "asked": asked,
            "read": read,
            "right": self.right,
        }


@dataclass(frozen=True)
class Rate:
    """How many of the videos of which something was asked show it."""

    right: int
    asked: int

    @property
    def share(self) -> float | None:
        """The fraction; None of no videos."""
        return self.right / self.asked if self.asked else None

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval of the fraction."""
        if not self.asked:
            return 0.0, 1.0
        share, spread = self.right / self.asked, _SUREST**2 / self.asked
        middle = (share + spread / 2) / (1 + spread)
        half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
        return max(0.0, middle - half), min(1.0, middle + half)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        low, high = self.interval
        share = None if self.share is None else round(self.share, 4)
        return {"right": self.right, "asked": self.asked, "share": share, "low": round(low, 4), "high": round(high, 4)}

    def __str__(self) -> str:
        if self.share is None:
            return "–"
        low, high = (100 * bound for bound in self.interval)
        return f"{100 * self.share:.1f} %\n[{low:.0f}, {high:.0f}]"


CHANCE: dict[str, float] = {kind: 1 / len(words) for kind, words in WORDS.items()}
"""The share that guessing gets right."""


@dataclass(frozen=True)
class Scores:
    """The videos of a set, judged."""

    videos: tuple[Judged, ...]

    @property
    def groups(self) -> dict[str, tuple[Judged, ...]]:
        """Videos of pairs that training names, of pairs held out, and all."""
        return {
            "seen pairs": tuple(video for video in self.videos if not video.asked.held_out),
            "held-out pairs": tuple(video for video in self.videos if video.asked.held_out),
            "all": self.videos,
        }

    def rates(self, group: str = "all") -> dict[str, Rate]:
        """By colour, form, direction and all that is asked together; videos of which it is not asked do not count."""
        verdicts = [video.right for video in self.groups[group]]
        found = {}
        for kind in (*WORDS, TOGETHER):
            of_kind = [right[kind] for right in verdicts if kind in right]
            found[kind] = Rate(sum(of_kind), len(of_kind))
        return found

    @property
    def found(self) -> int:
        """Videos in which there is a shape at all; the others count as wrong."""
        return sum(video.reading.colour is not None for video in self.videos)

    def chance(self) -> dict[str, float]:
        """What guessing would get right, as `rates`; of videos without a direction in their prompt, more of all together."""
        together = [math.prod(CHANCE[kind] for kind in video.right if kind in CHANCE) for video in self.videos]
        return {**CHANCE, TOGETHER: sum(together) / len(together) if together else 0.0}

    def confusion(self) -> dict[str, dict[str, dict[str, int]]]:
        """How often each word was read where each was asked for: kind, asked, read ("none" for nothing)."""
        found: dict[str, dict[str, dict[str, int]]] = {}
        for kind, words in WORDS.items():
            pairs = Counter((getattr(video.asked, kind), getattr(video.reading, kind) or "none") for video in self.videos)
            found[kind] = {
                word: {read: pairs[word, read] for read in (*words, "none") if pairs[word, read]}
                for word in words
                if any(asked == word for asked, _ in pairs)
            }
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        summary = {
            group: {"videos": len(videos), **{kind.replace(" ", "_"): rate.as_dict() for kind, rate in self.rates(group).items()}}
            for group, videos in self.groups.items()
        }
        return {
            "summary": summary,
            "found": self.found,
            "chance": {kind.replace(" ", "_"): round(share, 4) for kind, share in self.chance().items()},
            "confusion": self.confusion(),
            "videos": [video.as_dict() for video in self.videos],
        }


def score(
    videos: Iterable[tuple[str, NDArray[np.uint8]]],
    classifier: Classifier | None = None,
    fps: float = FPS,
    names: Sequence[str] | None = None,
) -> Scores:
    """Judge videos by their prompts.

    Args:
        videos: prompt and frames of each, uint8 [n, height, width, 3] RGB of any size; read one after the other.
        classifier: that reads; by default the package's own.
        fps: frames per second, for the speeds.
        names: of the videos; by default their numbers.

    Raises:
        ValueError: a prompt names no colour or no form; frames are of another kind.
    """
    reader = classifier or Classifier.load()
    judged = []
    for number, (prompt, frames) in enumerate(videos):
        name = names[number] if names is not None else f"{number:06}"
        judged.append(Judged(name, prompt, parse(prompt), reader.read(frames, fps)))
    return Scores(tuple(judged))


def counts(videos: Iterable[tuple[str, NDArray[np.uint8]]]) -> dict[str, tuple[int, int]]:
    """How many videos show what their prompts ask for, and of how many it is asked, as `videofactory.model.ablate --reader` wants it.

    By colour, form and direction; and of the pairs held out of training, by colour and form together.
    """
    scores = score(videos)
    all_rates, held_out = scores.rates(), scores.groups["held-out pairs"]
    found = {kind: (all_rates[kind].right, all_rates[kind].asked) for kind in WORDS}
    if held_out:
        pairs = sum(video.right["colour"] and video.right["form"] for video in held_out)
        found["held-out pair"] = (pairs, len(held_out))
    return found
