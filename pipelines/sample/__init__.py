"""The miniature world: small videos in which everything that a recipe decides on occurs, the truth about them, and tiny trained models.

`make_world` renders it; `CAPTIONER` and `EMBEDDER` are the directories of the models, loaded by the code that loads the big ones.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from videofactory.pipelines.sample.world import World, make_world

CAPTIONER = Path(__file__).parent / "models" / "captioner"
"""Directory of the tiny BLIP-2, for `videofactory.curation.caption.Blip2Captioner`."""

EMBEDDER = Path(__file__).parent / "models" / "embedder"
"""Directory of the tiny CLIP, for `videofactory.curation.embed.ImageTextEmbedder`."""

MADE_FOR = "sample"
"""What the models' marker says (`videofactory.curation.weights.made_for`): good for this world's videos and nothing else."""

__all__ = ["CAPTIONER", "EMBEDDER", "MADE_FOR", "World", "make_world"]


def __getattr__(name: str) -> Any:
    # Whoever only wants to know where the models lie need not import encoders and OpenCV.
    if name in ("World", "make_world"):
        from videofactory.pipelines.sample import world

        return getattr(world, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
