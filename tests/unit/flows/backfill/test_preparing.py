"""Pages of a load that are prepared before their mark: how large they are, and which are left to apply."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from cdcsync.config import Chunking
from cdcsync.documents.chunks import make_chunker
from cdcsync.flows.backfill.preparing import LEAST_ROWS, PAGE_S, QUICK_S, PagePreparer
from tests.support.indexes import make_spec

pytestmark = pytest.mark.anyio

SPEC = make_spec(carried={}, chunking=Chunking(max_tokens=8, overlap_tokens=0))


def preparer(texts_per_s: float, **chunking: Any) -> PagePreparer:
    """Return the preparer of an index whose model takes so many texts a second."""
    dispatcher: Any = SimpleNamespace(texts_within=lambda seconds: seconds * texts_per_s)
    settings = Chunking(max_tokens=8, overlap_tokens=0, **chunking)
    return PagePreparer(SPEC, "cdcsync", make_chunker(settings, None, None), dispatcher)


@pytest.mark.parametrize(
    ("texts_per_s", "rows"),
    [
        (10**6, 2_000),  # as many as were asked for
        (1_000 / PAGE_S, 1_000),
        (LEAST_ROWS / PAGE_S, LEAST_ROWS),
        ((LEAST_ROWS - 1) / PAGE_S, 2_000),  # a model so slow does not keep up in any case
        (0, 2_000),
    ],
)
async def test_a_page_has_as_many_rows_as_the_model_serves_while_it_waits(texts_per_s: float, rows: int) -> None:
    assert preparer(texts_per_s).page_rows(2_000) == rows


async def test_rows_of_several_chunks_make_the_next_pages_smaller() -> None:
    slow = preparer(1_000 / PAGE_S)
    rows = [(str(at), " ".join(f"This is sentence {number} of row {at}." for number in range(9))) for at in range(500)]
    made = await slow.make(None, rows)  # type: ignore[arg-type]
    assert made is not None
    each = sum(map(len, made.chunks)) / len(rows)
    assert each > 2
    assert slow.page_rows(2_000) == 2_000  # fewer would be below the least
    quicker = preparer(10_000 / PAGE_S)
    quicker._texts_per_row = slow._texts_per_row
    assert quicker.page_rows(2_000) == int(10_000 / each) < 2_000


async def test_a_page_whose_texts_take_the_model_too_long_comes_without_vectors() -> None:
    slow = preparer(1 / QUICK_S)
    made = await slow.make(None, [("1", "one two three four. " * 8), ("2", "five six seven eight nine. " * 8)])  # type: ignore[arg-type]
    assert made is not None
    assert made.vectors == {}
    assert [rendering.text[:3] for rendering in made.documents] == ["one", "fiv"]


async def test_documents_that_may_fail_are_left_to_apply() -> None:
    assert await preparer(10**6, max_chunks=2).make(None, [("1", "one two three four. " * 8)]) is None  # type: ignore[arg-type]
