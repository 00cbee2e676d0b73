"""What a source holds between two timestamps: which frames there are, and the packets that carry them.

Reading packets costs next to nothing and tells, for the containers that state a timestamp for every frame, exactly which
frames a cut must deliver. The other containers are decoded over the span to learn the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

from videofactory.curation.media import MediaError, open_video

STATED_FORMATS = frozenset({"mov", "matroska"})
"""Demuxers (first name) whose packets carry the container's own timestamps, one packet per frame."""

STATED_CODECS = frozenset({"h264", "hevc", "vp9", "av1"})

TOLERANCE = 0.0006
"""Seconds by which a given time may lie beside the timestamp it means: times are often stored rounded to milliseconds."""

_SEEK_MARGINS = (0.0, 2.0, 12.0, 60.0)
"""Seconds before the start at which to look for a key frame, one after another; at last reading starts at the beginning.
Containers without an index land anywhere, so the first packets may precede no key frame."""


@dataclass(frozen=True)
class Plan:
    """What a cut of one span has to deliver.

    Attributes:
        source: the file.
        format: name of the demuxer that reads it.
        codec: the video codec.
        pixel_format: name of the pixel format.
        stream: index of the video stream.
        time_base: seconds per tick of the video timestamps.
        times: timestamps of the frames inside the span in ticks, increasing.
        after: timestamp of the frame that follows the span, `None` where the video ends with it.
        key: timestamp in ticks of the key frame from which to decode.
        first: the lowest timestamp of the file in seconds, 0.0 where it states none.
        width, height: size in pixels as stored.
        sample_aspect: width of a pixel divided by its height.
        rotation: degrees by which a player turns the picture.
        audio_codec: codec of the first audio stream, `None` where there is none.
        stated: whether the container states the timestamps, rather than the decoder.
    """

    source: Path
    format: str
    codec: str
    pixel_format: str
    stream: int
    time_base: Fraction
    times: tuple[int, ...]
    after: int | None
    key: int
    first: float
    width: int
    height: int
    sample_aspect: Fraction
    rotation: int
    audio_codec: str | None
    stated: bool

    @property
    def display_size(self) -> tuple[int, int]:
        """Width and height in square pixels as a player shows them."""
        width, height = round(self.width * self.sample_aspect), self.height
        return (height, width) if self.rotation % 180 else (width, height)

    def seconds(self, ticks: int) -> float:
        """A timestamp of the video stream in seconds."""
        return float(ticks * self.time_base)


@contextmanager
def opened(source: Path) -> Iterator[tuple[Any, Any]]:
    """`media.open_video`, with the libraries' errors while the file is read turned into `MediaError`s as well."""
    import av

    try:
        with open_video(source) as (container, stream):
            yield container, stream
    except av.FFmpegError as error:
        raise MediaError("decode_failed", f"{source.name}: it cannot be read to the end of the span: {error}") from error


def read_packets(container: Any, stream: Any, start: float, end: float) -> list[Any]:
    """The packets from the last key frame at or before `start` to the first frame at or after `end`, in decoding order.

    Holds a little more than the encoded span in memory. Empty where the source has no key frame before `end`.
    """
    for margin in (*_SEEK_MARGINS, None):
        _seek(container, stream, None if margin is None else start - margin)
        packets = _collect(container, stream, start, end)
        begins = packets and packets[0].pts is not None and packets[0].pts * stream.time_base <= start + TOLERANCE
        if begins or margin is None:
            return packets
    return []


def _seek(container: Any, stream: Any, seconds: float | None) -> None:
    """Go to the key frame at or before `seconds`; `None`, or before the stream's start: its beginning."""
    import av

    begin = stream.start_time if stream.start_time is not None else 0
    ticks = begin if seconds is None else max(begin, round(Fraction(seconds + TOLERANCE / 2) / stream.time_base))
    try:
        # A second before the stream's own start is asked for, so that leading frames with lower timestamps are not skipped.
        container.seek(ticks if ticks > begin else begin - round(1 / stream.time_base), stream=stream, backward=True)
    except av.FFmpegError:
        container.seek(ticks, stream=stream, backward=True, any_frame=False)


def _collect(container: Any, stream: Any, start: float, end: float) -> list[Any]:
    """Packets from where the container stands: from the last key frame at or before `start` until `end` is passed."""
    packets: list[Any] = []
    beyond: int | None = None
    for packet in container.demux(stream):
        if not packet.size:
            continue
        if not packets and not packet.is_keyframe:
            continue
        time = None if packet.pts is None else packet.pts * stream.time_base
        if packet.is_keyframe and time is not None and time <= start + TOLERANCE:
            packets.clear()
        packets.append(packet)
        if time is not None and time >= end:
            beyond = packet.pts if beyond is None else min(beyond, packet.pts)
        # Decoding order is time order of dts, and no frame is shown before its dts: nothing below `beyond` can follow.
        if beyond is not None and packet.dts is not None and packet.dts > beyond:
            break
    return packets


def plan_span(source: Path, start: float, end: float, *, decode: bool = False) -> Plan:
    """Find the frames of `source` with timestamps in [start, end) seconds.

    Args:
        source: a video file.
        start, end: seconds of the source's own timestamps.
        decode: ask the decoder for timestamps even where the container states them.

    Raises:
        MediaError: those of `media.open_video`, `decode_failed`, `bad_timestamps`, and `empty_span` (no frame lies in the span).
    """
    with opened(source) as (container, stream):
        packets = [] if decode or not states_times(container, stream) else read_packets(container, stream, start, end)
        return make_plan(source, container, stream, packets, start, end)


def codec_of(stream: Any) -> str:
    """The codec's name, whichever library decodes it."""
    return str(stream.codec_context.codec.canonical_name)


def states_times(container: Any, stream: Any) -> bool:
    """Whether the packets of `stream` are frames with timestamps that can be relied on."""
    return container.format.name.split(",")[0] in STATED_FORMATS and codec_of(stream) in STATED_CODECS


def make_plan(source: Path, container: Any, stream: Any, packets: list[Any], start: float, end: float) -> Plan:
    """The plan for [start, end), from the packets that `read_packets` found or, without any, from decoding; see `plan_span`."""
    stated = bool(packets) and all(packet.pts is not None for packet in packets)
    if stated:
        key, shown = packets[0].pts, sorted(packet.pts for packet in packets if not packet.is_discard)
        frame = _first_frame(packets)
    else:
        key, shown, frame = _decoded_times(container, stream, start, end)
    inside, after = _select(shown, stream.time_base, start, end)
    if not inside or frame is None:
        raise MediaError("empty_span", f"{source.name}: no frame lies between {start} s and {end} s", retryable=False)
    audio = container.streams.audio
    return Plan(
        source=source,
        format=container.format.name.split(",")[0],
        codec=codec_of(stream),
        pixel_format=frame.format.name,
        stream=stream.index,
        time_base=stream.time_base,
        times=tuple(inside),
        after=after,
        key=key,
        first=(container.start_time or 0) / 1e6,
        width=frame.width,
        height=frame.height,
        sample_aspect=_sample_aspect(stream),
        rotation=int(frame.rotation) % 360,
        audio_codec=codec_of(audio[0]) if audio else None,
        stated=stated,
    )


def _sample_aspect(stream: Any) -> Fraction:
    """Width of a pixel divided by its height; headers that state nonsense count as square, as in `media.describe`."""
    aspect = Fraction(stream.sample_aspect_ratio or 1)
    return aspect if 0.1 < aspect < 10 else Fraction(1)


def _select(shown: list[int], time_base: Fraction, start: float, end: float) -> tuple[list[int], int | None]:
    """The increasing timestamps that lie inside [start, end), and the first one after it."""
    gaps = [float((b - a) * time_base) for a, b in pairwise(shown) if b > a]
    # Never more than a quarter of a frame, so that the tolerance cannot let a neighbouring frame in.
    slack = min([TOLERANCE, *(gap / 4 for gap in gaps)])
    inside = [pts for pts in shown if start - slack <= float(pts * time_base) < end - slack]
    return inside, min((pts for pts in shown if float(pts * time_base) >= end - slack), default=None)


def _first_frame(packets: list[Any]) -> Any:
    """The first frame that `packets` decode to: it alone knows how the picture is turned."""
    for packet in packets:
        for frame in packet.decode():
            return frame
    return None


def _decoded_times(container: Any, stream: Any, start: float, end: float) -> tuple[int, list[int], Any]:
    """From the decoder itself: the key frame to decode from, the timestamps of the frames shown around [start, end), and the
    last frame that was decoded."""
    stream.thread_type = "AUTO"
    for margin in (*_SEEK_MARGINS[1:], None):
        _seek(container, stream, None if margin is None else start - margin)
        keys, times, frame = _decode_until(container, stream, start, end, sought=margin is not None)
        if margin is None or len(keys) > 1:
            break
    if any(b <= a for a, b in pairwise(times)):
        raise MediaError(
            "bad_timestamps",
            "its timestamps run backwards, so a span of it means nothing certain; "
            "rewrite the file with 'ffmpeg -fflags +genpts -i IN -c copy OUT.mkv' and cut that",
        )
    # The last key frame but one, so that whoever seeks there has left the doubtful first group behind when the span begins.
    return (keys[-2] if len(keys) > 1 else times[0] if times else 0), times, frame


def _decode_until(container: Any, stream: Any, start: float, end: float, *, sought: bool) -> tuple[list[int], list[int], Any]:
    """Decode from where the container stands until `end`: the key frames up to `start`, all timestamps, the last frame.

    Where the container has sought, times are believed from the second key frame on: a program stream states times now and then
    only, and those of the first frames after a jump are guesses, found to be a frame late.
    """
    keys: list[int] = []
    times: list[int] = []
    groups, frame = 0, None
    for frame in container.decode(stream):
        groups += frame.key_frame
        if frame.pts is None or (sought and groups < 2):
            continue
        times.append(frame.pts)
        if frame.key_frame and frame.pts * stream.time_base <= start + TOLERANCE:
            keys.append(frame.pts)
        if frame.pts * stream.time_base >= end:
            break
    return keys, times, frame


def shortened(plan: Plan, count: int) -> Plan:
    """`plan` for its first `count` frames alone."""
    after = plan.times[count] if count < len(plan.times) else plan.after
    return replace(plan, times=plan.times[:count], after=after)
