"""Small videos for builds: textured, moving shots with hard cuts, made in a fraction of a second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import av
import cv2
import numpy as np

SIZE = (320, 180)


def textures(seed: int, shots: int) -> list[np.ndarray]:
    """One large coloured texture per shot, uint8 [270, 480, 3], clearly unlike its neighbours."""
    generator = np.random.default_rng(seed)
    found = []
    for number in range(shots):
        coarse = generator.random((9, 16, 3)) * 0.7 + 0.3 * (number % 2)
        found.append((cv2.resize(coarse, (480, 270), interpolation=cv2.INTER_CUBIC).clip(0, 1) * 255).astype(np.uint8))
    return found


def make_video(
    path: Path, seed: int, seconds: Sequence[float] = (1.2, 1.4, 1.6), fps: int = 25, still: Sequence[int] = ()
) -> Path:
    """Write an H.264 MP4 whose shots last `seconds`; shots named in `still` do not move."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = *SIZE, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "20", "bf": "2"}
        for number, (texture, length) in enumerate(zip(textures(seed, len(seconds)), seconds, strict=True)):
            for frame in range(round(length * fps)):
                shift = 0 if number in still else 2 * frame
                crop = np.ascontiguousarray(texture[20 : 20 + SIZE[1], shift % 150 : shift % 150 + SIZE[0]])
                container.mux(stream.encode(av.VideoFrame.from_ndarray(crop, format="rgb24")))
        container.mux(stream.encode())
    return path


def make_folder(folder: Path, count: int) -> Path:
    """A folder of `count` videos of three shots each, every third with a still, and one file that is no video."""
    for number in range(count):
        make_video(folder / f"video-{number:02d}.mp4", seed=number, still=[1] if number % 3 == 0 else [])
    (folder / "text.mp4").write_text("this is no video")
    return folder
