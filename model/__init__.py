"""The swap-attention text-to-video model: U-Net, pipeline, generation. Of this project it may import the shards' reader, nothing else.

Importing this package is light; PyTorch is loaded with the first name taken from it. The names of its modules are written into
saved pipelines, so they stay.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline import TextToVideoSwapPipeline, TextToVideoSwapPipelineOutput
    from .unet import SwapUNet, SwapUNetOutput

_HOMES = {
    "SwapUNet": "unet",
    "SwapUNetOutput": "unet",
    "TextToVideoSwapPipeline": "pipeline",
    "TextToVideoSwapPipelineOutput": "pipeline",
}
__all__ = ["SwapUNet", "SwapUNetOutput", "TextToVideoSwapPipeline", "TextToVideoSwapPipelineOutput"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
