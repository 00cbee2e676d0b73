"""The words that the miniature knows, its tokenizer, and the frozen text encoder over them."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

_TEXT = (
    "red orange yellow green cyan blue purple white black grey circle square triangle star cross ring shape "
    "striped checkered cloudy shaded dotted plain background a an the in front of on before behind and with over "
    "moving moves turning left right up down to from across slowly fast small big video picture"
)

WORDS = tuple(_TEXT.split())
"""Words that are one token each, whatever the captions hold: those of the sample's world, and some to ask for its motion."""

LENGTH = 24
"""Tokens of a prompt, begin and end included: a caption of the sample has 11."""

_BEGIN, _END = "<|startoftext|>", "<|endoftext|>"
_LAST = "</w>"


def build_tokenizer(captions: Iterable[str] = ()) -> Any:
    """A `CLIPTokenizer` in which every word of `WORDS` and of `captions` is one token and any other text is spelt in bytes.

    Args:
        captions: plain texts; what is not letters, digits and spaces is not made a word of its own.
    """
    from transformers import CLIPTokenizer

    vocabulary, merges = vocabulary_of(sorted({*WORDS, *_words_of(captions)}))
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)


def vocabulary_of(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Token ids and merges with which byte-pair encoding reads each of `words` (lower-case letters) as one token.

    Every byte is a token, alone and at the end of a word, so that no text is unknown.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    tokens = [*letters, *(letter + _LAST for letter in letters)]
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        # A merge appended last is tried last, so it changes no word before this one.
        while len(parts := _parts(word, ranks)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
            tokens.append(parts[0] + parts[1])
    # Two words may have come to the same beginning by different merges.
    names = list(dict.fromkeys([*tokens, _BEGIN, _END]))
    return {token: number for number, token in enumerate(names)}, list(ranks)


def _parts(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The tokens of a word by byte-pair encoding: the earliest merge first, until none fits."""
    parts = [*word[:-1], word[-1] + _LAST]
    while True:
        fitting = [(ranks[pair], place) for place, pair in enumerate(pairwise(parts)) if pair in ranks]
        if not fitting:
            return parts
        place = min(fitting)[1]
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def build_text_encoder(tokenizer: Any, seed: int = 0) -> Any:
    """A `CLIPTextModel` with 64 channels and 2 layers over the tokens of `tokenizer`; random weights, the same for the same seed.

    Its states tell words apart: those of two colours at one place have a cosine similarity near zero.
    """
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        projection_dim=64,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = CLIPTextModel(config).eval()
        # As initialised, the layers drown the embeddings, and any two words come out alike (cosine 0.9): nothing would train
        # them apart again. A word weighs most, its place a little.
        embeddings = encoder.get_input_embeddings(), encoder.embeddings.position_embedding
        for embedding, deviation in zip(embeddings, (1.0, 0.3), strict=True):
            torch.nn.init.normal_(embedding.weight, std=deviation)
    return encoder


def _words_of(captions: Iterable[str]) -> set[str]:
    return {word for caption in captions for word in caption.lower().split() if word.isascii() and word.isalpha()}
