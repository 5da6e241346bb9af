"""The outline of code: the rank of each line break, and the way back to the code as written."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.documents.chunks.outline import Outline


def ranks(code: str) -> list[int]:
    """Return the rank of each break, from the first to the last."""
    return [len(found) for found in re.findall(r"\n+", Outline(code).text)]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("a = 1", []),
        ("a = 1\nb = 2", [2]),
        ("a = 1\n\nb = 2", [7]),
        ("def f():\n    a\n    b\n\n    c\nd", [1, 1, 6, 3]),
        ("class C:\n  def f():\n    a\n  def g():\n    b", [1, 1, 2, 1]),
        # A line that continues a statement is kept with it, whatever stands before.
        ("if (a) {\n  b\n\n}\n\nelse {\n  c\n}", [1, 1, 1, 1, 1]),
        # Tabs reach every fourth column, and Windows' line ends are one break.
        ("f:\r\n\ta\r\n    b\r\n\r\ng:", [1, 1, 7]),
    ],
)
def test_a_break_ranks_by_blank_lines_and_by_indentation(code: str, expected: list[int]) -> None:
    assert ranks(code) == expected


def test_levels_below_the_deepest_rank_alike() -> None:
    nested = "a\n" + "".join(f"{'  ' * depth}b\n\n{'  ' * depth}c\n" for depth in range(1, 6))
    assert [rank for rank in ranks(nested) if rank > 3] == [6, 5, 4, 4, 4]


@given(st.text(st.sampled_from("ab(){} \t\r\n"), max_size=60), st.data())
def test_every_piece_between_line_ends_is_found_again_in_the_code(code: str, data: st.DataObject) -> None:
    outline = Outline(code)
    kept = [at for at, character in enumerate(outline.text) if character != "\n"]
    if not kept:
        return
    start, end = sorted((data.draw(st.sampled_from(kept)), data.draw(st.sampled_from(kept))))
    original = outline.original(start, end + 1)
    assert original in code
    assert re.sub(r"\s+", "", original) == re.sub(r"\s+", "", outline.text[start : end + 1])
