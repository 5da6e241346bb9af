"""The source: server, role, slot and publication.

Facts are read first; what they mean is said by functions that know no server.

Source: PostgreSQL, "Logical Replication" (Configuration Settings, Security), "Logical Decoding Concepts".
"""

from __future__ import annotations

import msgspec

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
    with noting(findings, "source", "source"):
        server = await read_server(connection)
        slot = await read_slot(connection, config.source.slot)
        publication = await read_publication(connection, config.source.publication)
        findings += server_findings(server, slot)
        findings += await _try_sender(config.source.dsn, server, slot)
        if slot is not None:
            findings += slot_findings(slot, server)
        if publication is not None:
            findings += publication_findings(publication)
        return SourceFacts(server, publication, config.source.publication)
    return None


def server_findings(server: Server, slot: Slot | None) -> list[Finding]:
    """Say whether the server can decode its WAL, and whether there is room for a slot."""
    found = []
    if server.version < MIN_VERSION:
        found.append(
            Finding.error(
                "source",
                f"PostgreSQL {server.version_text} is too old: it does not send logical messages",
                f"upgrade the source to PostgreSQL {MIN_VERSION // 10000} or later",
            )
        )
    if server.in_recovery:
        why = (
            "the pages that are read from tables cannot be marked in its WAL"
            if server.version >= STANDBY_VERSION
            else f"it cannot decode WAL before PostgreSQL {STANDBY_VERSION // 10000}"
        )
        found.append(
            Finding.error(
                "source",
                f"the server is a standby: {why}",
                "point source.dsn at the primary; if it names several hosts, add target_session_attrs=read-write",
            )
        )
    if server.wal_level != "logical":
        found.append(
            Finding.error(
                "source",
                f"wal_level is {server.wal_level}: the WAL does not hold what logical decoding needs",
                "ALTER SYSTEM SET wal_level = 'logical', then restart the server; a managed service has a parameter for it,"
                " such as rds.logical_replication = 1 or cloudsql.logical_decoding = on, and needs the restart too",
            )
        )
    if slot is None and server.used_slots >= server.max_slots:
        found.append(
            Finding.error(
                "source",
                f"all {server.max_slots} replication slots are taken",
                "drop one that nothing reads (SELECT slot_name FROM pg_replication_slots WHERE NOT active;"
                " SELECT pg_drop_replication_slot('NAME')), or raise max_replication_slots and restart the server",
            )
        )
    if not found:
        found.append(
            Finding.ok(
                "source",
                f"PostgreSQL {server.version_text}, {server.used_slots} of {server.max_slots} slots"
                f" and {server.used_senders} of {server.max_senders} WAL senders in use",
            )
        )
    if server.encoding == "SQL_ASCII":
        found.append(
            Finding.warning(
                "source",
                "the database's encoding is SQL_ASCII: nothing holds its texts to UTF-8, and one that is not stops the"
                " pipeline",
                "make sure that every writer sends UTF-8, or move to a database with ENCODING 'UTF8'",
            )
        )
    return found


async def _try_sender(dsn: str, server: Server, slot: Slot | None) -> list[Finding]:
    """Open a replication connection and close it again: role, pg_hba.conf and a free WAL sender in one."""
    try:
        async with await SlotConnection.connect(dsn) as sender:
            await sender.identify()
    except CdcsyncError as error:
        return sender_findings(error, server, slot)
    return []


def sender_findings(error: CdcsyncError, server: Server, slot: Slot | None) -> list[Finding]:
    """Say why a replication connection was refused."""
    if not server.may_replicate:
        role = quote(server.role)
        return [
            Finding.error(
                "source",
                f"the role {role} may not replicate",
                f"ALTER ROLE {role} REPLICATION; on Amazon RDS: GRANT rds_replication TO {role}",
            )
        ]
    if server.used_senders < server.max_senders:
        return [Finding.error("source", f"a replication connection is refused: {error.message}", error.hint)]
    if slot is not None and slot.active_pid is not None:
        return []  # the worker that reads the slot has its sender
    return [
        Finding.error(
            "source",
            f"all {server.max_senders} WAL senders are taken",
            "end a standby or backup that is not needed, or raise max_wal_senders and restart the server",
        )
    ]


def slot_findings(slot: Slot, server: Server) -> list[Finding]:
    """Say whether the slot that exists can be read by us, and from where it was left."""
    where = f"slot {slot.name}"
    another = "name another slot with source.slot; run creates it"
    if slot.plugin is None:
        return [Finding.error(where, "is a physical slot, made for a standby", another)]
    found = []
    if slot.plugin != "pgoutput":
        found.append(Finding.error(where, f"decodes with {slot.plugin}, and cdcsync reads pgoutput", another))
    if slot.database != server.database:
        found.append(
            Finding.error(
                where,
                f"belongs to the database {slot.database}, and source.dsn leads to the database {server.database}",
                another,
            )
        )
    if slot.wal_status == "lost":
        found.append(
            Finding.error(
                where,
                "the server has removed WAL that the slot still needed: its changes cannot be received any more",
                'load the indexes anew: docs/operations.md, "After a gap"; then raise max_slot_wal_keep_size',
            )
        )
    if not found:
        found.append(Finding.ok(where, f"exists, and is confirmed up to {slot.confirmed_flush}"))
    if slot.wal_status == "unreserved":
        found.append(
            Finding.warning(
                where,
                "retains more WAL than max_slot_wal_keep_size allows: the server's next checkpoint may remove it",
                "start the worker now, and raise max_slot_wal_keep_size",
            )
        )
    if slot.active_pid is not None:
        found.append(
            Finding.warning(
                where,
                f"a worker is reading it (server process {slot.active_pid}): another one waits as its standby",
                "if this is another pipeline, give it a slot of its own with source.slot",
            )
        )
    return found


def publication_findings(publication: Publication) -> list[Finding]:
    """Say whether the publication that exists sends all kinds of changes."""
    where = f"publication {publication.name}"
    missing = [operation for operation in OPERATIONS if operation not in publication.operations]
    if missing:
        return [
            Finding.error(
                where,
                f"does not send {' and '.join(missing)}: the index would drift from its table",
                f"ALTER PUBLICATION {quote(publication.name)} SET (publish = '{', '.join(OPERATIONS)}')",
            )
        ]
    return [Finding.ok(where, "exists, and sends every kind of change")]
