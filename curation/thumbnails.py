"""Small pictures of the shots, kept on the way through the one pass, so that a report can show what was rejected."""

from __future__ import annotations

import bisect

from videofactory.curation.signals import Frame

WIDTH = 192
"""Largest width in pixels of a thumbnail."""

_QUALITY = 70
_EVERY = 0.5
_AT_MOST = 2000


class Thumbnails:
    """Pictures of one video, taken at regular times before the shots are known.

    When there are too many, every other one is dropped and they are taken half as often, so that memory stays bounded (about
    10 MB) however long the video is.
    """

    def __init__(self) -> None:
        self._every = _EVERY
        self._times: list[float] = []
        self._pictures: list[bytes] = []

    def look(self, frame: Frame) -> None:
        """Keep a picture of this frame when it is time for one. Frames come in order."""
        if self._times and frame.time < self._times[-1] + self._every:
            return
        import cv2

        height, width = frame.bgr.shape[:2]
        scale = min(1.0, WIDTH / width)
        small = cv2.resize(frame.bgr, (round(width * scale), max(1, round(height * scale))), interpolation=cv2.INTER_AREA)
        done, data = cv2.imencode(".jpg", small, [cv2.IMWRITE_JPEG_QUALITY, _QUALITY])
        if done:
            self._times.append(frame.time)
            self._pictures.append(bytes(data))
        if len(self._times) > _AT_MOST:
            self._every *= 2
            del self._times[1::2], self._pictures[1::2]

    def inside(self, start: float, end: float) -> bytes | None:
        """The picture nearest to the middle of [start, end) seconds, as JPEG; `None` when there is none inside."""
        first, last = bisect.bisect_left(self._times, start), bisect.bisect_left(self._times, end)
        if first == last:
            return None
        middle = (start + end) / 2
        return self._pictures[min(range(first, last), key=lambda place: abs(self._times[place] - middle))]
