"""A miniature text-to-video pipeline that runs offline: real classes, tiny weights, good for the sample's world of shapes alone.

The VAE is trained on frames of the sample dataset, so its pictures can be recognised; the text encoder is frozen at random weights,
which keep the words apart. There are two U-Nets to begin with: a fresh one, which makes noise, and one that begins with the weights
of an image model of the sample's world (`unet_of_images`), as the big ones begin with Stable Diffusion's, which makes a picture of its
own for every frame. `train` in this package makes the files of VAE, words and scheduler again, `image_model` those of the image model.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DDIMScheduler
    from transformers import CLIPTextModel, CLIPTokenizer

    from videofactory.model.pipeline import TextToVideoSwapPipeline
    from videofactory.model.unet import SwapUNet

WEIGHTS = Path(__file__).parent / "weights"
"""Directory of the components, each in a folder named as in a saved pipeline."""

IMAGE_MODEL = "image_unet"
"""Folder, below `WEIGHTS`, of the image model."""

FRAMES, HEIGHT, WIDTH = 16, 64, 112
"""Size of its videos, in frames and pixels: what the VAE was trained for."""

__all__ = [
    "FRAMES",
    "HEIGHT",
    "IMAGE_MODEL",
    "WEIGHTS",
    "WIDTH",
    "pipeline",
    "scheduler",
    "text_encoder",
    "tokenizer",
    "unet",
    "unet_of_images",
    "vae",
]


def vae() -> AutoencoderKL:
    """The tiny VAE: 4 latent channels, a factor of 8, float32, in evaluation mode.

    Its latents, times `config.scaling_factor`, have a standard deviation of one on the sample dataset.
    """
    from diffusers import AutoencoderKL

    return _evaluated(AutoencoderKL.from_pretrained(WEIGHTS / "vae", use_safetensors=True, local_files_only=True))


def text_encoder() -> CLIPTextModel:
    """The tiny text encoder: 64 channels, 2 layers, random weights that stay as they are, float32, in evaluation mode."""
    import torch
    from transformers import CLIPTextModel

    # The files are in half precision, and transformers would keep it.
    place, options = WEIGHTS / "text_encoder", {"use_safetensors": True, "local_files_only": True, "dtype": torch.float32}
    return _evaluated(CLIPTextModel.from_pretrained(place, **options))


def tokenizer() -> CLIPTokenizer:
    """The tiny tokenizer: every word of the sample's captions is one token, other words are spelt; at most 24 tokens."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", local_files_only=True)


def scheduler(**config: Any) -> DDIMScheduler:
    """Stable Diffusion's noise schedule in a `DDIMScheduler`; `config` changes single values, e.g. `prediction_type`."""
    from diffusers import DDIMScheduler

    return DDIMScheduler.from_pretrained(WEIGHTS / "scheduler", local_files_only=True, **config)


def unet(seed: int = 0, **config: Any) -> SwapUNet:
    """A fresh, untrained U-Net that fits the other components, float32, in evaluation mode.

    Args:
        seed: of the weights; the global random state is left alone.
        config: arguments of `SwapUNet` that differ from the miniature's.
    """
    import torch

    from videofactory.model.unet import SwapUNet

    settings: dict[str, Any] = {
        "block_out_channels": (32, 64),
        "attention_levels": (True, True),
        "layers_per_block": 1,
        "attention_head_dim": 8,
        "cross_attention_dim": 64,
        "norm_num_groups": 8,
        "swap_windows": ((16, 4, 7), (16, 4, 7)),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fresh: SwapUNet = SwapUNet(**{**settings, **config}).eval()
    return fresh


def unet_of_images(seed: int = 0, **config: Any) -> SwapUNet:
    """A U-Net that begins with the weights of the miniature's image model; float32, in evaluation mode.

    Until it is trained on videos it makes every frame for itself: its layers over time change nothing yet.

    Args:
        seed: of the weights that are new; the global random state is left alone.
        config: arguments of `SwapUNet` that differ from the miniature's and that the image model leaves open: `interaction`,
            `swap_windows`, `dropout`.
    """
    import torch

    from videofactory.model.unet import SwapUNet

    settings: dict[str, Any] = {"swap_windows": ((16, 4, 7), (16, 4, 7)), "local_files_only": True, "torch_dtype": torch.float32}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        grown: Any = SwapUNet.from_unet2d(WEIGHTS, subfolder=IMAGE_MODEL, **{**settings, **config})
    return grown


def pipeline(seed: int = 0, unet: SwapUNet | None = None) -> TextToVideoSwapPipeline:
    """The whole miniature: videos of 16 frames, 112 x 64 pixels, unless told otherwise.

    Args:
        seed: of those weights of the U-Net that are new; they change nothing before they are trained.
        unet: a U-Net to use instead of `unet_of_images(seed)`, with which every frame is a picture of its own.
    """
    from videofactory.model.pipeline import TextToVideoSwapPipeline

    return TextToVideoSwapPipeline(
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        unet=unet_of_images(seed) if unet is None else unet,
        scheduler=scheduler(),
        default_frames=FRAMES,
        default_height=HEIGHT,
        default_width=WIDTH,
    )


def _evaluated(model: Any) -> Any:
    """`model` in evaluation mode, as `from_pretrained` leaves it."""
    return model.eval()
