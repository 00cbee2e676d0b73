"""What turns videos, pictures and texts into features: small classes, named by a word or by `module:Class`.

A plug-in is a class whose objects are called with uint8 videos (N, F, 3, H, W), or for pictures with (N, 3, H, W), and give features
(N, D). It is made with `weights` (what the user named, or `None`) and `device`, and has a `hash` of what decides its features. One
for texts has `texts(list of N) -> (N, D)` beside.
"""

from __future__ import annotations

import hashlib
import importlib
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

Use = Literal["video", "image", "text"]
RANDOM = "random"
_RANDOM_SEED = 20260101
"""Of the weights of the built-in extractors, which never change."""
_CHUNK = 1 << 20


@runtime_checkable
class Extractor(Protocol):
    """What a plug-in offers.

    Attributes:
        hash: SHA-256 of what decides the features, e.g. of the file of the weights.
    """

    hash: str

    def __call__(self, pixels: Tensor) -> Tensor:
        """Features (N, D) of uint8 videos (N, F, 3, H, W) or pictures (N, 3, H, W)."""
        ...


class RandomVideoExtractor:
    """A small 3D convolutional net with fixed random weights: offline, in a moment, and good only for comparing with itself.

    Random nets tell distributions apart, but not as people do. Frames are scaled to 32 x 32; beside their colours the net sees
    their differences in time. The features are mean and deviation of each channel of two layers: 32 numbers of order one.
    """

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        _no_weights(weights, RANDOM)
        self._net = _RandomNet(channels_in=6, convolution=nn.Conv3d, kernel=3).to(device)
        self.hash = _state_hash(self._net)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        count, frames = pixels.shape[:2]
        small = _small(pixels.flatten(0, 1)).unflatten(0, (count, frames)).transpose(1, 2)
        differences = functional.pad(small.diff(dim=2), (0, 0, 0, 0, 1, 0))
        return self._net(torch.cat((small, 2 * differences), dim=1))


class RandomImageExtractor:
    """The same for pictures, with two-dimensional convolutions: 32 numbers of order one."""

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        _no_weights(weights, RANDOM)
        self._net = _RandomNet(channels_in=3, convolution=nn.Conv2d, kernel=3).to(device)
        self.hash = _state_hash(self._net)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        return self._net(_small(pixels))


class _RandomNet(nn.Module):
    def __init__(self, channels_in: int, convolution: Callable[..., nn.Module], kernel: int) -> None:
        super().__init__()
        self.first = convolution(channels_in, 8, kernel, padding=1)
        self.second = convolution(8, 8, kernel, padding=1, stride=2)
        # numpy promises that this generator gives the same numbers for ever; PyTorch's does not.
        generator = np.random.RandomState(_RANDOM_SEED)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = (2 / parameter[0].numel()) ** 0.5 if parameter.ndim > 1 else 0.1
                parameter.copy_(torch.from_numpy(generator.standard_normal(tuple(parameter.shape)) * scale))
        self.requires_grad_(False).eval()

    def forward(self, inputs: Tensor) -> Tensor:
        first = functional.leaky_relu(self.first(inputs), 0.2)
        second = functional.leaky_relu(self.second(first), 0.2)
        parts = [layer.flatten(2) for layer in (first, second)]
        return torch.cat([part.mean(2) for part in parts] + [part.std(2) for part in parts], dim=1)


class TorchScriptVideoExtractor:
    """A TorchScript file with the call of StyleGAN-V's I3D: float32 videos (N, 3, F, H, W) of 0 to 255, scaled by the net itself.

    With `i3d_torchscript.pt` the features are the 400 logits of Kinetics, and the distance is the FVD of StyleGAN-V
    (`src/metrics/frechet_video_distance.py` there). The file is a program: loading it runs what is in it.
    """

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        self._net, self.hash = _torchscript(weights, device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        videos = pixels.to(self._device).transpose(1, 2).float()
        with _unfused():
            return self._net(videos, rescale=True, resize=True, return_features=True)


class TorchScriptImageExtractor:
    """A TorchScript file with the call of NVIDIA's Inception: uint8 pictures (N, 3, H, W), scaled by the net itself.

    With `inception-2015-12-05.pt` the distance is the FID of StyleGAN. The file is a program: loading it runs what is in it.
    """

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        self._net, self.hash = _torchscript(weights, device)
        self._device = device

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        with _unfused():
            return self._net(pixels.to(self._device), return_features=True)


class ClipExtractor:
    """A CLIP of transformers, from a folder or the Hub (safetensors only): pictures and texts in one space, not normalised."""

    def __init__(self, weights: str | None = None, device: str = "cpu") -> None:
        from transformers import AutoTokenizer, CLIPModel
        from transformers.image_processing_base import ImageProcessingMixin

        if not weights:
            raise ValueError("clip has no weights of its own; name a folder or a Hub id, e.g. openai/clip-vit-large-patch14")
        folder = _fetched(weights)
        self._net = CLIPModel.from_pretrained(folder, use_safetensors=True, local_files_only=True, dtype=torch.float32)
        self._net.eval().requires_grad_(False).to(device)
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        pictures, _ = ImageProcessingMixin.get_image_processor_dict(folder)
        self._mean, self._std = (torch.tensor(pictures[name]).view(1, 3, 1, 1) for name in ("image_mean", "image_std"))
        self._size, self._device = self._net.config.vision_config.image_size, device
        self.hash = _folder_hash(folder)

    @torch.inference_mode()
    def __call__(self, pixels: Tensor) -> Tensor:
        height, width = pixels.shape[-2:]
        scale = self._size / min(height, width)
        size = [max(self._size, round(height * scale)), max(self._size, round(width * scale))]
        scaled = functional.interpolate(pixels.float(), size, mode="bicubic", antialias=True, align_corners=False)
        top, left = (size[0] - self._size) // 2, (size[1] - self._size) // 2
        square = scaled[..., top : top + self._size, left : left + self._size].round().clamp(0, 255) / 255
        inputs = ((square - self._mean.to(square)) / self._std.to(square)).to(self._device)
        return _embedding(self._net.get_image_features(pixel_values=inputs))

    @torch.inference_mode()
    def texts(self, texts: list[str]) -> Tensor:
        """Embeddings of texts; of one that is too long, the beginning."""
        most = self._net.config.text_config.max_position_embeddings
        tokens = self._tokenizer(texts, padding=True, truncation=True, max_length=most, return_tensors="pt").to(self._device)
        return _embedding(self._net.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"]))


KNOWN: dict[Use, dict[str, Callable[..., Extractor]]] = {
    "video": {RANDOM: RandomVideoExtractor, "torchscript": TorchScriptVideoExtractor},
    "image": {RANDOM: RandomImageExtractor, "torchscript": TorchScriptImageExtractor, "clip": ClipExtractor},
    "text": {"clip": ClipExtractor},
}


def load(use: Use, name: str, weights: str | None = None, device: str = "cpu") -> Extractor:
    """The extractor of that name.

    Args:
        use: what it is for.
        name: one of `KNOWN[use]`, or `module:Class`, which is imported and so runs.
        weights: a file or folder, as the extractor wants it.

    Raises:
        ValueError: there is no such extractor, or it wants other weights.
        OSError: the weights cannot be read.
    """
    if ":" not in name:
        if name not in KNOWN[use]:
            nearest = get_close_matches(name, KNOWN[use], 1)
            raise ValueError(
                f"--{use}-extractor {name} is not known{f'; is {nearest[0]} meant?' if nearest else ''} "
                f"(known: {', '.join(KNOWN[use])}, or module:Class)"
            )
        return KNOWN[use][name](weights=weights, device=device)
    module, _, attribute = name.partition(":")
    try:
        made = getattr(importlib.import_module(module), attribute)(weights=weights, device=device)
    except (ImportError, AttributeError, TypeError) as error:
        raise ValueError(f"--{use}-extractor {name} cannot be made: {error}") from error
    if not isinstance(made, Extractor) or (use == "text" and not hasattr(made, "texts")):
        wanted = "a `hash`, and be callable" + (", with a method `texts`" if use == "text" else "")
        raise ValueError(f"--{use}-extractor {name} is no extractor of {use}s; it has to have {wanted}")
    return made


def _no_weights(weights: str | None, name: str) -> None:
    if weights is not None:
        raise ValueError(f"the {name} extractor has weights of its own; leave out {weights}, or name another extractor")


def _small(pixels: Tensor) -> Tensor:
    """Pictures as 32 x 32 pixels of -1 to 1."""
    return functional.interpolate(pixels.float(), (32, 32), mode="area") / 127.5 - 1


def _torchscript(weights: str | None, device: str) -> tuple[Any, str]:
    """The program of a file, and the hash of the file."""
    if not weights:
        raise ValueError("torchscript has no weights of its own; name a local .pt file")
    path = Path(weights)
    if not path.is_file():
        raise FileNotFoundError(f"the TorchScript file {weights} is not there; it has to be a local file, for loading it runs it")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    try:
        with warnings.catch_warnings():
            # PyTorch has deprecated the form in which the published files are.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(str(path), map_location=device).eval(), digest
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{weights} is no TorchScript file ({reason}); weights alone do not do, the program is needed"
        ) from error


def _unfused() -> Any:
    """Without PyTorch's fusers, which compile kernels at run time and fail where CUDA's compiler library is not there."""
    return torch.jit.optimized_execution(False)  # type: ignore[attr-defined]


def _fetched(weights: str) -> Path:
    """The folder of a model, fetched from the Hub if `weights` is none."""
    if Path(weights).is_dir():
        return Path(weights)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(weights, allow_patterns=["*.json", "*.txt", "model.safetensors"]))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise FileNotFoundError(f"{weights} is no folder, and cannot be fetched from the Hub: {reason}") from error


def _folder_hash(folder: Path) -> str:
    """Of the names and contents of what decides the features: settings, vocabulary and weights."""
    digest = hashlib.sha256()
    for file in sorted(file for file in folder.iterdir() if file.suffix in (".json", ".txt", ".safetensors")):
        digest.update(file.name.encode() + b"\0")
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _state_hash(net: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(net.state_dict().items()):
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def _embedding(features: Any) -> Tensor:
    # transformers 5 wraps them in an output object, earlier ones do not.
    return features if isinstance(features, Tensor) else features.pooler_output
