"""What is wrong with the parts of a pipeline or the arguments of its call, said before any work."""

import copy
import inspect
import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import retrieve_timesteps

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PREDICTIONS = ("epsilon", "v_prediction", "sample")

_MAY_BE_NONE = (
    "num_inference_steps",
    "timesteps",
    "sigmas",
    "decode_chunk_size",
    "generator",
    "latents",
    "callback_on_step_end",
)


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


def check_scheduler(scheduler: Any) -> None:
    """Whether a scheduler is one of noise, velocity or sample prediction; a missing one (`None`) is.

    Raises:
        ValueError: it is another one, of flow matching for example; the message says what it lacks and names some that work.
    """
    if scheduler is None:
        return
    lacks = [name for name in ("set_timesteps", "scale_model_input", "step", "init_noise_sigma") if not hasattr(scheduler, name)]
    prediction = scheduler.config.get("prediction_type", "epsilon")
    if lacks:
        reason = f"it has no {', '.join(lacks)}"
    elif prediction not in PREDICTIONS:
        reason = f"its prediction_type is {prediction!r}, not one of {', '.join(PREDICTIONS)}"
    elif len(needed := _needed_arguments(scheduler.step)) != 3:
        reason = f"its step needs {', '.join(needed)}, and is given a prediction, a timestep and latents"
    else:
        return
    raise ValueError(
        f"the scheduler {type(scheduler).__name__} does not suit a U-Net that predicts noise, velocity or samples: {reason}; "
        "DDIMScheduler, DPMSolverMultistepScheduler, EulerDiscreteScheduler and UniPCMultistepScheduler do"
    )


def _needed_arguments(function: Any) -> list[str]:
    given = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in given and parameter.default is parameter.empty]


def check_steps(
    scheduler: Any, number: int | None, timesteps: Sequence[int] | None = None, sigmas: Sequence[float] | None = None
) -> None:
    """Whether a scheduler can take that many steps, or those that are named; the scheduler stays as it is.

    Raises:
        ValueError: names what was asked for, and the scheduler's reason.
    """
    named: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas}
    asked = {name: steps for name, steps in named.items() if steps is not None}
    if not asked:
        _check_whole("num_inference_steps", number, "at least 1")
        asked = {"num_inference_steps": number}
    try:
        retrieve_timesteps(copy.deepcopy(scheduler), number, None, timesteps, sigmas)
    except (ValueError, TypeError, IndexError, AssertionError) as error:
        most = scheduler.config.get("num_train_timesteps")
        too_many = "num_inference_steps" in asked and most is not None and asked["num_inference_steps"] > most
        reason = f"it takes at most {most} (its num_train_timesteps)" if too_many else str(error)
        what = " and ".join(f"{name} is {steps}" for name, steps in asked.items())
        raise ValueError(f"{what}, which {type(scheduler).__name__} cannot take: {reason}") from error


def check_size(frames: int, height: int, width: int, factor: int, levels: int) -> None:
    """Whether a video of `frames`, `height` and `width` (pixels) can be made.

    Args:
        frames, height, width: as asked for.
        factor: pixels per latent position, in height and in width.
        levels: of the U-Net, each of half the height and width of the one before.

    Raises:
        ValueError: one is no whole number, or too small, or no multiple of `factor`; the message names the nearest that are.
    """
    _check_whole("num_frames", frames, "at least 1 (a picture)")
    least = factor * 2 ** (levels - 1)
    for name, pixels in (("height", height), ("width", width)):
        _check_whole(name, pixels, f"a multiple of {factor} from {least} pixels on")
        if pixels < least:
            raise ValueError(f"{name} is {pixels}; the model needs at least {least} pixels")
        if pixels % factor:
            below = pixels // factor * factor
            raise ValueError(
                f"{name} is {pixels}, no multiple of {factor}, the VAE's factor; the nearest are {below} and {below + factor}"
            )


def check_texts(
    prompt: Any,
    negative_prompt: Any,
    prompt_embeds: torch.Tensor | None,
    negative_prompt_embeds: torch.Tensor | None,
    unet: Any = None,
) -> None:
    """Whether prompts are given once, as texts or embedded, and negative ones fit them; embedded ones have to fit the U-Net.

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
    width = None if unet is None else unet.config.cross_attention_dim
    _check_embeds("prompt_embeds", prompt_embeds, width)
    _check_embeds("negative_prompt_embeds", negative_prompt_embeds, width)
    count = 1 if isinstance(prompt, str) else len(prompt if prompt_embeds is None else prompt_embeds)
    if isinstance(negative_prompt, list) and len(negative_prompt) != count:
        raise ValueError(f"{len(negative_prompt)} negative prompts were given for {count} prompts; give one for all, or {count}")
    if negative_prompt_embeds is not None and len(negative_prompt_embeds) != count:
        raise ValueError(f"negative_prompt_embeds are {len(negative_prompt_embeds)} for {count} prompts; give {count}")


def check_noise(shape: tuple[int, ...], generator: Any, latents: torch.Tensor | None) -> None:
    """Whether generators, if there are several, and given latents fit videos whose latents have this shape, (B, C, F, H, W).

    Raises:
        ValueError: names both numbers, or both shapes.
    """
    if isinstance(generator, list) and len(generator) != shape[0]:
        raise ValueError(
            f"{len(generator)} generators were given for {shape[0]} videos; give one for all, or as many as "
            "prompts times num_videos_per_prompt"
        )
    if latents is not None and tuple(latents.shape) != shape:
        raise ValueError(f"the latents have the shape {tuple(latents.shape)}; for these videos it is {shape}")


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


def _check_embeds(name: str, embeds: Any, width: int | None) -> None:
    if embeds is None:
        return
    _check_tensor(name, embeds)
    shape = tuple(embeds.shape)
    if len(shape) != 3 or 0 in shape or width not in (None, shape[2]):
        last = "channels" if width is None else f"{width}, the U-Net's cross_attention_dim"
        raise ValueError(f"{name} have the shape {shape}; it has to be (prompts, tokens, {last}), as encode_prompt returns them")


def check_settings(settings: Mapping[str, Any], callback_tensors: Sequence[str]) -> None:
    """Whether the arguments of a call, but for texts and sizes, have values of the right kind; what is not in `settings` is not checked.

    Raises:
        ValueError: names the value and what would be valid.
    """
    given = {name: value for name, value in settings.items() if not (value is None and name in _MAY_BE_NONE)}
    for name in ("num_inference_steps", "num_videos_per_prompt", "decode_chunk_size"):
        if name in given:
            _check_whole(name, given[name], "at least 1")
    if "guidance_scale" in given:
        _check_number("guidance_scale", given["guidance_scale"], "a finite number, such as 9.0")
    for name in ("guidance_rescale", "eta"):
        if name in given:
            _check_number(name, given[name], "a number between 0 and 1")
            if not 0 <= given[name] <= 1:
                raise ValueError(f"{name} is {given[name]}; it has to lie between 0 and 1")
    if "latents" in given:
        _check_tensor("latents", given["latents"])
    if "generator" in given:
        _check_generators(given["generator"])
    output_type = given.get("output_type", "pil")
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"output_type is {output_type!r}; it has to be one of {', '.join(OUTPUT_TYPES)}")
    callback = given.get("callback_on_step_end")
    if callback is not None and not callable(callback):
        raise ValueError(
            f"callback_on_step_end is {callback!r}, of type {type(callback).__name__}; it has to be a function, called as "
            "callback(pipeline, step, timestep, tensors)"
        )
    _check_callback_inputs(given.get("callback_on_step_end_tensor_inputs", ()), callback_tensors)


def _check_callback_inputs(asked: Any, callback_tensors: Sequence[str]) -> None:
    name, known = "callback_on_step_end_tensor_inputs", ", ".join(callback_tensors)
    if not isinstance(asked, list | tuple):
        raise ValueError(f"{name} is {asked!r}, of type {type(asked).__name__}; it has to be a list of names among {known}")
    if unknown := [tensor for tensor in asked if tensor not in callback_tensors]:
        raise ValueError(f"{name} holds {', '.join(map(repr, unknown))}; a callback can be given {known}")


def _check_generators(generator: Any) -> None:
    for one in generator if isinstance(generator, list) else [generator]:
        if not isinstance(one, torch.Generator):
            raise ValueError(
                f"generator is {generator!r}; it has to be a torch.Generator, such as torch.Generator().manual_seed(3), or a list "
                "of them, one for each video"
            )


def _check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be a torch.Tensor")


def _check_number(name: str, value: Any, wanted: str) -> None:
    """Whether `value` is a finite number; a text or `None` would fail in the midst of denoising."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be {wanted}")
    if not math.isfinite(value):
        raise ValueError(f"{name} is {value}; it has to be {wanted}")


def _check_whole(name: str, value: Any, wanted: str) -> None:
    """Whether `value` is an integer of at least 1; PyTorch would take a float for a size much later, and not say which."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ValueError(f"{name} is {value!r}, of type {type(value).__name__}; it has to be a whole number, {wanted}")
    if value < 1:
        raise ValueError(f"{name} is {value}; it has to be {wanted}")
