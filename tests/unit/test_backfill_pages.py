"""How large the next page of a backfill is to be."""

from __future__ import annotations

import pytest

from cdcsync.backfill.engine import BESIDE_LIVE_BYTES, BESIDE_LIVE_ROWS, next_limit
from cdcsync.backfill.pages import PAGE_BYTES, Page
from cdcsync.changes import Key, Row
from cdcsync.visibility import Snapshot


def page(rows: int, bytes_each: int) -> Page:
    entries: list[tuple[Key, Row | None]] = [((str(at),), ("x" * bytes_each,)) for at in range(rows)]
    return Page(Snapshot(1, 1, frozenset()), entries, None, False)


@pytest.mark.parametrize(
    ("rows", "bytes_each", "wanted"),
    [
        pytest.param(100, 10, 200, id="small rows: twice as many"),
        pytest.param(600, 10, 1_000, id="never more than was asked for"),
        pytest.param(0, 0, 200, id="an empty page says nothing"),
        pytest.param(100, PAGE_BYTES // 10, 10, id="large rows: as many as fit"),
        pytest.param(4, PAGE_BYTES * 2, 1, id="at least one"),
    ],
)
def test_a_page_grows_until_its_bytes_or_its_rows_are_enough(rows: int, bytes_each: int, wanted: int) -> None:
    assert next_limit(max(rows, 100), 1_000, page(rows, bytes_each)) == wanted


@pytest.mark.parametrize(
    ("rows", "bytes_each", "wanted"),
    [
        pytest.param(100, 10, BESIDE_LIVE_ROWS, id="small rows: few"),
        pytest.param(10, BESIDE_LIVE_BYTES // 5, 5, id="large rows: fewer"),
        pytest.param(1, PAGE_BYTES, 1, id="at least one"),
    ],
)
def test_a_page_is_small_while_changes_come_in(rows: int, bytes_each: int, wanted: int) -> None:
    assert next_limit(1_000, 1_000, page(rows, bytes_each), beside_live=True) == wanted
