"""Partitions that come, go and are emptied: with `publish_via_partition_root` the stream tells none of it.

    leaves as they are ─► compared with those that are stored ─► requests for what that did to the rows

A partition that was attached, or created, brings rows that were never sent: those within its bounds are read. One that
was detached, dropped, truncated or rewritten may have taken rows along: the source is asked which of the index's keys
it still has. What is known of the leaves commits together with the requests.

Source: PostgreSQL, "Table Partitioning"; src/backend/replication/pgoutput/pgoutput.c (pgoutput_truncate leaves
partitions out when their root is published).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
import structlog

from cdcsync.config import Config
from cdcsync.crashpoints import crash_point
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, Session, speaking_of
from cdcsync.target.registry import Partitions, Registry
from cdcsync.target.requests import Requests

log = structlog.get_logger()


class Leaf(msgspec.Struct, frozen=True):
    """A partition that holds rows.

    :ivar file: its relfilenode, which TRUNCATE changes, and so does whatever rewrites it.
    :ivar attached: the transactions that attached it and its ancestors.
    :ivar bounds: the condition that its rows fulfil; None where it takes all.
    """

    file: int
    attached: str
    bounds: str | None


async def follow_partitions(source: Connection, target: Session, config: Config, specs: Sequence[IndexSpec]) -> None:
    """Ask for the backfills that changes of the tables' partitions call for since the last time.

    :raises SourceUnavailable, TargetUnavailable: a server is away; nothing is forgotten.
    """
    with speaking_of("source"):
        leaves = await read_leaves(source, [spec.table_oid for spec in specs])
    for spec in specs:
        if spec.table_oid in leaves:
            with speaking_of("target", where=f"index {spec.name}"):
                await _follow(await target.connection(), config.target.schema, spec.name, leaves[spec.table_oid])


async def read_leaves(source: Connection, tables: Sequence[int]) -> dict[int, dict[int, Leaf]]:
    """Return the leaves of those tables (OIDs) that are partitioned, by OID."""
    cursor = await source.execute(
        """
        SELECT root.oid::int8, leaf.oid::int8, leaf.relfilenode::int8,
               (SELECT string_agg(i.xmin::text, ' ') FROM pg_partition_ancestors(leaf.oid) AS a
                JOIN pg_inherits AS i ON i.inhrelid = a.relid),
               pg_get_partition_constraintdef(leaf.oid)
        FROM pg_class AS root LEFT JOIN LATERAL (
            SELECT c.oid, c.relfilenode FROM pg_partition_tree(root.oid) AS p JOIN pg_class AS c ON c.oid = p.relid
            WHERE c.relkind <> 'p'
        ) AS leaf ON true
        WHERE root.oid = ANY(%s::int8[]::oid[]) AND root.relkind = 'p'
        """,
        [list(tables)],
    )
    leaves: dict[int, dict[int, Leaf]] = {}
    for root, leaf, file, attached, bounds in await cursor.fetchall():
        found = leaves.setdefault(root, {})
        if leaf is not None:
            found[leaf] = Leaf(file, attached, bounds)
    return leaves


async def _follow(target: Connection, schema: str, index: str, leaves: Mapping[int, Leaf]) -> None:
    registry = Registry(schema)
    known: Partitions = {str(oid): (leaf.file, leaf.attached) for oid, leaf in leaves.items()}
    async with target.transaction():
        entry = await registry.find(target, index, lock=True)
        if entry is None or entry.partitions == known:
            return
        if entry.partitions is not None:
            await _request(target, Requests(schema), index, entry.partitions, leaves)
        await registry.note_partitions(target, index, known)
        crash_point("partitions written")
    crash_point("partitions committed")


async def _request(
    target: Connection,
    requests: Requests,
    index: str,
    before: Partitions,
    leaves: Mapping[int, Leaf],
) -> None:
    come = [leaf for oid, leaf in leaves.items() if (before.get(str(oid)) or (0, ""))[1] != leaf.attached]
    left = [oid for oid, (file, attached) in before.items() if _other(leaves.get(int(oid)), file, attached)]
    if come:
        bounds = [f"({leaf.bounds})" for leaf in come if leaf.bounds is not None]
        filter_ = " OR ".join(bounds) if len(bounds) == len(come) else None
        await requests.add(target, index, "replay", rewrite=False, filter_=filter_)
    if left:
        # Not a resync: whether an index is whole is told by its last load, which this is none.
        await requests.add(target, index, "replay", rewrite=False, filter_=None, phase="orphans")
    log.info("partitions_changed", index=index, come=len(come), left=len(left))


def _other(leaf: Leaf | None, file: object, attached: object) -> bool:
    return leaf is None or leaf.file != file or leaf.attached != attached
