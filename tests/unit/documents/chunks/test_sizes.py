"""What is known of a text's length without tokenising it: never too little."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import example, given, settings

from cdcsync.documents.chunks.sizes import Sizes
from tests.support.tokenizers import DOCUMENTS, TOKENIZERS, count


@cache
def sizes(kind: str) -> Sizes:
    return Sizes(TOKENIZERS[kind](), "chunking")


@settings(max_examples=300)
@given(text=DOCUMENTS)
@example(text="東" * 99 + "abcdefghijklmnopqrstuvwxyz" * 2)
@example(text="\u0344" * 20)
@example(text="ab\x0bcd " * 9)
@example(text="quick " * 20)
@pytest.mark.parametrize("kind", list(TOKENIZERS))
def test_no_text_passes_for_shorter_than_it_is(kind: str, text: str) -> None:
    assert not sizes(kind).surely_fits(text, count(kind, text) - 1)


@pytest.mark.parametrize("kind", ["minilm", "bpe", "plain bpe", "sparse"])
def test_ordinary_text_within_the_capacity_is_found_to_be_so_without_tokenising(kind: str) -> None:
    text = "The quick brown fox, it's said, jumps over the lazy dog."

    assert sizes(kind).surely_fits(text, len(text) + 1)
    assert sizes("minilm").surely_fits(text, count("minilm", text))
