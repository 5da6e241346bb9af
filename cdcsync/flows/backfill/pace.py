"""How large a page may be, and how soon the next one may follow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import anyio

from cdcsync.flows.backfill.pages import PAGE_BYTES, Page

BESIDE_LIVE_ROWS = 32
BESIDE_LIVE_MOST_ROWS = 256
BESIDE_LIVE_BYTES = 128 * 1024
"""While changes come in, pages are small, and one at a time: a change waits for the page that is being applied. They
have at least so many rows, because most of such a page's time is that of its transaction. How many within these bounds
is measured (`Fit`)."""

REMEMBERED = 16
"""The batches of changes among which the one that took least says how long a change takes. Others shared the servers
with the reading of a page: to go by them, too, would make pages larger, and these changes slower."""

GROWTH = 1.25
"""A page has at most so many times as many rows as the one before it: what took long for another reason does not decide
alone."""

FIRST_PAGE_ROWS = 100
"""The first page is small: nobody knows yet how large the rows are."""


class Fit:
    """How large a page may be while changes come in: it takes about as long to apply as a change takes by itself.

    So a change waits for half of that time on average, and load and changes take turns, however fast the servers are.
    """

    def __init__(self) -> None:
        self.rows = BESIDE_LIVE_ROWS
        self._changes_s: deque[float] = deque(maxlen=REMEMBERED)

    def change_took(self, seconds: float) -> None:
        """Note how long a batch of changes without a page took to apply."""
        self._changes_s.append(seconds)

    def page_took(self, rows: int, seconds: float) -> None:
        """Note how long so many rows of a page took to apply, with no change among them."""
        if self._changes_s:
            fitting = min(rows * min(self._changes_s) / max(seconds, 1e-6), self.rows * GROWTH)
            self.rows = round(min(max(fitting, self.rows / 2, BESIDE_LIVE_ROWS), BESIDE_LIVE_MOST_ROWS))


def next_limit(limit: int, most: int, page: Page, *, beside_live: int | None = None) -> int:
    """Return how many rows the next page should have: twice as many, as long as their bytes allow.

    :param beside_live: while changes come in, how many rows they may have to wait for.
    """
    size = sum(
        len(value) for _, row in page.entries if isinstance(row, tuple) for value in row if isinstance(value, str)
    )
    fitting = len(page.entries) * (PAGE_BYTES if beside_live is None else BESIDE_LIVE_BYTES) // size if size else most
    return max(1, min(most, limit * 2 if beside_live is None else beside_live, fitting))


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
