"""Videos as uint8 frames of one size, in batches: which frames a protocol asks for, decoded by PyAV, and what had to be left out.

Decoding runs on threads ahead of the scoring; no more than a few videos are in memory at a time.
"""

from __future__ import annotations

import hashlib
import io
import logging
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from videofactory.shards.reader import scaled

from .inputs import Content, Video, VideoSet, content_hash
from .protocol import Sampling

MOST_DAMAGED = 0.1
"""Share of unreadable videos above which a set is not scored."""
_ENOUGH_TO_JUDGE = 10

logger = logging.getLogger(__name__)


class TooShortError(ValueError):
    """A video has fewer frames than a score takes."""


@dataclass
class Census:
    """What became of the videos of a set.

    Attributes:
        scored: names, in the order in which they were scored.
        short: how many were left out because they are too short.
        damaged: why each that could not be decoded was left out, by its name.
        rates: frames per second of the files that were scored.
        hashes: of the contents of the scored videos, by name.
    """

    scored: list[str] = field(default_factory=list)
    short: int = 0
    damaged: dict[str, str] = field(default_factory=dict)
    rates: list[float] = field(default_factory=list)
    hashes: dict[str, str] = field(default_factory=dict)

    @property
    def hash(self) -> str:
        """Of the names and contents of the scored videos, in whatever order they were scored."""
        return hashlib.sha256(repr(sorted(self.hashes.items())).encode()).hexdigest()

    def summary(self) -> dict[str, Any]:
        """For the result file."""
        rates = [round(rate, 3) for rate in self.rates if rate]
        return {
            "scored": len(self.scored),
            "short": self.short,
            "damaged": self.damaged,
            "fps": {"least": min(rates), "median": statistics.median(rates), "most": max(rates)} if rates else None,
            "hash": self.hash,
        }


@dataclass(frozen=True)
class Batch:
    """Some videos of a set.

    Attributes:
        frames: uint8 (N, F, 3, H, W), RGB.
        videos: which they are.
    """

    frames: torch.Tensor
    videos: list[Video]


def chosen(times: Sequence[float], sampling: Sampling, name: str) -> list[int]:
    """The numbers of the frames to score, of a video whose frames are shown at `times` (seconds, rising).

    Raises:
        TooShortError: it has fewer than are needed; none is shown twice.
    """
    if sampling.fps is None:
        needed = (sampling.frames - 1) * sampling.stride + 1
        if len(times) < needed:
            raise TooShortError(f"{len(times)} frames of the {needed} that are needed")
        begin = _begin(len(times) - needed, sampling, name)
        return list(range(begin, begin + needed, sampling.stride))
    # The last frame is shown for as long as the ones before it, about.
    shown = (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else 0.0
    length, needed_length = (times[-1] - times[0] + shown if times else 0.0), sampling.frames / sampling.fps
    if length < needed_length - shown / 2:
        raise TooShortError(f"{length:.2f} of the {needed_length:.2f} seconds that are needed")
    slack = max(0, round((length - needed_length) * 1000))
    start = times[0] + _begin(slack, sampling, name) / 1000
    instants = start + np.arange(sampling.frames) / sampling.fps + 1e-6
    return [int(place) for place in np.clip(np.searchsorted(times, instants, side="right") - 1, 0, len(times) - 1)]


def _begin(slack: int, sampling: Sampling, name: str) -> int:
    return {"first": 0, "centre": slack // 2, "random": sampling.number(name) % (slack + 1)}[sampling.window]


def decode(content: Content, sampling: Sampling, name: str, fps: float | None = None) -> tuple[torch.Tensor, float]:
    """The frames that are scored of one video.

    Args:
        content: an encoded file, or frames, uint8 (F, H, W, 3).
        name: of the video, for a random window.
        fps: of frames.

    Returns:
        uint8 (F, 3, H, W), and the frames per second of the video, 0 if unknown.

    Raises:
        TooShortError: it has too few frames.
        ValueError: it holds no video that can be decoded.
    """
    import av

    if not isinstance(content, bytes):
        if sampling.fps is not None and fps is None:
            raise ValueError("frames without their rate cannot be sampled at --fps; save `fps` beside `videos`, or use --stride")
        times = (np.arange(len(content)) / (fps or 1)).tolist()
        frames = [av.VideoFrame.from_ndarray(content[n], format="rgb24") for n in chosen(times, sampling, name)]
        return _stack([_scaled(frame, sampling) for frame in frames]), fps or 0.0
    try:
        with av.open(io.BytesIO(content)) as container:
            if not container.streams.video:
                raise ValueError("it has no video stream")
            stream = container.streams.video[0]
            packets = [p for p in container.demux(stream) if p.pts is not None and p.time_base and not p.is_discard]
            rate = float(stream.average_rate or 0)
        times = sorted(float(p.pts * p.time_base) for p in packets)
        images = _decoded(content, set(wanted := chosen(times, sampling, name)), sampling)
    except av.FFmpegError as error:
        raise ValueError(f"it cannot be decoded: {error.strerror or error}") from error
    if missing := [number for number in wanted if number not in images]:
        raise ValueError(f"it breaks off: of {len(times)} frames, number {missing[0]} cannot be decoded")
    return _stack([images[number] for number in wanted]), rate


def _decoded(content: bytes, wanted: set[int], sampling: Sampling) -> dict[int, NDArray[np.uint8]]:
    import av

    images: dict[int, NDArray[np.uint8]] = {}
    with av.open(io.BytesIO(content)) as container:
        # A few frames are not worth threads of the decoder's own: videos are decoded side by side.
        container.streams.video[0].codec_context.thread_count = 1
        for number, frame in enumerate(container.decode(video=0)):
            if number in wanted:
                images[number] = _scaled(frame, sampling)
            if number >= max(wanted):
                break
    return images


def _scaled(frame: Any, sampling: Sampling) -> NDArray[np.uint8]:
    height, width = sampling.height, sampling.width
    if sampling.crop == "centre":
        return scaled(frame, height, width)
    stretched: NDArray[np.uint8] = frame.reformat(
        width=width, height=height, format="rgb24", interpolation="BICUBIC"
    ).to_ndarray()
    return stretched


def _stack(images: list[NDArray[np.uint8]]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def batches(
    videos: VideoSet, sampling: Sampling, census: Census, *, count: int | None = None, size: int = 8, threads: int = 2
) -> Iterator[Batch]:
    """The videos of a set as frames, `size` at a time; `census` is kept up to date on the way.

    Args:
        count: how many to score; they are drawn by the seed, and one that is too short or damaged is replaced by the next. All, in
            the order of their names, by default.
        threads: that decode.

    Raises:
        ValueError: more than a tenth of the videos are damaged; the message names the first.
    """
    order = videos.videos
    if count is not None and count < len(order):
        order = sorted(order, key=lambda video: (sampling.number(video.name), video.name))
        if videos.kind == "frames":
            # All are of one length, so none has to be replaced, and going back would read the file anew.
            order = sorted(order[:count], key=lambda video: video.name)
    frames: list[torch.Tensor] = []
    members: list[Video] = []
    for video, result in _ahead(order, sampling, 1 if videos.kind == "frames" else threads, census):
        if not _counted(census, video, result, videos):
            continue
        frames.append(result[0])
        members.append(video)
        full = count is not None and len(census.scored) >= count
        if len(frames) == size or full:
            yield Batch(torch.stack(frames), members)
            frames, members = [], []
        if full:
            return
    if frames:
        yield Batch(torch.stack(frames), members)


def _ahead(order: list[Video], sampling: Sampling, threads: int, census: Census) -> Iterator[tuple[Video, Any]]:
    """Each video with its frames and rate, or with the error, in order, while the next ones are being decoded."""

    def work(video: Video) -> tuple[torch.Tensor, float, str]:
        content = video.read()
        return (*decode(content, sampling, video.name, video.fps), content_hash(content))

    waiting: deque[tuple[Video, Future[Any]]] = deque()
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        try:
            rest = iter(order)
            while True:
                while len(waiting) < 2 * threads and (video := next(rest, None)) is not None:
                    waiting.append((video, pool.submit(work, video)))
                if not waiting:
                    return
                video, future = waiting.popleft()
                error = future.exception()
                if error is not None and not isinstance(error, ValueError | OSError):
                    raise error
                yield video, error or future.result()
        finally:
            for _, future in waiting:
                future.cancel()


def _counted(census: Census, video: Video, result: Any, videos: VideoSet) -> bool:
    """Enter what became of a video; whether it is scored."""
    if isinstance(result, TooShortError):
        census.short += 1
        return False
    if isinstance(result, Exception):
        census.damaged[video.name] = str(result)
        logger.warning("left out %s of %s: %s", video.name, videos.place, result)
        seen = len(census.scored) + census.short + len(census.damaged)
        allowed = MOST_DAMAGED * max(len(videos.videos), _ENOUGH_TO_JUDGE)
        if len(census.damaged) > allowed:
            name, reason = next(iter(census.damaged.items()))
            raise ValueError(
                f"{len(census.damaged)} of the first {seen} videos of {videos.place} are damaged, more than a tenth of its "
                f"{len(videos.videos)} (the first is {name}: {reason}); repair or remove them"
            )
        return False
    census.scored.append(video.name)
    census.hashes[video.name] = result[2]
    if result[1]:
        census.rates.append(result[1])
    return True
