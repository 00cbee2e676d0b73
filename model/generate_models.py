"""The model of a run: where and how it runs, loaded whole, or its outline, by which a run is checked without its weights."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MINIATURE = "miniature"


@dataclass(frozen=True)
class Running:
    """How a run is done; the videos are the same but for rounding."""

    batch: int
    device: str
    dtype: str
    offload: bool
    cuda_graph: bool
    attention_backend: str | None
    decode_chunk_size: int = 16

    @property
    def torch_dtype(self) -> Any:
        """The number format as PyTorch's."""
        import torch

        return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[self.dtype]

    @property
    def replays(self) -> bool:
        """Whether the U-Net is replayed as a CUDA graph: where it is wanted, and the weights stay on an NVIDIA GPU."""
        return self.cuda_graph and self.device.startswith("cuda") and not self.offload


def load(model: str, running: Running, revision: str | None = None, variant: str | None = None) -> Any:
    """The pipeline, where and how it is to run.

    Args:
        model: a saved pipeline's folder, a Hub id, or the miniature.
        running: where and how.
        revision: branch, tag or commit of a Hub id.
        variant: of the weights' files, such as `fp16`.

    Raises:
        OSError: there is no such model.
        ValueError: the model is of another kind, or the machine or the U-Net cannot run it so.
    """
    import torch

    _disable_progress_bars()
    check_name(model, revision, variant)
    if model == MINIATURE:
        from videofactory.model import miniature

        if torch.device(running.device).type == "cpu":
            # Several threads on tensors this small wait for each other more than they compute, on a busy machine tenfold.
            torch.set_num_threads(1)
        pipeline = miniature.pipeline()
        for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet):
            # The models' own `to` warns of a cast that is right here.
            torch.nn.Module.to(part, running.torch_dtype)
    else:
        from videofactory.model.pipeline import TextToVideoSwapPipeline

        pipeline = TextToVideoSwapPipeline.from_pretrained(model, dtype=running.torch_dtype, revision=revision, variant=variant)
        if missing := [name for name, part in pipeline.components.items() if part is None]:
            raise ValueError(f"the pipeline {model} was saved without its {', '.join(missing)}; save it with all of its parts")
    pipeline.set_progress_bar_config(disable=True)
    if running.offload:
        pipeline.enable_model_cpu_offload(device=running.device)
    else:
        pipeline.to(running.device)
    if running.attention_backend is not None:
        pipeline.unet.set_attention_backend(running.attention_backend)
    if running.replays:
        pipeline.enable_cuda_graph()
    return pipeline


def _disable_progress_bars() -> None:
    """Those of diffusers and transformers, which would stand above the one line of an error."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()


def check_name(model: str, revision: str | None = None, variant: str | None = None) -> None:
    """Whether `model` can be the name of a pipeline, and has revisions and variants, if one was chosen.

    Raises:
        ValueError: it is empty, or the choice would be ignored.
    """
    if not model.strip():
        raise ValueError(f"--model is empty; name a saved pipeline's folder, a Hub id such as owner/name, or {MINIATURE}")
    if variant is not None and model == MINIATURE:
        raise ValueError(
            f"--variant {variant} chooses among the weights of a saved pipeline, and --model is {MINIATURE}; leave it out"
        )
    if revision is not None and (model == MINIATURE or Path(model).is_dir()):
        raise ValueError(f"--revision {revision} is for a model on the Hub, and --model {model} is on this machine; leave it out")


def identity(model: str, pipeline: Any, variant: str | None = None) -> dict[str, Any]:
    """Which weights a loaded pipeline has: the commit of a model on the Hub, else the SHA-256 of every file it was loaded from."""
    from videofactory.model import miniature, pipeline_files

    if model != MINIATURE and not Path(model).is_dir():
        # It was loaded from the Hub's cache, where the folder of a snapshot has the name of its commit.
        return {"commit": Path(pipeline.name_or_path).name}
    if model == MINIATURE:
        # Its U-Net is not stored, but begins with the image model.
        return {"sha256": pipeline_files.digests(miniature.WEIGHTS, [*pipeline.components, miniature.IMAGE_MODEL])}
    return {"sha256": pipeline_files.digests(Path(model), pipeline.components, variant)}


def machine(device: str) -> dict[str, Any]:
    """What of the machine decides the last bits of a video: the device's name, and whether our kernels for GPUs serve there."""
    import torch

    from videofactory.model import gpu

    if torch.device(device).type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "kernels": gpu.kernels is not None}
    return {"device": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}", "kernels": False}


def outline(model: str, revision: str | None = None, variant: str | None = None) -> Any:
    """The pipeline with the weights of the VAE and the U-Net left out, and without a text encoder; `None` if it is on the Hub.

    Raises:
        OSError: there is no such pipeline, or files of it are missing.
        ValueError: the model is of another kind.
    """
    import torch
    from diffusers import AutoencoderKL
    from huggingface_hub import hf_hub_url

    from videofactory.model import miniature, pipeline_files
    from videofactory.model.pipeline import TextToVideoSwapPipeline
    from videofactory.model.unet import SwapUNet

    _disable_progress_bars()
    check_name(model, revision, variant)
    if model == MINIATURE:
        return miniature.pipeline()
    directory = Path(model)
    if not directory.is_dir():
        try:
            # It checks the name, and asks nobody.
            hf_hub_url(model, pipeline_files.INDEX)
        except ValueError as error:
            raise FileNotFoundError(f"{model} is no directory, and cannot be the name of a repository on the Hub") from error
        return None
    pipeline_files.fetch(model, ("unet",), {})
    for part in ("vae", "text_encoder", "unet"):
        if not any((directory / part).glob("*.safetensors")):
            raise FileNotFoundError(f"{directory / part} holds no weights (*.safetensors); save the pipeline again")
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(directory / "vae"))
        unet = SwapUNet.from_config(SwapUNet.load_config(directory / "unet"))
    return TextToVideoSwapPipeline.from_pretrained(directory, vae=vae, unet=unet, text_encoder=None, variant=variant)


def choose_device(device: str, dtype: str, offload: bool) -> tuple[str, str]:
    """The device and the number format, `auto` resolved.

    Raises:
        ValueError: this machine has no such device, or none to offload from.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        kind = torch.device(device).type
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {device} is not there: {reason}; leave it out to take what there is") from error
    if offload and kind == "cpu":
        raise ValueError("--offload moves models between a GPU and the CPU, and the device is the CPU; leave it out")
    if dtype == "auto":
        dtype = "fp32" if kind == "cpu" else "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported() else "fp16"
    return device, dtype


def check_attention_backend(running: Running) -> None:
    """Whether the attention backend, if one was chosen, is installed and runs on the device.

    Raises:
        ValueError: it does not; the message has the reason.
    """
    import torch
    from diffusers.models.attention_dispatch import attention_backend, dispatch_attention_fn

    if (name := running.attention_backend) is None:
        return
    probe = torch.zeros(1, 16, 1, 64, device=running.device, dtype=running.torch_dtype)
    try:
        with attention_backend(name):
            dispatch_attention_fn(probe, probe, probe)
    # What a backend raises is its own affair.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"--attention-backend {name} does not run on {running.device} with {running.dtype}: {reason}; "
            "`native` does everywhere, or leave it out"
        ) from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory did not suffice; on the CPU PyTorch has no class for it."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("allocate memory", "not enough memory"))


def ways_to_less_memory(running: Running) -> str:
    """What helps where memory did not suffice, and is not done yet."""
    ways = {
        "--offload": running.device.startswith("cuda") and not running.offload,
        "--batch 1": running.batch > 1,
        "--no-cuda-graph": running.replays,
        "--decode-chunk-size 1": running.decode_chunk_size > 1,
        "fewer --frames": True,
        "a smaller --height and --width": True,
        "--dtype bf16": running.dtype == "fp32",
    }
    return ", ".join(way for way, helps in ways.items() if helps)
