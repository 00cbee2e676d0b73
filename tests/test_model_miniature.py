"""The miniature: small, of the real classes, and its VAE and words are fit for the sample's world."""

import subprocess
import sys

import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import ImageDraw

from videofactory.model import miniature
from videofactory.model.miniature import train
from videofactory.model.miniature.image_model import image_model
from videofactory.model.miniature.training_frames import random_crops, read_clips, signal_to_noise
from videofactory.model.miniature.words import WORDS
from videofactory.model.pipeline import TextToVideoSwapPipelineOutput
from videofactory.pipelines.sample.classifier_scores import score

from .datasets import write_dataset
from .model_pipelines import TINY_UNET
from .videos import make_video

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_word_of_the_sample_is_one_token():
    tokenizer = miniature.tokenizer()
    caption = "an orange triangle in front of a checkered background"
    assert [token.removesuffix("</w>") for token in tokenizer.tokenize(caption)] == caption.split()
    assert all(len(tokenizer.tokenize(word)) == 1 for word in WORDS)
    text = "zebra, 7 Übungen"
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True).replace(" ", "") == "zebra,7übungen"


def test_words_come_out_of_the_text_encoder_apart():
    with torch.no_grad():
        states, _ = miniature.pipeline().encode_prompt([f"a {colour} circle" for colour in ("red", "blue", "green")])
    likeness = torch.nn.functional.cosine_similarity(states[:1, 2], states[1:, 2])
    assert likeness.abs().max() < 0.5
    torch.testing.assert_close(states[0, 1], states[1, 1])


def _shapes(seed: int) -> torch.Tensor:
    """Pictures as the sample's, drawn here and now: plain shapes on striped and shaded backgrounds, (n, 3, 64, 112), -1 to 1."""
    rng = np.random.default_rng(seed)
    colours = [(218, 28, 34), (252, 132, 8), (250, 230, 30), (28, 168, 56), (30, 216, 226), (36, 70, 226), (158, 40, 200)]
    pictures = []
    for colour in colours:
        ramp = np.linspace(-1, 1, 448)[None, :, None] * rng.uniform(10, 25)
        stripes = np.sign(np.sin(np.arange(256)[:, None, None] / 8 + np.arange(448)[None, :, None] / 20)) * rng.uniform(5, 20)
        base = rng.uniform(70, 150) * (1 - 0.2 * rng.uniform(size=3))
        image = PIL.Image.fromarray((base + ramp + stripes).clip(0, 255).astype(np.uint8))
        x, y = rng.uniform(120, 330), rng.uniform(90, 170)
        draw = ImageDraw.Draw(image)
        draw.regular_polygon((x, y, 60), int(rng.integers(3, 7)), rotation=int(rng.integers(90)), fill=colour)
        pictures.append(np.asarray(image.resize((112, 64), PIL.Image.Resampling.BOX)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def test_the_vae_gives_shapes_and_colours_back():
    vae, originals = miniature.vae(), _shapes(0)
    with torch.no_grad():
        latents = vae.encode(originals).latent_dist.mean
        pictures = vae.decode(latents).sample
    assert latents.shape == (7, 4, 8, 14)
    assert signal_to_noise(pictures, originals) > 26
    assert 0.6 < (latents * vae.config.scaling_factor).std() < 1.6


def test_the_miniature_is_of_the_real_classes_and_small():
    pipeline = miniature.pipeline()
    assert isinstance(pipeline.vae, AutoencoderKL)
    assert {name: type(part).__name__ for name, part in pipeline.components.items()} == {
        "vae": "AutoencoderKL",
        "text_encoder": "CLIPTextModel",
        "tokenizer": "CLIPTokenizer",
        "unet": "SwapUNet",
        "scheduler": "DDIMScheduler",
    }
    assert all(part.dtype == torch.float32 for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet))
    assert sum(file.stat().st_size for file in miniature.WEIGHTS.rglob("*")) < 4e6
    assert not any(part.training for part in (pipeline.vae, pipeline.text_encoder, pipeline.unet))
    assert isinstance(TextToVideoSwapPipelineOutput(frames=[]), dict)


def test_a_fresh_unet_follows_its_seed_and_leaves_the_global_one():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, third = (miniature.unet(seed, **TINY_UNET).conv_in.weight for seed in (0, 0, 1))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_importing_the_miniature_is_light():
    code = (
        "import sys; import videofactory.model.miniature; print(sorted({'torch', 'diffusers', 'transformers'} & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_files_can_be_made_again(tmp_path):
    """The whole training on another dataset, a few steps of it: same seed, same files."""
    video = make_video(tmp_path / "clip.mp4", 5, seconds=[1.0]).read_bytes()
    dataset = write_dataset(tmp_path / "dataset", sources=5, video=video).uri
    for name in ("first", "second"):
        train.main(data=dataset, out=tmp_path / name, steps=2, seed=3)
    files = sorted(path.relative_to(tmp_path / "first") for path in (tmp_path / "first").rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} == {"README.md", "vae", "text_encoder", "tokenizer", "scheduler"}
    for file in files:
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    assert "--steps 2 --seed 3" in (tmp_path / "first" / "README.md").read_text()
    vae = AutoencoderKL.from_pretrained(tmp_path / "first" / "vae")
    frames = read_clips(dataset, "train", miniature.FRAMES, miniature.HEIGHT, miniature.WIDTH).float() / 127.5 - 1
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mean for part in frames.split(32)]) * vae.config.scaling_factor
    assert latents.std().item() == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match=r"holds no kept clip with .*nowhere"):
        read_clips(dataset, "nowhere", 2, 64, 112)


def test_training_learns():
    """A few seconds of training on pictures of two halves beat the best single colour."""
    frames = torch.zeros(2, 3, 192, 344, dtype=torch.uint8)
    frames[0, :, :, :172], frames[1, 0] = 200, 230
    vae = train.train_vae(frames, steps=50, seed=0, learning_rate=6e-3)
    originals = random_crops(frames, 8, torch.Generator().manual_seed(1))
    with torch.no_grad():
        pictures = vae(originals).sample
    assert originals.shape == (8, 3, 48, 64)
    assert originals.min() >= -1
    assert originals.max() <= 1
    plain = originals.mean(dim=(0, 2, 3), keepdim=True).expand_as(originals)
    assert signal_to_noise(pictures, originals) > signal_to_noise(plain, originals) + 1


def test_signal_to_noise_of_known_pictures():
    black = torch.full((1, 3, 4, 4), -1.0)
    assert signal_to_noise(-black, black) == pytest.approx(0)
    assert signal_to_noise(black + 0.2, black) == pytest.approx(20)


def test_the_image_model_is_the_spatial_part_of_what_begins_with_it():
    child = miniature.unet_of_images(3)
    parent = image_model(child)
    stored = UNet2DConditionModel.from_pretrained(miniature.WEIGHTS, subfolder="image_unet", torch_dtype=torch.float32)
    for name, weight in stored.state_dict().items():
        assert torch.equal(parent.state_dict()[name], weight), name
    frames, text, timesteps = torch.randn(2, 4, 3, 8, 14), torch.randn(2, 9, 64), torch.tensor([5, 700])
    with torch.no_grad():
        together = child(frames, timesteps, text).sample
        alone = torch.stack([stored(frame, timesteps, text).sample for frame in frames.unbind(2)], dim=2)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)


def test_seeds_and_interactions_of_what_begins_with_the_image_model():
    one, same, other = (miniature.unet_of_images(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert miniature.unet_of_images(interaction="joint_window").config.interaction == "joint_window"


def test_a_model_without_some_weights_is_no_image_model():
    class Lacking:
        config = miniature.unet().config

        def state_dict(self):
            return {name: weight for name, weight in miniature.unet().state_dict().items() if "attn2" not in name}

    with pytest.raises(ValueError, match=r"lacks .* weights of an image model"):
        image_model(Lacking())


def test_the_image_model_draws_what_is_asked_for():
    pipe = miniature.pipeline(unet=miniature.unet_of_images())
    pipe.set_progress_bar_config(disable=True)
    asked = [
        ("red", "circle"),
        ("yellow", "ring"),
        ("cyan", "square"),
        ("white", "cross"),
        ("blue", "circle"),
        ("orange", "ring"),
    ]
    prompts = [f"a {colour} {form} moving left in front of a shaded background" for colour, form in asked]
    videos = pipe(
        prompts, num_frames=1, num_inference_steps=16, guidance_scale=4, generator=torch.Generator().manual_seed(0)
    ).frames
    scores = score(zip(prompts, [np.stack([np.asarray(frame) for frame in video]) for video in videos], strict=True))
    rates = scores.rates()
    assert rates["colour"].right >= 5 and rates["form"].right >= 4, scores.as_dict()["videos"]
