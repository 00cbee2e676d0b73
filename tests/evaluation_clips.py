"""Drawn clips for the tests of evaluation: discs that move over a textured ground, and files of them."""

from __future__ import annotations

import json
from pathlib import Path

import av
import cv2
import numpy as np

FRAMES, HEIGHT, WIDTH = 12, 48, 64


def clip(seed: int, frames: int = FRAMES, speed: float = 1.0) -> np.ndarray:
    """A coloured disc that moves evenly over a ground of its own, uint8 (F, H, W, 3)."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(40, 200, (6, 8, 3)).astype(np.uint8)
    fine = generator.integers(-25, 25, (HEIGHT, WIDTH, 1))
    ground = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(int) + fine
    ground = ground.clip(0, 255).astype(np.uint8)
    place, way = generator.uniform((16, 12), (48, 36)), generator.uniform(-2, 2, 2) * speed
    colour = tuple(int(value) for value in generator.integers(0, 255, 3))
    pictures = []
    for number in range(frames):
        picture = ground.copy()
        x, y = (place + number * way).round().astype(int)
        cv2.circle(picture, (int(x), int(y)), 8, colour, -1)
        pictures.append(picture)
    return np.stack(pictures)


def clips(count: int, begin: int = 0) -> np.ndarray:
    """Different clips, uint8 (N, F, H, W, 3)."""
    return np.stack([clip(begin + number) for number in range(count)])


def blurred(videos: np.ndarray, sigma: float) -> np.ndarray:
    """The same clips out of focus."""
    flat = videos.reshape(-1, *videos.shape[2:])
    return np.stack([cv2.GaussianBlur(picture, (0, 0), sigma) for picture in flat]).reshape(videos.shape)


def shuffled(videos: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same clips, the frames of each in a random order."""
    generator = np.random.default_rng(seed)
    return np.stack([video[generator.permutation(len(video))] for video in videos])


def write_clip(path: Path, frames: np.ndarray, fps: int = 10) -> Path:
    """A small H.264 file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        stream.options = {"preset": "ultrafast", "crf": "12", "bf": "2"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())
    return path


def write_folder(folder: Path, videos: np.ndarray, prompts: list[str] | None = None, fps: int = 10) -> Path:
    """A folder of files with numbers for names, and `prompts.jsonl` if there are prompts."""
    for number, video in enumerate(videos):
        write_clip(folder / f"{number:03}.mp4", video, fps)
    if prompts is not None:
        rows = [json.dumps({"file": f"{number:03}.mp4", "prompt": prompt}) for number, prompt in enumerate(prompts)]
        (folder / "prompts.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def tensor(videos: np.ndarray):
    """Clips as extractors take them, uint8 (N, F, 3, H, W)."""
    import torch

    return torch.from_numpy(videos).permute(0, 1, 4, 2, 3).contiguous()
