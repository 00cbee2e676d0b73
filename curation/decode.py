"""One pass over a video that yields its frames small: cheap to decode, in display orientation, with the file's own timestamps.

The loop filter, and the frames that no other frame refers to, are skipped where that is safe. The timestamps of the skipped
frames are known all the same, because their packets are read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from videofactory.curation.media import MediaError, Probe, declared_duration, describe, open_video

Image = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]
Skip = Literal["nonreference", "none"]

# With fewer than 3 frames in 10 seen, a cut would be known to no better than three frames; then every frame is decoded.
_LEAST_SEEN = 0.3
# So many packets are read before that is judged, and their small frames held back.
_JUDGED_PACKETS = 150
# Below this rate every frame is needed to tell a cut from motion.
_LEAST_RATE = 20.0
# The loop filter may be skipped where scaling down smooths what it would have smoothed.
_LOOP_FILTER_SCALE = 2.0
# A film that ends earlier than promised by more than this part and by more than so many seconds is truncated.
_MISSING_PART, _MISSING_SECONDS = 0.1, 1.0
# More damaged packets, or timestamps that run backwards, than this part of all (and than so many) spoil a film.
_SPOILT_PART, _SPOILT_LEAST = 0.1, 10


class SmallFrames:
    """The frames of one video at a small size: iterate once, then read the attributes.

    Args:
        path: a local file.
        width: width in pixels to which a landscape picture is scaled, and height of a portrait one; nothing is scaled up.
        skip: `"nonreference"` leaves out frames that no other refers to (about half of an H.264 film) where the film allows it.
        threads: decoder threads; 0 for as many as there are processors. One costs the least processor time.

    Attributes:
        probe: what the file is; set before the first frame is yielded.
        skipped: whether frames were in fact left out.
        seen: number of frames yielded.
        damaged: number of packets that did not decode.
        end: end of the last frame in the file, in seconds.
    """

    probe: Probe

    def __init__(self, path: Path | str, width: int = 256, skip: Skip = "nonreference", threads: int = 1) -> None:
        self.path = Path(path)
        self.width = width
        self.threads = threads
        self.skipped = skip == "nonreference"
        self._in_order = False
        self._reset()

    def _reset(self) -> None:
        self.seen = self.damaged = 0
        self.end = 0.0
        self._times: list[float] = []
        self._decoding_times: deque[float] = deque()
        self._packets = self._untimed = self._backwards = 0
        self._others_end = 0.0
        self._step = 0.0
        self._last: float | None = None
        self._size: tuple[int, int] | None = None

    def __iter__(self) -> Iterator[tuple[float, Image]]:
        """Yield (timestamp in seconds, uint8 BGR image [height, width, 3]); timestamps increase strictly.

        Raises:
            MediaError: as `open_video`; and no_frames, decode_failed, truncated, bad_timestamps, decoder_memory.
        """
        frames = self._decode()
        held: list[tuple[float, Image]] = []
        for item in frames:
            held.append(item)
            if self._packets >= _JUDGED_PACKETS:
                break
        misleading = self._untimed * 2 > self._packets or self._backwards > _SPOILT_PART * self._packets
        if misleading or (self.skipped and not self._skipping_suits()):
            frames.close()
            held.clear()
            self._reset()
            self.skipped, self._in_order = False, misleading
            frames = self._decode()
        yield from held
        held.clear()
        yield from frames
        self._judge()

    def packet_times(self) -> Floats:
        """Timestamps in seconds of all frames in the file, seen or not, in presentation order, shape [n]."""
        return np.unique(np.asarray(self._times, np.float64))

    def _skipping_suits(self) -> bool:
        """Whether what was read so far may stay thinned out."""
        if not self.seen:
            return False
        decodable = max(1, self._packets - self.damaged)
        return self.seen >= _LEAST_SEEN * decodable and not 0 < self.probe.fps < _LEAST_RATE

    def _decode(self) -> Generator[tuple[float, Image], None, None]:
        import av

        with open_video(self.path) as (container, stream):
            self._configure(stream)
            promised = declared_duration(container, stream)
            # Where only the container promises a duration, the sound may account for its end, so its packets are read too.
            packets = container.demux(stream) if stream.duration else container.demux()
            try:
                for packet in packets:
                    if packet.stream is not stream:
                        self._note_other(packet)
                        continue
                    self._note(packet)
                    for frame in self._frames_of(packet):
                        yield from self._small(container, stream, frame)
            except MemoryError as error:
                raise MediaError("decoder_memory", f"{self.path.name}: decoding needs more memory than allowed") from error
            except av.error.InvalidDataError:
                # The container breaks off here; whether too early is judged by its promise.
                self.damaged += 1
            except av.error.FFmpegError as error:
                raise MediaError("unreadable", f"{self.path.name}: {error}") from error
            self._finish(promised, whole=bool(stream.duration))

    def _configure(self, stream: Any) -> None:
        context = stream.codec_context
        stream.thread_count = self.threads
        stream.thread_type = "AUTO"
        self._step = 1.0 / float(stream.average_rate or stream.guessed_rate or 25)
        if max(context.width, context.height) >= _LOOP_FILTER_SCALE * self.width:
            context.options = {"skip_loop_filter": "all"}
        if self.skipped:
            context.skip_frame = "NONREF"

    def _note(self, packet: Any) -> None:
        """Remember when the packet's frame is shown."""
        if not packet.size:
            return  # the empty packet that drains the decoder
        self._packets += 1
        base = packet.time_base
        ticks = packet.dts if packet.pts is None else packet.pts
        if self._in_order and ticks is not None and not packet.is_discard:
            self._decoding_times.append(ticks * base.numerator / base.denominator)
        if packet.pts is None:
            self._untimed += 1
        elif not packet.is_discard:
            time = packet.pts * base.numerator / base.denominator
            self._times.append(time)
            length = (packet.duration or 0) * base.numerator / base.denominator
            self.end = max(self.end, time + (length or self._step))

    def _note_other(self, packet: Any) -> None:
        if packet.size and packet.pts is not None:
            self._others_end = max(self._others_end, float((packet.pts + (packet.duration or 0)) * packet.time_base))

    def _frames_of(self, packet: Any) -> list[Any]:
        import av

        try:
            return packet.decode()  # type: ignore[no-any-return]
        except MemoryError:
            raise
        except av.error.EOFError:
            return []
        except av.error.FFmpegError:
            self.damaged += 1
            return []

    def _small(self, container: Any, stream: Any, frame: Any) -> Iterator[tuple[float, Image]]:
        time = self._time_of(frame)
        if self._last is not None and time <= self._last:
            self._backwards += 1
            return
        self._last = time
        if self._size is None:
            self.probe = describe(container, stream, frame, time)
            self._prepare_scaling()
        self.seen += 1
        yield time, self._scale(frame)

    def _time_of(self, frame: Any) -> float:
        """The frame's timestamp.

        Some containers (AVI) know when packets are decoded and not when frames are shown. Their frames come out in the order of
        showing all the same, so each takes the earliest timestamp that is left.
        """
        if self._in_order:
            if self._decoding_times:
                return self._decoding_times.popleft()
            return 0.0 if self._last is None else self._last + self._step
        ticks = frame.pts
        if ticks is None:
            return 0.0 if self._last is None else self._last + self._step
        base = frame.time_base
        return float(ticks * base.numerator / base.denominator)

    def _prepare_scaling(self) -> None:
        from av.video.reformatter import VideoReformatter

        # One reformatter for all frames: a fresh one computes its filter anew, which costs more than the scaling.
        self._reformatter = VideoReformatter()
        scale = min(1.0, self.width / max(self.probe.width, self.probe.height))
        width, height = (max(2, round(side * scale)) for side in (self.probe.width, self.probe.height))
        self._size = (height, width) if self.probe.rotation in (90, 270) else (width, height)

    def _scale(self, frame: Any) -> Image:
        import av
        import cv2

        width, height = self._size or (self.width, self.width)
        try:
            # Bicubic: with cheaper filters the adaptive detector fires on key frames of noisy pictures.
            small = self._reformatter.reformat(frame, width, height, "bgr24", interpolation="BICUBIC", threads=1)
        except (av.error.ArgumentError, av.error.UndefinedError, ValueError) as error:
            raise MediaError("decode_failed", f"{self.path.name}: pixel format {frame.format.name!r} cannot be read") from error
        image = cast(Image, small.to_ndarray())
        turns = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}
        turn = turns.get(self.probe.rotation)
        return image if turn is None else cast(Image, cv2.rotate(image, turn))

    def _finish(self, promised: float | None, whole: bool) -> None:
        """Settle the end of the film, and whether it comes too early."""
        if self._last is None:
            return
        if self._in_order:
            self._times = []
        self.end = max(self.end, self._last + self._step)
        decoded = self._last + self._step - self.probe.start
        # A promise of the container counts from its own start and covers the sound.
        reached = decoded if whole else max(self.end, self._others_end, decoded)
        missing = (promised or 0.0) - reached
        self._missing = missing if missing > max(_MISSING_SECONDS, _MISSING_PART * (promised or 0.0)) else 0.0

    def _judge(self) -> None:
        """Raise if what was decoded is not worth keeping."""
        name = self.path.name
        if self.damaged > max(_SPOILT_LEAST, _SPOILT_PART * self._packets) or (self.damaged and not self.seen):
            raise MediaError("decode_failed", f"{name}: {self.damaged} of {self._packets} packets do not decode")
        if not self.seen:
            raise MediaError("no_frames", f"{name}: a video stream without a single frame")
        if self._backwards > max(_SPOILT_LEAST, _SPOILT_PART * self.seen):
            raise MediaError("bad_timestamps", f"{name}: {self._backwards} frames come before their predecessor; remux it first")
        if self._missing:
            raise MediaError("truncated", f"{name}: the film ends {self._missing:.1f} s before the end that its header promises")
