"""Training the swap-attention U-Net: settings, data, objective, parameters and checkpoints.

    with joined() as processes:
        Trainer(load_config("miniature"), processes).run()

Importing this package is light; PyTorch is loaded with the first name taken from it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import load_config
    from .processes import joined
    from .trainer import Trainer

_HOMES = {"Trainer": "trainer", "joined": "processes", "load_config": "config"}
__all__ = ["Trainer", "joined", "load_config"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
