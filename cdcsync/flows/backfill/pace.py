"""How large a page may be, and how soon the next one may follow."""

from __future__ import annotations

from collections.abc import Callable

import anyio

from cdcsync.flows.backfill.pages import PAGE_BYTES, Page

BESIDE_LIVE_ROWS = 32
BESIDE_LIVE_BYTES = 128 * 1024
"""While changes come in, pages are this small, and one at a time: a change waits for the page that is being applied,
some 5 ms, which is about as long as it takes itself."""

FIRST_PAGE_ROWS = 100
"""The first page is small: nobody knows yet how large the rows are."""


def next_limit(limit: int, most: int, page: Page, *, beside_live: bool = False) -> int:
    """Return how many rows the next page should have: twice as many, as long as their bytes allow.

    :param beside_live: whether changes come in, which are not to wait for a page.
    """
    size = sum(
        len(value) for _, row in page.entries if isinstance(row, tuple) for value in row if isinstance(value, str)
    )
    fitting = len(page.entries) * (BESIDE_LIVE_BYTES if beside_live else PAGE_BYTES) // size if size else most
    return max(1, min(most, BESIDE_LIVE_ROWS if beside_live else limit * 2, fitting))


class Pace:
    """Spreads rows evenly over time."""

    def __init__(self, rows_per_s: Callable[[], int | None]) -> None:
        self._rows_per_s = rows_per_s
        self._due = anyio.current_time()

    @property
    def rows_per_s(self) -> int | None:
        """The most rows a second just now; None for any number."""
        return self._rows_per_s()

    def left_s(self, rows: int) -> float:
        """Note that rows were read and return how long to wait before the next ones, in seconds."""
        rows_per_s = self.rows_per_s
        if rows_per_s is None:
            return 0.0
        now = anyio.current_time()
        self._due = max(self._due, now - 1.0) + rows / rows_per_s
        return max(0.0, self._due - now)
