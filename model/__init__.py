"""The swap-attention text-to-video model: U-Net, pipeline, generation. Of this project it may import the shards' reader, nothing else.

Importing this package is light; PyTorch is loaded with the first name taken from it. The names of its modules are written into
saved pipelines, so they stay.
"""

from typing import TYPE_CHECKING

from videofactory.model.lazy import names_from

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

__getattr__ = names_from(__name__, _HOMES)
