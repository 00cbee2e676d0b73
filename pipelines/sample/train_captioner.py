"""Trains the sample's captioner: BLIP-2's real architecture, made tiny. As in BLIP-2 the vision transformer is trained before and
then frozen; Q-Former and language model learn to write the caption from what it sees."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from videofactory.pipelines.sample.shapes import COLOURS
from videofactory.pipelines.sample.train_vision import (
    MEAN,
    STD,
    WIDTH,
    look,
    make_readable,
    optimiser_of,
    take_step,
)
from videofactory.pipelines.sample.training_frames import SIDE, Frames
from videofactory.pipelines.sample.vocabulary import BEGIN, END, IMAGE, PAD, build_tokenizer, words

_log = logging.getLogger(__name__)

QUERIES = 8
_BATCH, _BATCHES = 64, 150
_EXCHANGED = 0.25
_ARTICLE, _COLOUR, _FORM = 1, 2, 3
"""Positions in a caption's tokens, after the begin token."""


def build_captioner(vision: Any) -> Any:
    """A Blip2ForConditionalGeneration of 0.75 million parameters, trained nowhere but in its vision transformer."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2QFormerConfig, OPTConfig

    ids = {word: number for number, word in enumerate(words())}
    sizes = {
        "hidden_size": WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": len(ids),
        "pad_token_id": ids[PAD],
    }
    qformer = Blip2QFormerConfig(
        **sizes,
        intermediate_size=2 * WIDTH,
        cross_attention_frequency=1,
        encoder_hidden_size=WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    language = OPTConfig(
        **sizes,
        word_embed_proj_dim=WIDTH,
        ffn_dim=2 * WIDTH,
        max_position_embeddings=64,
        dropout=0.0,
        bos_token_id=ids[BEGIN],
        eos_token_id=ids[END],
    )
    config = Blip2Config(
        vision_config=vision.config,
        qformer_config=qformer,
        text_config=language,
        num_query_tokens=QUERIES,
        image_token_index=ids[IMAGE],
    )
    model = Blip2ForConditionalGeneration(config)
    model.vision_model.load_state_dict(vision.state_dict())
    # The class starts its queries at zero, where all of them stay alike.
    nn.init.normal_(model.query_tokens, std=0.5)
    return model


def train_captioner(vision: Any, frames: Frames, steps: int, seed: int) -> Any:
    """Train all but the vision transformer and return the model in evaluation mode."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = build_captioner(vision)
    model.vision_model.requires_grad_(False)
    tokenizer = build_tokenizer("captioner")
    optimiser, schedule = optimiser_of(list(model.parameters()), 2e-3, steps)
    started = time.monotonic()
    batches = look(lambda pixels: vision(pixel_values=pixels).last_hidden_state, frames, _BATCHES, _BATCH, seed)
    for step in range(steps):
        batch = batches[step % _BATCHES]
        written = _write(tokenizer, [frames.caption(i) for i in batch.chosen], batch.named, rng)
        loss = _loss(model, batch.states, *written)
        take_step(loss, optimiser, schedule)
        if step % 50 == 0 or step == steps - 1:
            _log.info("captioner %d/%d: loss %.3f, %.0f s", step, steps, loss.item(), time.monotonic() - started)
    return model.eval()


def save_captioner(model: Any, directory: Path) -> None:
    """Write model, tokenizer and image processor, in half precision: the files that `from_pretrained` reads."""
    from transformers import Blip2Processor, BlipImageProcessor

    image_processor = BlipImageProcessor(size={"height": SIDE, "width": SIDE}, image_mean=[MEAN] * 3, image_std=[STD] * 3)
    processor = Blip2Processor(image_processor, build_tokenizer("captioner"), num_query_tokens=QUERIES)
    model.to(torch.float16).save_pretrained(directory)
    processor.save_pretrained(directory)
    make_readable(directory)


def _loss(model: Any, states: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the caption's words, given what the vision transformer sees: states [batch, 1 + patches, width]."""
    queries = model.query_tokens.expand(len(states), -1, -1)
    seen = model.language_projection(model.qformer(query_embeds=queries, encoder_hidden_states=states).last_hidden_state)
    embedded = torch.cat([seen, model.get_input_embeddings()(ids)[:, QUERIES:]], dim=1)
    attended = torch.ones(ids.shape, dtype=torch.long)
    logits = model.language_model(inputs_embeds=embedded, attention_mask=attended).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def _write(
    tokenizer: Any, captions: list[str], named: torch.Tensor, rng: np.random.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Input ids and labels [batch, length]: image tokens, begin, caption, end; all captions padded at the right.

    A quarter of the input words is exchanged for random ones: each word must then be read off the image, not guessed from the
    words before it. A frame of a nameless colour is not asked for article and colour, any other not for the form (see `Batch`); and
    among its input words the colour is any, so that every form follows every colour.
    """
    texts = tokenizer([f"{caption} {END}" for caption in captions], padding=True, return_tensors="pt").input_ids
    pad, image = tokenizer.pad_token_id, tokenizer.convert_tokens_to_ids(IMAGE)
    labels = texts.masked_fill(texts == pad, -100)
    labels[:, 0] = -100
    labels[~named, _ARTICLE : _COLOUR + 1] = -100
    labels[named, _FORM] = -100
    exchanged = torch.from_numpy(rng.random(texts.shape) < _EXCHANGED) & (texts != pad)
    exchanged[:, 0] = False
    words_at_random = torch.from_numpy(rng.integers(3, len(tokenizer) - 2, texts.shape))
    ids = torch.where(exchanged, words_at_random, texts)
    colours = torch.tensor(tokenizer.convert_tokens_to_ids(list(COLOURS)))
    ids[~named, _COLOUR] = colours[torch.from_numpy(rng.integers(len(colours), size=int((~named).sum())))]
    images = torch.full((len(texts), QUERIES), image)
    return torch.cat([images, ids], dim=1), torch.cat([torch.full_like(images, -100), labels], dim=1)
