"""Trains the sample's embedder: an open_clip CLIP, made tiny, that maps frames of the miniature world and texts about them together.

The vision tower is the one that `train_vision` trains, under a pooling of its own. Contrastive, with one difference to CLIP's own
recipe: in so small a world many frames of a batch share a caption, so a frame is compared with the distinct captions of the
batch, and besides with texts about its colour, its form and its background alone. The latter teach the text side that a caption
is the sum of its words, which is what pairs never seen together need.
"""

from __future__ import annotations

import json
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from videofactory.pipelines.sample.backgrounds import BACKGROUNDS
from videofactory.pipelines.sample.shapes import COLOURS, FORMS
from videofactory.pipelines.sample.train_vision import (
    EXPANSION,
    HEADS,
    LAYERS,
    MEAN,
    PATCH,
    STD,
    WIDTH,
    Batch,
    look,
    make_readable,
    optimiser_of,
    take_step,
)
from videofactory.pipelines.sample.training_frames import HELD_OUT, SIDE, Frames
from videofactory.pipelines.sample.vocabulary import build_tokenizer, words

_log = logging.getLogger(__name__)

_CONTEXT = 24
_BATCH, _BATCHES = 96, 70
_COLOURS_WITH = [[i for i, colour in enumerate(COLOURS) if (colour, form) not in HELD_OUT] for form in FORMS]

# Every way to say it; "{0}" is the article, "{1}" colour, "{2}" form, "{3}" background.
_TEMPLATES = (
    "{0} {1} {2} in front of {3}",
    "{0} {1} {2} in front of {3}",
    "a photo of {0} {1} {2} in front of {3}",
    "there is {0} {1} {2} on {3}",
    "{1} {2} with {3}",
    "a video frame showing {0} {1} {2} before {3}",
    "{0} {1} {2} moves over {3}",
)
_COLOUR_ALONE = ("{0} {1} shape", "something {1}", "{0} {1} object", "{1}")
_FORM_ALONE = ("a {2}", "a photo of a {2}", "the {2}", "{2}")
_PAIR_ALONE = ("{0} {1} {2}", "a picture of {0} {1} {2}", "{1} {2}", "there is {0} {1} {2}")
_BACKGROUND_ALONE = ("{3}", "a picture with {3}", "something in front of {3}")


def embedder_config() -> dict[str, Any]:
    """The configuration file of the model, as open_clip reads it: a vision transformer, and a text tower over whole words."""
    return {
        "model_cfg": {
            "embed_dim": 64,
            "vision_cfg": {
                "image_size": SIDE,
                "patch_size": PATCH,
                "width": WIDTH,
                "layers": LAYERS,
                "head_width": WIDTH // HEADS,
                "mlp_ratio": EXPANSION,
                "no_ln_pre": True,
                "norm_kwargs": {"eps": 1e-6},
                "attentional_pool": True,
                "attn_pooler_queries": 1,
                "attn_pooler_heads": 8,
            },
            "text_cfg": {
                "context_length": _CONTEXT,
                "vocab_size": len(words()),
                "hf_tokenizer_name": "tokenizer of this directory",
                "width": 64,
                "heads": 2,
                "layers": 2,
            },
        },
        "preprocess_cfg": {
            "size": SIDE,
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "interpolation": "bicubic",
            "resize_mode": "squash",
        },
    }


def build_embedder(vision: Any) -> Any:
    """An open_clip CLIP of 0.6 million parameters, whose vision tower is a copy of `vision` below a new, attentive pooling."""
    import open_clip

    settings = embedder_config()["model_cfg"]
    text = {key: value for key, value in settings["text_cfg"].items() if key != "hf_tokenizer_name"}
    model = open_clip.CLIP(settings["embed_dim"], settings["vision_cfg"], text)
    weights = vision.state_dict()
    places = weights["embeddings.position_embedding"][0].clone()
    # open_clip's patches have no bias of their own; added to the places it has the same effect.
    places[1:] += weights["embeddings.patch_embedding.bias"]
    copied = {
        "conv1.weight": weights["embeddings.patch_embedding.weight"],
        "class_embedding": weights["embeddings.class_embedding"].flatten(),
        "positional_embedding": places,
    }
    for theirs, ours in _LAYER_NAMES.items():
        for layer in range(LAYERS):
            for kind in ("weight", "bias"):
                separator = "_" if ours.endswith("in_proj") else "."
                copied[f"transformer.resblocks.{layer}.{ours}{separator}{kind}"] = weights[
                    f"encoder.layers.{layer}.{theirs}.{kind}"
                ]
    left_out = model.visual.load_state_dict(copied, strict=False)
    assert not left_out.unexpected_keys, left_out.unexpected_keys
    return model


_LAYER_NAMES = {
    "layer_norm1": "ln_1",
    "self_attn.qkv": "attn.in_proj",
    "self_attn.projection": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def train_embedder(vision: Any, frames: Frames, steps: int, seed: int) -> Any:
    """Train the pooling and the text tower, the transformer frozen, and return the model in evaluation mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build_embedder(vision)
    for name, parameter in model.visual.named_parameters():
        parameter.requires_grad_(name.startswith(("attn_pool", "ln_post", "proj")))
    tokenizer = build_tokenizer("embedder")
    optimiser, schedule = optimiser_of(list(model.parameters()), 2e-3, steps)
    started = time.monotonic()
    visual = model.visual
    batches = look(lambda pixels: visual.transformer(visual._embeds(pixels)), frames, _BATCHES, _BATCH, seed)
    for step in range(steps):
        loss, right = _loss(model, tokenizer, batches[step % _BATCHES], rng)
        take_step(loss, optimiser, schedule)
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        if step % 50 == 0 or step == steps - 1:
            _log.info(
                "embedder %d/%d: loss %.3f, caption %.3f, %.0f s", step, steps, loss.item(), right, time.monotonic() - started
            )
    return model.eval()


def save_embedder(model: Any, directory: Path) -> None:
    """Write model, configuration and tokenizer, in half precision: the directory that open_clip's `local-dir:` reads."""
    from safetensors.torch import save_file

    directory.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: (value.half() if value.is_floating_point() else value).contiguous() for name, value in model.state_dict().items()
    }
    save_file(tensors, directory / "open_clip_model.safetensors")
    (directory / "open_clip_config.json").write_text(json.dumps(embedder_config(), indent=2) + "\n", encoding="utf-8")
    build_tokenizer("embedder").save_pretrained(directory)
    make_readable(directory)


def _loss(model: Any, tokenizer: Any, batch: Batch, rng: np.random.Generator) -> tuple[torch.Tensor, float]:
    """Sum of the contrastive losses, and the fraction of frames whose caption is nearest among the batch's."""
    images = nn.functional.normalize(model.visual._pool(batch.states)[0] @ model.visual.proj, dim=-1) * model.logit_scale.exp()
    labels = np.stack([batch.colour.numpy(), batch.form.numpy(), batch.background.numpy()], axis=1)
    named = batch.named.numpy()
    for i in np.flatnonzero(~named):
        # Some word has to stand where a frame has no colour with a name; which one is never asked.
        labels[i, 0] = rng.choice(_COLOURS_WITH[labels[i, 1]])
    total = torch.zeros(())
    right = 0.0
    questions = (
        (_TEMPLATES, [0, 1, 2]),
        (_PAIR_ALONE, [0, 1]),
        (_COLOUR_ALONE, [0]),
        (_FORM_ALONE, [1]),
        (_BACKGROUND_ALONE, [2]),
    )
    for number, (templates, told) in enumerate(questions):
        asked = named if told == [0] else ~named if told == [1] else np.ones_like(named)
        # Frames that the text cannot tell apart share one text.
        masked = np.zeros_like(labels)
        masked[:, told] = labels[:, told]
        distinct, answer = np.unique(masked[asked], axis=0, return_inverse=True)
        texts = [_say(str(templates[rng.integers(len(templates))]), *row) for row in distinct.tolist()]
        ids = tokenizer(texts, padding="max_length", max_length=_CONTEXT, return_tensors="pt").input_ids
        embedded = nn.functional.normalize(model.encode_text(ids), dim=-1)
        similarity = images[torch.from_numpy(asked)] @ embedded.T
        if len(told) > 1:
            # The rule of `Batch`: who is asked for the colour is offered texts of one form, who is asked for the form texts of one colour.
            same = np.where(named[:, None], labels[:, 1:2] == distinct[None, :, 1], labels[:, :1] == distinct[None, :, 0])
            similarity = similarity.masked_fill(torch.from_numpy(~same), -1e4)
        wanted = torch.from_numpy(answer.reshape(-1))
        total = total + nn.functional.cross_entropy(similarity, wanted)
        if number == 0:
            right = float((similarity.argmax(-1) == wanted).float().mean())
    return total, right


def _say(template: str, colour: int, form: int, background: int) -> str:
    word = list(COLOURS)[colour]
    article = "an" if word[0] in "aeiou" else "a"
    return template.format(article, word, "shape" if form < 0 else FORMS[form], list(BACKGROUNDS.values())[background])
