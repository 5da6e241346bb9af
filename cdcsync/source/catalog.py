"""What the source says of itself: server, slot, publication. Its tables are in `relations`.

Only read here. The statements that create or extend a publication are returned: `run` executes them once every check
has passed.

Source: PostgreSQL, "System Catalogs", "System Views" (pg_replication_slots, pg_publication_tables); "Logical
Replication" (Publication, Generated Column Replication).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import LiteralString, cast

import msgspec
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.lsn import Lsn
from cdcsync.model.visibility import XID_SPAN, Snapshot
from cdcsync.postgres.queries import fetch_one, fetch_row, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.source.relations import Column, Table, read_table

__all__ = [
    "FAILOVER_VERSION",
    "Column",
    "Publication",
    "Published",
    "Server",
    "Slot",
    "Table",
    "blockers",
    "create_publication_statement",
    "current_lsn",
    "current_snapshot",
    "publish_statement",
    "read_publication",
    "read_server",
    "read_slot",
    "read_table",
    "running_transactions",
]


FAILOVER_VERSION = 170000
"""PostgreSQL 17: standbys can have a logical slot too."""

REPLICATION_ROLES = ("rds_replication",)
"""Roles of managed services whose members may replicate without having the attribute themselves."""


class Server(msgspec.Struct, frozen=True):
    """The settings and privileges that replication depends on. The target's are of interest too.

    :ivar started: when the server was started; together with `database` it tells whether two sessions share one.
    """

    version: int
    database: str
    role: str
    in_recovery: bool
    wal_level: str
    wal_sender_timeout_s: float
    max_slots: int
    used_slots: int
    max_senders: int
    used_senders: int
    may_replicate: bool
    may_create: bool
    encoding: str
    started: str = ""
    may_use_temporary: bool = True
    read_only: bool = False

    @property
    def version_text(self) -> str:
        """The version as people write it: 18.6."""
        return f"{self.version // 10000}.{self.version % 10000}"


class Slot(msgspec.Struct, frozen=True):
    """A row of pg_replication_slots."""

    name: str
    plugin: str | None
    database: str | None
    active_pid: int | None
    confirmed_flush: Lsn | None
    restart: Lsn | None
    wal_status: str | None
    retained_bytes: int | None
    safe_bytes: int | None
    failover: bool = False


class Published(msgspec.Struct, frozen=True):
    """How a publication sends one table: which columns, and all rows when `row_filter` is None.

    `listed` says that the publication names these columns; otherwise they follow the table.
    """

    table: QualifiedName
    columns: tuple[str, ...]
    row_filter: str | None
    listed: bool = False
    membership: int | None = None
    """The OID of the table's own row in pg_publication_rel; None where the publication is of all tables or a schema."""


class Publication(msgspec.Struct, frozen=True):
    """A publication; `tables` are those it sends, under the names that the stream uses.

    `generated` says whether it sends stored generated columns of tables without a column list.
    """

    name: str
    all_tables: bool
    owned: bool
    operations: frozenset[str]
    via_root: bool
    tables: dict[QualifiedName, Published]
    generated: bool = False


async def read_server(connection: Connection) -> Server:
    """Return what the server says of itself."""
    row = await fetch_one(
        connection,
        """
        SELECT current_setting('server_version_num')::int, current_database(), current_user, pg_is_in_recovery(),
               current_setting('wal_level'),
               (SELECT setting::float8 / 1000 FROM pg_settings WHERE name = 'wal_sender_timeout'),
               current_setting('max_replication_slots')::int, (SELECT count(*) FROM pg_replication_slots)::int,
               current_setting('max_wal_senders')::int, (SELECT count(*) FROM pg_stat_replication)::int,
               (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user)
                   OR EXISTS (SELECT FROM pg_roles WHERE rolname = ANY(%s) AND pg_has_role(oid, 'USAGE')),
               has_database_privilege(current_database(), 'CREATE'),
               current_setting('server_encoding'), pg_postmaster_start_time()::text,
               has_database_privilege(current_database(), 'TEMPORARY'), current_setting('transaction_read_only')::bool
        """,
        [list(REPLICATION_ROLES)],
    )
    return Server(*row)


async def read_slot(connection: Connection, name: str) -> Slot | None:
    """Return the slot, or None when there is none of that name."""
    row = await fetch_row(
        connection,
        sql.SQL(
            """
            SELECT slot_name, plugin, database, active_pid, confirmed_flush_lsn::text, restart_lsn::text, wal_status,
                   pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                                        ELSE pg_current_wal_lsn() END, restart_lsn)::int8,
                   safe_wal_size, {}
            FROM pg_replication_slots WHERE slot_name = %s
            """
        ).format(sql.SQL("failover" if connection.info.server_version >= FAILOVER_VERSION else "false")),
        [name],
    )
    if row is None:
        return None
    return Slot(
        name=row[0],
        plugin=row[1],
        database=row[2],
        active_pid=row[3],
        confirmed_flush=Lsn.parse(row[4]) if row[4] else None,
        restart=Lsn.parse(row[5]) if row[5] else None,
        wal_status=row[6],
        retained_bytes=row[7],
        safe_bytes=row[8],
        failover=row[9],
    )


async def current_lsn(connection: Connection) -> Lsn:
    """Return the end of the WAL that is written."""
    statement: LiteralString = (
        "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text"
    )
    return Lsn.parse(cast(str, await fetch_value(connection, statement)))


async def current_snapshot(connection: Connection) -> Snapshot:
    """Return which transactions a statement begun now sees."""
    return Snapshot.parse(cast(str, await fetch_value(connection, "SELECT pg_current_snapshot()::text")))


async def running_transactions(connection: Connection) -> frozenset[int]:
    """Return the transactions (64-bit ids) that are open now and may have written.

    A snapshot lists what runs below the newest *finished* id, and leaves out what began after that. So an id is
    drawn and finished first: everything older is below it.
    """
    await connection.execute("SELECT pg_current_xact_id()")
    return (await current_snapshot(connection)).running


async def blockers(connection: Connection, xids: Iterable[int]) -> list[str]:
    """Describe for an operator whose transactions are among `xids`: session or prepared transaction, role, age."""
    cursor = await connection.execute(
        """
        SELECT format('pid %%s (%%s, %%s, transaction open for %%s)', pid, coalesce(usename, '?'), coalesce(state, '?'),
                      date_trunc('second', now() - xact_start))
        FROM pg_stat_activity WHERE backend_xid::text::bigint = ANY(%s)
        UNION ALL
        SELECT format('prepared transaction %%L (%%s, prepared %%s ago)', gid, owner,
                      date_trunc('second', now() - prepared))
        FROM pg_prepared_xacts WHERE transaction::text::bigint = ANY(%s)
        """,
        [(recent := [xid % XID_SPAN for xid in xids]), recent],
    )
    return [cast(str, row[0]) for row in await cursor.fetchall()]


async def read_publication(connection: Connection, name: str) -> Publication | None:
    """Return the publication, or None when there is none of that name."""
    version = connection.info.server_version
    row = await fetch_row(
        connection,
        sql.SQL(
            """
            SELECT puballtables, pg_has_role(pubowner, 'USAGE'), pubinsert, pubupdate, pubdelete, pubtruncate,
                   pubviaroot, {}
            FROM pg_publication WHERE pubname = %s
            """
        ).format(sql.SQL("pubgencols = 's'" if version >= GENERATED_COLUMNS_VERSION else "false")),
        [name],
    )
    if row is None:
        return None
    all_tables, owned, *operations, via_root, generated = row
    cursor = await connection.execute(
        sql.SQL(
            """
            SELECT p.schemaname, p.tablename, (
                SELECT r.oid::int8 FROM pg_publication b JOIN pg_publication_rel r ON r.prpubid = b.oid
                WHERE b.pubname = p.pubname AND r.prrelid = c.oid), {}
            FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname
            JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename WHERE p.pubname = %s
            """
        ).format(sql.SQL(_PUBLISHED if version >= 150000 else _PUBLISHED_BEFORE_15)),
        [name],
    )
    tables = {}
    for schema, table, membership, columns, row_filter, listed in await cursor.fetchall():
        qualified = QualifiedName(schema, table)
        tables[qualified] = Published(qualified, tuple(columns), row_filter, listed, membership)
    names = ("insert", "update", "delete", "truncate")
    return Publication(
        name=name,
        all_tables=all_tables,
        owned=owned,
        operations=frozenset(operation for operation, on in zip(names, operations, strict=True) if on),
        via_root=via_root,
        tables=tables,
        generated=generated,
    )


_PUBLISHED = """p.attnames::text[], p.rowfilter, EXISTS (
    SELECT FROM pg_publication b JOIN pg_publication_rel r ON r.prpubid = b.oid
    WHERE b.pubname = p.pubname AND r.prrelid = c.oid AND r.prattrs IS NOT NULL)"""
_PUBLISHED_BEFORE_15 = """ARRAY(
    SELECT attname::text FROM pg_attribute
    WHERE attrelid = c.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '' ORDER BY attnum), NULL, false"""

GENERATED_COLUMNS_VERSION = 180000
"""PostgreSQL 18: a publication can send stored generated columns; earlier ones never do."""


def create_publication_statement(name: str, tables: Sequence[QualifiedName], *, version: int = 0) -> sql.Composed:
    """Return the statement that creates a publication of `tables`.

    :param version: the server's. Where it can, the publication sends stored generated columns: templates may use them,
        and without them UPDATE and DELETE would fail on a table that has some and REPLICA IDENTITY FULL.
    """
    generated = ", publish_generated_columns = stored" if version >= GENERATED_COLUMNS_VERSION else ""
    return sql.SQL(
        "CREATE PUBLICATION {} FOR TABLE {} WITH (publish_via_partition_root = true" + generated + ")"
    ).format(sql.Identifier(name), _names(tables))


def publish_statement(name: str, tables: Sequence[QualifiedName]) -> sql.Composed:
    """Return the statement that adds `tables` to a publication."""
    return sql.SQL("ALTER PUBLICATION {} ADD TABLE {}").format(sql.Identifier(name), _names(tables))


def _names(tables: Sequence[QualifiedName]) -> sql.Composed:
    return sql.SQL(", ").join(sql.Identifier(table.schema, table.name) for table in tables)
