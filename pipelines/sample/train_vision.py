"""Trains the vision transformer that both tiny models share: frozen inside BLIP-2, as BLIP-2 has it, and copied into the CLIP.

It learns to say, patch by patch, what lies there: how much of the patch the shape covers, the shape's colour and form, and the
background of the frame. From such dense answers a tiny network learns far more per frame than from a caption.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from videofactory.pipelines.sample.backgrounds import BACKGROUNDS
from videofactory.pipelines.sample.shapes import COLOURS, FORMS
from videofactory.pipelines.sample.training_frames import MASK, SIDE, Frames

_log = logging.getLogger(__name__)

PATCH = 12
WIDTH = 96
LAYERS, HEADS, EXPANSION = 4, 4, 2
MEAN, STD = 0.5, 0.25
"""Pixels, 0 to 1, are normalised to (pixel - MEAN) / STD."""

_BATCH = 32
_PATCHES = SIDE // PATCH
_CELLS = MASK // _PATCHES
_COVERED = 0.35


class Batch:
    """A random batch of frames, mirrored at random and varied in light, with its labels as tensors.

    Forms are learned from shapes of random colours, which are asked for the form alone; colours from all others, among them
    forms without a name, which are asked for the colour alone (`named`). Nothing then ever tells a network that some named colour
    does not go with some form. Frames asked for both would, for the pairs held out are not among them; learning that is what
    makes a network fail on them.
    """

    def __init__(self, frames: Frames, chosen: Any, rng: np.random.Generator) -> None:
        size = len(chosen)
        self.chosen = chosen
        self.states = torch.empty(0)
        pixels = frames.pixels[chosen].astype(np.float32) / 255
        masks = frames.masks[chosen].astype(np.float32) / 255
        # Every form and every background stays what it is in a mirror.
        mirrored = rng.random(size) < 0.5
        pixels[mirrored], masks[mirrored] = pixels[mirrored][:, :, ::-1], masks[mirrored][:, :, ::-1]
        gain = rng.uniform(0.9, 1.08, (size, 1, 1, 1)) * rng.uniform(0.97, 1.03, (size, 1, 1, 3))
        offset = rng.uniform(-0.03, 0.03, (size, 1, 1, 1))
        pixels = np.clip(pixels * gain.astype(np.float32) + offset.astype(np.float32), 0, 1)
        self.pixels = (torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous() - MEAN) / STD
        cells = torch.from_numpy(masks).reshape(size, _PATCHES, _CELLS, _PATCHES, _CELLS)
        # [batch, row, column, cells]: how the shape covers each patch.
        self.cover = cells.permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)
        self.inside = self.cover.mean(-1) > _COVERED
        self.colour = torch.from_numpy(frames.colour[chosen])
        self.named = self.colour >= 0
        self.form = torch.from_numpy(frames.form[chosen])
        self.background = torch.from_numpy(frames.background[chosen])


def build_vision() -> Any:
    """An untrained Blip2VisionModel of 0.35 million parameters."""
    from transformers import Blip2VisionConfig, Blip2VisionModel

    config = Blip2VisionConfig(
        hidden_size=WIDTH,
        intermediate_size=EXPANSION * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        image_size=SIDE,
        patch_size=PATCH,
        initializer_range=0.02,
    )
    vision = Blip2VisionModel(config)
    _give_sense_of_place(vision)
    return vision


def train_vision(frames: Frames, steps: int, seed: int) -> Any:
    """Train from nothing and return the model in evaluation mode."""
    torch.manual_seed(seed)
    vision = build_vision()
    teach_vision(vision, frames, steps, seed)
    return vision.eval()


def teach_vision(vision: Any, frames: Frames, steps: int, seed: int) -> None:
    """Train `vision` for so many more steps."""
    rng = np.random.default_rng(seed)
    questions = _Questions()
    halfway: list[torch.Tensor] = []
    vision.encoder.layers[LAYERS // 2 - 1].register_forward_hook(lambda *call: halfway.append(_tensor(call[2])))
    optimiser, schedule = optimiser_of([*vision.parameters(), *questions.parameters()], 1.2e-3, steps)
    vision.train()
    started = time.monotonic()
    order = shuffled(len(frames.pixels), _BATCH, rng)
    for step in range(steps):
        batch = Batch(frames, next(order), rng)
        states = vision(pixel_values=batch.pixels).last_hidden_state
        loss, right = questions(halfway.pop(), states, batch)
        take_step(loss, optimiser, schedule)
        if step % 100 == 0 or step == steps - 1:
            _log.info("vision %d/%d: loss %.3f, form %.3f, %.0f s", step, steps, loss.item(), right, time.monotonic() - started)
    vision.encoder.layers[LAYERS // 2 - 1]._forward_hooks.clear()


class _Questions(nn.Module):
    """What the vision transformer is asked in training, and nobody asks later."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.norm_halfway = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.cover = nn.Linear(WIDTH, _CELLS**2)
        self.form = nn.Linear(WIDTH, len(FORMS))
        self.colour = nn.Linear(WIDTH, len(COLOURS) + 1)
        self.background = nn.Linear(WIDTH, len(BACKGROUNDS))

    def forward(self, halfway: torch.Tensor, states: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, float]:
        """Sum of the losses, and the fraction of shape patches whose form is right.

        Where the shape lies is asked halfway up, what it is at the top. Form is asked of the shape's patches alone, a tenth of
        all: among the others the question would drown.

        Args:
            halfway, states: [batch, 1 + patches, width], after half of the layers and after all.
            batch: with the answers.
        """
        cover = self.cover(self.norm_halfway(halfway[:, 1:]))
        states = self.norm(states[:, 1:])
        asked = batch.inside & ~batch.named[:, None]
        form, colour = self.form(states[asked]), self.colour(states).flatten(0, 1)
        wanted_form = batch.form[:, None].expand_as(asked)[asked]
        wanted_colour = torch.where(batch.inside, batch.colour[:, None], len(COLOURS))
        wanted_colour = wanted_colour.masked_fill(~batch.named[:, None], -100).flatten()
        cross_entropy = nn.functional.cross_entropy
        loss = cross_entropy(form, wanted_form) + 2 * cross_entropy(colour, wanted_colour)
        loss = loss + 2 * nn.functional.binary_cross_entropy_with_logits(cover, batch.cover)
        loss = loss + 0.3 * cross_entropy(self.background(states.mean(1)), batch.background)
        return loss, float((form.argmax(-1) == wanted_form).float().mean())


def look(see: Callable[[torch.Tensor], torch.Tensor], frames: Frames, batches: int, size: int, seed: int) -> list[Batch]:
    """Batches of frames as the frozen vision transformer sees them: `states` [size, 1 + patches, width] in place of the pixels.

    What a frozen network sees need not be computed anew each time that a batch comes round.

    Args:
        see: pixels [size, 3, height, width] -> states.
        frames: that the batches are drawn from.
        batches, size: how many, and the frames of each.
        seed: of the draw and of mirrors and light.
    """
    rng = np.random.default_rng(seed)
    order = shuffled(len(frames.pixels), size, rng)
    seen = [Batch(frames, next(order), rng) for _ in range(batches)]
    with torch.no_grad():
        for batch in seen:
            batch.states = see(batch.pixels)
            batch.pixels = torch.empty(0)
    return seen


def shuffled(count: int, size: int, rng: np.random.Generator) -> Iterator[Any]:
    """Batches of indices below `count`, each index once per round, for ever."""
    while True:
        order = rng.permutation(count)
        for start in range(0, count - size + 1, size):
            yield order[start : start + size]


def optimiser_of(parameters: list[nn.Parameter], rate: float, steps: int) -> tuple[Any, Any]:
    """AdamW with decay on matrices only, and the schedule of its rate: a short rise, a cosine fall."""
    settings = [
        {"params": [p for p in parameters if p.requires_grad and p.ndim > 1], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.requires_grad and p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(settings, lr=rate, betas=(0.9, 0.98))
    rise = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.02 + 0.49 * (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise)))

    return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)


def take_step(loss: torch.Tensor, optimiser: Any, schedule: Any) -> None:
    """One step of gradient descent, the gradient's norm limited to 1."""
    optimiser.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_([p for group in optimiser.param_groups for p in group["params"]], 1.0)
    optimiser.step()
    schedule.step()


def make_readable(directory: Path) -> None:
    """Let everybody read the files: safetensors are written for their owner alone, which an installed package does not want."""
    for file in directory.iterdir():
        file.chmod(0o644)


def _give_sense_of_place(vision: Any) -> None:
    """Start where patches know their place and attend to patches like themselves, near ones first.

    From the usual random start a network this small spends most of its training finding that out (compare Trockman and
    Kolter 2023, "Mimetic initialization of self-attention layers"). Places are sines and cosines of row and column.
    """
    frequencies = 2.0 ** torch.linspace(0, 3, WIDTH // 4)
    angles = (torch.arange(_PATCHES) + 0.5)[:, None] / _PATCHES * math.pi / 2 * frequencies
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = waves[:, None].expand(_PATCHES, _PATCHES, -1)
    columns = waves[None].expand(_PATCHES, _PATCHES, -1)
    with torch.no_grad():
        vision.embeddings.position_embedding[0, 1:] = 0.3 * torch.cat([rows, columns], dim=-1).flatten(0, 1)
        for layer in vision.encoder.layers:
            alike = torch.linalg.qr(torch.randn(WIDTH, WIDTH))[0]
            layer.self_attn.qkv.weight[: 2 * WIDTH] = torch.cat([alike, alike]) + 0.02 * torch.randn(2 * WIDTH, WIDTH)


def _tensor(output: Any) -> torch.Tensor:
    """What a layer gives, which is a tensor in some versions of transformers and the first of a tuple in others."""
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states
