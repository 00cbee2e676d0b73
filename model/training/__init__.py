"""Training the swap-attention U-Net: settings, data, objective, parameters and checkpoints.

    with joined() as processes:
        Trainer(load_config("miniature"), processes).run()

Importing this package is light; PyTorch is loaded with the first name taken from it.
"""

from typing import TYPE_CHECKING

from videofactory.model.lazy import names_from

if TYPE_CHECKING:
    from .config import load_config
    from .processes import joined
    from .trainer import Trainer

_HOMES = {"Trainer": "trainer", "joined": "processes", "load_config": "config"}
__all__ = ["Trainer", "joined", "load_config"]

__getattr__ = names_from(__name__, _HOMES)
