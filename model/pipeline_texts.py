"""Prompts as embeddings, and what of a prompt a text encoder does not read."""

import logging
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch

MOST_SHOWN = 80
"""Characters of a prompt that a message shows."""
MOST_REMEMBERED = 1000
"""Prompts of which it is known that their loss was told."""

logger = logging.getLogger(__name__)


def embed(texts: Sequence[str], tokenizer: Any, text_encoder: Any, device: torch.device) -> torch.Tensor:
    """The texts as the text encoder reads them, (texts, T, D); what is longer than T tokens is cut off."""
    length = tokenizer.model_max_length
    tokens = tokenizer(list(texts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    mask = tokens.attention_mask.to(device) if masked else None
    embedded: torch.Tensor = text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
    return embedded


def loss(text: str, tokenizer: Any) -> str | None:
    """What the text encoder does not read of a text, as a message; `None` where it reads everything."""
    length = tokenizer.model_max_length
    whole = tokenizer(text, verbose=False).input_ids
    if len(whole) <= length:
        return None
    # The end token takes the last place, so the first token that is lost is the one before it.
    lost = tokenizer.decode(whole[length - 1 : -1])
    return (
        f"the prompt {shortened(text)!r} has {len(whole)} tokens, of which {length} are read; "
        f"the last {len(whole) - length} are left out: {shortened(lost)!r}"
    )


class LossWarnings:
    """Warns of texts that are too long, of each once, as long as it is among the last `MOST_REMEMBERED` that were."""

    def __init__(self) -> None:
        # A service makes videos of ever new prompts for months.
        self._told: deque[int] = deque(maxlen=MOST_REMEMBERED)

    def __len__(self) -> int:
        """How many texts are remembered."""
        return len(self._told)

    def tell(self, texts: Sequence[str], tokenizer: Any) -> None:
        """Warn of what the text encoder does not read of these texts."""
        for text in texts:
            if hash(text) not in self._told and (message := loss(text, tokenizer)):
                self._told.append(hash(text))
                logger.warning("%s", message)


def shortened(text: str) -> str:
    """`text` as one line of at most `MOST_SHOWN` characters."""
    line = " ".join(text.split())
    return line if len(line) <= MOST_SHOWN else line[: MOST_SHOWN - 1].rstrip() + "…"
