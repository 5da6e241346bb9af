"""The lengths of texts, counted by a tokenizer or estimated from characters."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from cdcsync.documents.chunks.lengths import Lengths, estimate

WORDS = "the quick brown fox"


def tokenizer() -> Tokenizer:
    """Return a tokenizer of words that cuts and pads texts."""
    made = Tokenizer(models.WordLevel({word: at for at, word in enumerate([*WORDS.split(), "?"])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.enable_truncation(2)
    made.enable_padding(length=8)
    return made


def test_a_tokenizer_counts_whole_texts_without_padding() -> None:
    assert Lengths(tokenizer().to_str()).of(["", "fox", WORDS, f"{WORDS} {WORDS}"]) == [0, 1, 4, 8]


@pytest.mark.parametrize("tokenizer_json", [None, "not a tokenizer", "{}"])
def test_without_a_usable_tokenizer_characters_are_counted(tokenizer_json: str | None) -> None:
    texts = ["", "fox", WORDS * 100]
    lengths = Lengths(tokenizer_json).of(texts)
    assert lengths == [estimate(text) for text in texts]
    assert lengths == sorted(lengths)
    assert lengths[0] > 0
