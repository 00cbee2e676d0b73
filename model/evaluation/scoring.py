"""An evaluation from beginning to end: videos, features, scores, a result. What the command does, without printing."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .distances import RESAMPLES
from .extractors import RANDOM, Extractor, Use, load
from .inputs import VideoSet
from .metrics import METRICS, Features, Score, extract, score
from .protocol import Protocol, Sampling
from .results import result
from .samples import hash_of
from .videos import Census, batches

_RATES_ALIKE = 0.02


@dataclass(frozen=True)
class Evaluation:
    """What is scored and how.

    Args:
        metrics: names out of `METRICS`.
        sampling: of the frames.
        extractors: by use, the name and the weights.
        count: videos of each set; all by default.
        resamples: of the bootstrap.
        batch: videos at once.
        device: of extractors and distances.
        threads: that decode.
    """

    metrics: list[str]
    sampling: Sampling = field(default_factory=Sampling)
    extractors: dict[Use, tuple[str, str | None]] = field(default_factory=dict)
    count: int | None = None
    resamples: int = RESAMPLES
    batch: int = 8
    device: str = "cpu"
    threads: int = 2

    @property
    def uses(self) -> list[Use]:
        """What the metrics need extractors for."""
        order: tuple[Use, ...] = ("video", "image", "text")
        return [use for use in order if any(METRICS[name].extractor == use for name in self.metrics)]


def choose_metrics(
    wanted: list[str], scored: VideoSet, has_reference: bool, has_text_extractor: bool
) -> tuple[list[str], list[str]]:
    """The metrics to compute, and what has to be said of those that are left out.

    Args:
        wanted: names; nothing for all that can be computed.

    Raises:
        ValueError: a metric was asked for that cannot be computed; the message has what it needs.
    """
    problems = {}
    for name, metric in METRICS.items():
        if metric.is_distance and not has_reference:
            problems[name] = "a distance needs a second set of videos, e.g. --data MINE --data REAL"
    if not has_text_extractor:
        problems["clipsim"] = "CLIP is needed, e.g. --text-extractor clip --text-weights FOLDER"
    elif not scored.has_prompts:
        problems["clipsim"] = f"every video needs a text, and {scored.place} has none for some (see prompts.jsonl)"
    for name in wanted:
        if name in problems:
            raise ValueError(f"{name} cannot be computed: {problems[name]}")
    if wanted:
        return wanted, []
    by_reason: dict[str, list[str]] = {}
    for name, reason in problems.items():
        by_reason.setdefault(reason, []).append(name)
    left_out = [f"left out {', '.join(names)}: {reason}" for reason, names in by_reason.items()]
    return [name for name in METRICS if name not in problems], left_out


def evaluate(
    evaluation: Evaluation,
    scored: VideoSet,
    reference: VideoSet | None,
    progress: Callable[[VideoSet, Census], None] = lambda _videos, _census: None,
    stage: Callable[[str], None] = lambda _name: None,
) -> dict[str, Any]:
    """Score a set of videos, alone or against a reference; returns the result (see `results.result`).

    Args:
        progress: called after every batch.
        stage: called with the name of each metric before it is computed.

    Raises:
        ValueError: too few videos can be scored, too many are damaged, or an extractor cannot cope with them.
        OSError: an extractor's weights cannot be read.
    """
    began = time.perf_counter()
    extractors = {use: load(use, *evaluation.extractors.get(use, (RANDOM, None)), evaluation.device) for use in evaluation.uses}
    seconds = {"extractors": time.perf_counter() - began}
    sets = {"scored": scored, **({"reference": reference} if reference is not None else {})}
    censuses, features = {role: Census() for role in sets}, {role: Features() for role in sets}
    prompts: dict[str, str] = {}
    for role, videos in sets.items():
        began = time.perf_counter()
        names = [name for name in evaluation.metrics if not (name == "clipsim" and not videos.has_prompts)]
        census = censuses[role]
        limits: dict[str, Any] = {"count": evaluation.count, "size": evaluation.batch, "threads": evaluation.threads}
        for batch in batches(videos, evaluation.sampling, census, **limits):
            texts = [video.prompt or "" for video in batch.videos]
            if role == "scored":
                prompts.update(zip((video.name for video in batch.videos), texts, strict=True))
            extract(features[role], batch.frames.to(evaluation.device), texts, names, extractors)
            progress(videos, census)
        seconds[role] = time.perf_counter() - began
        _check_enough(videos, census, evaluation.sampling)
    warnings = _warnings(evaluation, censuses)
    scores: dict[str, Score] = {}
    for name in evaluation.metrics:
        stage(name)
        other = features.get("reference")
        if not METRICS[name].is_distance and other is not None and name not in other.parts:
            other = None
        made, notes = score(name, features["scored"], other, evaluation.resamples, evaluation.sampling.seed, evaluation.device)
        scores[name], seconds[name] = made, made.seconds
        warnings += notes
    protocol = _protocol(evaluation, sets, censuses, extractors, prompts)
    places = {role: {"place": videos.place, "kind": videos.kind, **censuses[role].summary()} for role, videos in sets.items()}
    return result(protocol, scores, places, warnings, seconds)


def _check_enough(videos: VideoSet, census: Census, sampling: Sampling) -> None:
    if len(census.scored) >= 2:
        return
    wanted = f"{sampling.frames} frames" + (f" at {sampling.fps} fps" if sampling.fps else f" at stride {sampling.stride}")
    raise ValueError(
        f"{videos.place} has {len(census.scored)} video{'s' * (len(census.scored) != 1)} to score, at least 2 are needed; of "
        f"{len(videos.videos)}, {census.short} are too short for {wanted} and {len(census.damaged)} are damaged"
    )


def _warnings(evaluation: Evaluation, censuses: dict[str, Census]) -> list[str]:
    warnings = []
    for role, census in censuses.items():
        if evaluation.count is not None and len(census.scored) < evaluation.count:
            warnings.append(
                f"of the {role} set {len(census.scored)} videos were scored, fewer than the {evaluation.count} asked for"
            )
        if census.short:
            warnings.append(f"{census.short} videos of the {role} set were too short and left out")
        if census.damaged:
            names = ", ".join(list(census.damaged)[:3])
            warnings.append(f"{len(census.damaged)} damaged videos of the {role} set were left out: {names}")
        rates = census.summary()["fps"]
        if evaluation.sampling.fps is None and rates and rates["most"] - rates["least"] > _RATES_ALIKE * rates["most"]:
            warnings.append(
                f"the {role} set mixes {rates['least']:g} to {rates['most']:g} frames per second; --fps samples all alike"
            )
    medians = {role: fps["median"] for role, census in censuses.items() if (fps := census.summary()["fps"])}
    if evaluation.sampling.fps is None and len(medians) == 2:
        first, second = medians["scored"], medians["reference"]
        if abs(first - second) > _RATES_ALIKE * max(first, second):
            warnings.append(
                f"the scored videos have {first:g} frames per second and the reference {second:g}, which alone changes a distance "
                "of videos; --fps samples both alike"
            )
    if any(evaluation.extractors.get(use, (RANDOM, None))[0] == RANDOM for use in evaluation.uses):
        warnings.append("the random extractor was used: its numbers compare among themselves only, never with published ones")
    return warnings


def _protocol(
    evaluation: Evaluation,
    sets: dict[str, VideoSet],
    censuses: dict[str, Census],
    extractors: dict[Use, Extractor],
    prompts: dict[str, str],
) -> Protocol:
    described: dict[str, dict[str, Any]] = {}
    for use, extractor in extractors.items():
        described[use] = {"name": evaluation.extractors.get(use, (RANDOM, None))[0], "hash": str(extractor.hash)}
    reference = censuses.get("reference")
    return Protocol(
        evaluation.sampling,
        len(censuses["scored"].scored),
        form=sets["scored"].form,
        reference_form=sets["reference"].form if reference else "",
        reference_videos=len(reference.scored) if reference else 0,
        reference_hash=reference.hash if reference else "",
        prompts_hash=hash_of([text for _, text in sorted(prompts.items())]) if "clipsim" in evaluation.metrics else "",
        extractors=described,
    )
