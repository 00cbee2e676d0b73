"""Which model the command runs, how it is loaded, and what the record says of it."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

from videofactory.model import generate, generate_models, gpu, miniature

from .model_pipelines import small_pipeline

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = ["--steps", "1", "--frames", "3", "--height", "32", "--width", "48", "--device", "cpu"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    small_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture
def hub_model(saved, tmp_path, monkeypatch) -> str:
    """A model in the Hub's cache, with a tag; the Hub itself cannot be reached."""
    repository = tmp_path / "cache" / "models--someone--shapes"
    shutil.copytree(saved, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "v1").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return "someone/shapes"


def _run(*arguments: object) -> tuple[int, str]:
    """Exit code and everything printed, as one line."""
    result = CliRunner().invoke(generate.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, re.sub(r"\s+", " ", result.output)


def _record(out: Path) -> dict:
    return json.loads((out / "generate.json").read_text(encoding="utf-8"))


def test_the_record_tells_the_files_of_a_saved_model(saved, tmp_path):
    assert _run("a star", "--model", saved, *SMALL, "--out", tmp_path)[0] == 0
    record = _record(tmp_path)
    hashes = record["model"]["sha256"]
    assert {name.partition("/")[0] for name in hashes} == {
        "model_index.json", "vae", "text_encoder", "tokenizer", "unet", "scheduler",
    }  # fmt: skip
    for name, found in hashes.items():
        assert found == hashlib.sha256((saved / name).read_bytes()).hexdigest()
    assert record["machine"] == {"device": generate_models.machine("cpu")["device"], "kernels": False}


def test_the_record_tells_the_files_of_the_miniature(tmp_path):
    assert _run("a star", *SMALL, "--out", tmp_path)[0] == 0
    found = _record(tmp_path)["model"]["sha256"]
    for part in ("vae", miniature.IMAGE_MODEL):
        name = f"{part}/diffusion_pytorch_model.safetensors"
        assert found[name] == hashlib.sha256((miniature.WEIGHTS / name).read_bytes()).hexdigest()


def test_the_record_tells_the_commit_of_a_model_on_the_hub(hub_model, tmp_path):
    """A tag can be moved, a commit cannot; and the run is repeated with the commit as the revision."""
    options = ("--model", hub_model, *SMALL)
    assert _run("a star", *options, "--revision", "v1", "--out", tmp_path / "tag")[0] == 0
    record = _record(tmp_path / "tag")
    assert record["model"] == {"commit": COMMIT}
    assert (record["settings"]["revision"], record["settings"]["variant"]) == ("v1", None)
    assert _run("a star", *options, "--revision", COMMIT, "--out", tmp_path / "commit")[0] == 0
    assert (tmp_path / "commit" / "000-a-star.mp4").read_bytes() == (tmp_path / "tag" / "000-a-star.mp4").read_bytes()
    code, printed = _run("a star", *options, "--revision", "v2", "--out", tmp_path / "none")
    assert code == 2
    assert "someone/shapes is no directory, and could not be fetched from the Hub: " in printed


def test_a_variant_is_what_is_loaded(saved, tmp_path):
    """The weights of the variant alone are whole."""
    folder = tmp_path / "model"
    shutil.copytree(saved, folder)
    plain = folder / "vae" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name("diffusion_pytorch_model.half.safetensors"))
    plain.write_bytes(b"no weights")
    options = ("--model", folder, "--variant", "half", *SMALL)
    assert _run("a star", *options, "--out", tmp_path / "out", "--dry-run")[0] == 0
    code, printed = _run("a star", *options, "--out", tmp_path / "out")
    assert code == 0, printed
    assert "vae/diffusion_pytorch_model.half.safetensors" in _record(tmp_path / "out")["model"]["sha256"]


def test_the_name_of_a_gpu_and_whether_our_kernels_serve(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"card of {device}")
    monkeypatch.setattr(gpu, "kernels", None)
    assert generate_models.machine("cuda:1") == {"device": "card of cuda:1", "kernels": False}
    monkeypatch.setattr(gpu, "kernels", object())
    assert generate_models.machine("cuda") == {"device": "card of cuda", "kernels": True}


@pytest.mark.parametrize("arguments", [["--dry-run"], ["--dry-run", "--height", "60"], ["--height", "60"], []])
@pytest.mark.parametrize("model", ["miniature", "saved"])
def test_no_bar_of_a_library_stands_among_our_lines(saved, tmp_path, model, arguments):
    transformers_logging.enable_progress_bar()
    diffusers_logging.enable_progress_bar()
    name = saved if model == "saved" else model
    _, printed = _run("a star", "--model", name, *SMALL, *arguments, "--out", tmp_path)
    assert printed
    assert "Loading" not in printed
    assert "%" not in printed


def test_the_miniature_runs_in_one_thread_on_a_cpu(saved, tmp_path):
    """Two wait for each other where others work on the same cores: 13 s instead of 1 s for a first video."""
    torch.set_num_threads(2)
    assert _run("a star", "--model", saved, *SMALL, "--out", tmp_path / "saved")[0] == 0
    assert torch.get_num_threads() == 2
    assert _run("a star", *SMALL, "--out", tmp_path / "miniature")[0] == 0
    assert torch.get_num_threads() == 1


def test_the_vae_decodes_as_many_frames_at_once_as_asked(saved, tmp_path, monkeypatch):
    decode, seen = AutoencoderKL.decode, []

    def decode_and_count(vae, latents, **settings):
        seen.append(len(latents))
        return decode(vae, latents, **settings)

    monkeypatch.setattr(AutoencoderKL, "decode", decode_and_count)
    assert _run("a star", "--model", saved, *SMALL, "--decode-chunk-size", 2, "--out", tmp_path)[0] == 0
    assert seen == [2, 1]
    assert _record(tmp_path)["running"]["decode_chunk_size"] == 2


def test_a_sheet_that_does_not_hold_every_video_says_so(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(generate, "SHEET_ROWS", 1)
    two, one = tmp_path / "two", tmp_path / "one"
    assert f"contact-sheet.png (of the first 1) and {two}" in _run("a star", "a ring", "--model", saved, *SMALL, "--out", two)[1]
    assert f"contact-sheet.png and {one}" in _run("a star", "--model", saved, *SMALL, "--out", one)[1]
