"""The requests that an index needs after its fingerprint changed, committed together with the new fingerprint.

    fingerprint as stored ─┐
                           ├─► difference ─► requests and the new fingerprint, in one transaction
    catalog as it is now ──┘

It happens at every start (`start.set_up_indexes`) and while the worker runs (`watch`). A crash before the commit
finds the same difference again.

Source: PostgreSQL, "Table Partitioning"; src/backend/replication/pgoutput/pgoutput.c (pgoutput_truncate leaves
partitions out if their root is published).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import structlog

from cdcsync.documents.related import columns_read
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import Catalog
from cdcsync.source.fingerprints import Difference, Fingerprint, difference, fingerprint_of
from cdcsync.source.relations import Partition
from cdcsync.target.entries import Entry
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History
from cdcsync.target.requests.submission import Requests

log = structlog.get_logger()


def stored_fingerprint(entry: Entry) -> Fingerprint | None:
    """Return the fingerprint that an index's row holds; None if an earlier version wrote the row."""
    if entry.made_of is None or entry.sent_by is None:
        return None
    return msgspec.convert({"made_of": entry.made_of, "sent_by": entry.sent_by}, Fingerprint)


def as_followed(catalog: Catalog, spec: IndexSpec) -> Catalog:
    """Return the catalog as an index sees it: of many equal tables, with those that it follows."""
    return catalog.limited(spec.shape.table, spec.members) if spec.shape.many else catalog


def present_fingerprint(catalog: Catalog, spec: IndexSpec) -> Fingerprint | None:
    """Return the fingerprint of an index as the catalog has it; None if a table of it is gone."""
    catalog = as_followed(catalog, spec)
    table = catalog.tables.get(spec.shape.table)
    if table is None or any(name not in catalog.tables for name in spec.tables):
        return None
    related = columns_read(spec.documents.related)
    table = table.keyed_by(spec.shape.key)
    return fingerprint_of(catalog, table, spec.shape.own, spec.where, related, spec.config.expressions)


def difference_of(catalog: Catalog, spec: IndexSpec, entry: Entry, now: Fingerprint) -> Difference:
    """Return what has to be done for an index whose fingerprint is `now`, and is stored as it was before."""
    catalog = as_followed(catalog, spec)
    tables = [catalog.tables[name] for name in spec.tables]
    return difference(stored_fingerprint(entry), now, catalog.tables[spec.shape.table], tables)


async def note_fingerprint(
    target: Connection, schema: str, index: str, fingerprint: Fingerprint, *, before: Entry | None = None
) -> bool:
    """Store an index's fingerprint in the caller's transaction.

    :param before: only if the stored one is still what it is there; returns whether it was.
    """
    stored = msgspec.to_builtins(fingerprint)
    return await Registry(schema).note_fingerprint(target, index, stored["made_of"], stored["sent_by"], before=before)


async def ask_for(target: Connection, schema: str, index: str, found: Difference) -> None:
    """Ask for what a difference needs short of reading the table again, in the caller's transaction.

    What a load under way has read may be wrong by then: the comparison follows that load.
    """
    requests = Requests(schema)
    if found.compare:
        load = await History(schema).last_load(target, index)
        if load is None or load.ended or load.started_at is not None:
            await requests.compare(target, index)
        log.warning("index_doubted", index=index, because=found.compare)
    if found.arrived:
        await requests.add(target, index, "replay", rewrite=False, filter_=_within(found.arrived), owed=True)
    if found.left:
        # Not a resync: whether an index is whole is told by its last load, and this is not a load.
        await requests.add(target, index, "replay", rewrite=False, filter_=None, phase="orphans", owed=True)
    if found.arrived or found.left:
        log.info("partitions_changed", index=index, arrived=len(found.arrived), left=found.left)


def _within(partitions: Sequence[Partition]) -> str | None:
    """Return the condition that rows of these partitions fulfil; None if one of them takes all rows."""
    bounds = [f"({one.bounds})" for one in partitions if one.bounds is not None]
    return " OR ".join(bounds) if len(bounds) == len(partitions) else None
