"""How many tokens texts have, for those who put texts of like length together."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from cdcsync.documents.chunks.sizes import CHARACTERS_PER_TOKEN

TOKENIZERS = 4
"""Tokenizers that are kept: hardly anybody runs more models than this in one process."""


class Lengths:
    """Counts tokens without special ones: of the model's own tokenizer where it is known, else by characters.

    :param tokenizer_json: the model's `tokenizer.json`; `None` where it has none.
    """

    def __init__(self, tokenizer_json: str | None) -> None:
        self._json = tokenizer_json

    def of(self, texts: Sequence[str]) -> list[int]:
        """Return each text's number of tokens. Blocks: some 20,000 short texts take a second of one processor."""
        tokenizer = None if self._json is None else _tokenizer(self._json)
        if tokenizer is None:
            return [estimate(text) for text in texts]
        return [len(one.ids) for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def estimate(text: str) -> int:
    """Return about how many tokens a text has, at once."""
    return 1 + len(text) // CHARACTERS_PER_TOKEN


@lru_cache(maxsize=TOKENIZERS)
def _tokenizer(tokenizer_json: str) -> Any:
    """Return the tokenizer; None where the package that reads it is not installed, or it cannot be read."""
    # Unset, every process that we start later is warned about; set, tokenizing stays parallel.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        from tokenizers import Tokenizer
    except ImportError:
        return None
    try:
        tokenizer = Tokenizer.from_str(tokenizer_json)
    except Exception:  # the binding raises bare Exception for what it cannot parse
        return None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
