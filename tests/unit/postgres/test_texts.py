"""Which strings are texts of PostgreSQL, and what is stored in place of those that are not."""

from __future__ import annotations

import pytest

from cdcsync.postgres.texts import is_text, storable


@pytest.mark.parametrize("text", ["", "bob", "a\nb\x1b\x7f", "€ \U0001f600", "\ud7ff\ue000\uffff"])
def test_a_text_is_stored_as_it_is(text: str) -> None:
    assert is_text(text)
    assert storable(text) == text


@pytest.mark.parametrize(
    ("string", "stored"), [("bo\0b", "bo?b"), ("\ud83d", "?"), ("a\udcff\ude00", "a??"), ("\0", "?")]
)
def test_what_no_text_can_hold_is_stored_as_question_marks(string: str, stored: str) -> None:
    assert not is_text(string)
    assert storable(string) == stored
    assert is_text(stored)
