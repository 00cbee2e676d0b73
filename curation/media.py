"""What stands between us and a file nobody vouches for: opening it, probing it, and the child process that may die of it.

A file is judged by its content, never by its name: only the containers and codecs listed here are opened, only from a plain
local file, and nothing that the file refers to is followed (playlists, external tracks). Everything that can go wrong with a
file is a `MediaError` with one of the classes of `ERRORS`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

from videofactory.curation.guard import (
    DEFAULT_LIMITS,
    ERRORS,
    Guard,
    GuardLimits,
    MediaError,
    shared_guard,
)

__all__ = [
    "CODECS",
    "CONTAINERS",
    "DEFAULT_LIMITS",
    "ERRORS",
    "Guard",
    "GuardLimits",
    "MediaError",
    "Probe",
    "describe",
    "open_video",
    "probe",
    "shared_guard",
]

CONTAINERS = ("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf")
"""Demuxers of libavformat that may be chosen; each of them reads the one file it is given and nothing else."""

CODECS = (
    *("h264", "hevc", "av1", "vp8", "vp9", "theora"),
    *("mpeg1video", "mpeg2video", "mpeg4", "msmpeg4v2", "msmpeg4v3", "h263", "flv1", "vp6f"),
    *("wmv1", "wmv2", "wmv3", "vc1", "mjpeg", "prores", "dnxhd", "dvvideo"),
)
"""Video codecs that may be decoded."""

# Decoders that go by another name than the codec they decode.
_DECODERS = [*CODECS, "libdav1d", "libvpx", "libvpx-vp9", "mpegvideo", "vc1image", "flv", "msmpeg4"]

# A file without a frame in so many packets is not worth probing further.
_PROBE_PACKETS = 400


@dataclass(frozen=True)
class Probe:
    """What a video's header and first frame say.

    Attributes:
        container: libavformat's first name of the container ("mov" stands for MP4 and its relatives).
        codec: libavcodec's name of the codec ("h264").
        width, height: pixels as displayed: turned by `rotation`, width stretched by `pixel_aspect`.
        rotation: degrees clockwise by which a player turns the coded picture: 0, 90, 180 or 270.
        pixel_aspect: width of a coded pixel divided by its height.
        fps: average frames per second, 0 when the file does not say.
        duration: seconds, `None` when the file does not say.
        start: timestamp of the first frame in seconds; rarely 0 in transport streams, and negative in some files.
        has_audio: whether there is at least one audio stream.
    """

    container: str
    codec: str
    width: int
    height: int
    rotation: int
    pixel_aspect: float
    fps: float
    duration: float | None
    start: float
    has_audio: bool


@contextmanager
def open_video(path: Path | str) -> Iterator[tuple[Any, Any]]:
    """Open a local file and yield PyAV's container and its video stream; cover pictures do not count as video.

    Raises:
        MediaError: not_found, unreadable, not_a_video, unsupported_container, unsupported_codec, no_video_stream, truncated.
    """
    import av

    path = Path(path)
    _require_plain_file(path)
    allowed = {
        "protocol_whitelist": "file",
        "format_whitelist": ",".join(CONTAINERS),
        "codec_whitelist": ",".join(_DECODERS),
    }
    try:
        # The prefix keeps a file name with a colon in it from being read as a protocol.
        container = av.open(f"file:{path}", container_options=allowed)
    except MemoryError as error:
        raise MediaError("decoder_memory", f"{path.name}: opening it needs more memory than allowed") from error
    except (av.error.FFmpegError, EOFError, UnicodeError) as error:
        raise _why_not_opened(path, error) from error
    with container:
        yield container, _video_stream(container, path)


def _require_plain_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
        readable = os.access(path, os.R_OK)
    except FileNotFoundError as error:
        raise MediaError("not_found", f"{path.name}: no such file") from error
    except (OSError, ValueError) as error:
        raise MediaError("unreadable", f"{path.name}: {getattr(error, 'strerror', None) or error}") from error
    if not S_ISREG(mode):
        raise MediaError("unreadable", f"{path.name}: a folder or device, not a file", retryable=False)
    if not readable:
        raise MediaError("unreadable", f"{path.name}: no permission to read it", retryable=False)


def _why_not_opened(path: Path, error: Exception) -> MediaError:
    """The error class of a failed open, told from libav's error and the file's first bytes."""
    import av

    with path.open("rb") as file:
        head = file.read(16)
    if not head:
        return MediaError("not_a_video", f"{path.name}: the file is empty", retryable=True)
    if isinstance(error, av.error.ArgumentError):
        return MediaError(
            "unsupported_container", f"{path.name}: its container is not one of {', '.join(CONTAINERS)}; convert it to MP4 first"
        )
    if isinstance(error, av.error.InvalidDataError | EOFError):
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
            return MediaError("truncated", f"{path.name}: an MP4 file without its index; the rest of the file is missing")
        why = getattr(error, "strerror", None) or "no known format"
        return MediaError("not_a_video", f"{path.name}: the content is not a video ({why})")
    return MediaError("unreadable", f"{path.name}: {error}")


def _video_stream(container: Any, path: Path) -> Any:
    import av

    names = (container.format.name or "").split(",")
    if not set(names) & set(CONTAINERS):
        raise MediaError("unsupported_container", f"{path.name}: container {names[0]!r}; one of {', '.join(CONTAINERS)} is read")
    pictures = av.stream.Disposition.attached_pic | av.stream.Disposition.still_image
    streams = [stream for stream in container.streams.video if not stream.disposition & pictures]
    if not streams:
        raise MediaError("no_video_stream", f"{path.name}: no video stream, only {len(container.streams)} other stream(s)")
    stream = streams[0]
    codec = _codec_name(stream)
    if codec not in CODECS:
        raise MediaError("unsupported_codec", f"{path.name}: video codec {codec!r}; decoded are {', '.join(CODECS)}")
    return stream


def _codec_name(stream: Any) -> str:
    codec = getattr(stream.codec_context, "codec", None)
    return getattr(codec, "canonical_name", None) or getattr(codec, "name", None) or "unknown"


def describe(container: Any, stream: Any, first_frame: Any, start: float) -> Probe:
    """The `Probe` of an opened file; `first_frame` is its first decoded frame, `start` that frame's timestamp in seconds."""
    # PyAV counts counter-clockwise, players are told clockwise.
    rotation = round(-first_frame.rotation / 90) * 90 % 360
    aspect = float(stream.sample_aspect_ratio or 1) or 1.0
    if not 0.1 < aspect < 10:
        aspect = 1.0
    width, height = max(1, round(first_frame.width * aspect)), first_frame.height
    if rotation in (90, 270):
        width, height = height, width
    duration = declared_duration(container, stream)
    return Probe(
        container=container.format.name.split(",")[0],
        codec=_codec_name(stream),
        width=width,
        height=height,
        rotation=rotation,
        pixel_aspect=aspect,
        fps=float(stream.average_rate or stream.guessed_rate or 0),
        duration=duration,
        start=start,
        has_audio=len(container.streams.audio) > 0,
    )


def declared_duration(container: Any, stream: Any) -> float | None:
    """Seconds of video that the header promises; the container's promise where the stream makes none."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return container.duration / 1_000_000 if container.duration else None


def probe(path: Path | str) -> Probe:
    """Read a video's header and first frame.

    Untrusted files should be probed by `guard.run(probe, path, seconds=...)`.

    Raises:
        MediaError: as `open_video`, and no_frames, decode_failed.
    """
    import av

    name = Path(path).name
    with open_video(path) as (container, stream):
        stream.thread_count = 1
        failed: Exception | None = None
        try:
            for count, packet in enumerate(container.demux(stream)):
                try:
                    for frame in packet.decode():
                        start = float(frame.pts * frame.time_base) if frame.pts is not None else 0.0
                        return describe(container, stream, frame, start)
                except av.error.InvalidDataError as error:
                    failed = error
                if count >= _PROBE_PACKETS:
                    break
        except MemoryError as error:
            raise MediaError("decoder_memory", f"{name}: its first frame needs more memory than allowed") from error
        except av.error.FFmpegError as error:
            failed = error
    if failed is not None:
        raise MediaError("decode_failed", f"{name}: the first frame cannot be decoded: {failed}")
    raise MediaError("no_frames", f"{name}: a video stream without a single frame")
