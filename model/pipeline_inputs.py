"""What is wrong with the parts of a pipeline or the arguments of its call, said before any work."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def check_components(vae: Any, text_encoder: Any, unet: Any) -> None:
    """Whether the components of a pipeline fit together; a missing one (`None`) fits.

    Raises:
        ValueError: channels differ; the message names both values.
    """
    if unet is None:
        return
    if vae is not None and unet.config.in_channels != vae.config.latent_channels:
        raise ValueError(
            f"the U-Net takes latents of {unet.config.in_channels} channels (in_channels), the VAE makes "
            f"{vae.config.latent_channels} (latent_channels); take the VAE that the U-Net was trained with"
        )
    if text_encoder is not None and unet.config.cross_attention_dim != text_encoder.config.hidden_size:
        raise ValueError(
            f"the U-Net takes texts of {unet.config.cross_attention_dim} channels (cross_attention_dim), the text encoder makes "
            f"{text_encoder.config.hidden_size} (hidden_size); take the text encoder that the U-Net was trained with"
        )


def check_size(frames: int, height: int, width: int, factor: int, levels: int) -> None:
    """Whether a video of `frames`, `height` and `width` (pixels) can be made.

    Args:
        frames, height, width: as asked for.
        factor: pixels per latent position, in height and in width.
        levels: of the U-Net, each of half the height and width of the one before.

    Raises:
        ValueError: names the nearest sizes that are valid.
    """
    if frames < 1:
        raise ValueError(f"num_frames is {frames}; it has to be at least 1 (a picture)")
    least = factor * 2 ** (levels - 1)
    for name, pixels in (("height", height), ("width", width)):
        if pixels < least:
            raise ValueError(f"{name} is {pixels}; the model needs at least {least} pixels")
        if pixels % factor:
            below = pixels // factor * factor
            raise ValueError(
                f"{name} is {pixels}, no multiple of {factor}, the VAE's factor; the nearest are {below} and {below + factor}"
            )


def check_texts(
    prompt: Any, negative_prompt: Any, prompt_embeds: torch.Tensor | None, negative_prompt_embeds: torch.Tensor | None
) -> None:
    """Whether prompts are given once, as texts or embedded, and negative ones fit them.

    Raises:
        ValueError: names the arguments and their values.
    """
    if (prompt is None) == (prompt_embeds is None):
        both = "neither prompt nor prompt_embeds was" if prompt is None else "both prompt and prompt_embeds were"
        raise ValueError(f"{both} given; give one of them")
    if negative_prompt is not None and negative_prompt_embeds is not None:
        raise ValueError("both negative_prompt and negative_prompt_embeds were given; give one of them")
    _check_strings("prompt", prompt)
    _check_strings("negative_prompt", negative_prompt)
    count = 1 if isinstance(prompt, str) else len(prompt if prompt_embeds is None else prompt_embeds)
    if isinstance(negative_prompt, list) and len(negative_prompt) != count:
        raise ValueError(f"{len(negative_prompt)} negative prompts were given for {count} prompts; give one for all, or {count}")
    if negative_prompt_embeds is not None and len(negative_prompt_embeds) != count:
        raise ValueError(f"negative_prompt_embeds are {len(negative_prompt_embeds)} for {count} prompts; give {count}")


def check_alike(prompt_embeds: torch.Tensor, negative_prompt_embeds: torch.Tensor) -> None:
    """Whether embedded prompts and negative prompts can be run side by side.

    Raises:
        ValueError: names both shapes.
    """
    if prompt_embeds.shape != negative_prompt_embeds.shape:
        shapes = tuple(prompt_embeds.shape), tuple(negative_prompt_embeds.shape)
        raise ValueError(f"prompt_embeds have the shape {shapes[0]}, negative_prompt_embeds {shapes[1]}; they have to be equal")


def _check_strings(name: str, texts: Any) -> None:
    if texts is None or isinstance(texts, str):
        return
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name} is {texts!r} of type {type(texts).__name__}; it has to be a string or a list of strings")
    if not texts:
        raise ValueError(f"{name} is an empty list; give at least one")


def check_settings(settings: Mapping[str, Any], callback_tensors: Sequence[str]) -> None:
    """Whether the numbers and names among the arguments of a call are valid; what is not in `settings` is not checked.

    Raises:
        ValueError: names the value and what would be valid.
    """
    for name in ("num_inference_steps", "num_videos_per_prompt", "decode_chunk_size"):
        if (number := settings.get(name)) is not None and number < 1:
            raise ValueError(f"{name} is {number}; it has to be at least 1")
    for name in ("guidance_rescale", "eta"):
        if not 0 <= (share := settings.get(name) or 0.0) <= 1:
            raise ValueError(f"{name} is {share}; it has to lie between 0 and 1")
    output_type = settings.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; it has to be one of {', '.join(OUTPUT_TYPES)}")
    asked = settings.get("callback_on_step_end_tensor_inputs") or ()
    if unknown := [name for name in asked if name not in callback_tensors]:
        raise ValueError(
            f"callback_on_step_end_tensor_inputs holds {', '.join(map(repr, unknown))}; "
            f"a callback can be given {', '.join(callback_tensors)}"
        )
