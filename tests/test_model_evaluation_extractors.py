"""Extractors by name and import path: TorchScript files with other people's calls, a CLIP of transformers, plug-ins."""

import json
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from videofactory.model.evaluation.extractors import Extractor, load

from .evaluation_clips import clips, tensor

pytestmark = pytest.mark.usefixtures("one_thread")


class ThreeD(nn.Module):
    """The call of StyleGAN-V's I3D, which needs 10 frames as that does."""

    def forward(self, videos: torch.Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        assert videos.dim() == 5 and videos.size(1) == 3 and rescale and resize and return_features
        if videos.size(2) < 10:
            raise RuntimeError("kernel size can't be greater than actual input size")
        scaled = videos / 127.5 - 1
        return torch.cat([scaled.mean(dim=[2, 3, 4]), scaled.amax(dim=[2, 3, 4]), scaled[:, :, 0].mean(dim=[2, 3])], 1)


class TwoD(nn.Module):
    """The call of NVIDIA's Inception: bytes, scaled inside."""

    def forward(self, images: torch.Tensor, return_features: bool = False):
        assert images.dtype == torch.uint8 and return_features
        return images.float().mean(dim=[2, 3])


class Mine:
    """A plug-in."""

    def __init__(self, weights, device):
        self.hash = f"mine {weights} {device}"

    def __call__(self, pixels):
        return pixels.float().mean((-1, -2)).flatten(1)


class NoHash:
    def __init__(self, weights, device):
        pass


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scripts")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, and the published files are in it
        torch.jit.script(ThreeD()).save(str(folder / "i3d.pt"))
        torch.jit.script(TwoD()).save(str(folder / "inception.pt"))
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A CLIP of random weights and a few words, as transformers saves it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    ends = {"bos_token_id": len(words) - 2, "eos_token_id": len(words) - 1, "pad_token_id": len(words) - 1}
    tiny = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tiny, **ends, "vocab_size": len(words), "max_position_embeddings": 12},
        vision_config={**tiny, "image_size": 24, "patch_size": 8},
        projection_dim=10,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt")).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24}).save_pretrained(folder)
    return folder


class TestTorchScript:
    def test_a_video_net_gets_floats_of_0_to_255_channels_first(self, scripts):
        videos = clips(3)
        extractor = load("video", "torchscript", str(scripts / "i3d.pt"))
        found = extractor(tensor(videos))
        assert found.shape == (3, 9)
        wanted = videos.mean((1, 2, 3)) / 127.5 - 1
        assert found[:, :3].numpy() == pytest.approx(wanted, abs=1e-4)
        assert found[:, 6:].numpy() == pytest.approx(videos[:, 0].mean((1, 2)) / 127.5 - 1, abs=1e-4)
        assert isinstance(extractor, Extractor) and len(extractor.hash) == 64

    def test_an_image_net_gets_bytes(self, scripts):
        pictures = tensor(clips(2)).flatten(0, 1)
        found = load("image", "torchscript", str(scripts / "inception.pt"))(pictures)
        assert torch.allclose(found, pictures.float().mean((2, 3)))

    def test_the_hash_is_that_of_the_file(self, scripts, tmp_path):
        import hashlib

        content = (scripts / "i3d.pt").read_bytes()
        (tmp_path / "other.pt").write_bytes(content)
        assert load("video", "torchscript", str(tmp_path / "other.pt")).hash == hashlib.sha256(content).hexdigest()

    @pytest.mark.parametrize(("weights", "words"), [(None, "name a local .pt file"), ("no.pt", "no.pt is not there")])
    def test_without_a_file(self, weights, words):
        with pytest.raises((ValueError, OSError), match=words):
            load("video", "torchscript", weights)

    def test_weights_alone_do_not_do(self, tmp_path):
        torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
        with pytest.raises(ValueError, match="is no TorchScript file"):
            load("video", "torchscript", str(tmp_path / "weights.pt"))


class TestClip:
    def test_pictures_are_prepared_as_transformers_does(self, clip_folder):
        from transformers import CLIPImageProcessor, CLIPModel

        extractor = load("image", "clip", str(clip_folder))
        # Smooth pictures: the two ways to scale differ in the last digits of sharp edges.
        ramp = np.linspace(0, 255, 64, dtype=np.uint8)[None, None, :, None] * np.ones((2, 48, 1, 3), np.uint8)
        pictures = torch.from_numpy(np.ascontiguousarray(ramp)).permute(0, 3, 1, 2)
        processor, model = CLIPImageProcessor.from_pretrained(clip_folder), CLIPModel.from_pretrained(clip_folder)
        with torch.no_grad():
            wanted = model.get_image_features(**processor(images=list(ramp), return_tensors="pt")).pooler_output
        found = extractor(pictures)
        assert found.shape == (2, 10)
        assert torch.nn.functional.cosine_similarity(found, wanted).min() > 0.9999

    def test_texts(self, clip_folder):
        from transformers import AutoTokenizer, CLIPModel

        extractor = load("text", "clip", str(clip_folder))
        texts = ["a cat", "a very long text that does not end"]
        tokens = AutoTokenizer.from_pretrained(clip_folder)(
            texts, padding=True, truncation=True, max_length=12, return_tensors="pt"
        )
        with torch.no_grad():
            wanted = CLIPModel.from_pretrained(clip_folder).get_text_features(**tokens).pooler_output
        assert torch.allclose(extractor.texts(texts), wanted, atol=1e-5)
        alone = torch.cat([extractor.texts([text]) for text in texts])
        assert torch.allclose(alone, wanted, atol=1e-5)  # whatever it is padded to

    def test_the_hash_sees_the_weights(self, clip_folder, tmp_path):
        import shutil

        before = load("text", "clip", str(clip_folder)).hash
        other = shutil.copytree(clip_folder, tmp_path / "other")
        assert load("text", "clip", str(other)).hash == before
        from transformers import CLIPModel

        model = CLIPModel.from_pretrained(other)
        with torch.no_grad():
            model.logit_scale.add_(1)
        model.save_pretrained(other)
        assert load("text", "clip", str(other)).hash != before

    def test_weights_that_could_run_code_are_not_loaded(self, clip_folder, tmp_path):
        import shutil

        other = shutil.copytree(clip_folder, tmp_path / "other")
        from safetensors.torch import load_file

        torch.save(load_file(other / "model.safetensors"), other / "pytorch_model.bin")
        (other / "model.safetensors").unlink()
        with pytest.raises(OSError, match="safetensors"):
            load("text", "clip", str(other))

    def test_without_a_folder(self):
        with pytest.raises(ValueError, match="name a folder or a Hub id"):
            load("text", "clip")
        with pytest.raises(OSError, match="is no folder, and cannot be fetched"):
            load("text", "clip", "no/such/folder")


class TestNames:
    def test_a_plug_in(self):
        extractor = load("video", f"{__name__}:Mine", "some/file", "cpu")
        assert extractor.hash == "mine some/file cpu"
        assert extractor(tensor(clips(2))).shape == (2, 36)

    @pytest.mark.parametrize(
        ("use", "name", "words"),
        [
            ("video", "torchscrpt", r"is torchscript meant\? \(known: random, torchscript, or module:Class\)"),
            ("text", "random", r"--text-extractor random is not known \(known: clip"),
            ("video", "no_such_module:Class", "cannot be made: No module named"),
            ("video", f"{__name__}:Nothing", "cannot be made"),
            ("video", f"{__name__}:NoHash", "is no extractor of videos"),
            ("text", f"{__name__}:Mine", "with a method `texts`"),
        ],
    )
    def test_wrong_ones_are_said(self, use, name, words):
        with pytest.raises(ValueError, match=words):
            load(use, name)

    def test_the_built_in_ones_take_no_weights(self):
        with pytest.raises(ValueError, match="has weights of its own"):
            load("image", "random", "weights.pt")
