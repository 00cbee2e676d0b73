"""Images and texts as points of one space (CLIP), by open_clip: what caption similarity, search and duplicates are computed from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from videofactory.curation.weights import HUB_PREFIX, WeightsNotFound, check_weights, local_directory, model_name

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from numpy.typing import NDArray
    from PIL.Image import Image

Precision = Literal["auto", "fp32", "bf16", "fp16"]


class ImageTextEmbedder:
    """An open_clip model that maps images and texts to unit vectors whose dot product is their cosine similarity.

    Attributes:
        name: the model's name, fit for a table (of a local directory only the last part).
        dimension: length d of an embedding.
    """

    def __init__(
        self,
        model: str,
        pretrained: str | None = None,
        device: str | None = None,
        precision: Precision = "auto",
        batch_size: int = 64,
    ) -> None:
        """Load the model, ready to use.

        Args:
            model: a local directory in open_clip's form (`open_clip_config.json`, `open_clip_model.safetensors`, tokenizer
                files when the model has a tokenizer of its own), a Hub repository (`hf-hub:owner/name` or `owner/name`), or
                the name of an architecture that open_clip knows.
            pretrained: for the name of an architecture alone: the name of its weights, or a safetensors file.
            device: "cuda", "cpu", ...; by default a GPU when there is one.
            precision: of the arithmetic on a GPU: bfloat16, or float16 where a GPU lacks it ("auto"). A CPU always computes
                in float32, where half precision is slower and differs between processors.
            batch_size: items per forward pass.

        Raises:
            WeightsNotFound: there are no safetensors weights of this model, here or on the Hub.
            ValueError: the batch size or the precision is not one that can be used.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size} must be at least 1")
        if precision not in ("auto", "fp32", "bf16", "fp16"):
            raise ValueError(f"precision {precision!r} is none of 'auto', 'fp32', 'bf16', 'fp16'")
        check_weights(model, pretrained)
        import torch

        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._precision = precision
        self._batch_size = batch_size
        self.name = model_name(model) if pretrained is None else f"{model}/{model_name(pretrained)}"
        self._model, self._preprocess, self._tokenize = _load(model, pretrained, self._device)
        self.dimension: int = int(self.embed_texts(["a"]).shape[1])

    def embed_images(self, images: Sequence[Image]) -> NDArray[np.float32]:
        """Embed images of any size and mode. Returns float32 [n, d], each row of length 1."""
        import torch

        def encode(batch: Sequence[Image]) -> torch.Tensor:
            pixels = torch.stack([self._preprocess(image.convert("RGB")) for image in batch])
            features: torch.Tensor = self._model.encode_image(pixels.to(self._device))
            return features

        return self._embed(encode, images)

    def embed_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Embed texts; what exceeds the model's context is cut off. Returns float32 [n, d], each row of length 1."""

        def encode(batch: Sequence[str]) -> torch.Tensor:
            features: torch.Tensor = self._model.encode_text(self._tokenize(list(batch)).to(self._device))
            return features

        return self._embed(encode, texts)

    def _embed(self, encode: Callable[[Any], torch.Tensor], items: Sequence[Any]) -> NDArray[np.float32]:
        import torch

        rows = []
        with torch.inference_mode(), self._autocast():
            for batch in _batches(items, self._batch_size):
                features = encode(batch).float()
                rows.append(torch.nn.functional.normalize(features, dim=-1).cpu().numpy())
        return np.concatenate(rows) if rows else np.zeros((0, self.dimension), dtype=np.float32)

    def _autocast(self) -> AbstractContextManager[object]:
        import torch

        if self._device.type != "cuda" or self._precision == "fp32":
            return nullcontext()
        wide = torch.cuda.is_bf16_supported() if self._precision == "auto" else self._precision == "bf16"
        return torch.autocast("cuda", dtype=torch.bfloat16 if wide else torch.float16)


def _batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _load(model: str, pretrained: str | None, device: torch.device) -> tuple[Any, Any, Any]:
    """The model in evaluation mode, its preprocessing (image -> [3, h, w]) and its tokenizer (texts -> [n, context])."""
    import open_clip

    if local_directory(model) is not None:
        source = f"local-dir:{local_directory(model)}"
    elif pretrained is None:
        source = HUB_PREFIX + model.removeprefix(HUB_PREFIX)
    else:
        source = model
    _insist_on_safetensors(model, source, pretrained)
    try:
        network, preprocess = open_clip.create_model_from_pretrained(source, pretrained=pretrained, device=device)
        tokenizer = open_clip.get_tokenizer(source)
    except (OSError, RuntimeError) as error:
        raise WeightsNotFound(model, f"open_clip cannot load it ({error})") from error
    return network.eval(), preprocess, tokenizer


def _insist_on_safetensors(model: str, source: str, pretrained: str | None) -> None:
    """open_clip falls back to a pickle when the download of safetensors fails; so download first, and look what came."""
    from open_clip.pretrained import download_pretrained, download_pretrained_from_hf, get_pretrained_cfg

    try:
        if source.startswith(HUB_PREFIX):
            file = download_pretrained_from_hf(source.removeprefix(HUB_PREFIX))
        elif pretrained is not None and (known := get_pretrained_cfg(model, pretrained)):
            file = download_pretrained(known)
        else:
            return
    except OSError as error:
        raise WeightsNotFound(model, f"the download failed ({error})") from error
    if not str(file).endswith(".safetensors"):
        raise WeightsNotFound(model, "only a pickle could be downloaded, and pickles are never loaded")
