"""Which description of a table holds, where transactions are streamed before they commit.

A server describes a table before its first change and after each change of its columns, and then relies on what it has
sent. The description within a streamed transaction is replayed at the commit. By then a newer one may have come with
another transaction, and some servers do not send that again. So what holds after a commit is what came last, among the
descriptions that came by themselves and those of transactions that have committed.

Source: PostgreSQL, src/backend/replication/pgoutput/pgoutput.c (`schema_sent`, `streamed_txns`).
"""

from __future__ import annotations

from cdcsync.pgoutput.messages import Relation


class Descriptions:
    """The newest description of each table on one connection."""

    def __init__(self) -> None:
        self._count = 0
        self._newest: dict[int, tuple[int, Relation]] = {}
        self._overtaken: set[int] = set()

    def arrive(self) -> int:
        """Return the number of a description that comes now: later ones have higher numbers."""
        self._count += 1
        return self._count

    def take(self, relation: Relation, number: int) -> None:
        """Note a description that takes effect now, which is when its transaction is replayed if it was streamed."""
        newest = self._newest.get(relation.oid)
        if newest is not None and newest[0] > number:
            self._overtaken.add(relation.oid)
        else:
            self._newest[relation.oid] = number, relation
            self._overtaken.discard(relation.oid)

    def overtaken(self) -> list[Relation]:
        """Return, once, the descriptions that hold in place of older ones which have taken effect since."""
        oids, self._overtaken = sorted(self._overtaken), set()
        return [self._newest[oid][1] for oid in oids]
