"""Frames out of an encoded clip: a window of it at a given rate, decoded from the last key frame before it and no further than its end."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import torch

from videofactory.shards.reader import scaled

from .options import Bucket


class ClipError(ValueError):
    """A clip cannot give a sample; the message says why."""


def window_of(times: np.ndarray, bucket: Bucket, place: float) -> np.ndarray:
    """Which frames of a clip make up a sample.

    Args:
        times: when the clip's frames are shown, in seconds, rising.
        bucket: how many frames, and at which rate.
        place: where in the clip the window lies, 0 (its begin) to below 1 (its end). Without a rate the frames are spread over the
            whole clip, as `Decode` of `shards.reader` does, and `place` counts for images alone.

    Returns:
        Numbers of frames, int64 `[bucket.frames]`, none decreasing: at every instant the last frame shown by then.

    Raises:
        ClipError: the clip has fewer frames than the bucket, or is shorter than its span.
    """
    if not len(times):
        raise ClipError("it has no frame")
    if bucket.is_image:
        return np.array([int(place * len(times))])
    if bucket.fps is None:
        if len(times) < bucket.frames:
            raise ClipError(f"it has {len(times)} frames, and {bucket.frames} are wanted")
        instants = np.linspace(times[0], times[-1], bucket.frames)
    else:
        span = (bucket.frames - 1) / bucket.fps
        slack = times[-1] - times[0] - span
        # The last frame is shown for a while, too: what is short by less than that is not short.
        if slack < -1 / bucket.fps:
            raise ClipError(
                f"it lasts {times[-1] - times[0]:.3f} s, and {bucket.frames} frames at {bucket.fps:g} fps take {span:.3f}"
            )
        instants = times[0] + place * max(slack, 0.0) + np.arange(bucket.frames) / bucket.fps
    # Timestamps are rounded; an instant that is meant to be a frame's own must not fall before it.
    return np.searchsorted(times, np.minimum(instants, times[-1]) + 1e-6, side="right") - 1


def decode(video: bytes, bucket: Bucket, place: float, threads: int = 1) -> torch.Tensor:
    """A sample of an encoded clip: uint8 `[3, frames, height, width]`, RGB, scaled to cover the size and cropped about the centre.

    Args:
        video: the encoded clip.
        bucket: the sample's shape and rate.
        place: where in the clip the sample lies, 0 to below 1.
        threads: of the decoder.

    Raises:
        ClipError: the bytes are no video, or one that is too short.
    """
    import av

    try:
        images = _promised(video, bucket, place, threads) or _delivered(video, bucket, place, threads)
    except av.FFmpegError as error:
        raise ClipError(f"it cannot be decoded: {error}") from error
    return torch.from_numpy(np.stack(images)).permute(3, 0, 1, 2)


def _promised(video: bytes, bucket: Bucket, place: float, threads: int) -> list[np.ndarray] | None:
    """The frames, chosen by what the packets promise; `None` where the decoder delivers others."""
    with _opened(video, threads) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        shown = sorted({p.pts for p in packets if p.pts is not None and not p.is_discard})
        if not shown or packets[0].time_base is None:
            return None
        numbers = window_of(np.array(shown, np.float64) * float(packets[0].time_base), bucket, place)
        wanted = [shown[number] for number in numbers]
        # Packets come in decoding order. What follows a key frame and is shown before it may lack its references, and is not wanted.
        keys = [n for n, p in enumerate(packets) if p.is_keyframe and p.pts is not None and p.pts <= wanted[0]]
        found: dict[int, np.ndarray] = {}
        left = set(wanted)
        for packet in [*packets[keys[-1] if keys else 0 :], None]:
            for frame in container.streams.video[0].decode(packet):
                if frame.pts in left:
                    left.remove(frame.pts)
                    found[frame.pts] = scaled(frame, bucket.height, bucket.width)
            if not left:
                return [found[pts] for pts in wanted]
    return None


def _delivered(video: bytes, bucket: Bucket, place: float, threads: int) -> list[np.ndarray]:
    """The frames, chosen by what the decoder delivers; every frame is decoded twice."""
    with _opened(video, threads) as container:
        times = [float(frame.time or 0.0) for frame in container.decode(video=0)]
    numbers = window_of(np.maximum.accumulate(np.array(times)) if times else np.empty(0), bucket, place)
    found: dict[int, np.ndarray] = {}
    with _opened(video, threads) as container:
        for number, frame in enumerate(container.decode(video=0)):
            if number in numbers:
                found[number] = scaled(frame, bucket.height, bucket.width)
    return [found[int(number)] for number in numbers]


def _opened(video: bytes, threads: int) -> Any:
    import av

    container = av.open(io.BytesIO(video))
    if not container.streams.video:
        container.close()
        raise ClipError("it has no video stream")
    container.streams.video[0].thread_count = threads
    return container
