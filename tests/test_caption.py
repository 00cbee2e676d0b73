"""The captioner: that it says what is to be seen, by the code that loads the big models, and that missing weights are told early."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from videofactory.curation import weights
from videofactory.curation.caption import Blip2Captioner, load_captioner
from videofactory.curation.weights import WeightsNotFound, check_weights, made_for, model_name
from videofactory.pipelines.sample import CAPTIONER, EMBEDDER, MADE_FOR
from videofactory.pipelines.sample.evaluate import named
from videofactory.pipelines.sample.scene import Renderer, draw_shot
from videofactory.pipelines.sample.shapes import COLOURS, FORMS
from videofactory.pipelines.sample.training_frames import HELD_OUT


def rendered(pairs: list[tuple[str, str]], seed: int) -> list[Image.Image]:
    """One frame per pair of colour and form."""
    rng = np.random.default_rng(seed)
    return [Image.fromarray(Renderer(draw_shot(rng, 2.0, pair), 640, 360).frame(1.0)) for pair in pairs]


@pytest.fixture(scope="module")
def captioner() -> Blip2Captioner:
    return Blip2Captioner(str(CAPTIONER), device="cpu", batch_size=5)


def test_captions_name_what_is_seen(captioner: Blip2Captioner) -> None:
    pairs = [(colour, form) for colour in COLOURS for form in FORMS][::2]
    captions = captioner.caption(rendered(pairs, 31))
    right = [named(caption) == pair for caption, pair in zip(captions, pairs, strict=True)]
    assert sum(right) >= 0.85 * len(pairs), list(zip(pairs, captions, strict=True))
    assert all(7 <= len(caption.split()) <= 14 for caption in captions)


def test_held_out_pairs_are_named(captioner: Blip2Captioner) -> None:
    pairs = sorted(HELD_OUT) * 2
    captions = captioner.caption(rendered(pairs, 32))
    assert sum(named(caption) == pair for caption, pair in zip(captions, pairs, strict=True)) >= 0.75 * len(pairs), captions


def test_captions_do_not_depend_on_the_batch(captioner: Blip2Captioner) -> None:
    images = rendered([("red", "circle"), ("blue", "cross"), ("cyan", "ring")], 33)
    assert [captioner.caption([image])[0] for image in images] == captioner.caption(images)
    assert captioner.caption([]) == []


def test_a_prompt_is_continued_and_left_out() -> None:
    captioner = Blip2Captioner(str(CAPTIONER), device="cpu", prompt="a")
    (caption,) = captioner.caption(rendered([("red", "circle")], 34))
    assert caption.startswith("red circle")


def test_images_of_any_mode(captioner: Blip2Captioner) -> None:
    image = rendered([("green", "square")], 35)[0]
    assert captioner.caption([image.convert("RGBA")]) == captioner.caption([image])


def test_load_captioner_by_path() -> None:
    captioner = load_captioner(model=str(CAPTIONER), device="cpu")
    assert captioner.name == "captioner"
    with pytest.raises(ValueError, match="not of the form"):
        load_captioner("videofactory.curation.caption")
    with pytest.raises(ValueError, match="cannot be imported"):
        load_captioner("videofactory.curation.caption:Missing")
    with pytest.raises(TypeError, match="no method `caption"):
        load_captioner("builtins:dict")


@pytest.mark.parametrize("option", ["batch_size", "max_new_tokens", "num_beams"])
def test_numbers_below_one_are_refused(option: str) -> None:
    options: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match=f"{option} 0 must be at least 1"):
        Blip2Captioner(str(CAPTIONER), **options)


def test_the_models_are_marked() -> None:
    for directory in (CAPTIONER, EMBEDDER):
        assert made_for(str(directory)) == MADE_FOR
        assert "README.md" in {file.name for file in directory.iterdir()}
        check_weights(str(directory))
    assert made_for("Salesforce/blip2-opt-2.7b") is None


def test_a_broken_marker_is_an_error(tmp_path: Path) -> None:
    (tmp_path / weights.MARKER).write_text("{")
    with pytest.raises(ValueError, match="restore or remove"):
        made_for(str(tmp_path))


def test_missing_weights_are_told_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(WeightsNotFound, match="no such directory") as caught:
        Blip2Captioner(str(tmp_path / "nowhere"))
    for way_out in ("local directory", "switch captions off", "run the sample"):
        assert way_out in str(caught.value)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_directories_are_checked_for_whole_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(CAPTIONER, broken)
    file = broken / "model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsNotFound, match="copy it again"):
        check_weights(str(broken))
    file.write_bytes(b"no tensors")
    with pytest.raises(WeightsNotFound, match="not a safetensors file"):
        check_weights(str(broken))
    file.unlink()
    (broken / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(WeightsNotFound, match="holds none of"):
        check_weights(str(broken))
    (broken / "config.json").unlink()
    with pytest.raises(WeightsNotFound, match="holds neither"):
        check_weights(str(broken))


def test_a_divided_checkpoint_needs_all_its_parts(tmp_path: Path) -> None:
    shutil.copy(CAPTIONER / "config.json", tmp_path)
    shutil.copy(CAPTIONER / "model.safetensors", tmp_path / "part-1.safetensors")
    index = {"weight_map": {"a": "part-1.safetensors", "b": "part-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(WeightsNotFound, match=r"part-2\.safetensors is missing"):
        check_weights(str(tmp_path))
    shutil.copy(CAPTIONER / "model.safetensors", tmp_path / "part-2.safetensors")
    check_weights(str(tmp_path))


def test_offline_only_the_cache_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(WeightsNotFound, match="HF_HUB_OFFLINE"):
        check_weights("nobody/no-such-model")
    with pytest.raises(WeightsNotFound, match="neither a directory nor a Hub repository"):
        check_weights("just-a-word")


def test_model_names_hold_no_paths(tmp_path: Path) -> None:
    assert model_name(str(tmp_path)) == tmp_path.name
    assert model_name("hf-hub:owner/name") == "owner/name"
