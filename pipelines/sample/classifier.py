"""Reads the colour, the form and the direction of motion of the one shape in a video of the miniature world.

A judge for text-to-video models that were trained on this world. It was trained apart from them, on rendered scenes alone. One
frame after the other, a small convolutional network marks where the shape is and names its colour and form; the direction is no
network's opinion but arithmetic: the slope of the line through the marks' centres.

    reading = Classifier.load().read(frames)      # uint8 [16, 64, 112, 3]
    reading.colour, reading.form, reading.direction      # "red", "circle", "left"; None where there is nothing to name
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn import functional

from videofactory.pipelines.sample.shapes import COLOURS, FORMS

CLASSIFIER = Path(__file__).parent / "models" / "classifier"
"""Directory of the trained classifier."""

HEIGHT, WIDTH = 64, 112
"""Of the frames that the network sees, in pixels."""

LEAST_CONFIDENCE = 0.5
"""Mean over the frames of the mask's peak below which there is no shape."""

LEAST_WAY = 0.03
"""Frame widths over the whole video below which a shape stands still. The world's slowest shape goes 0.1."""

_CONFIG, _WEIGHTS = "config.json", "model.safetensors"


@dataclass(frozen=True)
class Reading:
    """What a video shows.

    Attributes:
        colour: a key of `COLOURS`; None when no shape was found.
        form: one of `FORMS`; None when no shape was found.
        direction: left, right, up or down; None when no shape was found, or it does not move.
        speed: of the shape, in frame widths per second, at the video's frames per second.
        confidence: that there is a shape, 0 to 1, averaged over the frames.
        colour_share, form_share: the probability of the word read, by the network's own account.
    """

    colour: str | None
    form: str | None
    direction: str | None
    speed: float
    confidence: float
    colour_share: float
    form_share: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(self).items()}


class ShapeNetwork(nn.Module):
    """Frames to a soft mask of the shape, and the colour and form of what lies under the mask."""

    def __init__(self, fine: int = 32, coarse: int = 60) -> None:
        """Channels at a quarter and at an eighth of the resolution."""
        super().__init__()
        self.config = {"fine": fine, "coarse": coarse}
        # Squares of 4 x 4 pixels become channels: as good here as convolutions at full size, and faster.
        self.fine = nn.Sequential(nn.PixelUnshuffle(4), _convolution(3 * 4**2, fine), _Residual(fine))
        self.coarse = nn.Sequential(_convolution(fine, coarse, stride=2), _Residual(coarse), _Residual(coarse), _Residual(coarse))
        self.mask_fine, self.mask_coarse = nn.Conv2d(fine, 1, 1), nn.Conv2d(coarse, 1, 1)
        self.colour = nn.Linear(fine + coarse, len(COLOURS))
        self.form = nn.Sequential(nn.Linear(fine + coarse, coarse), nn.ReLU(), nn.Linear(coarse, len(FORMS)))

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits of the mask [n, 16, 28], of colours [n, 8] and of forms [n, 6], of pixels [n, 3, 64, 112] in -1 to 1."""
        fine = self.fine(pixels)
        coarse = self.coarse(fine)
        size = fine.shape[-2:]
        widened = functional.interpolate(self.mask_coarse(coarse), size, mode="bilinear", align_corners=False)
        mask = (self.mask_fine(fine) + widened)[:, 0]
        # What lies under the mask; that it is a mask, its own loss sees to.
        cover = mask.detach().sigmoid()[:, None]
        pooled = torch.cat([_under(cover, fine), _under(functional.avg_pool2d(cover, 2), coarse)], dim=1)
        return mask, self.colour(pooled), self.form(pooled)


class Classifier:
    """The trained network with its arithmetic."""

    def __init__(self, network: ShapeNetwork, training: Mapping[str, int] | None = None) -> None:
        """Take a network; `training` says how it was trained, and is kept with it."""
        self.network = network.eval()
        self.training = dict(training or {})

    @classmethod
    def load(cls, directory: Path = CLASSIFIER) -> Classifier:
        """The classifier that `save` wrote.

        Raises:
            ValueError: it was made for other words than the world has now.
            OSError: a file is not there.
        """
        from safetensors.torch import load_file

        config = json.loads((directory / _CONFIG).read_text(encoding="utf-8"))
        known = {"colours": list(COLOURS), "forms": list(FORMS)}
        for name, words in known.items():
            if config[name] != words:
                raise ValueError(
                    f"the classifier in {directory} knows the {name} {', '.join(config[name])}, the world has {', '.join(words)}; "
                    "train it anew: python -m videofactory.pipelines.sample.train_classifier"
                )
        network = ShapeNetwork(**config["network"])
        network.load_state_dict({name: value.float() for name, value in load_file(directory / _WEIGHTS).items()})
        return cls(network, config.get("training"))

    def save(self, directory: Path) -> None:
        """Write the weights in half precision, and the configuration."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        halves = {name: value.half().contiguous() for name, value in self.network.state_dict().items() if _is_stored(name)}
        save_file(halves, directory / _WEIGHTS)
        config = {
            "made_by": "videofactory.pipelines.sample.train_classifier",
            "height": HEIGHT,
            "width": WIDTH,
            "network": self.network.config,
            "colours": list(COLOURS),
            "forms": list(FORMS),
            "training": self.training,
        }
        (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # Safetensors are written for their owner alone, which an installed package does not want.
        (directory / _WEIGHTS).chmod(0o644)

    @torch.no_grad()
    def read(self, frames: NDArray[np.uint8], fps: float = 8.0) -> Reading:
        """Read one video.

        Args:
            frames: uint8 [n, height, width, 3] RGB, of any size; they are scaled to what the network sees.
            fps: frames per second, of which only the speed depends.

        Raises:
            ValueError: the frames are of another kind, or there are none.
        """
        if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or not frames.size:
            raise ValueError(f"frames are {frames.dtype} {frames.shape}; uint8 (n, height, width, 3) is wanted, n at least 1")
        masks, colours, forms = self.network(to_input(frames))
        cover = masks.sigmoid()
        # A shape covers many cells; a single one that stands out is none.
        found = functional.avg_pool2d(cover[:, None], 3, stride=1).amax(dim=(1, 2, 3))
        confidence = float(found.mean())
        colour, colour_share = _word(colours, found, tuple(COLOURS))
        form, form_share = _word(forms, found, FORMS)
        across, down = slope(centres(cover).numpy(), found.numpy())
        direction = direction_of(across * (len(frames) - 1), down * (len(frames) - 1))
        speed = float(np.hypot(across, down)) * fps
        if confidence < LEAST_CONFIDENCE:
            return Reading(None, None, None, speed, confidence, colour_share, form_share)
        return Reading(colour, form, direction, speed, confidence, colour_share, form_share)


def to_input(frames: NDArray[np.uint8]) -> torch.Tensor:
    """Frames uint8 [n, height, width, 3] as the network takes them: [n, 3, 64, 112] in -1 to 1, scaled by area."""
    if frames.shape[1:3] != (HEIGHT, WIDTH):
        frames = np.stack([cv2.resize(frame, (WIDTH, HEIGHT), interpolation=cv2.INTER_AREA) for frame in frames])
    pixels = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2)
    return (pixels.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def centres(cover: torch.Tensor) -> torch.Tensor:
    """Centres of masks [n, rows, columns] in frame widths from the upper left corner: [n, 2] as x, y."""
    weights = cover.square()
    rows, columns = cover.shape[1:]
    x, y = (torch.arange(columns) + 0.5) / columns, (torch.arange(rows) + 0.5) / columns
    total = weights.sum(dim=(1, 2)).clamp_min(1e-6)
    return torch.stack([(weights.sum(1) @ x) / total, (weights.sum(2) @ y) / total], dim=1)


def slope(points: NDArray[np.floating[Any]], weights: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """The steps in x and y from frame to frame of the line that fits `points` [n, 2] best, squares weighted by `weights` [n]."""
    moments = np.arange(len(points), dtype=np.float64)
    share = weights / max(float(weights.sum()), 1e-6)
    lags = moments - share @ moments
    spread = float(share @ lags**2)
    if spread < 1e-9:
        return 0.0, 0.0
    across, down = (share * lags) @ (points - share @ points) / spread
    return float(across), float(down)


def direction_of(across: float, down: float) -> str | None:
    """The nearest of the four directions of a way in frame widths; None if it is too short to be one."""
    if max(abs(across), abs(down)) < LEAST_WAY:
        return None
    if abs(across) >= abs(down):
        return "left" if across < 0 else "right"
    return "up" if down < 0 else "down"


def _word(logits: torch.Tensor, weights: torch.Tensor, words: tuple[str, ...]) -> tuple[str, float]:
    """The likeliest word over all frames and its probability; frames count as much as there is a shape in them."""
    mean = (weights / weights.sum().clamp_min(1e-6)) @ functional.log_softmax(logits, dim=-1)
    share, number = functional.softmax(mean, dim=-1).max(dim=-1)
    return words[int(number)], float(share)


def _under(cover: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
    """Mean of states [n, channels, rows, columns] under a cover [n, 1, rows, columns]."""
    return (states * cover).sum(dim=(2, 3)) / cover.sum(dim=(2, 3)).clamp_min(1e-3)


def _convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norm, self.norm_out = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        inner = functional.relu(self.norm(self.first(states)))
        return functional.relu(states + self.norm_out(self.second(inner)))


def _is_stored(name: str) -> bool:
    """Whether a value of the network is needed to use it: the count of batches is not."""
    return not name.endswith("num_batches_tracked")
