"""Texts of others on a terminal."""

from __future__ import annotations

import pytest

from cdcsync.process.terminals import harmless


@pytest.mark.parametrize(
    ("text", "in_one_line", "in_lines"),
    [
        ("plain, Zürich und 東京", "plain, Zürich und 東京", "plain, Zürich und 東京"),
        ("a\x1b[2Jb", "a·[2Jb", "a·[2Jb"),
        ("a\x9b31mb", "a·31mb", "a·31mb"),
        ("a\u202eb", "a·b", "a·b"),
        ("first\nsecond", "first second", "first\nsecond"),
        ("first\r\nsecond", "first second", "first·\nsecond"),
    ],
)
def test_a_character_that_a_terminal_acts_on_is_a_dot(text: str, in_one_line: str, in_lines: str) -> None:
    assert harmless(text) == in_one_line
    assert harmless(text, lines=True) == in_lines
