"""Prompts for a model trained on the miniature world: one a line, in the form of the captions that tell a motion.

python -m videofactory.pipelines.sample.prompts --out data/prompts.txt --seen 164 --held-out 28
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from videofactory.pipelines.sample.backgrounds import BACKGROUNDS
from videofactory.pipelines.sample.motion import motion_caption
from videofactory.pipelines.sample.scene import DIRECTIONS
from videofactory.pipelines.sample.training_frames import HELD_OUT, SEEN


def write_prompts(seen: int, held_out: int, seed: int) -> list[str]:
    """Prompts of pairs of colour and form seen in training, then of pairs held out.

    Of each kind, every pair occurs as often as every other, give or take one, and so does every direction; four times as many
    prompts as there are pairs have each pair go each way once. Backgrounds are drawn.

    Args:
        seen, held_out: how many of each.
        seed: same seed, same prompts.

    Raises:
        ValueError: fewer than none are asked for, or none at all.
    """
    if min(seen, held_out) < 0 or seen + held_out < 1:
        raise ValueError(f"{seen} prompts of seen pairs and {held_out} of held-out ones; ask for at least one in all")
    rng = np.random.default_rng(seed)
    return _dealt(SEEN, seen, rng) + _dealt(sorted(HELD_OUT), held_out, rng)


def _dealt(pairs: Sequence[tuple[str, str]], count: int, rng: np.random.Generator) -> list[str]:
    order = rng.permutation(len(pairs))
    ways, backgrounds = tuple(DIRECTIONS), tuple(BACKGROUNDS)
    prompts = []
    for number in range(count):
        turn, place = divmod(number, len(pairs))
        colour, form = pairs[order[place]]
        # The next direction for the next pair, and for the same pair in the next round.
        direction, background = ways[(place + turn) % len(ways)], str(rng.choice(backgrounds))
        prompts.append(motion_caption({"colour": colour, "form": form, "background": background, "direction": direction}))
    return prompts


def main(
    out: Annotated[Path, typer.Option(help="File for the prompts, one a line; an earlier one is replaced.")],
    seen: Annotated[int, typer.Option(min=0, help="Prompts of pairs that training names; 41 pairs, 4 directions.")] = 164,
    held_out: Annotated[int, typer.Option(min=0, help="Prompts of pairs held out of training; 7 pairs, 4 directions.")] = 28,
    seed: Annotated[int, typer.Option(help="Same seed, same prompts.")] = 0,
) -> None:
    """Write prompts for `videofactory.model.evaluate sample`, whose videos `videofactory.pipelines.sample.classify` scores."""
    try:
        prompts = write_prompts(seen, held_out, seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text("".join(f"{prompt}\n" for prompt in prompts), encoding="utf-8")
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    typer.echo(f"{seen} prompts of seen pairs and {held_out} of held-out ones in {out}")


if __name__ == "__main__":
    typer.run(main)
