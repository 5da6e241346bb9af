"""Which documents the changes of related rows concern: a part of preparing, for indexes of several tables only.

    touched values ─► keys of documents: those values, or asked of the source ─► rows to read again
                 └──► more of them than one batch takes, or a table that is locked: a request of the backfill engine,
                      committed with the batch

The source is asked under a snapshot that sees what touched the rows. It may see more: that is still to come, and
concerns the document once more.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import msgspec

from cdcsync.flows.follow.sight import PutOff, Sight, snapshot_only
from cdcsync.model.batch import IndexChanges
from cdcsync.model.changeset import Rebuild
from cdcsync.model.links import Link, Touch, Values
from cdcsync.model.rows import Delete, Key
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Deliveries, Snapshot
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.source.related import MOST_FILTERED, LookUps

MOST_OF_ONE = 1_000
"""Documents of one changed row that are rebuilt with its batch: reading them takes some 50 ms. If there are more, a
request rebuilds them page by page, behind live changes."""

MOST_OF_A_BATCH = 5_000
"""The same for all changed rows of a batch together, as many as a batch has rows."""

VALUES_AT_FIRST = 20
"""Changed rows that are asked for in the first query, while nobody knows how many documents each has."""

VALUES_AT_ONCE = 500
"""Changed rows that are asked for in one query at most."""

KEYS_AT_ONCE = 10_000
"""The target size of such a query's result, estimated from the query before it: some 3 MB."""


class Concerned(msgspec.Struct, frozen=True):
    """The documents that the changes of related rows in a batch concern.

    :ivar documents: the keys to read again, with what touched them last.
    :ivar rebuilds: requests for the documents that are too many for a batch.
    """

    documents: dict[Key, Touch]
    rebuilds: list[Rebuild]


class RelatedChanges:
    """Finds the documents of one index that changes of related rows concern."""

    def __init__(self, spec: IndexSpec, source: Session, deliveries: Deliveries, sight: Sight) -> None:
        self._spec = spec
        self._sight = sight
        self._source = source
        self._deliveries = deliveries
        self._links = spec.links
        self._look_ups = LookUps(spec.shape, self._links, spec.facts)

    async def concerned(self, changes: IndexChanges) -> Concerned:
        """Return what the touches of a batch ask for.

        :raises SourceUnavailable: nothing is lost by asking again.
        """
        documents: dict[Key, Touch] = {}

        def touched(key: Key, touch: Touch) -> None:
            if (other := documents.get(key)) is None or other.lsn < touch.lsn:
                documents[key] = touch

        if changes.truncated:
            # What was touched before is asked for no more, but rows that come in later are read as of then.
            await self._sight.applied(changes.touched_by)
        rebuilds = [await self._rebuild(changes, self._links[place], None) for place in changes.emptied]
        by_link: dict[int, dict[Values, Touch]] = {}
        for (place, values), touch in changes.touched.items():
            by_link.setdefault(place, {})[values] = touch
        for place, touches in by_link.items():
            link, left = self._links[place], list(touches)
            too_many: list[Values] = []
            while link.key and left and len(documents) < MOST_OF_A_BATCH:
                values = left.pop()
                key = tuple([values[at] for at in link.key])
                # A document that the batch deletes need not be read: one that has its key later is still to come.
                if not isinstance(changes.live.get(key), Delete):
                    touched(key, touches[values])
            at_once = VALUES_AT_FIRST
            # If a condition names too many values, all documents are rebuilt, and there is nothing more to ask.
            while left and len(documents) < MOST_OF_A_BATCH and len(too_many) <= MOST_FILTERED:
                try:
                    found = await self._keys(link, left[:at_once], changes.touched_by)
                except PutOff:
                    break
                left = left[at_once:]
                for values, keys in found.items():
                    if len(keys) > MOST_OF_ONE or len(documents) + len(keys) > MOST_OF_A_BATCH:
                        too_many.append(values)
                    else:
                        for key in keys:
                            touched(key, touches[values])
                keys_found = sum(map(len, found.values()))
                at_once = max(1, min(VALUES_AT_ONCE, 4 * at_once, at_once * KEYS_AT_ONCE // max(1, keys_found)))
            if too_many or left:
                condition = await self._condition(link, [*too_many, *left])
                rebuilds.append(await self._rebuild(changes, link, condition))
        return Concerned(documents, rebuilds)

    async def _rebuild(self, changes: IndexChanges, link: Link, condition: str | None) -> Rebuild:
        try:
            await self._sight.read(changes.touched_by, snapshot_only)
        except PutOff:
            return Rebuild(link.relation, condition)
        # What a load reads from here on is as the changes left it.
        return Rebuild(link.relation, condition, read=self._deliveries.read_to)

    async def _keys(self, link: Link, values: Sequence[Values], xids: Collection[int]) -> dict[Values, list[Key]]:
        async def read(connection: Connection) -> tuple[Snapshot, dict[Values, list[Key]]]:
            return await self._look_ups.keys(connection, link, values, MOST_OF_ONE + 1)

        return await self._sight.read(xids, read)

    async def _condition(self, link: Link, values: Sequence[Values]) -> str | None:
        with speaking_of("source", where=str(link.table), index=self._spec.name):
            return await self._look_ups.condition(await self._source.connection(), link, values)
