"""The runs of an ablation: a U-Net per interaction and seed, trained, sampled and scored like all others.

    study = Study("miniature", prompts=("a red circle moving left",), reference="data/sample", out=Path("runs/ablation"))
    for arm in study.arms():
        result = run(study, arm, processes)

The runs of one seed see the same clips, captions, time steps and noise in the same order, begin with the same weights (`none`, which
has fewer, draws its layers over time anew), and are sampled from the same noise. A run that is done leaves
`OUT/INTERACTION-SEED/result.json`, and is not done again.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
from numpy.typing import NDArray

from videofactory.model.attention import Interaction
from videofactory.model.evaluation import samples
from videofactory.model.evaluation.extractors import load
from videofactory.model.evaluation.inputs import VideoSet, open_videos
from videofactory.model.evaluation.protocol import Sampling
from videofactory.model.evaluation.results import write
from videofactory.model.evaluation.scoring import Evaluation, choose_metrics, evaluate
from videofactory.model.training.config import TrainingConfig, load_config
from videofactory.model.training.processes import Processes
from videofactory.shards.reader import all_frames

INTERACTIONS: tuple[Interaction, ...] = get_args(Interaction)
RECORD, RESULT = "study.json", "result.json"

Reader = Callable[[Sequence[tuple[str, NDArray[np.uint8]]]], Mapping[str, tuple[int, int]]]
"""What reads videos: of pairs of a prompt and its frames, uint8 (F, H, W, 3), to (right, asked) by attribute."""


class InterruptedRunError(Exception):
    """A run was asked to end before its last step; the same command goes on."""


@dataclass(frozen=True)
class Arm:
    """One run: how space and time meet, and the seed of everything random."""

    interaction: Interaction
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.interaction}-{self.seed}"


@dataclass(frozen=True)
class Study:
    """What is compared, and how.

    Args:
        config: a training configuration, as `load_config` takes it; its `seed`, `output` and `model.interaction` are set by run.
        overrides: settings that differ from it.
        interactions, seeds: every one with every other is a run.
        prompts: of the videos that are scored; gone through again and again.
        reference: dataset that they are compared with.
        out: folder of the runs.
        count: videos per run.
        batch: videos made at once.
        steps, guidance_scale: of generation.
        split: of the reference; all of it when None.
        video_extractor, image_extractor: of the distances, with their weights; see `evaluation.extractors`.
        reader: `module:function`, a `Reader` that says whether the videos show what was asked for; none when None.
    """

    config: str
    prompts: tuple[str, ...]
    reference: str
    out: Path
    overrides: tuple[str, ...] = ()
    interactions: tuple[Interaction, ...] = INTERACTIONS
    seeds: tuple[int, ...] = (0, 1, 2)
    count: int = 64
    batch: int = 8
    steps: int = 25
    guidance_scale: float = 4.0
    split: str | None = "train"
    video_extractor: tuple[str, str | None] = ("random", None)
    image_extractor: tuple[str, str | None] = ("random", None)
    reader: str | None = None

    def arms(self) -> list[Arm]:
        """All runs, seed by seed, so that a study that is not finished compares whole seeds."""
        return [Arm(interaction, seed) for seed in self.seeds for interaction in self.interactions]

    def training(self, arm: Arm) -> TrainingConfig:
        """The training configuration of a run.

        Raises:
            ConfigError: it cannot be used.
        """
        output = json.dumps(str(self.folder(arm) / "run"))
        own = (f"seed={arm.seed}", f"model.interaction={arm.interaction}", f"output={output}")
        return load_config(self.config, [*self.overrides, *own])

    def folder(self, arm: Arm) -> Path:
        """Where a run leaves everything."""
        return self.out / arm.name

    def identity(self) -> dict[str, Any]:
        """What all runs of the folder have in common, as JSON."""
        config = self.training(Arm("swap", 0))
        same = ("count", "batch", "steps", "guidance_scale", "reference", "split", "video_extractor", "image_extractor", "reader")
        values = {name: getattr(self, name) for name in same}
        common = {
            "training": config.fingerprint(),
            "training_steps": config.steps,
            "validation": config.validation.model_dump(mode="json") if config.validation else None,
            "prompts": samples.hash_of(list(self.prompts)),
        }
        found: dict[str, Any] = json.loads(json.dumps(common | values))
        return found


def check(study: Study) -> None:
    """Whether the study can run in its folder, before hours of work.

    Raises:
        ConfigError: the training configuration cannot be used.
        ValueError: the folder holds another study; the message names what differs. Or prompts, reader, extractors, reference or the
            kind of training cannot be used.
        OSError: the reference or weights cannot be read.
    """
    if not study.prompts:
        raise ValueError("there are no prompts, so nothing could be scored; name a file with some")
    for config in map(study.training, study.arms()):
        if config.model.train == "lora":
            raise ValueError("model.train is lora, which leaves no pipeline to make videos with; an ablation trains whole models")
        bucket = next((bucket for bucket in config.data.buckets if bucket.frames > 1), None)
        if bucket is None:
            raise ValueError("every bucket of data.buckets has frames 1; an ablation needs a size of videos")
    load("video", *study.video_extractor)
    load("image", *study.image_extractor)
    if (reader := load_reader(study.reader)) is not None:
        blank = np.zeros((2, 16, 16, 3), np.uint8)
        _counted(reader, [(prompt, blank) for prompt in dict.fromkeys(study.prompts)])
    open_videos(study.reference, study.split)
    check_same(study)


def check_same(study: Study) -> None:
    """Whether the folder holds no runs of another study.

    Raises:
        ValueError: it does; the message names what differs.
    """
    identity, record = study.identity(), study.out / RECORD
    if record.is_file():
        before = json.loads(record.read_text(encoding="utf-8"))
        different = [
            f"{name} was {before.get(name)!r} and is {value!r}" for name, value in identity.items() if before.get(name) != value
        ]
        if different:
            raise ValueError(f"{study.out} holds runs of another study: {'; '.join(different)}; name another folder with --out")


def load_reader(name: str | None) -> Reader | None:
    """The function `module:function` names.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return None
    module, _, attribute = name.partition(":")
    try:
        found: Reader = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--reader {name} cannot be loaded: {error}; it has to be module:function") from error
    if not callable(found):
        raise ValueError(f"--reader {name} is no function, but {type(found).__name__}; it has to be module:function")
    return found


def _counted(reader: Reader, videos: Sequence[tuple[str, NDArray[np.uint8]]]) -> dict[str, list[int]]:
    """What a reader says, checked."""
    found = reader(videos)
    try:
        return {str(name): [int(right), int(asked)] for name, (right, asked) in found.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"the reader gave {found!r}; (right, asked) by attribute is wanted") from error


def finished(study: Study, arm: Arm) -> dict[str, Any] | None:
    """The result of a run that is done."""
    file = study.folder(arm) / RESULT
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None


def run(study: Study, arm: Arm, processes: Processes, stage: Callable[[str], None] = lambda _name: None) -> dict[str, Any]:
    """Train, sample and score one run, or go on with it; returns its result.

    Args:
        stage: called with what comes next.

    Raises:
        InterruptedRunError: a signal ended training.
        Whatever training, sampling and scoring raise.
    """
    # The configuration is a file, and may have been edited since the last run.
    check_same(study)
    if (result := finished(study, arm)) is not None:
        return result
    write(study.identity(), study.out / RECORD)
    stage("training")
    loss = _train(study, arm, processes)
    stage("sampling")
    folder = _sample(study, arm, processes)
    stage("scoring")
    scores = _score(study, folder, processes)
    result = {**asdict(arm), "steps": study.training(arm).steps, "validation_loss": loss, **scores}
    write(result, study.folder(arm) / RESULT)
    return result


def _train(study: Study, arm: Arm, processes: Processes) -> float | None:
    """Train to the last step; returns the last validation loss, if there is any."""
    from videofactory.model.training.trainer import Trainer

    config = study.training(arm)
    trainer = Trainer(config, processes)
    if not trainer.run() or trainer.stopping:
        raise InterruptedRunError(f"stopped while {arm.name} was trained; the same command goes on")
    lines = [json.loads(line) for line in (Path(config.output) / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["validation"].get("loss") for line in lines if line["step"] == config.steps and "validation" in line]
    return losses[-1] if losses else None


def _sample(study: Study, arm: Arm, processes: Processes) -> Path:
    """Make the videos that are not there yet; returns their folder. The noise is that of every run of this seed."""
    from videofactory.model.generate_models import Running, choose_device
    from videofactory.model.generate_models import load as load_pipeline

    config, out = study.training(arm), study.folder(arm) / "samples"
    model = str(Path(config.output) / "pipeline")
    device, number_format = choose_device(str(processes.device), "auto", offload=False)
    settings = (
        study.count,
        arm.seed,
        study.batch,
        study.steps,
        study.guidance_scale,
        None,
        None,
        None,
        config.data.fps or 8.0,
        None,
    )
    plan = samples.Plan(model, *settings, number_format, samples.hash_of(list(study.prompts)), samples.weights_hash(model))
    parts = samples.groups(list(study.prompts), plan, samples.Place())
    samples.prepare(plan, samples.samples(list(study.prompts), study.count, arm.seed), out)
    if any(samples.missing_of(part, plan, out) for part in parts):
        pipeline = load_pipeline(
            model, Running(study.batch, device, number_format, offload=False, cuda_graph=True, attention_backend=None)
        )
        for _ in samples.make(pipeline, plan, parts, out):
            pass
    return out


def _score(study: Study, folder: Path, processes: Processes) -> dict[str, Any]:
    """The metrics of a run's videos against the reference, and what the reader reads in them."""
    config = study.training(study.arms()[0])
    bucket = next(bucket for bucket in config.data.buckets if bucket.frames > 1)
    scored, reference = open_videos(str(folder)), open_videos(study.reference, study.split)
    metrics, _ = choose_metrics([], scored, has_reference=True, has_text_extractor=False)
    sampling = Sampling(bucket.frames, fps=config.data.fps, height=bucket.height, width=bucket.width)
    extractors: Any = {"video": study.video_extractor, "image": study.image_extractor}
    evaluation = Evaluation(metrics, sampling, extractors, device=str(processes.device))
    found = evaluate(evaluation, scored, reference)
    write(found, folder.parent / "evaluation.json")
    scores = {name: one["value"] for name, one in found["metrics"].items()}
    reader = load_reader(study.reader)
    readings = {} if reader is None else _counted(reader, list(_frames(scored)))
    return {"metrics": scores, "readings": readings, "warnings": found["warnings"]}


def _frames(videos: VideoSet) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """The prompt and frames, uint8 (F, H, W, 3), of every video, which are files."""
    for video in videos.videos:
        yield video.prompt or "", all_frames(cast(bytes, video.read()))[0]
