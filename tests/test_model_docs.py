"""The Python of docs/model.md runs, and what it states of parameters is so."""

import re
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiffusionPipeline, UNet2DConditionModel

from videofactory.model import SwapUNet, miniature

PAGE = (Path(__file__).parent.parent / "docs/model.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


STATED = re.findall(r"^\| `(\w+)`.*\| ([\d,]+) \|$", PAGE, re.MULTILINE)


def run(snippet: str) -> None:
    exec(compile(snippet, "docs/model.md", "exec"), {"__name__": "snippet"})


def test_the_miniature(capsys: pytest.CaptureFixture[str]) -> None:
    run(next(snippet for snippet in SNIPPETS if "miniature" in snippet))
    assert capsys.readouterr().out.strip() == "(1, 16, 64, 112, 3)"


def test_start_from_published_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a saved pipeline of Stable Diffusion's layout, with a small image U-Net where the snippet names the Hub."""
    base = tmp_path / "base"
    parts = {"vae": miniature.vae(), "text_encoder": miniature.text_encoder(), "tokenizer": miniature.tokenizer()}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    widths = {"block_out_channels": (16, 32), "cross_attention_dim": 64, "norm_num_groups": 8, "attention_head_dim": (2, 4)}
    parts["unet"] = UNet2DConditionModel(**blocks, **widths, use_linear_projection=True)
    stable_diffusion(parts, base)
    snippet = next(snippet for snippet in SNIPPETS if "from_unet2d" in snippet)
    monkeypatch.chdir(tmp_path)
    run(re.sub(r'base = ".*?"', f"base = {str(base)!r}", snippet))
    assert (tmp_path / "my-model/unet/diffusion_pytorch_model.safetensors").is_file()


def stable_diffusion(parts: dict, folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline: DiffusionPipeline = StableDiffusionPipeline(
        **parts, scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder)


@pytest.mark.parametrize(("interaction", "parameters"), STATED)
def test_stated_parameters(interaction: str, parameters: str) -> None:
    with torch.device("meta"):
        model = SwapUNet(interaction=interaction)
    assert model.num_parameters() == int(parameters.replace(",", ""))


def test_every_interaction_is_in_the_table() -> None:
    from videofactory.model.attention import INTERACTIONS

    assert sorted(name for name, _ in STATED) == sorted(INTERACTIONS)
