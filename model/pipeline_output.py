"""What the pipeline returns."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class TextToVideoSwapPipelineOutput(BaseOutput):
    """The videos, one per prompt and `num_videos_per_prompt`, in the order of the prompts.

    Attributes:
        frames: `pil`: a list of frames per video; `np`: float32 (B, F, H, W, 3), 0 to 1; `pt`: (B, F, 3, H, W), 0 to 1;
            `latent`: (B, C, F, H, W), what `decode_latents` takes.
    """

    frames: torch.Tensor | np.ndarray | list[list[PIL.Image.Image]]
