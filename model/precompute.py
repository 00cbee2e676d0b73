"""`python -m videofactory.model.precompute DATASET --vae DIR --out DIR --bucket 16x192x344@8`: latents made once, for many trainings.

Run it again and it goes on where it stopped; run it with `--share 0/4` to `--share 3/4` on four machines, and they divide the clips.
Exit codes: 0 done; 1 too many clips are unreadable, or a file or the memory failed; 2 wrong arguments, found before any work; 130
interrupted.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    import torch

    from videofactory.model.training.buckets import BucketTable, Share
    from videofactory.model.training.clips import Clips
    from videofactory.model.training.latents import Record, Window
    from videofactory.model.training.options import Bucket, DataOptions
    from videofactory.shards.storage import Storage

MINIATURE = "miniature"

app = typer.Typer(pretty_exceptions_enable=False, context_settings={"help_option_names": ["-h", "--help"]})
notes = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Job:
    """One window of one clip to encode: number of the clip, of the bucket and of the window."""

    clip: int
    bucket: int
    window: int


class Windows:
    """Windows of clips, decoded; as `torch.utils.data.Dataset`s are, for data-loader workers.

    Args:
        clips: the clips.
        buckets: shapes.
        windows: how many windows a clip of several frames has; they are evenly spaced.
        options: how clips become samples.
    """

    def __init__(self, clips: Clips, buckets: Sequence[Bucket], windows: int, options: DataOptions) -> None:
        from videofactory.model.training.samples import VideoSource

        self._source, self._buckets, self._windows = VideoSource(clips, options), list(buckets), windows

    def __getitem__(self, job: Job) -> tuple[Job, torch.Tensor | str]:
        """A window, uint8 `[3, frames, height, width]`, or why there is none."""
        import numpy as np

        from videofactory.model.training.frames import ClipError

        chances = np.array([(job.window + 0.5) / self._windows, 1.0, 0.0])
        try:
            return job, self._source.read(job.clip, self._buckets[job.bucket], chances)
        except ClipError as error:
            return job, str(error)


class Encoder:
    """A VAE that encodes windows.

    Args:
        vae: an `AutoencoderKL`, where and in the number format in which it is to run.
        frames_at_once: frames per forward pass.
    """

    def __init__(self, vae: Any, frames_at_once: int) -> None:
        self._vae, self._frames_at_once = vae, frames_at_once

    def __call__(self, video: torch.Tensor) -> Any:
        """Mean and standard deviation of a window's posterior.

        Args:
            video: uint8 `[3, frames, height, width]`.

        Returns:
            float16 array `[2, channels, frames, height / 8, width / 8]`, unscaled.

        Raises:
            FloatingPointError: the VAE gives values that are no numbers.
        """
        import torch

        parts = []
        for frames in video.permute(1, 0, 2, 3).split(self._frames_at_once):
            with torch.no_grad():
                pixels = frames.to(self._vae.device, self._vae.dtype) / 127.5 - 1
                posterior = self._vae.encode(pixels).latent_dist
            parts.append(torch.stack([posterior.mean, posterior.std]).half().cpu())
        moments = torch.cat(parts, dim=1).transpose(1, 2).contiguous()
        if not torch.isfinite(moments).all():
            raise FloatingPointError("the VAE gives values that are no numbers or do not fit half precision; try --dtype fp32")
        return moments.numpy()


@dataclass(frozen=True)
class Work:
    """What is encoded with what.

    Attributes:
        clips: the clips.
        table: their buckets.
        record: what the latents are made with; see `latents.begin`.
        encoder: of windows.
        options: how clips become samples.
    """

    clips: Clips
    table: BucketTable
    record: Record
    encoder: Encoder
    options: DataOptions


def jobs_of(share: Share, bucket: int, work: Work, done: set[tuple[str, str, str]], part: tuple[int, int]) -> list[Job]:
    """What is left to do for a bucket, by clip.

    Args:
        share: the bucket's clips.
        bucket: its number.
        work: what is encoded with what.
        done: (clip_id, sha256, bucket) of the clips that are there.
        part: (number, count) of the machines that divide the clips.
    """
    number, count = part
    clips = work.clips
    # Frames spread over the whole clip lie the same in every window.
    several = work.record.windows if share.bucket.is_image or share.bucket.fps is not None else 1
    mine = [clip for clip in share.clips.tolist() if clip % count == number]
    left = [clip for clip in mine if (clips.clip_id(clip), clips.sha256[clip].as_py(), share.bucket.name) not in done]
    return [Job(clip, bucket, window) for clip in left for window in range(several)]


def encoded(work: Work, jobs: Sequence[Job]) -> Iterator[Window]:
    """The jobs' windows, in their order, decoded in worker processes and encoded here."""
    import torch

    from videofactory.model.training.latents import Window

    buckets, options, clips = [share.bucket for share in work.table.shares], work.options, work.clips
    windows: Any = Windows(clips, buckets, work.record.windows, options)
    decoded: Any = torch.utils.data.DataLoader(
        windows,
        batch_size=None,
        sampler=jobs,
        num_workers=options.workers,
        prefetch_factor=8 if options.workers else None,
        # The VAE may stand on a GPU already, and a process with threads is no good one to fork.
        multiprocessing_context="spawn" if options.workers else None,
    )
    for job, video in decoded:
        name, sha256 = clips.clip_id(job.clip), clips.sha256[job.clip].as_py()
        bucket = buckets[job.bucket].name
        if isinstance(video, str):
            yield Window(name, sha256, bucket, job.window, error=video)
        else:
            yield Window(name, sha256, bucket, job.window, moments=work.encoder(video))


def precompute(
    storage: Storage,
    work: Work,
    part: tuple[int, int] = (0, 1),
    chunk: int = 64,
    progress: Callable[[int, int], None] = lambda made, left: None,
) -> dict[str, str]:
    """Encode what is left of the work, and commit every `chunk` clips.

    Args:
        storage: the folder of the latents.
        work: what is encoded with what.
        part: (number, count) of the machines that divide the clips.
        chunk: clips per part.
        progress: called with the numbers of windows that are committed, and that were left at the start.

    Returns:
        The errors of unreadable clips, by `clip_id`.

    Raises:
        LatentsError: the folder's latents were made with something else.
    """
    from videofactory.model.training.latents import begin, put_part, read_index

    begin(storage, work.record)
    rows = read_index(storage)
    keys = list(zip(*(rows[name].to_pylist() for name in ("clip_id", "sha256", "bucket")), strict=True))
    errors = rows["error"].is_valid().to_pylist()
    done = {key for key, error in zip(keys, errors, strict=True) if not error}
    # They are tried again, for the dataset may have been repaired, and noted once.
    known_bad = set(keys) - done
    plans = [jobs_of(share, number, work, done, part) for number, share in enumerate(work.table.shares)]
    left, made = sum(map(len, plans)), 0
    bad: dict[str, str] = {}
    for jobs in filter(None, plans):
        per_clip = 1 + max(job.window for job in jobs)
        held: list[Window] = []
        for number, window in enumerate(encoded(work, jobs), 1):
            held.append(window)
            if window.error is not None:
                bad[window.clip_id] = window.error
            if number % (per_clip * chunk) == 0 or number == len(jobs):
                put_part(storage, [w for w in held if w.error is None or (w.clip_id, w.sha256, w.bucket) not in known_bad])
                made, held = made + len(held), []
                progress(made, left)
    return bad


def _stop(message: object, code: int = 2) -> NoReturn:
    notes.print(f"[red]Error:[/] {escape(str(message))}", soft_wrap=True)
    raise typer.Exit(code)


def _load_vae(name: str, revision: str | None, variant: str | None) -> Any:
    from diffusers import AutoencoderKL

    if name == MINIATURE:
        from videofactory.model import miniature

        return miniature.vae()
    options = {"revision": revision, "variant": variant, "use_safetensors": True}
    try:
        return AutoencoderKL.from_pretrained(name, **options)
    except OSError as first:
        try:
            return AutoencoderKL.from_pretrained(name, subfolder="vae", **options)
        except OSError:
            raise first from None


def _part(share: str) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+)/(\d+)", share)
    if found is None or not int(found[1]) < int(found[2]):
        _stop(f"--share {share!r} is not of the form NUMBER/COUNT, the number from 0 and below the count, for example 0/4")
    return int(found[1]), int(found[2])


@app.command()
def main(
    dataset: Annotated[str, typer.Argument(help="Folder or URI of a dataset.")],
    bucket: Annotated[list[str], typer.Option(help="FRAMESxHEIGHTxWIDTH[@FPS]; may be given several times.")],
    out: Annotated[str, typer.Option("--out", "-o", help="Folder or URI for the latents.")],
    vae: Annotated[str, typer.Option(help="Folder or Hub id of an AutoencoderKL, or of a pipeline, or `miniature`.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", show_default=False)] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of the weights' files, as fp16.", show_default=False)] = None,
    windows: Annotated[int, typer.Option(min=1, max=1024, help="Windows per clip, evenly spaced; training draws one.")] = 1,
    split: Annotated[Literal["train", "val", "test", "all"], typer.Option(help="Split of the dataset.")] = "train",
    where: Annotated[str | None, typer.Option(help="Condition in SQL on the columns of the clips.", show_default=False)] = None,
    max_upscale: Annotated[float, typer.Option(help="As in training.")] = 1.0,
    max_aspect_change: Annotated[float, typer.Option(help="As in training.")] = 1.5,
    share: Annotated[str, typer.Option(help="NUMBER/COUNT: this machine's share of the clips.")] = "0/1",
    chunk: Annotated[int, typer.Option(min=1, max=2**16, help="Clips per file.")] = 64,
    frames_at_once: Annotated[int, typer.Option(min=1, max=2**16, help="Frames per pass of the VAE.")] = 16,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Processes that decode.")] = 2,
    device: Annotated[str, typer.Option(help="`auto`, `cpu`, `cuda`, `cuda:1`.")] = "auto",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(help="Number format of the VAE.")] = "fp32",
    max_bad_fraction: Annotated[float, typer.Option(min=0, max=1, help="Share of clips that may be unreadable.")] = 0.01,
) -> None:
    """Encode the clips of a dataset with a VAE, for training without it."""
    from videofactory.model.training.options import DataOptions
    from videofactory.shards.storage import Storage

    part = _part(share)
    try:
        options = DataOptions(
            split=None if split == "all" else split,
            where=where,
            max_upscale=max_upscale,
            max_aspect_change=max_aspect_change,
            uncaptioned="empty",
            workers=workers,
            max_bad_fraction=max_bad_fraction,
        )
        work = _prepared(dataset, bucket, options, _load_vae(vae, revision, variant), windows, frames_at_once, device, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        _stop(error)
    notes.print(work.table.rich())
    begun = time.perf_counter()
    bad = _guarded(Storage(out), work, part, chunk)
    _summarise(bad, work, time.perf_counter() - begun, out)


def _prepared(
    dataset: str, names: Sequence[str], options: DataOptions, vae: Any, windows: int, frames_at_once: int, device: str, dtype: str
) -> Work:
    from videofactory.model.training.buckets import assign
    from videofactory.model.training.clips import Clips
    from videofactory.model.training.latents import Record, fingerprint
    from videofactory.model.training.options import Bucket

    buckets = [Bucket.parse(name) for name in names]
    _check_factor(vae, buckets)
    clips = Clips(dataset, options)
    table = assign(buckets, clips.measures, options)
    table.check()
    # Before the cast to another number format, which changes weights.
    record = Record(fingerprint(vae), vae.config.scaling_factor, getattr(vae.config, "shift_factor", None) or 0.0, windows)
    return Work(clips, table, record, Encoder(_placed(vae, device, dtype), frames_at_once), options)


def _guarded(storage: Storage, work: Work, part: tuple[int, int], chunk: int) -> dict[str, str]:
    from videofactory.model.training.latents import LatentsError

    columns = (TextColumn("windows"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=notes) as bar:
            task = bar.add_task("windows", total=None)
            return precompute(storage, work, part, chunk, lambda made, left: bar.update(task, completed=made, total=left))
    except LatentsError as error:
        _stop(error)
    except (OSError, ValueError, ArithmeticError, RuntimeError) as error:
        _stop(f"{error}\nWhat is committed stays; run the same command again to go on", 1)
    except KeyboardInterrupt:
        _stop("interrupted; run the same command again to go on", 130)


def _summarise(bad: dict[str, str], work: Work, seconds: float, out: str) -> None:
    clips, allowed = work.table.used, work.options.max_bad_fraction
    if bad:
        first = "; ".join(f"{clip}: {error}" for clip, error in list(bad.items())[:3])
        notes.print(f"{len(bad)} of {clips} clips are unreadable: {escape(first)}", soft_wrap=True)
    if len(bad) > max(10, int(allowed * clips)):
        _stop(f"more clips are unreadable than --max-bad-fraction {allowed:g} allows; run `videofactory verify`", 1)
    notes.print(f"done in {seconds:.1f} s: {escape(out)}", soft_wrap=True)


def _check_factor(vae: Any, buckets: Sequence[Bucket]) -> None:
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    for bucket in buckets:
        if bucket.height % factor or bucket.width % factor:
            raise ValueError(f"bucket {bucket.name} is no multiple of {factor} in height and width, which this VAE needs")


def _placed(vae: Any, device: str, dtype: str) -> Any:
    import torch

    place = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    torch.nn.Module.to(vae, place, {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype])
    return vae.eval()


if __name__ == "__main__":
    app()
