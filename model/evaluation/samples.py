"""Videos of a model to be scored: numbered files, made by as many processes as there are, and continued where a run broke off."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .inputs import PROMPTS

RECORD = "samples.json"


@dataclass(frozen=True)
class Plan:
    """What decides the videos of a folder.

    Args:
        model: a pipeline's folder, a Hub id, or `miniature`.
        count: videos; the prompts are gone through again and again. It may grow from run to run.
        seed: of all videos.
        batch: videos made at once. It belongs here because a batch's size may change roundings.
        steps, guidance_scale, frames, height, width, fps, negative_prompt: as for the pipeline.
        dtype: number format of the models.
        prompts_hash: of the prompts in their order.
        weights_hash: of the models' files, where they lie in a folder: training may have put others there.
    """

    model: str
    count: int
    seed: int
    batch: int
    steps: int
    guidance_scale: float
    frames: int | None
    height: int | None
    width: int | None
    fps: float
    negative_prompt: str | None
    dtype: str
    prompts_hash: str
    weights_hash: str = ""


@dataclass(frozen=True)
class Sample:
    """A video to make."""

    number: int
    file: str
    prompt: str
    seed: int


@dataclass(frozen=True)
class Place:
    """Which of several processes this one is."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0


def place(environment: Mapping[str, str] = os.environ) -> Place:
    """This process's place, from the variables that torchrun sets.

    Raises:
        ValueError: they contradict each other.
    """
    try:
        found = Place(*(int(environment.get(name, default)) for name, default in _VARIABLES.items()))
    except ValueError as error:
        raise ValueError(f"RANK, WORLD_SIZE and LOCAL_RANK of the environment have to be numbers: {error}") from error
    if not 0 <= found.rank < found.processes:
        raise ValueError(
            f"RANK is {found.rank} and WORLD_SIZE {found.processes}; a rank lies from 0 to one less than their number"
        )
    return found


_VARIABLES = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def seed_of(seed: int, number: int) -> int:
    """The seed of a video's noise, below 2**63: of a run's seed and the video's number alone, so no two runs share videos."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{number}".encode()).digest()[:8], "big") >> 1


def hash_of(prompts: list[str]) -> str:
    """Of prompts in their order."""
    return hashlib.sha256(json.dumps(prompts).encode()).hexdigest()


def weights_hash(model: str) -> str:
    """Of the files of a saved pipeline's models; empty of one that is in no folder. Several gigabytes take some seconds."""
    from videofactory.model.pipeline_files import digests

    if not Path(model).is_dir():
        return ""
    found = digests(Path(model), ("unet", "vae", "text_encoder"))
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()


def samples(prompts: list[str], count: int, seed: int) -> list[Sample]:
    """The videos of a run; prompt after prompt, and again from the first until there are enough."""
    return [Sample(n, f"{n:06}.mp4", prompts[n % len(prompts)], seed_of(seed, n)) for n in range(count)]


def groups(prompts: list[str], plan: Plan, where: Place) -> list[list[Sample]]:
    """The batches of this process, all full: the last may have samples beyond the plan's count, which are not kept.

    For rounding may depend on the batch, and so a video has the same companions for any number of processes and any count.
    """
    whole = samples(prompts, -(-plan.count // plan.batch) * plan.batch, plan.seed)
    return [whole[begin : begin + plan.batch] for begin in range(0, len(whole), plan.batch)][where.rank :: where.processes]


def wanted_of(part: list[Sample], plan: Plan) -> list[Sample]:
    """The samples of a batch that the plan has."""
    return [sample for sample in part if sample.number < plan.count]


def missing_of(part: list[Sample], plan: Plan, out: Path) -> list[Sample]:
    """Those of them that are not there yet."""
    return [sample for sample in wanted_of(part, plan) if not is_complete(out / sample.file)]


def is_complete(file: Path) -> bool:
    """Whether a file is there and has frames; an unfinished one never has its name, but a copied one may be cut off."""
    import av

    if not file.is_file():
        return False
    try:
        with av.open(str(file)) as container:
            return any(packet.size for packet in container.demux(video=0))
    except (av.FFmpegError, IndexError):
        return False


def prepare(plan: Plan, wanted: list[Sample], out: Path) -> None:
    """Write what the folder holds, or make sure that it holds just that.

    Raises:
        ValueError: the folder holds videos of another plan; the message names what differs.
        OSError: it cannot be written.
    """
    out.mkdir(parents=True, exist_ok=True)
    record = out / RECORD
    if record.exists():
        try:
            before = json.loads(record.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{record} is damaged ({error}); remove the folder, or name another with --out") from error
        grows = before.get("count", 0) <= plan.count
        different = [
            f"{name} was {before.get(name)!r} and is {value!r}"
            for name, value in asdict(plan).items()
            if before.get(name) != value and not (name == "count" and grows)
        ]
        if different:
            raise ValueError(
                f"{out} holds videos of another plan: {'; '.join(different)}; remove it, or name another folder with --out"
            )
    elif any(out.glob("*.mp4")):
        raise ValueError(
            f"{out} holds videos that were not made so (there is no {RECORD}); remove it, or name another folder with --out"
        )
    _write(out / PROMPTS, "".join(json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in wanted))
    _write(record, json.dumps(asdict(plan), indent=2, ensure_ascii=False) + "\n")


def _write(file: Path, text: str) -> None:
    """Whole or not at all, though several processes write the same at once."""
    unfinished = file.with_name(f"{file.name}.{os.getpid()}.part")
    try:
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def make(pipeline: Any, plan: Plan, parts: list[list[Sample]], out: Path) -> Iterator[Sample]:
    """Make the videos that are not there and yield each when it is written.

    Args:
        parts: batches of this process. One of which a video is missing is made whole.

    Raises:
        FloatingPointError: a video holds values that are no numbers.
    """
    import torch

    from videofactory.model.video_files import to_pixels, write_video

    for part in parts:
        missing = missing_of(part, plan, out)
        if not missing:
            continue
        frames = pipeline(
            [sample.prompt for sample in part],
            num_frames=plan.frames,
            height=plan.height,
            width=plan.width,
            num_inference_steps=plan.steps,
            guidance_scale=plan.guidance_scale,
            negative_prompt=plan.negative_prompt,
            # On the CPU, noise is the same whatever the device is.
            generator=[torch.Generator().manual_seed(sample.seed) for sample in part],
            output_type="np",
        ).frames
        for sample, video in zip(part, frames, strict=True):
            if sample not in missing:
                continue
            write_video(out / sample.file, to_pixels(video, f"{sample.file} (seed {sample.seed})"), plan.fps)
            yield sample
