"""The embedder: unit vectors that mean something, whatever the batch, by the code that loads the big models."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.test_caption import rendered
from videofactory.curation.embed import ImageTextEmbedder
from videofactory.curation.weights import WeightsNotFound, check_weights
from videofactory.pipelines.sample import EMBEDDER
from videofactory.pipelines.sample.scene import Renderer, draw_shot


@pytest.fixture(scope="module")
def embedder() -> ImageTextEmbedder:
    return ImageTextEmbedder(str(EMBEDDER), device="cpu", batch_size=7)


def test_vectors_are_unit_float32(embedder: ImageTextEmbedder) -> None:
    images = embedder.embed_images(rendered([("red", "circle"), ("blue", "star")], 41))
    texts = embedder.embed_texts(["a red circle", "a blue star", "words it never saw"])
    assert images.shape == (2, embedder.dimension)
    assert texts.shape == (3, embedder.dimension)
    for vectors in (images, texts):
        assert vectors.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert embedder.embed_images([]).shape == embedder.embed_texts([]).shape == (0, embedder.dimension)
    assert embedder.name == "embedder"


def test_the_right_caption_is_most_similar(embedder: ImageTextEmbedder) -> None:
    rng = np.random.default_rng(42)
    shots = [draw_shot(rng, 2.0) for _ in range(30)]
    images = embedder.embed_images([Image.fromarray(Renderer(shot, 640, 360).frame(1.0)) for shot in shots])
    captions = sorted({shot.caption for shot in shots})
    similarity = images @ embedder.embed_texts(captions).T
    right = [captions[row.argmax()] == shot.caption for row, shot in zip(similarity, shots, strict=True)]
    # Of about thirty captions, where the gate of the evaluation has ten.
    assert sum(right) >= 0.8 * len(shots)


def test_vectors_do_not_depend_on_the_batch(embedder: ImageTextEmbedder) -> None:
    images = rendered([("red", "circle"), ("blue", "cross"), ("cyan", "ring")], 43)
    alone = np.concatenate([embedder.embed_images([image]) for image in images])
    np.testing.assert_allclose(embedder.embed_images(images * 4)[-3:], alone, atol=1e-5)
    texts = ["a red circle", "a blue cross in front of a striped background"]
    alone = np.concatenate([embedder.embed_texts([text]) for text in texts])
    np.testing.assert_allclose(embedder.embed_texts(texts * 5)[-2:], alone, atol=1e-5)


def test_what_cannot_be_used_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="batch_size 0"):
        ImageTextEmbedder(str(EMBEDDER), batch_size=0)
    with pytest.raises(ValueError, match="precision 'int8'"):
        ImageTextEmbedder(str(EMBEDDER), precision="int8")  # type: ignore[arg-type]
    with pytest.raises(WeightsNotFound, match="no such directory"):
        ImageTextEmbedder(str(tmp_path / "nowhere"))
    with pytest.raises(WeightsNotFound, match="no pretrained weights are named"):
        ImageTextEmbedder("ViT-B-32")


def test_architectures_with_named_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFound, match="knows no weights 'made-up'"):
        check_weights("ViT-B-32", "made-up")
    with pytest.raises(WeightsNotFound, match="HF_HUB_OFFLINE"):
        check_weights("ViT-B-32", "laion2b_s34b_b79k")
    with pytest.raises(WeightsNotFound, match="pickles are never loaded"):
        check_weights("ViT-B-32", str(tmp_path / "weights.pt"))
    file = tmp_path / "weights.safetensors"
    shutil.copy(EMBEDDER / "open_clip_model.safetensors", file)
    check_weights("ViT-B-32", str(file))
