"""Describe kept clips: image embedding, caption, and how well the two agree, judged as soon as each is known.

Both models live in one process: the caption model costs far more than the embedding, and rejected clips skip it.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from videofactory.shards.schema import CAPTION_SIMILARITY, STEPS, Step

from .ingest import judge

if TYPE_CHECKING:
    from .caption import Captioner
    from .embed import ImageTextEmbedder


class Describer:
    """The step `rows of clips -> the same rows, described`, one row out for each row in, in order.

    Args:
        embedder: model for embeddings and caption similarity, or `None`.
        captioner: model for captions, or `None`.
        rules: conditions in SQL by name; those on embeddings and captions are judged here.
        steps: the steps of the recipe.
    """

    def __init__(
        self,
        embedder: ImageTextEmbedder | None,
        captioner: Captioner | None,
        rules: Mapping[str, str],
        steps: tuple[Step, ...] = STEPS,
    ) -> None:
        self._embedder = embedder
        self._captioner = captioner
        self._rules = rules
        self._steps = steps

    def __call__(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Describe rows of `travelling_schema`; those without bytes (errors, rejected) pass through."""
        rows = [dict(row) for row in rows]
        images = {number: _image(row) for number, row in enumerate(rows) if row.get("video") is not None}
        if self._embedder is not None:
            self._embed(rows, images)
        if self._captioner is not None:
            self._caption(rows, images)
        for row in rows:
            row.pop("middle_frame", None)
            if row.get("rejected_by") is not None or row.get("error_class") is not None:
                row["video"] = row["embedding"] = None
        return rows

    def _embed(self, rows: list[dict[str, Any]], images: dict[int, Any]) -> None:
        import numpy as np

        assert self._embedder is not None
        for number, vector in zip(images, self._embedder.embed_images(list(images.values())), strict=True):
            rows[number]["embedding"] = vector.astype(np.float16)
        self._judge(rows, images, "embed")

    def _caption(self, rows: list[dict[str, Any]], images: dict[int, Any]) -> None:
        assert self._captioner is not None
        for number, caption in zip(images, self._written(list(images.values())), strict=True):
            if isinstance(caption, Exception):
                rows[number].update(error_class="caption_failed", error=f"the captioner failed on the middle frame: {caption}")
            else:
                rows[number]["caption"] = caption
        images = {number: image for number, image in images.items() if rows[number].get("error_class") is None}
        if self._embedder is not None:
            texts = self._embedder.embed_texts([rows[number]["caption"] for number in images])
            for number, text in zip(images, texts, strict=True):
                rows[number][CAPTION_SIMILARITY.name] = float(text @ rows[number]["embedding"].astype(text.dtype))
        self._judge(rows, images, "caption")

    def _written(self, images: list[Any]) -> list[str | Exception]:
        """A caption per image; when the batch fails, each alone, so that one image cannot take others with it."""
        assert self._captioner is not None
        try:
            return list(self._captioner.caption(images))
        except Exception as error:  # noqa: BLE001 - a captioner of the user's may raise anything
            if len(images) == 1:
                return [error]
        return [answer for image in images for answer in self._written([image])]

    def _judge(self, rows: list[dict[str, Any]], images: dict[int, Any], step: Step) -> None:
        """Reject what the rules of `step` reject; the rejected leave `images`, so that no later model sees them."""
        numbers = list(images)
        verdicts = judge([rows[number] for number in numbers], self._rules, self._steps, step)
        for number, verdict in zip(numbers, verdicts, strict=True):
            if verdict is not None:
                rows[number]["rejected_by"] = verdict
                del images[number]


def _image(row: Mapping[str, Any]) -> Any:
    """The middle frame, which was encoded by us when the clip was cut."""
    from PIL import Image

    return Image.open(io.BytesIO(row["middle_frame"])).convert("RGB")
