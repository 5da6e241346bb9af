"""Waits for transactions of others, which may last for as long as somebody forgets a transaction.

If one lasts, the log says whose transactions these are, and so do `/readyz` and `status` until it is over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, MutableMapping
from types import TracebackType
from typing import Self, TypeAlias

import anyio

from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.source.transactions import blockers, current_snapshot

REPORT_S = 10.0
"""How often a wait is told of, and after how long for the first time."""

POLL_S = 0.5
"""How often it is looked whether transactions are over."""

NAMED = 3
"""How many transactions are named to people; the log has all."""

Note: TypeAlias = Callable[[str | None], None]
"""Takes what is waited for, anew each time that it is told, and None once that is over."""


class Blocked:
    """A wait that begins and ends with a `with` block."""

    def __init__(self, what: str, note: Note, log: Callable[[list[str]], None], *, surely: bool = True) -> None:
        """Begin nothing yet.

        :param what: the beginning of a sentence that goes on with whose transactions are in the way.
        :param log: takes all of them, as an operator knows them.
        :param surely: whether they are what is waited for, so that it is told how to end them.
        """
        self._what = what
        self._note = note
        self._log = log
        self._surely = surely
        self._told_at = 0.0

    def __enter__(self) -> Self:
        self._told_at = anyio.current_time()
        return self

    def __exit__(self, _: type[BaseException] | None, __: BaseException | None, ___: TracebackType | None) -> None:
        self._note(None)

    async def due(self) -> None:
        """Return when it is time to tell of the wait, for those that do not look by themselves."""
        await anyio.sleep_until(self._told_at + REPORT_S)

    async def by(self, connection: Connection, xids: Iterable[int]) -> None:
        """Tell of the wait for these transactions, if it is time for that."""
        if anyio.current_time() - self._told_at < REPORT_S:
            return
        self._told_at = anyio.current_time()
        found = await blockers(connection, xids)
        self._log([str(one) for one in found])
        named = [f"{one}, which ends with {one.ending}" if self._surely else str(one) for one in found[:NAMED]]
        more = [f"{len(found) - NAMED} more"] if len(found) > NAMED else []
        self._note(f"{self._what} {'; '.join([*named, *more]) or 'transactions that no session shows'}")


async def outlast(connection: Connection, xids: Iterable[int], blocked: Blocked) -> None:
    """Return once transactions of the source are over.

    :raises SourceUnavailable: it does not answer.
    """
    with speaking_of("source"), blocked:
        while left := [xid for xid in xids if not (await current_snapshot(connection)).sees(xid)]:
            await blocked.by(connection, left)
            await anyio.sleep(POLL_S)


def noted(problems: MutableMapping[str, str], index: str) -> Note:
    """Return what keeps a wait among the problems of an index."""

    def note(why: str | None) -> None:
        if why is None:
            problems.pop(index, None)
        else:
            problems[index] = why

    return note
