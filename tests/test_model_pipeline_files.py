"""Saved pipelines: moved, loaded in a new process, fetched from the Hub, refused; never a pickle."""

import hashlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

from videofactory.model import miniature
from videofactory.model.pipeline import TextToVideoSwapPipeline
from videofactory.model.pipeline_files import LOADING_OPTIONS, check_options, digests

from .model_pipelines import TINY_UNET, make_video

pytestmark = pytest.mark.usefixtures("one_thread")


def _save(pipe: TextToVideoSwapPipeline, folder: Path) -> Path:
    pipe.save_pretrained(folder)
    return folder


_LOAD = """
import sys
import numpy, torch
from videofactory.model.pipeline import TextToVideoSwapPipeline
name = sys.argv[1]
pipe = TextToVideoSwapPipeline.from_pretrained(name)
video = pipe("a red circle", generator=torch.Generator().manual_seed(0), output_type="np", num_frames=3, height=32, width=48,
             num_inference_steps=3).frames
numpy.save(sys.argv[2], video)
"""


_LOAD_AGAIN = """
import urllib.request
urllib.request.urlopen(sys.argv[3] + "/end").close()
TextToVideoSwapPipeline.from_pretrained(name, local_files_only=True)
try:
    TextToVideoSwapPipeline.from_pretrained("someone/else")
except FileNotFoundError as error:
    print(error)
"""


def _load_elsewhere(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_saved_moved_and_loaded_in_a_new_process(pipe, tmp_path):
    _save(pipe, tmp_path / "here").rename(tmp_path / "there")
    index = json.loads((tmp_path / "there" / "model_index.json").read_text())
    assert index["unet"] == ["videofactory.model.unet", "SwapUNet"]
    assert not list(tmp_path.rglob("*.bin"))
    done = _load_elsewhere(_LOAD, str(tmp_path / "there"), str(tmp_path / "video.npy"), HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "video.npy"), make_video(pipe), atol=1e-5)


def test_loading_keeps_the_defaults_and_takes_components(pipe, tmp_path):
    unet = miniature.unet(seed=9, **TINY_UNET)
    loaded = TextToVideoSwapPipeline.from_pretrained(_save(pipe, tmp_path), unet=unet, dtype=torch.float16)
    assert loaded.unet is unet
    assert loaded.vae.dtype == loaded.text_encoder.dtype == torch.float16
    assert (loaded.config.default_frames, loaded.config.default_height, loaded.config.default_width) == (16, 64, 112)


def test_a_component_may_be_left_out(pipe, tmp_path):
    embeds = pipe.encode_prompt("a red circle")
    loaded = TextToVideoSwapPipeline.from_pretrained(_save(pipe, tmp_path), text_encoder=None, tokenizer=None)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(
        make_video(loaded, None, prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1]), make_video(pipe), atol=1e-6
    )


_NOT_WANTED = ("model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.bin", "a.png")


class _Hub(ThreadingHTTPServer):
    """As much of the Hub as it takes to fetch the files of `folder` as the repository `someone/shapes`; `fetched` are those asked for."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _HubRequest)
        self.folder, self.fetched = folder, []


class _HubRequest(BaseHTTPRequestHandler):
    server: _Hub
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:
        self._answer(send=False)

    def do_GET(self) -> None:
        self._answer(send=True)

    def _answer(self, send: bool) -> None:
        path = unquote(self.path.partition("?")[0])
        files = {
            file.relative_to(self.server.folder).as_posix(): file for file in self.server.folder.rglob("*") if file.is_file()
        }
        if path.startswith("/api/models/someone/shapes/revision/"):
            info = {"id": "someone/shapes", "sha": self.commit, "siblings": [{"rfilename": name} for name in files]}
            self._reply(200, json.dumps({**info, "private": False, "tags": [], "downloads": 0, "likes": 0}).encode(), {}, send)
        elif path.startswith("/api/models/someone/shapes/tree/"):
            tree = [{"type": "file", "path": name, "size": file.stat().st_size, "oid": "0" * 40} for name, file in files.items()]
            self._reply(200, json.dumps(tree).encode(), {}, send)
        elif path.startswith("/someone/shapes/resolve/") and (name := path.split("/", 5)[5]) in files:
            if send:
                self.server.fetched.append(name)
            self._reply(200, files[name].read_bytes(), {"X-Repo-Commit": self.commit, "ETag": f'"{hash(name):x}"'}, send)
        elif path == "/end":
            self.server.fetched.append("end")
            self._reply(200, b"{}", {}, send)
        else:
            self._reply(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}, send)

    def _reply(self, code: int, body: bytes, headers: dict[str, str], send: bool) -> None:
        self.send_response(code)
        for name, value in {**headers, "Content-Type": "application/json", "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if send:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(pipe, tmp_path) -> Iterator[_Hub]:
    server = _Hub(_save(pipe, tmp_path / "repository"))
    for extra in (
        "model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.bin",
        "a.png",
    ):
        (server.folder / extra).write_bytes(b"must not be fetched")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_a_pipeline_is_fetched_from_the_hub(pipe, hub, tmp_path):
    """The Hub's address is read when its client is imported, hence another process."""
    address = f"http://127.0.0.1:{hub.server_port}"
    there = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
    done = _load_elsewhere(_LOAD + _LOAD_AGAIN, "someone/shapes", str(tmp_path / "video.npy"), address, **there)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "video.npy"), make_video(pipe), atol=1e-5)
    assert "unet/diffusion_pytorch_model.safetensors" in hub.fetched
    assert not set(hub.fetched) & set(_NOT_WANTED)
    # What was fetched once is loaded from the cache.
    assert hub.fetched[-1] == "end"
    assert "someone/else is no directory, and could not be fetched from the Hub: " in done.stdout


def test_names_that_are_no_pipeline(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    load = TextToVideoSwapPipeline.from_pretrained
    with pytest.raises(FileNotFoundError, match="the name of the saved pipeline is empty; give a directory"):
        load("")
    with pytest.raises(FileNotFoundError, match=r"nobody/nothing is no directory, and could not be fetched from the Hub: "):
        load("nobody/nothing")
    with pytest.raises(FileNotFoundError, match=r"/a/b/c is no directory, and cannot be the name of a repository"):
        load("/a/b/c")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"holds no model_index.json, so it is no saved pipeline \(it holds notes.txt\)"):
        load(tmp_path)
    with pytest.raises(ValueError, match="use_safetensors=False would load pickled weights"):
        load(tmp_path, use_safetensors=False)


def test_a_broken_index_is_named(tmp_path):
    for text in ("{", "[]"):
        (tmp_path / "model_index.json").write_text(text)
        with pytest.raises(ValueError, match=r"model_index.json is no JSON object .*; save the pipeline again"):
            TextToVideoSwapPipeline.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("torch_dtyp", "knows no argument torch_dtyp, nor does diffusers; did you mean torch_dtype?"),
        ("revison", "did you mean revision?"),
        ("text_encodr", "did you mean text_encoder?"),
        ("default_frame", "did you mean default_frames?"),
        ("subfolder", "knows no argument subfolder, nor does diffusers; "),
        ("xyz", "the pipeline's own are default_frames, default_height, default_width, scheduler, text_encoder, tokenizer, unet"),
    ],
)
def test_misspelt_arguments_are_named(tmp_path, name, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        TextToVideoSwapPipeline.from_pretrained(tmp_path, **{name: None})


def test_arguments_that_diffusers_knows_are_taken():
    """Those that this diffusers documents and those that it reads: where one is new or gone, our list has to follow."""
    load = DiffusionPipeline.from_pretrained
    documented = set(re.findall(r"^ +(\w+) ?\([`']", load.__doc__, re.MULTILINE)) - {"pretrained_model_name_or_path", "kwargs"}
    read = set(re.findall(r'\bkwargs\.pop\("(\w+)"', inspect.getsource(load)))
    assert {"revision", "variant", "disable_mmap"} <= documented
    assert {"revision", "variant", "provider"} <= read
    assert set(LOADING_OPTIONS) == documented | read
    check_options([*LOADING_OPTIONS, "unet"], {"unet"})


def test_files_that_a_pipeline_is_loaded_from_have_digests(pipe, tmp_path):
    folder = _save(pipe, tmp_path)
    (folder / "vae" / "sample.png").write_bytes(b"")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"half")
    plain, half = digests(folder, pipe.components), digests(folder, pipe.components, "fp16")
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"} <= plain.keys()
    weights = (folder / "unet" / "diffusion_pytorch_model.safetensors").read_bytes()
    assert plain["unet/diffusion_pytorch_model.safetensors"] == hashlib.sha256(weights).hexdigest()
    assert half.keys() - plain.keys() == {"unet/diffusion_pytorch_model.fp16.safetensors"}
    assert all(not name.endswith(".png") for name in plain)


def test_documented_arguments_load(pipe, tmp_path):
    options = {"torch_dtype": torch.float16, "low_cpu_mem_usage": True, "local_files_only": True, "default_frames": 5}
    loaded = TextToVideoSwapPipeline.from_pretrained(_save(pipe, tmp_path), **options, unet=None, disable_mmap=True)
    assert (loaded.vae.dtype, loaded.config.default_frames) == (torch.float16, 5)


def test_pickled_weights_are_not_read(pipe, tmp_path):
    _save(pipe, tmp_path)
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipe.vae.state_dict(), tmp_path / "vae" / "diffusion_pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        TextToVideoSwapPipeline.from_pretrained(tmp_path)


def test_a_pipeline_of_another_unet_lends_its_other_parts(pipe, tmp_path):
    """A saved image pipeline is refused, with the way out; with a U-Net of ours it is loaded."""
    image = UNet2DConditionModel(
        block_out_channels=(16, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=64,
        norm_num_groups=4,
    )
    _save(pipe, tmp_path)
    shutil.rmtree(tmp_path / "unet")
    image.save_pretrained(tmp_path / "unet")
    index = json.loads((tmp_path / "model_index.json").read_text())
    index |= {
        "_class_name": "StableDiffusionPipeline",
        "unet": ["diffusers", "UNet2DConditionModel"],
        "safety_checker": [None, None],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(
        ValueError, match=r"class UNet2DConditionModel, not SwapUNet; start from it with unet=SwapUNet.from_unet2d"
    ):
        TextToVideoSwapPipeline.from_pretrained(tmp_path)
    loaded = TextToVideoSwapPipeline.from_pretrained(tmp_path, unet=pipe.unet)
    loaded.set_progress_bar_config(disable=True)
    np.testing.assert_allclose(make_video(loaded), make_video(pipe), atol=1e-6)
