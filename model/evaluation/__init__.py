"""Scores of generated videos: distances between sets, agreement with texts, consistency and motion, each with its whole protocol.

    result = evaluate(Evaluation(["fvd", "motion"], Sampling(fps=8)), open_videos("data/samples"), open_videos("data/sample"))

Importing this package is light; PyTorch is loaded with the first name taken from it. The command is
`python -m videofactory.model.evaluate`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inputs import open_videos
    from .protocol import Sampling
    from .scoring import Evaluation, evaluate

_HOMES = {"Evaluation": "scoring", "Sampling": "protocol", "evaluate": "scoring", "open_videos": "inputs"}
__all__ = ["Evaluation", "Sampling", "evaluate", "open_videos"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
