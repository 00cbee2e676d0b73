"""`python -m videofactory.pipelines.sample.evaluate`: do the tiny models say what is to be seen? Measured on videos of an unseen seed.

The frames are decoded from freshly made videos, in the middle of every shot, and pass through JPEG as clips' middle frames do.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import av
import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image

from videofactory.curation.caption import Blip2Captioner
from videofactory.curation.embed import ImageTextEmbedder
from videofactory.pipelines.sample import CAPTIONER, EMBEDDER
from videofactory.pipelines.sample.shapes import COLOURS, FORMS
from videofactory.pipelines.sample.training_frames import HELD_OUT
from videofactory.pipelines.sample.world import World, make_world

_CHOICES = 10


@dataclass(frozen=True)
class Gate:
    """A figure and the bounds it has to lie in."""

    name: str
    value: float
    low: float
    high: float
    count: int

    @property
    def passed(self) -> bool:
        """Whether the figure lies in its bounds."""
        return self.low <= self.value <= self.high

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return f"{verdict}  {self.name}: {self.value:.3f} (asked {self.low:.2f} to {self.high:.2f}, n = {self.count})"


@dataclass(frozen=True)
class Example:
    """The middle frame of a shot, and the truth about the shot."""

    image: Image.Image
    truth: dict[str, Any]

    @property
    def pair(self) -> tuple[str, str]:
        """Colour and form."""
        return self.truth["colour"], self.truth["form"]


def middle_frames(world: World) -> Iterator[Example]:
    """The middle frame of every well-lit shot of the world's intact, distinct videos, turned upright, after JPEG."""
    rows = [row for row in world.truth.to_pylist() if row["error_class"] is None and row["duplicate_of"] is None]
    for path in world.videos:
        shots = [row for row in rows if row["video"] == path.name]
        if not shots:
            continue
        wanted = {id(row): (row["start"] + row["end"]) / 2 for row in shots}
        with av.open(str(path)) as container:
            pending = list(shots)
            for frame in container.decode(video=0):
                if pending and frame.time >= wanted[id(pending[0])]:
                    row = pending.pop(0)
                    if row["verdict"] != "dark":
                        yield Example(_through_jpeg(frame), row)


def _through_jpeg(frame: av.VideoFrame) -> Image.Image:
    image = frame.to_image()
    if frame.rotation:
        image = image.rotate(frame.rotation, expand=True)
    stored = io.BytesIO()
    image.save(stored, "JPEG", quality=90)
    return Image.open(io.BytesIO(stored.getvalue())).convert("RGB")


def named(caption: str) -> tuple[str | None, str | None]:
    """The first colour and the first form that a caption names."""
    spoken = caption.split()
    return next((word for word in spoken if word in COLOURS), None), next((word for word in spoken if word in FORMS), None)


def judge_captions(examples: Sequence[Example], captions: Sequence[str], seed: int) -> list[Gate]:
    """Gates of the captioner: right colour and form, of seen and of held-out pairs, and by chance when images are exchanged."""
    right = np.array([named(caption) == example.pair for caption, example in zip(captions, examples, strict=True)])
    held_out = np.array([example.pair in HELD_OUT for example in examples])
    shuffled = np.random.default_rng(seed).permutation(len(examples))
    by_chance = np.mean([named(captions[i]) == example.pair for i, example in zip(shuffled, examples, strict=True)])
    # Chance is 1 in 48; the bound leaves room for the small numbers of a small world.
    spread = 3 * np.sqrt(1 / 48 / len(examples))
    return [
        Gate("caption names colour and form, pairs seen in training", _mean(right[~held_out]), 0.95, 1.0, int((~held_out).sum())),
        Gate("caption names colour and form, pairs held out", _mean(right[held_out]), 0.85, 1.0, int(held_out.sum())),
        Gate("the same against the captions of other images", float(by_chance), 0.0, 1 / 48 + float(spread), len(examples)),
    ]


def judge_similarities(examples: Sequence[Example], embedder: ImageTextEmbedder, seed: int) -> list[Gate]:
    """Gate of the embedder: among ten distinct captions the right one is the most similar to the image."""
    rng = np.random.default_rng(seed)
    captions = [str(example.truth["caption"]) for example in examples]
    distinct = sorted(set(captions))
    images = embedder.embed_images([example.image for example in examples])
    texts: dict[str, NDArray[np.float32]] = dict(zip(distinct, embedder.embed_texts(distinct), strict=True))
    right, other = [], []
    for caption, image in zip(captions, images, strict=True):
        wrong = [text for text in distinct if text != caption]
        offered = [caption, *rng.choice(wrong, size=_CHOICES - 1, replace=False)]
        similarities = np.array([texts[text] @ image for text in offered])
        right.append(similarities.argmax() == 0)
        other.append(similarities[1:].mean())
    held_out = np.array([example.pair in HELD_OUT for example in examples])
    hits = np.array(right)
    return [
        Gate(f"right caption most similar of {_CHOICES}", _mean(hits), 0.9, 1.0, len(hits)),
        Gate(f"right caption most similar of {_CHOICES}, pairs held out", _mean(hits[held_out]), 0.85, 1.0, int(held_out.sum())),
    ]


def _mean(hits: NDArray[np.bool_]) -> float:
    """The fraction of hits; of none at all it is 0, which no gate lets pass."""
    return float(hits.mean()) if len(hits) else 0.0


def evaluate(world: World, captioner: Path, embedder: Path, seed: int) -> list[Gate]:
    """All gates, on the middle frames of `world`."""
    examples = list(middle_frames(world))
    captions = Blip2Captioner(str(captioner), device="cpu").caption([example.image for example in examples])
    gates = judge_captions(examples, captions, seed)
    return gates + judge_similarities(examples, ImageTextEmbedder(str(embedder), device="cpu"), seed)


def main(
    seed: Annotated[int, typer.Option(help="Of the world made for the purpose; not one that anything was trained on.")] = 12345,
    sources: Annotated[int, typer.Option(help="Sources of that world.", min=26)] = 64,
    captioner: Annotated[Path, typer.Option(help="Directory of the captioner.")] = CAPTIONER,
    embedder: Annotated[Path, typer.Option(help="Directory of the embedder.")] = EMBEDDER,
) -> None:
    """Measure the sample's tiny models; fails when a gate does."""
    with tempfile.TemporaryDirectory() as directory:
        gates = evaluate(make_world(Path(directory), seed, sources), captioner, embedder, seed)
    for gate in gates:
        typer.echo(str(gate))
    if not all(gate.passed for gate in gates):
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
