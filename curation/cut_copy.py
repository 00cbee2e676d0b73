"""A clip without loss: the source's own packets under a new container, where every reader then delivers the shot alone.

Measured with PyAV 18.1, OpenCV 5.0, torchcodec 0.17 (exact mode) and ffmpeg 5.1, on painted frame numbers:

=============================================  =====  ======  ==========  ======
copied packets                                 PyAV   OpenCV  torchcodec  ffmpeg
=============================================  =====  ======  ==========  ======
H.264, closed groups, hidden lead-in           obeys  obeys   obeys       obeys
H.264, closed groups, starts at the key frame  obeys  obeys   obeys       obeys
H.264, open groups, hidden lead-in             obeys  obeys   **raises**  obeys
HEVC, open groups, hidden lead-in              obeys  obeys   **raises**  obeys
VP9, hidden lead-in                            obeys  obeys   obeys       obeys
=============================================  =====  ======  ==========  ======

So H.264 is copied where every key frame is an IDR picture (ITU-T H.264, 7.4.1.2.4: nothing refers back across it) and no frame
precedes its key frame, and VP9 always; an edit list hides the frames between the key frame and the shot. OpenCV's
CAP_PROP_FRAME_COUNT still counts the hidden frames: read until it stops, or set `max_lead_in` to 0. With B-frames the last
frames of a span refer to frames behind it; the copy ends before them, where decoding order is closed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from videofactory.curation.cut_plan import Plan, shortened

COPIED_CODECS = frozenset({"h264", "vp9"})
COPIED_AUDIO = frozenset({"aac"})

_IDR, _SEQUENCE_PARAMETERS, _PICTURE_PARAMETERS = 5, 7, 8
"""Kinds of NAL unit, ITU-T H.264 table 7-1."""


class NotCopyableError(Exception):
    """The span cannot be copied under the law above; the message says why."""


def copy_span(
    container: Any, stream: Any, packets: list[Any], plan: Plan, target: Path, *, max_lead_in: float, max_trim: float, audio: bool
) -> Plan:
    """Write the packets of the span into the MP4 file `target`.

    Args:
        container, stream: the opened source and its video stream.
        packets: what `cut_plan.read_packets` found for the span.
        plan: the frames to deliver.
        max_lead_in: largest share of the clip's bytes that may be hidden frames before the shot.
        max_trim: largest share of the span's frames that may be left out at its end.
        audio: whether to copy the first audio stream.

    Returns:
        The plan of what was written: `plan`, or fewer frames of it.

    Raises:
        NotCopyableError: nothing was written.
    """
    _demand_plain_video(plan, audio)
    count = _closed_end(packets, plan.times[-1])
    chosen = packets[:count]
    written = shortened(plan, sum(1 for packet in chosen if packet.pts >= plan.times[0]))
    if not written.times or len(written.times) < (1 - max_trim) * len(plan.times):
        raise NotCopyableError(f"only {len(written.times)} of {len(plan.times)} frames lie before the last closed end")
    if tuple(sorted(packet.pts for packet in chosen if packet.pts >= plan.times[0])) != written.times:
        raise NotCopyableError("the source hides frames inside the span")
    hidden = sum(packet.size for packet in chosen if packet.pts < plan.times[0])
    if hidden > max_lead_in * sum(packet.size for packet in chosen):
        raise NotCopyableError(f"the frames before the shot would take {hidden} bytes of the clip")
    _demand_closed_groups(chosen)
    if plan.codec == "h264":
        _demand_idr(chosen, bytes(stream.codec_context.extradata or b""))
    sound = list(_sound(container, plan, written)) if audio and plan.audio_codec else []
    _write(stream, chosen, plan, target, sound)
    return written


def _demand_plain_video(plan: Plan, audio: bool) -> None:
    """Only what needs no conversion: 8-bit 4:2:0, square pixels, upright, codecs that the readers agree on."""
    if not plan.stated or plan.codec not in COPIED_CODECS:
        raise NotCopyableError(f"{plan.codec} in {plan.format} is not copied")
    if plan.pixel_format != "yuv420p" or plan.sample_aspect != 1 or plan.rotation:
        raise NotCopyableError(f"{plan.pixel_format}, pixel aspect {plan.sample_aspect}, turned by {plan.rotation} degrees")
    if audio and plan.audio_codec not in {None, *COPIED_AUDIO}:
        raise NotCopyableError(f"{plan.audio_codec} sound is not copied")


def _closed_end(packets: list[Any], last: int) -> int:
    """The longest run of packets from the first that shows nothing after `last` and leaves out nothing before its own end."""
    following: list[int | float] = [float("inf")] * (len(packets) + 1)
    for position in range(len(packets) - 1, -1, -1):
        following[position] = min(following[position + 1], packets[position].pts)
    closed, highest = 0, -float("inf")
    for position, packet in enumerate(packets):
        highest = max(highest, packet.pts)
        if highest > last:
            break
        if following[position + 1] > highest:
            closed = position + 1
    return closed


def _demand_closed_groups(packets: list[Any]) -> None:
    """No frame is shown before the key frame that it follows in decoding order."""
    key = packets[0].pts
    for packet in packets:
        key = packet.pts if packet.is_keyframe else key
        if packet.pts < key:
            raise NotCopyableError("a frame is shown before the key frame that precedes it (open group of pictures)")
        if packet.is_discard or packet.is_corrupt or packet.has_sidedata("new_extradata"):
            raise NotCopyableError("the source hides or replaces something inside the span")


def _demand_idr(packets: list[Any], extradata: bytes) -> None:
    """Every key frame is an IDR picture, and the parameter sets are those of the header throughout."""
    if len(extradata) < 7 or extradata[0] != 1:
        raise NotCopyableError("the H.264 stream has no parameter sets in its header")
    length = (extradata[4] & 3) + 1
    for packet in packets:
        units = list(_units(bytes(packet), length))
        if packet.is_keyframe and not any(unit[0] & 31 == _IDR for unit in units):
            raise NotCopyableError("a key frame is no IDR picture")
        for unit in units:
            if unit[0] & 31 in (_SEQUENCE_PARAMETERS, _PICTURE_PARAMETERS) and unit not in extradata:
                raise NotCopyableError("the parameter sets change inside the span")


def _units(data: bytes, length: int) -> Iterator[bytes]:
    """The NAL units of an MP4 sample (ISO/IEC 14496-15, 5.3.4.2): each behind its size in `length` bytes."""
    position = 0
    while position + length < len(data):
        size = int.from_bytes(data[position : position + length], "big")
        position += length
        if not 0 < size <= len(data) - position:
            raise NotCopyableError("an H.264 sample is damaged")
        yield data[position : position + size]
        position += size


def _sound(container: Any, plan: Plan, written: Plan) -> Iterator[Any]:
    """The audio packets that lie inside the written frames' time."""
    stream = container.streams.audio[0]
    begin = plan.times[0] * plan.time_base
    end = (written.after if written.after is not None else written.times[-1] + 1) * plan.time_base
    container.seek(round(begin / stream.time_base), stream=stream, backward=True)
    for packet in container.demux(stream):
        if not packet.size or packet.pts is None or packet.pts * stream.time_base < begin:
            continue
        if (packet.pts + (packet.duration or 0)) * stream.time_base > end:
            return
        yield packet


def _decoding_times(times: list[int]) -> list[int]:
    """Decoding timestamps for frames with presentation timestamps `times` in decoding order: increasing, none later than its
    frame. Containers disagree about them and Matroska states none, so they are made anew."""
    ordered = sorted(times)
    delay = max(decoded - shown for decoded, shown in zip(ordered, times, strict=True))
    return [time - delay for time in ordered]


def _write(stream: Any, packets: list[Any], plan: Plan, target: Path, sound: list[Any]) -> None:
    """Mux `packets` so that the first frame of the plan gets timestamp 0; what comes before it is hidden by an edit list."""
    import av

    begin = plan.times[0]
    decoding = _decoding_times([packet.pts for packet in packets])
    try:
        with av.open(str(target), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as output:
            video = output.add_stream_from_template(stream)
            track = output.add_stream_from_template(sound[0].stream) if sound else None
            for packet in sound:
                packet.pts -= round(begin * plan.time_base / packet.time_base)
                packet.dts, packet.stream = packet.pts, track
            for packet, time in zip(packets, decoding, strict=True):
                packet.pts, packet.dts, packet.stream = packet.pts - begin, time - begin, video
            for packet in sorted([*packets, *sound], key=lambda packet: packet.dts * packet.time_base):
                output.mux(packet)
    except av.FFmpegError as error:
        raise NotCopyableError(f"the muxer refuses the packets: {error}") from error
