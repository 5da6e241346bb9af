"""The source: server, role, slot and publication.

Facts are read first; what they mean is said by functions that know no server.

Source: PostgreSQL, "Logical Replication" (Configuration Settings, Security), "Logical Decoding Concepts".
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from psycopg import sql

from cdcsync.config import Config
from cdcsync.config.names import quote
from cdcsync.errors import CdcsyncError
from cdcsync.postgres import Connection
from cdcsync.preflight.findings import Finding, noting
from cdcsync.source.catalog import Publication, Server, Slot, read_publication, read_server, read_slot
from cdcsync.source.slot import MIN_VERSION, SlotConnection

STANDBY_VERSION = 160000
"""PostgreSQL 16: a standby can decode WAL; earlier ones refuse."""

OPERATIONS = ("insert", "update", "delete", "truncate")


class SourceFacts(msgspec.Struct, frozen=True):
    """What the checks of the tables need to know of the source; `publication` is None where `run` creates it."""

    server: Server
    publication: Publication | None
    publication_name: str


async def examine_source(connection: Connection, config: Config, findings: list[Finding]) -> SourceFacts | None:
    """Check everything on the source but its tables; returns None when the server could not be read."""
    name, publication_name = config.source.slot, config.source.publication
    facts = None
    with noting(findings, "source", "source"):
        server = await read_server(connection)
        slot = await read_slot(connection, name)
        findings.extend(server_findings(server, slot))
        findings.extend(await _sender_findings(config.source.dsn, server, slot))
        if slot is not None:
            findings.extend(slot_findings(slot, server))
        publication = await read_publication(connection, publication_name)
        facts = SourceFacts(server, publication, publication_name)
    if facts is not None and facts.publication is not None:
        findings.extend(publication_findings(facts.publication))
    return facts


def server_findings(server: Server, slot: Slot | None) -> Iterator[Finding]:
    """Say whether the server can decode its WAL, and for one more slot."""
    if server.version < MIN_VERSION:
        yield Finding.error(
            "source",
            f"PostgreSQL {_version(server)} is too old: it does not send logical messages",
            f"upgrade the source to PostgreSQL {MIN_VERSION // 10000} or later",
        )
    if server.in_recovery:
        why = (
            "pages that are read from tables cannot be marked in the WAL there"
            if server.version >= STANDBY_VERSION
            else f"one decodes WAL only from PostgreSQL {STANDBY_VERSION // 10000} on"
        )
        yield Finding.error(
            "source",
            f"the server is a standby: {why}",
            "point source.dsn at the primary; with several hosts in it, add target_session_attrs=read-write",
        )
    if server.wal_level != "logical":
        yield Finding.error(
            "source",
            f"wal_level is {server.wal_level}: the WAL does not hold what logical decoding needs",
            "ALTER SYSTEM SET wal_level = 'logical', then restart the server; a managed service has its own parameter,"
            " such as rds.logical_replication = 1 or cloudsql.logical_decoding = on, and needs the restart too",
        )
    if slot is None and server.used_slots >= server.max_slots:
        yield Finding.error(
            "source",
            f"all {server.max_slots} replication slots are taken",
            "drop one that nothing reads (SELECT * FROM pg_replication_slots WHERE NOT active;"
            " SELECT pg_drop_replication_slot('NAME')), or raise max_replication_slots and restart the server",
        )
    if server.encoding == "SQL_ASCII":
        yield Finding.warning(
            "source",
            "the database's encoding is SQL_ASCII: nothing says that its texts are UTF-8, and one that is not stops the"
            " pipeline",
            "make sure that every writer uses UTF-8, or move to a database with ENCODING 'UTF8'",
        )
    yield Finding.ok(
        "source",
        f"PostgreSQL {_version(server)}, wal_level {server.wal_level},"
        f" {server.used_slots} of {server.max_slots} slots and {server.used_senders} of {server.max_senders} WAL senders"
        " in use",
    )


async def _sender_findings(dsn: str, server: Server, slot: Slot | None) -> Iterator[Finding]:
    """Open a replication connection and close it again: role, pg_hba.conf and a free WAL sender in one."""
    try:
        async with await SlotConnection.connect(dsn) as sender:
            await sender.identify()
    except CdcsyncError as error:
        return sender_findings(error, server, slot)
    return iter(())


def sender_findings(error: CdcsyncError, server: Server, slot: Slot | None) -> Iterator[Finding]:
    """Say why a replication connection was refused."""
    if not server.may_replicate:
        yield Finding.error(
            "source",
            f"the role {server.role} may not replicate",
            f"ALTER ROLE {quote(server.role)} REPLICATION; on Amazon RDS GRANT rds_replication TO {quote(server.role)}",
        )
    elif server.used_senders < server.max_senders:
        yield Finding.error("source", f"a replication connection is refused: {error.message}", error.hint)
    elif slot is None or slot.active_pid is None:  # else the worker that reads the slot has its sender
        yield Finding.error(
            "source",
            f"all {server.max_senders} WAL senders are taken",
            "end a standby or backup that needs none, or raise max_wal_senders and restart the server",
        )


def slot_findings(slot: Slot, server: Server) -> Iterator[Finding]:
    """Say whether the slot that exists can be read by us, and from where it was left."""
    where = f"slot {slot.name}"
    another = 'set source.slot to a name that is free: "cdcsync_2", say'
    if slot.plugin is None:
        yield Finding.error(where, "is a physical slot, which a standby reads", another)
        return
    if slot.plugin != "pgoutput":
        yield Finding.error(where, f"decodes by the plugin {slot.plugin}, and cdcsync reads pgoutput", another)
    if slot.database != server.database:
        yield Finding.error(
            where, f"belongs to the database {slot.database}, and source.dsn leads to {server.database}", another
        )
    if slot.wal_status == "lost":
        yield Finding.error(
            where,
            "the server has removed WAL that the slot still needed: the changes in it cannot be received any more",
            'load the indexes again: docs/operations.md, "After a gap"; and raise max_slot_wal_keep_size',
        )
    elif slot.wal_status == "unreserved":
        yield Finding.warning(
            where,
            "retains more WAL than max_slot_wal_keep_size: the next checkpoint of the server may make it useless",
            "start the worker now, and raise max_slot_wal_keep_size",
        )
    if slot.active_pid is not None:
        yield Finding.warning(
            where,
            f"a worker reads it now (server process {slot.active_pid}): another one waits as its standby",
            "give this pipeline a slot of its own with source.slot if it is not meant to be a standby",
        )
    yield Finding.ok(where, f"exists, confirmed up to {slot.confirmed_flush}")


def publication_findings(publication: Publication) -> Iterator[Finding]:
    """Say whether the publication that exists sends all kinds of changes."""
    where = f"publication {publication.name}"
    missing = [operation for operation in OPERATIONS if operation not in publication.operations]
    if missing:
        statement = sql.SQL("ALTER PUBLICATION {} SET (publish = {})").format(
            sql.Identifier(publication.name), sql.Literal(", ".join(OPERATIONS))
        )
        yield Finding.error(where, f"does not send {' and '.join(missing)}: the index would drift", text(statement))
    else:
        yield Finding.ok(where, f"exists, sends {len(publication.tables)} tables")


def text(statement: sql.Composed) -> str:
    """Return a statement as an operator would type it."""
    return statement.as_string(None)


def _version(server: Server) -> str:
    return f"{server.version // 10000}.{server.version % 10000}"
