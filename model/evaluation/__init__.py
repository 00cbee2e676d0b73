"""Scores of generated videos: distances between sets, agreement with texts, consistency and motion, each with its whole protocol.

    result = evaluate(Evaluation(["fvd", "motion"], Sampling(fps=8)), open_videos("data/samples"), open_videos("data/sample"))

Importing this package is light; PyTorch is loaded with the first name taken from it. The command is
`python -m videofactory.model.evaluate`.
"""

from typing import TYPE_CHECKING

from videofactory.model.lazy import names_from

if TYPE_CHECKING:
    from .inputs import open_videos
    from .protocol import Sampling
    from .scoring import Evaluation, evaluate

_HOMES = {"Evaluation": "scoring", "Sampling": "protocol", "evaluate": "scoring", "open_videos": "inputs"}
__all__ = ["Evaluation", "Sampling", "evaluate", "open_videos"]

__getattr__ = names_from(__name__, _HOMES)
