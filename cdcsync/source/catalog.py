"""The source's server and slot, and one reading of all that is followed: `read_catalog`.

Source: PostgreSQL, "System Catalogs", "System Views" (pg_replication_slots).
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from functools import partial
from typing import LiteralString, cast

import anyio
import msgspec
import psycopg
from psycopg import sql

from cdcsync.backoff import backoff_s
from cdcsync.config import QualifiedName
from cdcsync.config.names import WHOLE_ROW
from cdcsync.documents.related import RelatedRows, TableFacts, columns_read
from cdcsync.lsn import Lsn
from cdcsync.postgres.collations import Outdated, outdated_collations
from cdcsync.postgres.locking import BRIEFLY, until_locked
from cdcsync.postgres.queries import fetch_one, fetch_row, fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.source.families import as_one, members_of, sent_as_one
from cdcsync.source.functions import Definition, functions_called
from cdcsync.source.publications import Publication, read_publication
from cdcsync.source.relations import Table, read_tables

FAILOVER_VERSION = 170000
"""PostgreSQL 17: standbys can have a logical slot too."""

IDLE_TIMEOUT_VERSION = 180000
"""PostgreSQL 18: a slot that nobody reads for long enough is invalidated (idle_replication_slot_timeout)."""

REPLICATION_ROLES = ("rds_replication",)
"""Roles of managed services whose members may replicate without having the attribute themselves."""

RELEASE_S = 5.0
"""How long a slot is waited for whose reader has just ended: the server notices that within a moment, or a busy one
within some seconds."""

RELEASE_POLL_S = 0.02


DROPPED_ATTEMPTS = 10
"""How often the catalog is read at most if it fails for a table that is dropped meanwhile. Few drops come just then, so
a failure that stays is another fault, and its message is to be seen within seconds."""

SENDS_PREPARED = "sends prepared transactions before they are committed (two_phase = true), which cdcsync does not read"
"""Why a slot is refused that is otherwise as ours."""


UNREAD = "has no reader now"
"""The state of a standby's slot that a standby has read, or is to read, and that none reads now."""


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
    read_only_by: str | None = None
    """Where the setting by which transactions are read-only comes from, as pg_settings has it; None if they are not."""
    replica_role: bool = False
    """Whether sessions act as those that apply another server's changes: no trigger and no foreign key acts then."""
    standby_slots: dict[str, str | None] = {}
    """The slots of standbys that failover slots wait for (synchronized_standby_slots), each with what keeps it from
    being caught up: it does not exist, is logical, or has no WAL or no reader; None if there is nothing of that."""

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
    lost_because: str | None = None
    """Why it has lost its WAL, as the server says from version 17 on."""
    two_phase: bool = False
    """Whether it sends prepared transactions at once, before it is known whether they are committed."""
    catalog_xmin: int | None = None
    """The oldest transaction (32 bits) whose effect on the catalogs it may still need: of a slot from which nothing was
    read yet, no transaction that ran during its creation or began later is older."""
    reader: str | None = None
    """The application_name of the session that reads it."""
    here: str | None = None
    """The database of the session that looked at it."""
    expires: str | None = None
    """When it is invalidated unless somebody reads it again; None while less than half of that time is over."""

    @property
    def foreign(self) -> str | None:
        """Why it is not such as a worker makes in this database; None if it is. Another one may be somebody else's."""
        if self.plugin is None:
            return "is a physical slot, made for a standby"
        if self.plugin != "pgoutput":
            return f"decodes with {self.plugin}, and cdcsync reads pgoutput"
        if self.database != self.here:
            return f"belongs to the database {self.database}, and source.dsn leads to the database {self.here}"
        return None

    @property
    def drop(self) -> str:
        """The statement that drops it, from whichever database of its server."""
        return f"SELECT pg_drop_replication_slot('{self.name}')"  # names are of lower-case letters, digits and _


class Catalog(msgspec.Struct, frozen=True):
    """The publication and the configured tables, as of one moment.

    :ivar role: the session's role, whose privileges `tables` tell.
    :ivar publication: None if there is none of that name.
    :ivar tables: those of the configured tables that exist.
    :ivar members: the tables of each family of many equal tables that was asked for.
    :ivar functions: the definitions of what each condition that was asked for calls, by name.
    :ivar called: the present names of the tables whose OIDs were asked for, as far as they exist.
    :ivar collations: those of the tables' columns whose version has changed since it was recorded, by name.
    """

    version: int
    role: str
    publication_name: str
    publication: Publication | None
    tables: dict[QualifiedName, Table]
    called: dict[int, QualifiedName] = {}
    members: dict[QualifiedName, tuple[QualifiedName, ...]] = {}
    functions: dict[str, dict[str, Definition]] = {}
    collations: dict[str, Outdated] = {}

    def limited(self, family: QualifiedName, members: Collection[QualifiedName]) -> Catalog:
        """Return the catalog as if a family had only these of its members."""
        listed = self.members.get(family, ())
        kept = tuple(one for one in listed if one in members)
        if kept == listed:
            return self
        tables = {name: table for name, table in self.tables.items() if name != family}
        publication = self.publication
        if publication is not None:
            sent = {name: one for name, one in publication.tables.items() if name != family}
            publication = msgspec.structs.replace(publication, tables=sent)
        if known := [tables[one] for one in kept if one in tables]:
            publication = publication and sent_as_one(publication, family, known)
            tables[family] = as_one(family, known)
        return msgspec.structs.replace(
            self, tables=tables, publication=publication, members={**self.members, family: kept}
        )

    def single(self, names: Iterable[QualifiedName]) -> list[QualifiedName]:
        """Return these tables with the members in place of each family."""
        return sorted({one for name in names for one in self.members.get(name, () if name.patterns else (name,))})


async def read_catalog(
    connection: Connection,
    publication: str,
    names: Collection[QualifiedName],
    oids: Collection[int] = (),
    expressions: Collection[str] = (),
) -> Catalog:
    """Return what the catalog says of the publication and these tables, and of no others, under one snapshot.

    :param oids: tables whose present names are wanted.
    :param expressions: conditions in SQL, of which it is asked what they call.
    """
    once = partial(_read_once, connection, publication, names, oids, expressions)
    return await _despite_drops(partial(until_locked, once, table="partitions of the source"))


async def _despite_drops(read: Callable[[], Awaitable[Catalog]]) -> Catalog:
    """Read the catalog in a transaction, and again in another one if a table was dropped meanwhile.

    The catalog's functions look at a table as it is now, whatever the snapshot says: for a partition that is dropped
    between the two they fail with an internal error ("could not open relation with OID"). The next snapshot does not
    have it.

    :raises InternalError_: the error was the same each time.
    """
    for attempt in range(DROPPED_ATTEMPTS - 1):
        try:
            return await read()
        except psycopg.errors.InternalError_:
            await anyio.sleep(backoff_s(attempt, first=0.01, most=1))
    return await read()


async def _read_once(
    connection: Connection,
    publication: str,
    names: Collection[QualifiedName],
    oids: Collection[int],
    expressions: Collection[str],
) -> Catalog:
    async with connection.transaction():
        await connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        await connection.execute(BRIEFLY)
        families = [name for name in names if name.patterns]
        members = {name: tuple(await members_of(connection, name)) for name in families}
        single = {*(name for name in names if not name.patterns), *(one for of in members.values() for one in of)}
        tables = await read_tables(connection, single)
        cursor = await connection.execute(
            "SELECT c.oid::int8, n.nspname, c.relname FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace"
            " WHERE c.oid = ANY(%s::int8[]::oid[])",
            [list(oids)],
        )
        called = {oid: QualifiedName(schema, name) for oid, schema, name in await cursor.fetchall()}
        followed = {name: table.ancestors for name, table in tables.items()}
        found = await read_publication(connection, publication, followed)
        for name, listed in members.items():
            known = [tables[one] for one in listed if one in tables]
            if known:
                found = found and sent_as_one(found, name, known)
                tables[name] = as_one(name, known)
        functions = await functions_called(connection, expressions)
        sorted_by = {column.collation for table in tables.values() for column in table.columns.values()} - {""}
        outdated = await outdated_collations(connection, sorted_by)
        role = await fetch_value(connection, "SELECT current_user::text")
    version = connection.info.server_version
    return Catalog(version, role, publication, found, tables, called, members, functions, outdated)


def facts_of(catalog: Catalog, table: Table, related: Sequence[RelatedRows]) -> dict[QualifiedName, TableFacts]:
    """Return what statements over an index's table and its related tables have to know; nothing if there are none.

    A table that is missing is left out.
    """
    if not related:
        return {}
    read = columns_read(related)
    outward = [theirs for one in related for _, theirs in one.steps[0].on]
    read[table.name] = (*read.get(table.name, ()), *outward)
    publication = catalog.publication
    facts = {}
    for name, columns in read.items():
        one = catalog.tables.get(name)
        if one is None:
            continue
        sent = publication.tables.get(name) if publication is not None else None
        named = {*columns, *one.primary_key}
        # In the order of the table, as a row that is compared or written as a whole has them.
        used = [column for column in one.columns.values() if WHOLE_ROW in named or column.name in named]
        facts[name] = TableFacts(
            key=one.primary_key,
            columns=tuple(column.name for column in used if column.readable),
            row_filter=sent.row_filter if sent is not None else None,
            types={column.name: column.value_type for column in used},
            inheritable=one.inheritable,
        )
    return facts


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
               has_database_privilege(current_database(), 'TEMPORARY'),
               CASE WHEN current_setting('transaction_read_only')::bool
                    THEN (SELECT source FROM pg_settings WHERE name = 'default_transaction_read_only') END,
               current_setting('session_replication_role') = 'replica',
               (SELECT coalesce(jsonb_object_agg(n.name, CASE
                       WHEN s.slot_name IS NULL THEN 'does not exist' WHEN s.slot_type <> 'physical' THEN 'is logical'
                       WHEN s.wal_status = 'lost' THEN 'has lost its WAL' WHEN NOT s.active THEN %s
                   END), '{}')
                FROM (SELECT lower(btrim(one, E' \t\r\n"'))
                      FROM unnest(string_to_array(current_setting('synchronized_standby_slots', true), ',')) AS one)
                     AS n (name)
                LEFT JOIN pg_replication_slots AS s ON s.slot_name = n.name)
        """,
        [list(REPLICATION_ROLES), UNREAD],
    )
    return Server(*row)


_REASONS = {
    "wal_removed": "it held more than max_slot_wal_keep_size",
    "idle_timeout": "nobody read it for longer than idle_replication_slot_timeout",
    "wal_level_insufficient": "wal_level was lowered on the primary",
    "rows_removed": "rows were removed that it needed",
}


def why_lost(slot: Slot) -> str:
    """Return why a slot has lost its WAL, in words."""
    if slot.lost_because is None:
        return "max_slot_wal_keep_size"
    return _REASONS.get(slot.lost_because, slot.lost_because)


def misfit(slot: Slot, *, begun: bool) -> tuple[str, str] | None:
    """Return why a worker can neither read a slot nor put another in its place, with the fix; None if it can.

    It drops no slot that may be somebody else's: none that is foreign, and none that was there before it had a
    checkpoint. Whether anybody needs such a slot, an operator knows.

    :param begun: whether the pipeline has a checkpoint: its indexes then belong to a slot of this name.
    """
    why = slot.foreign or (SENDS_PREPARED if slot.two_phase and not begun else None)
    if why is None:
        return None
    if not begun:
        another = "name another slot with source.slot, which run creates"
        return why, f"{another}; or, if nothing else reads this one, {slot.drop}"
    again = f'{slot.drop}, and start the worker with source.on_gap = "resync", which reads the tables again'
    renamed = slot.plugin == "pgoutput"
    dsn = f"point source.dsn at {slot.database} if that is the database that is indexed; or, " if renamed else ""
    return (
        f"{why}: the changes since the checkpoint cannot be received from it",
        f'{dsn}if nothing else reads the slot, {again}: docs/operations.md, "After a gap"',
    )


_EXPIRES: LiteralString = """
    (SELECT date_trunc('second', inactive_since + after)::text
     FROM (SELECT current_setting('idle_replication_slot_timeout')::interval) AS allowed (after)
     WHERE NOT active AND after > '0' AND clock_timestamp() - inactive_since > after / 2)
"""


async def read_slot(connection: Connection, name: str) -> Slot | None:
    """Return the slot, or None when there is none of that name."""
    row = await fetch_row(
        connection,
        sql.SQL(
            """
            SELECT slot_name, plugin, database, active_pid, confirmed_flush_lsn::text, restart_lsn::text, wal_status,
                   pg_wal_lsn_diff(CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn()
                                        ELSE pg_current_wal_lsn() END, restart_lsn)::int8,
                   safe_wal_size, {}, {}, catalog_xmin::text::bigint, two_phase,
                   (SELECT application_name FROM pg_stat_activity WHERE pid = active_pid), current_database(), {}
            FROM pg_replication_slots WHERE slot_name = %s
            """
        ).format(
            *(sql.SQL("failover"), sql.SQL("invalidation_reason"))
            if connection.info.server_version >= FAILOVER_VERSION
            else (sql.SQL("false"), sql.SQL("NULL")),
            sql.SQL(_EXPIRES if connection.info.server_version >= IDLE_TIMEOUT_VERSION else "NULL"),
        ),
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
        lost_because=row[10],
        catalog_xmin=row[11],
        two_phase=row[12],
        reader=row[13],
        here=row[14],
        expires=row[15],
    )


async def slot_names(connection: Connection) -> set[str]:
    """Return the names of all slots of the server: no two of them have one name, whichever databases they are of."""
    cursor = await connection.execute("SELECT slot_name::text FROM pg_replication_slots")
    return {name for (name,) in await cursor.fetchall()}


async def other_readers(connection: Connection, slot: str | None) -> list[str]:
    """Return the other slots of the database that read publications; of which ones, no catalog tells.

    :param slot: the pipeline's own; None on a server on which it has none.
    """
    cursor = await connection.execute(
        "SELECT slot_name::text FROM pg_replication_slots WHERE plugin = 'pgoutput' AND database = current_database()"
        " AND NOT temporary AND slot_name IS DISTINCT FROM %s::text ORDER BY 1",
        [slot],
    )
    return [name for (name,) in await cursor.fetchall()]


async def released_slot(connection: Connection, name: str) -> Slot | None:
    """Return the slot once nobody reads it any more, or as it is if somebody still does after a while."""
    deadline = anyio.current_time() + RELEASE_S
    while (slot := await read_slot(connection, name)) is not None and slot.active_pid is not None:
        if anyio.current_time() > deadline:
            break
        await anyio.sleep(RELEASE_POLL_S)
    return slot


async def current_lsn(connection: Connection) -> Lsn:
    """Return the end of the WAL that is written."""
    statement: LiteralString = (
        "SELECT CASE WHEN pg_is_in_recovery() THEN pg_last_wal_replay_lsn() ELSE pg_current_wal_lsn() END::text"
    )
    return Lsn.parse(cast(str, await fetch_value(connection, statement)))


async def insert_lsn(connection: Connection) -> Lsn:
    """Return where the next record of WAL goes: everything that is visible by now was committed before it."""
    return Lsn.parse(cast(str, await fetch_value(connection, "SELECT pg_current_wal_insert_lsn()::text")))
