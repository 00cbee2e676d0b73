"""Describe kept clips: image embedding, caption, and how well the two agree, judged as soon as each is known.

Both models live in one process: the caption model costs far more than the embedding, and rejected clips skip it.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        waiting = [number for number, row in enumerate(rows) if row.get("video") is not None]
        images = self._answered(rows, waiting, _image, [rows[number] for number in waiting], "caption_failed")
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
        vectors = self._answered(rows, list(images), self._embedder.embed_images, list(images.values()), "embed_failed")
        for number, vector in vectors.items():
            rows[number]["embedding"] = vector.astype(np.float16)
        _drop_failed(rows, images)
        self._judge(rows, images, "embed")

    def _caption(self, rows: list[dict[str, Any]], images: dict[int, Any]) -> None:
        assert self._captioner is not None
        captions = self._answered(rows, list(images), self._captioner.caption, list(images.values()), "caption_failed")
        for number, caption in captions.items():
            rows[number]["caption"] = caption
        if self._embedder is not None:
            texts = self._answered(rows, list(captions), self._embedder.embed_texts, list(captions.values()), "embed_failed")
            for number, text in texts.items():
                rows[number][CAPTION_SIMILARITY.name] = float(text @ rows[number]["embedding"].astype(text.dtype))
        _drop_failed(rows, images)
        self._judge(rows, images, "caption")

    def _answered(
        self,
        rows: list[dict[str, Any]],
        numbers: list[int],
        model: Callable[[list[Any]], Iterable[Any]],
        items: list[Any],
        failure: str,
    ) -> dict[int, Any]:
        """What `model` says of each item, by row number; a row whose item it fails on gets an error of class `failure`."""
        answers = {}
        for number, answer in zip(numbers, _one_by_one(model, items), strict=True):
            if isinstance(answer, Exception):
                rows[number].update(error_class=failure, error=f"{type(answer).__name__}: {answer}")
            else:
                answers[number] = answer
        return answers

    def _judge(self, rows: list[dict[str, Any]], images: dict[int, Any], step: Step) -> None:
        """Reject what the rules of `step` reject; the rejected leave `images`, so that no later model sees them."""
        numbers = list(images)
        verdicts = judge([rows[number] for number in numbers], self._rules, self._steps, step)
        for number, verdict in zip(numbers, verdicts, strict=True):
            if verdict is not None:
                rows[number]["rejected_by"] = verdict
                del images[number]


def _one_by_one(model: Callable[[list[Any]], Iterable[Any]], items: list[Any]) -> list[Any]:
    """One answer per item; when a batch fails, each item alone, so that one cannot take others with it."""
    if not items:
        return []
    try:
        answers = list(model(items))
        if len(answers) != len(items):
            raise ValueError(f"{len(answers)} answers for {len(items)} clips")
        return answers
    except Exception as error:  # noqa: BLE001 - a model of the user's may raise anything
        if len(items) == 1:
            return [error]
    return [answer for item in items for answer in _one_by_one(model, [item])]


def _drop_failed(rows: Sequence[Mapping[str, Any]], images: dict[int, Any]) -> None:
    for number in [number for number in images if rows[number].get("error_class") is not None]:
        del images[number]


def _image(rows: list[dict[str, Any]]) -> list[Any]:
    """The middle frames, which were encoded by us when the clips were cut."""
    from PIL import Image

    return [Image.open(io.BytesIO(row["middle_frame"])).convert("RGB") for row in rows]
