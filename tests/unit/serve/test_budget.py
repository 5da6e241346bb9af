"""An agent's answers within its budget."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cdcsync.serve.budget import CUT, cut_answer, cut_document, tokens
from cdcsync.serve.messages import Answer, Document, Found


def answer(*hits: Found) -> Answer:
    return Answer("tickets", list(hits), "0/1", 0.0)


def hit(number: int, content: str, **columns: Any) -> Found:
    return Found({"id": number}, columns, content, 0.5, 0)


def test_what_fits_is_left_as_it_is() -> None:
    whole = answer(*(hit(number, "a text", status="open", size=3) for number in range(8)))
    assert cut_answer(whole, 6_000) == whole


@pytest.mark.parametrize("value", ["a" * 100_000, "\n" * 100_000, {"text": ["é" * 100_000]}, ["a"] * 30_000])
def test_a_long_column_is_cut_and_displaces_no_other_hit(value: Any) -> None:
    cut = cut_answer(answer(*(hit(number, "the printer of room 7", notes=value) for number in range(8))), 2_000)
    assert [one.content for one in cut.hits] == ["the printer of room 7"] * 8
    assert all(one.columns["notes"].endswith(CUT) for one in cut.hits)
    assert tokens(cut.hits) <= 2_000
    assert cut.left_out == 0


@pytest.mark.parametrize("text", ["a" * 100_000, '"' * 100_000, "é" * 100_000, "\0" * 100_000])
@pytest.mark.parametrize("columns", [0, 1, 100])
def test_the_first_hit_is_cut_rather_than_left_out(text: str, columns: int) -> None:
    first = hit(1, text, **{f"column_{number}": text for number in range(columns)})
    cut = cut_answer(answer(first, first), 3_000)
    assert cut.left_out == 1
    assert cut.hits[0].key == {"id": 1}
    assert cut.hits[0].content.endswith(CUT)
    assert len(cut.hits[0].content) > 100
    assert tokens(cut.hits) <= 3_010


def test_chunks_that_were_not_read_are_left_out_too() -> None:
    document = Document("tickets", {"id": 1}, {}, ["a" * 3_000] * 9, '"mark"', left_out=5)
    assert cut_document(document, 2_000).left_out == 9 - 2 + 5


@pytest.mark.parametrize(
    ("chunks", "kept"), [(["a" * 100_000], 1), (["a" * 1_000] * 3, 3), (["a" * 3_000] * 9, 2), ([], 0)]
)
def test_a_document_counts_with_its_columns(chunks: list[str], kept: int) -> None:
    document = Document("tickets", {"id": 1}, {"notes": "b" * 100_000, "status": "open"}, chunks, '"mark"')
    cut = cut_document(document, 2_000)
    assert (len(cut.chunks), cut.left_out) == (kept, len(chunks) - kept)
    assert cut.columns["status"] == "open"
    assert tokens(cut) <= 2_010
    assert msgspec.structs.replace(cut, columns={}, chunks=[], left_out=0) == msgspec.structs.replace(
        document, columns={}, chunks=[]
    )
