"""`python -m videofactory.pipelines.sample --out DIR`: make the miniature world."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from videofactory.pipelines.sample.world import make_world


def main(
    out: Annotated[Path, typer.Option(help="Directory to make it in.")],
    seed: Annotated[int, typer.Option(help="Same seed, same world.")] = 0,
    sources: Annotated[int | None, typer.Option(help="Number of sources; by default one of each kind.", min=1)] = None,
) -> None:
    """Make the miniature world: videos, broken files, and the truth about them."""
    world = make_world(out, seed, sources)
    typer.echo(f"{len(world.videos)} sources in {world.directory / 'videos'}, truth in {world.directory / 'truth.parquet'}")


if __name__ == "__main__":
    typer.run(main)
