"""`python -m videofactory.pipelines.sample.train_classifier`: train the classifier of the miniature world anew, and measure it.

Every frame that it learns from is rendered for the purpose; of the model that it shall judge, it sees nothing. Measured on shots of
another seed: clean, spoilt as in training, and encoded and decoded by the miniature's VAE, which is about the best that a model on
that VAE can reach.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import cv2
import numpy as np
import torch
import typer
from numpy.typing import NDArray
from torch.nn import functional

from videofactory.pipelines.sample.classifier import CLASSIFIER, Classifier, Reading, ShapeNetwork, to_input
from videofactory.pipelines.sample.classifier_frames import (
    FPS,
    Batch,
    Studio,
    degrade,
    draw_degradation,
    draw_videos,
    render_video,
)
from videofactory.pipelines.sample.scene import Shot
from videofactory.pipelines.sample.train_vision import optimiser_of, take_step

logger = logging.getLogger(__name__)

STEPS, BATCH, SCENERIES = 1900, 32, 600
RATE = 3e-3
MASK_WEIGHT, COLOUR_WEIGHT, FORM_WEIGHT = 2.0, 1.0, 1.0
MEASURED, MEASURED_SEED = 240, 90_000
"""Videos that it is measured on, five of every pair, and the seed of their shots, which no training uses."""

Change = Callable[[NDArray[np.uint8], int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Accuracy:
    """Fractions of videos read right, of a kind of video."""

    kind: str
    videos: int
    colour: float
    form: float
    direction: float
    all: float

    def __str__(self) -> str:
        return (
            f"{self.kind}: colour {self.colour:.1%}, form {self.form:.1%}, direction {self.direction:.1%}, "
            f"all three {self.all:.1%} ({self.videos} videos)"
        )


def train(steps: int, seed: int, sceneries: int = SCENERIES) -> Classifier:
    """Train from nothing.

    Args:
        steps: of `BATCH` frames each, all of them new.
        seed: same seed, same weights, on the same machine and versions.
        sceneries: backgrounds, painted once; no more than there are frames.
    """
    torch.manual_seed(seed)
    network = ShapeNetwork().to(memory_format=torch.channels_last).train()
    studio = Studio(min(sceneries, steps * BATCH), seed)
    optimiser, schedule = optimiser_of(list(network.parameters()), RATE, steps)
    began = time.monotonic()
    for step in range(steps):
        loss = _loss(network, studio.batch(BATCH))
        take_step(loss, optimiser, schedule)
        if step % 100 == 0 or step == steps - 1:
            logger.info("step %d of %d: loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - began)
    return Classifier(network, {"steps": steps, "seed": seed, "frames": steps * BATCH})


def _loss(network: ShapeNetwork, batch: Batch) -> torch.Tensor:
    masks, colours, forms = network(to_input(batch.pixels))
    loss = MASK_WEIGHT * functional.binary_cross_entropy_with_logits(masks, torch.from_numpy(batch.masks))
    for weight, logits, wanted in ((COLOUR_WEIGHT, colours, batch.colour), (FORM_WEIGHT, forms, batch.form)):
        # Of frames that show nothing with a name, nothing is asked; a batch of nothing else counts as no loss.
        asked = torch.from_numpy(wanted >= 0)
        if bool(asked.any()):
            loss = loss + weight * functional.cross_entropy(logits[asked], torch.from_numpy(wanted)[asked])
    return loss


def measure(classifier: Classifier, shots: Sequence[Shot], changes: Mapping[str, Change]) -> list[Accuracy]:
    """How much of rendered videos is read right.

    Args:
        classifier: that reads.
        shots: that are rendered.
        changes: what is done to the frames of a video, uint8 [n, height, width, 3], before they are read, by the name of the
            result. It also gets the video's number.
    """
    right: dict[str, list[tuple[bool, bool, bool]]] = {kind: [] for kind in changes}
    for number, shot in enumerate(shots):
        frames = render_video(shot)
        for kind, change in changes.items():
            right[kind].append(_right(classifier.read(change(frames, number), FPS), shot))
    return [_accuracy(kind, verdicts) for kind, verdicts in right.items()]


def _accuracy(kind: str, right: Sequence[tuple[bool, bool, bool]]) -> Accuracy:
    colour, form, direction = np.mean(right, axis=0).tolist()
    return Accuracy(kind, len(right), colour, form, direction, float(np.all(right, axis=1).mean()))


def _right(reading: Reading, shot: Shot) -> tuple[bool, bool, bool]:
    return reading.colour == shot.colour, reading.form == shot.form, reading.direction == shot.direction


def leave(frames: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """The frames as they are."""
    return frames


def spoil(frames: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
    """The frames of one video with one random mixture of faults, drawn from the video's number."""
    rng = np.random.default_rng([MEASURED_SEED, number])
    how = draw_degradation(rng)
    return np.stack([degrade(frame, how, rng) for frame in frames])


def through_vae() -> Change:
    """What encodes and decodes frames by the miniature's VAE, taking the mean of its latents."""
    from videofactory.model import miniature

    vae = miniature.vae()

    @torch.no_grad()
    def change(frames: NDArray[np.uint8], number: int) -> NDArray[np.uint8]:
        latents = vae.encode(to_input(frames)).latent_dist.mean
        pictures = (vae.decode(latents).sample.clamp(-1, 1) + 1) * 127.5
        pixels: NDArray[np.uint8] = pictures.round().byte().permute(0, 2, 3, 1).numpy()
        return pixels

    return change


def measure_all(classifier: Classifier, videos: int) -> list[Accuracy]:
    """Accuracies on clean videos, on spoilt ones and through the VAE: the same shots each time."""
    changes = {"clean": leave, "degraded": spoil, "through the miniature's VAE": through_vae()}
    return measure(classifier, draw_videos(videos, MEASURED_SEED), changes)


def describe(directory: Path, accuracies: Sequence[Accuracy], training: Mapping[str, int]) -> None:
    """Write the model card; `training` is the classifier's own account."""
    steps, seed, frames = (training[name] for name in ("steps", "seed", "frames"))
    size = sum(path.stat().st_size for path in directory.glob("*.safetensors")) / 1000
    table = [f"| {a.kind} | {a.videos} | {a.colour:.1%} | {a.form:.1%} | {a.direction:.1%} | {a.all:.1%} |" for a in accuracies]
    lines = [
        "---",
        "license: apache-2.0",
        "---",
        "",
        "# The miniature world's classifier",
        "",
        f"A convolutional network of {size:.0f} kB in half precision (`videofactory.pipelines.sample.classifier`) that reads the",
        "colour, the form and the direction of motion of the one shape in a video, so that text-to-video models trained on the",
        "miniature world can be scored: `python -m videofactory.pipelines.sample.classify SAMPLES`.",
        "",
        "**What it is not:** a model for your videos. It knows the shapes of the miniature world and nothing else; on any other video",
        "its answers mean nothing.",
        "",
        "- Input: frames of 112 x 64 pixels, others scaled to it by area, read one by one. The words are the likeliest over all frames.",
        "- The direction is arithmetic: the nearest of four to the slope of the line through the centres of the masks. A shape that",
        "  goes less than 0.03 frame widths in all has none.",
        f"- Trained on {frames:,} frames rendered for the purpose, all 48 pairs of colour and form alike, four fifths of them",
        "  spoilt at random (blur, lower resolution, smeared and stained colour, noise, JPEG, light), and on nobody's pictures. It",
        "  never saw a picture that the miniature's VAE or any model made.",
        "- Of a picture without any shape it says that there is none; to a shape without a name it gives the name of the likest.",
        "",
        "Measured on shots of another seed, 16 frames at 8 frames per second, each pair equally often:",
        "",
        "| videos | number | colour | form | direction | all three |",
        "|---|---|---|---|---|---|",
        *table,
        "| by chance | – | 12.5% | 16.7% | 25.0% | 0.5% |",
        "",
        "Degraded videos are spoilt as those of the training are. The videos that went through the VAE (encoded, and decoded from the",
        "mean of the latents) show about how much a model built on it can reach; the VAE serves for this measurement alone.",
        "",
        "Made by the authors of VideoFactory:",
        f"`python -m videofactory.pipelines.sample.train_classifier --steps {steps} --seed {seed}`.",
        "Licence: Apache-2.0, that of VideoFactory.",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Where the classifier goes; by default the package's own.")] = CLASSIFIER,
    steps: Annotated[int, typer.Option(min=1, help=f"Training steps of {BATCH} frames each.")] = STEPS,
    seed: Annotated[int, typer.Option(help="Same seed, same weights, on the same machine and versions.")] = 0,
    videos: Annotated[int, typer.Option(min=1, help="Videos to measure it on.")] = MEASURED,
    only_measure: Annotated[
        bool, typer.Option("--only-measure", help="Measure the classifier that is there, and write its card anew.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
) -> None:
    """Train the classifier of the miniature world, measure it, and write it with its model card."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", stream=sys.stderr)
    torch.set_num_threads(threads)
    cv2.setNumThreads(threads)
    if not only_measure:
        train(steps, seed).save(out)
    classifier = Classifier.load(out)
    accuracies = measure_all(classifier, videos)
    for accuracy in accuracies:
        logger.info("%s", accuracy)
    describe(out, accuracies, classifier.training)


if __name__ == "__main__":
    typer.run(main)
