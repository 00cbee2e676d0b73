"""The words that the tiny models know, and the tokenizer that they share: one token per word, saved as a fast tokenizer."""

from __future__ import annotations

from typing import Any, Literal

from videofactory.pipelines.sample.backgrounds import BACKGROUNDS
from videofactory.pipelines.sample.shapes import COLOURS, FORMS

PAD, BEGIN, UNKNOWN, IMAGE, END = "<pad>", "<s>", "<unk>", "<image>", "</s>"

_OTHER_WORDS = (
    "a an in front of background on before over there is shape something object picture photo image video frame showing shows the "
    "with and moving moves across left right up down big small at"
)


def words() -> list[str]:
    """The whole vocabulary, in the order of token ids.

    The end token comes last: open_clip pools the text at the position of the highest id.
    """
    named = " ".join(BACKGROUNDS.values()).split()
    plain = sorted({*COLOURS, *FORMS, *named, *_OTHER_WORDS.split()})
    return [PAD, BEGIN, UNKNOWN, *plain, IMAGE, END]


def build_tokenizer(kind: Literal["captioner", "embedder"]) -> Any:
    """The tokenizer, as transformers saves and loads it.

    A captioner's puts the begin token before a prompt, as OPT's does; an embedder's puts begin and end around a text, as CLIP's does.
    """
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.normalizers import Lowercase
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    ids = {word: number for number, word in enumerate(words())}
    tokenizer = Tokenizer(WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.normalizer = Lowercase()
    tokenizer.pre_tokenizer = Whitespace()
    template = f"{BEGIN} $A" if kind == "captioner" else f"{BEGIN} $A {END}"
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=[(BEGIN, ids[BEGIN]), (END, ids[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        unk_token=UNKNOWN,
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )
