"""A shot becomes a clip: a small MP4 from which every reader delivers frames of the shot and nothing else.

A clip is a lossless copy of the source's packets where that is safe (`cut_copy` says when, with the measurements), and one
x264 pass otherwise (`cut_encode`). The law in both cases: every frame that PyAV, OpenCV, torchcodec in exact mode or the
ffmpeg command line delivers from the clip lies inside the shot. `cut` checks what it wrote before it returns it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from videofactory.curation.cut_copy import NotCopyableError, copy_span
from videofactory.curation.cut_encode import Encoding, encode_span, output_size
from videofactory.curation.cut_plan import TOLERANCE, Plan, codec_of, make_plan, opened, plan_span, read_packets, states_times
from videofactory.curation.media import Guard, MediaError

Result = TypeVar("Result")

MIDDLE_FRAME_WIDTH = 1024
"""Largest width in pixels of the JPEG of the middle frame."""


_PRESETS = ("ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo")


@dataclass(frozen=True)
class ClipSettings:
    """How clips are made. Every field decides about the bytes of a clip.

    Attributes:
        mode: `copy` (lossless; an error where it is not safe), `encode`, or `auto`: copy where it is safe, else encode.
            With `height` or `fps` set, `auto` encodes.
        max_lead_in: largest share of a copied clip's bytes, 0 to 1, that may be frames before the shot. They are hidden from
            readers but stored and decoded every time; at 0 only shots that start on a key frame are copied.
        max_trim: largest share of a span's frames, 0 to 1, that a copy may leave out at its end, where B-frames refer to
            frames behind the shot.
        crf: x264 constant rate factor, 0 (lossless) to 51.
        preset: x264 preset.
        height: height in pixels to scale to, never up; `None` keeps the source's.
        fps: frame rate to resample to, which drops or repeats frames; `None` keeps every frame at its own time.
        audio: keep the sound.
        threads: threads of the encoder; x264 writes other bytes with another number of them.
    """

    mode: Literal["auto", "copy", "encode"] = "auto"
    max_lead_in: float = 0.25
    max_trim: float = 0.1
    crf: int = 18
    preset: str = "veryfast"
    height: int | None = None
    fps: float | None = None
    audio: bool = False
    threads: int = 2

    def __post_init__(self) -> None:
        for name, value, low, high in (
            ("max_lead_in", self.max_lead_in, 0, 1),
            ("max_trim", self.max_trim, 0, 1),
            ("crf", self.crf, 0, 51),
            ("height", self.height, 16, 16384),
            ("fps", self.fps, 0.1, 1000),
            ("threads", self.threads, 1, 64),
        ):
            if value is not None and not low <= value <= high:
                raise ValueError(f"clip setting {name} is {value}; it must lie between {low} and {high}")
        if self.preset not in _PRESETS:
            raise ValueError(f"clip setting preset is {self.preset!r}; x264 has {', '.join(_PRESETS)}")
        if self.mode not in ("auto", "copy", "encode"):
            raise ValueError(f"clip setting mode is {self.mode!r}; it must be 'auto', 'copy' or 'encode'")
        if self.mode == "copy" and (self.height is not None or self.fps is not None):
            raise ValueError("clip setting mode 'copy' cannot change height or fps; use 'auto' or 'encode'")


@dataclass(frozen=True)
class Clip:
    """A finished clip.

    Attributes:
        video: the MP4 file, with its index at the front.
        width, height: size in pixels as shown.
        fps: frames per second, the mean where the rate varies.
        frames: number of frames that readers deliver.
        duration: seconds from the first frame to the end of the last.
        codec: `h264` or `vp9`.
        has_audio: whether there is a sound track.
        lead_in_bytes: bytes of hidden frames before the shot.
        middle_frame: the frame in the middle as JPEG, upright, at most `MIDDLE_FRAME_WIDTH` pixels wide.
    """

    video: bytes
    width: int
    height: int
    fps: float
    frames: int
    duration: float
    codec: str
    has_audio: bool
    lead_in_bytes: int
    middle_frame: bytes


def cut(
    source: Path,
    start: float,
    end: float,
    settings: ClipSettings | None = None,
    *,
    seconds: float = 600.0,
    guard: Guard | None = None,
) -> Clip:
    """Cut the frames with timestamps in [start, end) out of `source`.

    Args:
        source: a video file; it is not changed.
        start, end: seconds of the source's own timestamps, as its frames carry them; they may be rounded to milliseconds.
        settings: how; `ClipSettings()` by default.
        seconds: wall-time limit of the whole operation.
        guard: where to read the untrusted file; without one it is read in this process.

    Returns:
        The clip. A copied clip may lack a few frames at the end of the span (`ClipSettings.max_trim`); an encoded one holds
        exactly the frames of the span.

    Raises:
        MediaError: those of `media.open_video` and of the guard, `decode_failed`, `bad_timestamps`; `bad_span`, `empty_span`,
            `not_copyable` (mode `copy` alone), `ffmpeg_missing`, `encode_failed`, `encode_timeout` or `clip_check_failed`.
    """
    settings, source = settings or ClipSettings(), Path(source)
    if not start < end:
        raise MediaError(
            "bad_span",
            f"{source.name}: the span from {start} s to {end} s is empty; the end must lie after the start",
            retryable=False,
        )
    deadline = time.monotonic() + seconds

    def left() -> float:
        remaining = deadline - time.monotonic()
        if remaining <= 0:
            raise MediaError("encode_timeout", f"{source.name}: cutting took longer than {seconds} s; allow more", retryable=True)
        return remaining

    def guarded(function: Callable[..., Result], *arguments: object) -> Result:
        limit = left()
        if guard is None:
            return function(*arguments)
        result: Result = guard.run(function, *arguments, seconds=limit)
        return result

    with tempfile.TemporaryDirectory(prefix="videofactory-cut-") as folder:
        target = Path(folder) / "clip.mp4"
        plan, copied = guarded(_plan_or_copy, source, start, end, settings, target)
        if copied:
            return guarded(finish, target, plan, settings, False)
        encoding = Encoding(
            crf=settings.crf,
            preset=settings.preset,
            height=settings.height,
            fps=settings.fps,
            audio=settings.audio,
            threads=settings.threads,
        )
        try:
            encode_span(plan, target, encoding, seconds=left())
            return guarded(finish, target, plan, settings, True)
        except MediaError as error:
            if error.error_class not in {"clip_check_failed", "decode_failed"}:
                raise
        # The container misled us about its timestamps or about where decoding may begin (x264's old 4:4:4 streams, for one, decode
        # correctly only after the first frame, which names the encoder's version): believe the decoder, from the beginning.
        plan = guarded(_decoded_plan, source, start, end)
        encode_span(plan, target, encoding, seconds=left(), seek=False)
        return guarded(finish, target, plan, settings, True)


def _plan_or_copy(source: Path, start: float, end: float, settings: ClipSettings, target: Path) -> tuple[Plan, bool]:
    """The plan of the span, and whether it has been copied to `target`."""
    with opened(source) as (container, stream):
        packets = read_packets(container, stream, start, end) if states_times(container, stream) else []
        plan = make_plan(source, container, stream, packets, start, end)
        if settings.mode == "encode" or settings.height is not None or settings.fps is not None:
            return plan, False
        limits = {"max_lead_in": settings.max_lead_in, "max_trim": settings.max_trim}
        try:
            return copy_span(container, stream, packets, plan, target, **limits, audio=settings.audio), True
        except NotCopyableError as reason:
            if settings.mode == "copy":
                raise MediaError(
                    "not_copyable",
                    f"{source.name}: the span from {start} s to {end} s cannot be copied: {reason}; use mode 'auto' or 'encode'",
                    retryable=False,
                ) from reason
            return plan, False


def _decoded_plan(source: Path, start: float, end: float) -> Plan:
    return plan_span(source, start, end, decode=True)


def finish(target: Path, plan: Plan, settings: ClipSettings, encoded: bool) -> Clip:
    """Check the clip at `target` against the plan and return it.

    Args:
        target: an MP4 file.
        plan: the frames it has to deliver.
        settings: what it was made with.
        encoded: whether it was encoded rather than copied.

    Raises:
        MediaError: `clip_check_failed`, where the streams, the size, the number of frames or their times are not the planned ones.
    """
    try:
        return _checked(target, plan, settings, encoded)
    except MediaError as error:
        if error.error_class == "clip_check_failed":
            raise
        raise _failed(plan, f"a fault ({error})", "none") from error


def _checked(target: Path, plan: Plan, settings: ClipSettings, encoded: bool) -> Clip:
    """The body of `finish`, which says of every error that the clip is at fault."""
    with opened(target) as (container, stream):
        shown, hidden = _shown_frames(container, stream)
        times = [float(pts * stream.time_base) for pts in shown]
        expected = [plan.seconds(pts - plan.times[0]) for pts in plan.times]
        _check_times(plan, times, expected, settings.fps)
        frame = _middle_frame(container, stream, shown)
        size = output_size(plan, settings.height) if encoded else plan.display_size
        if (frame.width, frame.height) != size or frame.rotation % 360 or len(container.streams.video) != 1:
            raise _failed(
                plan, f"a picture of {frame.width}x{frame.height} turned by {frame.rotation} degrees", f"one of {size}, upright"
            )
        duration = plan.seconds((plan.after if plan.after is not None else _next(plan.times)) - plan.times[0])
        rate = settings.fps or ((len(times) - 1) / times[-1] if len(times) > 1 else float(stream.average_rate or 1 / duration))
        return Clip(
            video=target.read_bytes(),
            width=frame.width,
            height=frame.height,
            fps=rate,
            frames=len(shown),
            duration=duration,
            codec=codec_of(stream),
            has_audio=bool(container.streams.audio),
            lead_in_bytes=hidden,
            middle_frame=_jpeg(frame),
        )


def _shown_frames(container: Any, stream: Any) -> tuple[list[int], int]:
    """Timestamps of the frames that readers deliver, increasing, and the bytes of the frames they do not."""
    shown, hidden = [], 0
    for packet in container.demux(stream):
        if packet.size and (packet.is_discard or packet.pts < 0):
            hidden += packet.size
        elif packet.size:
            shown.append(packet.pts)
    return sorted(shown), hidden


def _check_times(plan: Plan, times: list[float], expected: list[float], fps: float | None) -> None:
    """The clip's frame times in seconds are the expected ones or, resampled to `fps`, cover the same time."""
    if fps is not None:
        wanted = max(1, round((expected[-1] + (expected[-1] / max(1, len(expected) - 1))) * fps))
        if not times or abs(len(times) - wanted) > 1 + 0.01 * wanted or abs(times[0]) > TOLERANCE:
            raise _failed(plan, f"{len(times)} frames", f"{wanted} at {fps} frames per second")
    elif len(times) != len(expected):
        raise _failed(plan, f"{len(times)} frames", f"{len(expected)}")
    elif (apart := max(abs(a - b) for a, b in zip(times, expected, strict=True))) > TOLERANCE:
        raise _failed(plan, f"a frame {apart:.4f} s off its time", "none")


def _failed(plan: Plan, found: str, wanted: str) -> MediaError:
    begin, end = plan.seconds(plan.times[0]), plan.seconds(plan.times[-1])
    return MediaError(
        "clip_check_failed",
        f"{plan.source.name}: the clip with the frames from {begin:.4f} s to {end:.4f} s has {found}, expected {wanted}; "
        "the source may be damaged there",
        False,
    )


def _next(times: tuple[int, ...]) -> int:
    """When the frame after the last would come, at the mean distance."""
    return times[-1] + (max(1, round((times[-1] - times[0]) / (len(times) - 1))) if len(times) > 1 else 1)


def _middle_frame(container: Any, stream: Any, shown: list[int]) -> Any:
    """The frame in the middle, decoded from its key frame on."""
    wanted = shown[len(shown) // 2]
    container.seek(wanted, stream=stream, backward=True)
    for frame in container.decode(stream):
        if frame.pts is not None and frame.pts >= wanted:
            return frame
    raise MediaError(
        "clip_check_failed", "the clip's middle frame cannot be decoded; the source may be damaged there", retryable=False
    )


def _jpeg(frame: Any) -> bytes:
    """A frame as JPEG of quality 90."""
    import cv2

    width = min(frame.width, MIDDLE_FRAME_WIDTH)
    height = max(1, round(frame.height * width / frame.width))
    pixels = frame.to_ndarray(format="bgr24", width=width, height=height, interpolation="AREA")
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 90])
    if not done:
        raise MediaError("clip_check_failed", f"a frame of {width}x{height} pixels cannot be written as JPEG", retryable=False)
    return bytes(data)
