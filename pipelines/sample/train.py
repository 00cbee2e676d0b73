"""`python -m videofactory.pipelines.sample.train`: train the tiny captioner and embedder anew and write them where the sample finds them.

Everything follows from one seed. The vision transformer that both share comes first, for its training is most of the work; the
gates in `evaluate` say whether the result is fit for release.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from videofactory.pipelines.sample import CAPTIONER, EMBEDDER, MADE_FOR
from videofactory.pipelines.sample.training_frames import COLOURS_ALONE, FORMS_ALONE, HELD_OUT, SEEN, SIDE, render_frames

FORM_FRAMES, COLOUR_FRAMES, PAIR_FRAMES = 12_000, 5_000, 5_000
VISION_STEPS, CAPTIONER_STEPS, EMBEDDER_STEPS = 4000, 450, 400

_SAYS = "Knows the shapes of the miniature world and nothing else; on any other video its answers mean nothing."
_CARDS = {
    "captioner": "A BLIP-2 (`Blip2ForConditionalGeneration` with a vision transformer, a Q-Former and an OPT language model)",
    "embedder": "A CLIP of open_clip (vision transformer, text transformer over whole words)",
}


def main(
    out: Annotated[
        Path | None, typer.Option(help="Parent of the directories written; by default the package's own models.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Same seed, same weights, on the same machine and versions.")] = 0,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 2,
) -> None:
    """Train the sample's tiny models on frames of the miniature world."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    import torch

    from videofactory.pipelines.sample.train_captioner import save_captioner, train_captioner
    from videofactory.pipelines.sample.train_embedder import save_embedder, train_embedder
    from videofactory.pipelines.sample.train_vision import train_vision

    torch.set_num_threads(threads)
    parts = ((FORM_FRAMES, FORMS_ALONE), (COLOUR_FRAMES, COLOURS_ALONE), (PAIR_FRAMES, SEEN))
    rendered = [render_frames(count, 1000 * seed + number, pairs) for number, (count, pairs) in enumerate(parts)]
    frames = rendered[0] + rendered[1] + rendered[2]
    vision = train_vision(frames, VISION_STEPS, seed)
    captioner = CAPTIONER if out is None else out / "captioner"
    save_captioner(train_captioner(vision, frames, CAPTIONER_STEPS, seed), captioner)
    describe("captioner", captioner, seed)
    embedder = EMBEDDER if out is None else out / "embedder"
    save_embedder(train_embedder(vision, frames, EMBEDDER_STEPS, seed), embedder)
    describe("embedder", embedder, seed)


def describe(kind: Literal["captioner", "embedder"], directory: Path, seed: int) -> None:
    """Write the marker that ties the weights to the sample, and the model card."""
    marker = {"made_for": MADE_FOR, "says": _SAYS}
    (directory / "made_for.json").write_text(json.dumps(marker, indent=2) + "\n", encoding="utf-8")
    held_out = ", ".join(sorted(f"{colour} {form}" for colour, form in HELD_OUT))
    lines = [
        f"# The miniature world's {kind}",
        "",
        f"{_CARDS[kind]}, a few megabytes in half precision, loaded by the same code as the big ones.",
        "It shows that the pipeline's path from a frame to its caption and its scores works, end to end, without a download.",
        "",
        f"**What it is not:** a model for your videos. {_SAYS}",
        "The file `made_for.json` says so to the pipeline, which refuses these weights for any other source.",
        "",
        f"- Input: the whole frame, squeezed to {SIDE} x {SIDE} pixels.",
        f"- Trained on {FORM_FRAMES + COLOUR_FRAMES + PAIR_FRAMES:,} frames that the sample rendered, and on nobody's pictures. Forms",
        "  are learned from frames in random colours, colours from forms without a name, so that neither is tied to the other.",
        f"- Pairs of colour and form that no caption in training names: {held_out}.",
        f"- Made by `python -m videofactory.pipelines.sample.train --seed {seed}`; "
        "measured by `python -m videofactory.pipelines.sample.evaluate`.",
        "- Licence: that of VideoFactory.",
    ]
    (directory / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
