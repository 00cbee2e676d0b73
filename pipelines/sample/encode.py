"""Turns the shots of the miniature world into files: encoders, containers, frame rates, and the ways in which a file can be broken.

Every encoder runs on one thread and writes no dates or random identifiers, so that the same world is the same bytes.
"""

from __future__ import annotations

import math
import subprocess
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray

from videofactory.pipelines.sample.scenario import Kind, Video
from videofactory.pipelines.sample.scene import Renderer

FADE = 0.4
"""Seconds that a fade through black takes, half before the boundary and half after it."""

_BIT_EXACT = {"fflags": "+bitexact"}
_SOUND_RATE = 44100
_CLOCK = Fraction(1, 90000)


def shot_moments(video: Video) -> list[list[float]]:
    """For each shot the moments, in seconds from its start, at which it has a frame."""
    kind = video.kind
    rng = np.random.default_rng(len(video.shots) + sum(shot.seed for shot in video.shots))
    moments = []
    for shot in video.shots:
        count = round(shot.duration * float(kind.fps))
        steps = rng.choice([0.5, 1.0, 1.0, 1.5], size=count) if kind.variable_rate else np.ones(count)
        moments.append([float(moment) for moment in (np.cumsum(steps) - steps) / float(kind.fps)])
    return moments


def write_video(video: Video, path: Path) -> None:
    """Write the file of `video` to `path`, faults included. A copy is not this function's work."""
    kind = video.kind
    if kind.fault == "empty":
        path.write_bytes(b"")
    elif kind.fault == "text":
        path.write_text("This file has the name of a video and the content of a letter.\n" * 40, encoding="utf-8")
    elif kind.fault == "audio_only":
        with av.open(str(path), "w", container_options=_BIT_EXACT) as container:
            _write_sound(container, 3.0)
    else:
        _write_shots(video, path)
    if kind.fault in ("no_index", "cut_in_half"):
        # The index of an MP4 stands at its end, or, with `faststart`, at its beginning, where half a file still has it.
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2])
    if kind.rotated:
        _mark_as_rotated(path)


def _write_shots(video: Video, path: Path) -> None:
    kind = video.kind
    options = dict(_BIT_EXACT)
    if kind.suffix == ".mp4" and kind.fault != "no_index":
        options["movflags"] = "+faststart"
    with av.open(str(path), "w", container_options=options) as container:
        stream = container.add_stream(kind.codec, rate=kind.fps)
        stream.width, stream.height = kind.size[::-1] if kind.rotated else kind.size
        stream.pix_fmt = "yuv420p"
        stream.options = {**_encoder_options(kind), "flags": "+bitexact"}
        stream.codec_context.thread_count = 1
        if kind.variable_rate:
            stream.codec_context.time_base = _CLOCK
            stream.time_base = _CLOCK
        time_base = _CLOCK if kind.variable_rate else 1 / kind.fps
        if kind.audio:
            length = sum(shot.duration for shot in video.shots)
            _write_sound(container, length)
        for number, (moment, pixels) in enumerate(_frames(video)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.time_base = time_base
            frame.pts = round(moment / time_base) if kind.variable_rate else number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def _encoder_options(kind: Kind) -> dict[str, str]:
    """The kind's own options over those that make an encoder quick and repeatable."""
    quick = {
        "libx264": {"preset": "veryfast", "crf": "21"},
        "libx265": {"crf": "24", "x265-params": "log-level=error:pools=none:frame-threads=1"},
        "libsvtav1": {"svtav1-params": "lp=1"},
    }
    return {**quick.get(kind.codec, {}), **kind.options}


def _frames(video: Video) -> Iterator[tuple[float, NDArray[np.uint8]]]:
    """All frames as they are stored, with their moments in seconds from the start of the video."""
    kind = video.kind
    start = 0.0
    all_moments = shot_moments(video)
    for number, (shot, moments) in enumerate(zip(video.shots, all_moments, strict=True)):
        renderer = Renderer(shot, *kind.size)
        length = _length(moments, kind)
        still = renderer.frame(0.0) if shot.frozen else None
        for moment in moments:
            pixels = renderer.frame(moment) if still is None else still
            light = 1.0
            if number in kind.fades:
                light = min(light, moment / (FADE / 2))
            if number + 1 in kind.fades:
                light = min(light, (length - moment) / (FADE / 2) - 1 / (float(kind.fps) * FADE / 2))
            if light < 1.0:
                pixels = (pixels * max(0.0, light)).astype(np.uint8)
            yield start + moment, np.ascontiguousarray(np.rot90(pixels)) if kind.rotated else pixels
        start += length


def _length(moments: list[float], kind: Kind) -> float:
    return moments[-1] + 1 / float(kind.fps)


def _write_sound(container: av.container.OutputContainer, seconds: float) -> None:
    """A quiet tone, as AAC."""
    stream = container.add_stream("aac", rate=_SOUND_RATE)
    stream.layout = "mono"
    samples = np.arange(round(seconds * _SOUND_RATE)) / _SOUND_RATE
    wave = (0.1 * np.sin(2 * math.pi * 440 * samples)).astype(np.float32)
    packets = []
    for start in range(0, len(wave), 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
        frame.sample_rate = _SOUND_RATE
        frame.pts = start
        packets += stream.encode(frame)
    container.mux([*packets, *stream.encode(None)])


def _mark_as_rotated(path: Path) -> None:
    """Write the display matrix that turns the stored picture upright; PyAV cannot, the command line can."""
    import imageio_ffmpeg

    plain = path.with_name(f"upright_{path.name}")
    path.rename(plain)
    head = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-display_rotation:v:0", "-90", "-i", str(plain)]
    tail = ["-c", "copy", "-fflags", "+bitexact", "-movflags", "+faststart", str(path)]
    subprocess.run([*head, *tail], check=True, timeout=60)
    plain.unlink()


def frame_timestamps(path: Path) -> list[float]:
    """When the frames of a file's first video stream are shown, in seconds of the file's own timestamps, in order.

    Raises:
        ValueError: the container does not say when one of its frames is shown.
    """
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        moments = []
        for packet in container.demux(stream):
            if packet.size == 0:
                continue
            # An AVI knows decoding times alone; without B-frames they are the times of display.
            moment = packet.pts if packet.pts is not None else packet.dts
            if moment is None:
                raise ValueError(f"{path.name}: a frame without a timestamp")
            moments.append(float(moment * stream.time_base))
    return sorted(moments)
