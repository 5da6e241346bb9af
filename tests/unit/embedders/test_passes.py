"""The texts of each forward pass."""

from __future__ import annotations

from cdcsync.embedders.passes import passes


def test_a_pass_has_texts_of_like_length_and_no_more_tokens_than_it_may() -> None:
    lengths = [5, 100, 7, 90, 300, 6]

    assert list(passes(lengths, 3, 200)) == [[4], [1, 3], [2, 5, 0]]
    assert list(passes(lengths, 4, None)) == [[4, 1, 3, 2], [5, 0]]
    assert list(passes([], 4, 200)) == []
    assert list(passes([0, 0], 4, 200)) == [[0, 1]]
