"""Captions of middle frames by BLIP-2, as HD-VG-130M was captioned, and the protocol that a captioner of your own satisfies."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol, cast

from videofactory.curation.weights import HUB_PREFIX, WeightsNotFound, check_weights, local_directory, model_name

if TYPE_CHECKING:
    from PIL.Image import Image

DEFAULT_CAPTIONER = "videofactory.curation.caption:Blip2Captioner"
DEFAULT_MODEL = "Salesforce/blip2-opt-2.7b"


class Captioner(Protocol):
    """What the pipeline needs of a captioner. Any class that has it can be named in a recipe by its import path.

    Attributes:
        name: the model's name, written next to the captions it made.
    """

    name: str

    def caption(self, images: Sequence[Image]) -> list[str]:
        """One caption per image, in order, each a single line."""
        ...


class Blip2Captioner:
    """BLIP-2 (Li et al. 2023) through transformers: vision transformer, Q-Former and language model.

    Deterministic: greedy decoding, or beam search, never sampling. The paper's authors say only that BLIP-2 captioned the
    middle frame; which checkpoint and how many beams is not known.
    """

    def __init__(
        self,
        model: str = DEFAULT_MODEL,
        *,
        device: str | None = None,
        batch_size: int = 16,
        prompt: str | None = None,
        max_new_tokens: int = 20,
        num_beams: int = 1,
    ) -> None:
        """Load the model, ready to use.

        Args:
            model: a local directory written by `save_pretrained`, or a Hub repository; safetensors only.
            device: "cuda", "cpu", ...; by default a GPU when there is one. A GPU computes in bfloat16 (float16 where it
                lacks that), a CPU in float32.
            batch_size: images per forward pass.
            prompt: text that the caption continues, for example "a photo of"; it is not part of the caption returned.
            max_new_tokens: longest caption, in tokens. Captions of HD-VG-130M have about ten words.
            num_beams: 1 is greedy decoding, the fastest; 5 is what LAVIS does by default, at about that many times the cost.

        Raises:
            WeightsNotFound: there are no safetensors weights of this model, here or on the Hub.
            ValueError: a number that must be at least 1 is not.
        """
        for what, number in (("batch_size", batch_size), ("max_new_tokens", max_new_tokens), ("num_beams", num_beams)):
            if number < 1:
                raise ValueError(f"{what} {number} must be at least 1")
        check_weights(model)
        import torch

        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._dtype = torch.float32
        if self._device.type == "cuda":
            self._dtype = torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        self.name = model_name(model)
        self._batch_size = batch_size
        self._prompt = prompt
        self._generation = {"max_new_tokens": max_new_tokens, "num_beams": num_beams, "do_sample": False}
        self._model, self._processor = _load(model, self._device, self._dtype)

    def caption(self, images: Sequence[Image]) -> list[str]:
        """One caption per image, in order: one line, white space collapsed, no prompt. A model that says nothing gives ""."""
        captions: list[str] = []
        for start in range(0, len(images), self._batch_size):
            captions += self._caption_batch(images[start : start + self._batch_size])
        return captions

    def _caption_batch(self, images: Sequence[Image]) -> list[str]:
        import torch

        texts = None if self._prompt is None else [self._prompt] * len(images)
        inputs = self._processor(images=[image.convert("RGB") for image in images], text=texts, return_tensors="pt")
        inputs = inputs.to(self._device, self._dtype)
        if "input_ids" not in inputs:
            # Without a prompt the language model starts from the image's tokens and its begin-of-sentence token alone.
            config = self._model.config
            start = [config.image_token_index] * config.num_query_tokens + [config.text_config.bos_token_id]
            inputs["input_ids"] = torch.tensor([start] * len(images), device=self._device)
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        with torch.inference_mode():
            written = self._model.generate(**inputs, **self._generation)
        # What `generate` returns begins with the input: image tokens, begin-of-sentence and prompt.
        answers = written[:, inputs["input_ids"].shape[1] :]
        return [_clean(text) for text in self._processor.batch_decode(answers, skip_special_tokens=True)]


def load_captioner(path: str = DEFAULT_CAPTIONER, **options: Any) -> Captioner:
    """Build the captioner that `path` names.

    Args:
        path: `package.module:Class`; the class is called with `options` and has to satisfy `Captioner`.
        options: passed on to the class.

    Raises:
        ValueError: the path is not of that form, or names nothing that exists.
        TypeError: what it names is not a captioner.
    """
    captioner = find_captioner(path)(**options)
    if not (isinstance(getattr(captioner, "name", None), str) and callable(getattr(captioner, "caption", None))):
        raise TypeError(f"captioner {path!r} has no text `name` or no method `caption(images)`")
    return cast(Captioner, captioner)


def find_captioner(path: str) -> Callable[..., Any]:
    """The class that `path` names, without making one.

    Raises:
        ValueError: the path is not of the form `package.module:Class`, or names nothing that exists.
    """
    module_name, colon, class_name = path.partition(":")
    if not (module_name and colon and class_name):
        raise ValueError(f"captioner {path!r} is not of the form package.module:Class, for example {DEFAULT_CAPTIONER!r}")
    try:
        factory: Callable[..., Any] = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"captioner {path!r} cannot be imported ({error}); check the name and that its package is installed"
        ) from error
    return factory


def _load(model: str, device: Any, dtype: Any) -> tuple[Any, Any]:
    from transformers import AutoProcessor, Blip2ForConditionalGeneration

    directory = local_directory(model)
    source = model.removeprefix(HUB_PREFIX) if directory is None else str(directory)
    try:
        network = Blip2ForConditionalGeneration.from_pretrained(source, dtype=dtype, use_safetensors=True)
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise WeightsNotFound(model, f"transformers cannot load it ({error})") from error
    return network.to(device).eval(), processor


def _clean(text: str) -> str:
    """The first line that says something, on one line, with single spaces."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return " ".join(line.split())
