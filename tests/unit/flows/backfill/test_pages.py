"""How large the next page of a backfill is to be, and what is known of it before it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from cdcsync.flows.backfill.pace import BESIDE_LIVE_BYTES, BESIDE_LIVE_ROWS, next_limit
from cdcsync.flows.backfill.pages import PAGE_BYTES, Page, Pages
from cdcsync.model.rows import Key, Row
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.source.reads import Page as Read
from tests.support.indexes import make_spec


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
    assert next_limit(1_000, 1_000, page(rows, bytes_each), beside_live=BESIDE_LIVE_ROWS) == wanted


@pytest.mark.anyio
async def test_before_a_page_is_read_it_is_said_what_it_will_see(monkeypatch: pytest.MonkeyPatch) -> None:
    """So a late stream's old transactions are not remembered until the page's mark arrives."""
    deliveries = Deliveries()
    deliveries.record()
    early, late = Snapshot(100, 100, frozenset()), Snapshot(103, 103, frozenset())

    class Source:
        async def connection(self) -> None:
            return None

    class Table:
        async def by_keys(self, _connection: object, _keys: Sequence[Key]) -> Read:
            for xid in (*range(10, 100), 101):
                deliveries.touched((str(xid),), xid)
            return Read(late, [])

    async def now(_connection: object) -> Snapshot:
        return early

    monkeypatch.setattr("cdcsync.flows.backfill.pages.current_snapshot", now)
    spec = make_spec()
    pages = Pages(cast(Any, Source()), "cdcsync", spec, cast(Any, Table()), deliveries, deliveries.forget_seen)

    read = await pages.of_keys([("1",)])

    assert read.snapshot == late
    assert deliveries.size == 1
    assert deliveries.hides(("101",), early)
