"""The source: server, role, slot and publication.

Facts are read first; pure functions interpret them.

Source: PostgreSQL, "Logical Replication" (Configuration Settings, Security), "Logical Decoding Concepts".
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence

import msgspec

from cdcsync.config import Config, QualifiedName
from cdcsync.config.names import named, quote
from cdcsync.errors import CdcsyncError
from cdcsync.postgres.refusals import allow_replication
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.administration import allow_writes
from cdcsync.preflight.findings import Finding, noting, or_ok
from cdcsync.source.catalog import (
    SENDS_PREPARED,
    UNREAD,
    Catalog,
    Server,
    Slot,
    misfit,
    read_catalog,
    read_server,
    read_slot,
    why_lost,
)
from cdcsync.source.publications import Publication, create_publication_statement, fixed_in, publish_statement
from cdcsync.source.slot import MIN_VERSION, RESYNC, SlotConnection

STANDBY_VERSION = 160000
"""PostgreSQL 16: a standby can decode WAL; earlier ones refuse."""

OPERATIONS = ("insert", "update", "delete", "truncate")


class SourceFacts(msgspec.Struct, frozen=True):
    """The facts about the source that the checks of tables need.

    :ivar wanted: the tables of all indexes.
    """

    server: Server
    catalog: Catalog
    wanted: frozenset[QualifiedName]


async def examine_source(
    connection: Connection,
    config: Config,
    findings: list[Finding],
    *,
    known: Collection[int] = (),
    begun: bool = False,
    followed_by: str | None = None,
    elsewhere: Mapping[str, str | None],
) -> SourceFacts | None:
    """Check everything on the source but its tables; returns None when the server could not be read.

    :param known: the OIDs of tables that are followed already.
    :param begun: whether the pipeline has a checkpoint.
    :param followed_by: the publication through which they are.
    :param elsewhere: the other schemas of the target whose pipeline has a slot of this name, each with the system
        identifier of its source.
    """
    with noting(findings, "source", "source"):
        server = await read_server(connection)
        slot = await read_slot(connection, config.source.slot)
        wanted = frozenset(table for index in config.indexes.values() for table in index.followed)
        expressions = {text for index in config.indexes.values() for text in index.expressions}
        catalog = await read_catalog(connection, config.source.publication, wanted, known, expressions)
        publication = catalog.publication
        findings += or_ok(
            server_faults(server, slot),
            "source",
            f"PostgreSQL {server.version_text}, {server.used_slots} of {server.max_slots} slots"
            f" and {server.used_senders} of {server.max_senders} WAL senders in use",
        )
        if config.source.failover or (slot is not None and slot.failover):
            findings += standby_faults(server)
        identity = await _try_sender(config.source.dsn, server, slot, findings)
        if slot is not None:
            confirmed = f"exists, and is confirmed up to {slot.confirmed_flush}"
            resync = config.source.on_gap == "resync" or not begun
            faults = list(slot_faults(slot, resync=resync, begun=begun))
            readers = [schema for schema, of in elsewhere.items() if identity is not None and of == identity]
            if readers or not (begun or faults):
                faults.append(adoption_fault(slot, readers))
            findings += or_ok(faults, f"slot {slot.name}", confirmed)
        if publication is not None:
            where = f"publication {publication.name}"
            if not list(publication_faults(publication)):
                findings.append(Finding.ok(where, "exists, and sends every kind of change"))
        findings += read_only_faults(server, catalog, catalog.single(wanted))
        if publication is None and slot is not None and slot.foreign is None:
            findings += orphan_faults(slot, config.source.publication, followed_by=followed_by)
        return SourceFacts(server, catalog, frozenset(catalog.single(wanted)))
    return None


def server_faults(server: Server, slot: Slot | None) -> Iterator[Finding]:
    """Say whether the server can decode its WAL, and whether there is room for a slot."""
    if server.version < MIN_VERSION:
        yield Finding.error(
            "source",
            f"PostgreSQL {server.version_text} is too old: it does not send logical messages",
            f"upgrade the source to PostgreSQL {MIN_VERSION // 10000} or later",
        )
    if (fixed := fixed_in(server.version)) is not None:
        yield Finding.warning(
            "source",
            f"PostgreSQL {server.version_text} may send nothing of a table that was published while a transaction wrote"
            " to it",
            f"upgrade the source to PostgreSQL {fixed} or later; until then each comparison opens the stream anew, and"
            " a new index is compared with its tables before it is live",
        )
    if server.in_recovery:
        why = (
            "the pages that are read from tables cannot be marked in its WAL"
            if server.version >= STANDBY_VERSION
            else f"it cannot decode WAL before PostgreSQL {STANDBY_VERSION // 10000}"
        )
        yield Finding.error(
            "source",
            f"the server is a standby: {why}",
            "point source.dsn at the primary; if it names several hosts, add target_session_attrs=read-write",
        )
    if server.wal_level != "logical":
        yield Finding.error(
            "source",
            f"wal_level is {server.wal_level}: the WAL does not hold what logical decoding needs",
            "ALTER SYSTEM SET wal_level = 'logical', then restart the server; a managed service has a parameter for it"
            " (rds.logical_replication = 1, cloudsql.logical_decoding = on) and needs the restart too",
        )
    if server.max_slots == 0:
        yield Finding.error(
            "source",
            "max_replication_slots is 0: the server has no slots",
            "ALTER SYSTEM SET max_replication_slots = 10, then restart the server",
        )
    elif slot is None and server.used_slots >= server.max_slots:
        yield Finding.error(
            "source",
            f"all {server.max_slots} replication slots are taken",
            "drop one that nothing reads (SELECT slot_name FROM pg_replication_slots WHERE NOT active;"
            " SELECT pg_drop_replication_slot('NAME')), or raise max_replication_slots and restart the server",
        )
    if server.encoding == "SQL_ASCII":
        yield Finding.warning(
            "source",
            "the database's encoding is SQL_ASCII: nothing guarantees that its texts are UTF-8, and one that is"
            " not stops the pipeline",
            "make sure that every writer sends UTF-8, or move to a database with ENCODING 'UTF8'",
        )


def standby_faults(server: Server) -> Iterator[Finding]:
    """Say which standbys keep the server from sending changes of failover slots: it sends what these have received."""
    late = {name: why for name, why in sorted(server.standby_slots.items()) if why is not None}
    if server.in_recovery:
        return
    stopped = [name for name, why in late.items() if why == UNREAD]
    hopeless = {name: why for name, why in late.items() if why != UNREAD}
    if hopeless:
        yield Finding.warning(
            "source",
            f"synchronized_standby_slots names {named(f'{name} ({why})' for name, why in hopeless.items())}: the server"
            " sends a worker nothing of a slot with failover",
            _without(server, hopeless),
        )
    if stopped:
        # It may be restarting. Without it in the setting, a failover to it could lose what a worker has been sent.
        standbys = " and ".join(f"the standby with primary_slot_name = '{name}'" for name in stopped)
        yield Finding.warning(
            "source",
            f"synchronized_standby_slots names {named(f'{name} ({UNREAD})' for name in stopped)}: until a standby reads"
            " it, the server sends a worker nothing of a slot with failover",
            f"start {standbys}; only if it stays away, {_without(server, late)}",
        )


def _without(server: Server, names: Collection[str]) -> str:
    """Return how to leave slots out of synchronized_standby_slots."""
    rest = ", ".join(name for name in sorted(server.standby_slots) if name not in names)
    return (
        "take its name out, by the service's parameter where ALTER SYSTEM is refused:"
        f" ALTER SYSTEM SET synchronized_standby_slots = '{rest}'; SELECT pg_reload_conf()"
    )


async def _try_sender(dsn: str, server: Server, slot: Slot | None, findings: list[Finding]) -> str | None:
    """Open a replication connection and close it again: role, pg_hba.conf and a free WAL sender in one.

    :returns: the cluster's system identifier, where that worked.
    """
    try:
        async with await SlotConnection.connect(dsn) as sender:
            return (await sender.identify()).system_identifier
    except CdcsyncError as error:
        findings += sender_faults(error, server, slot)
        return None


def sender_faults(error: CdcsyncError, server: Server, slot: Slot | None) -> Iterator[Finding]:
    """Say why a replication connection was refused."""
    if not server.may_replicate:
        role = quote(server.role)
        yield Finding.error(
            "source",
            f"the role {role} may not replicate",
            allow_replication(role),
        )
    if server.max_senders == 0:
        yield Finding.error(
            "source",
            "max_wal_senders is 0, so the server sends no WAL",
            "ALTER SYSTEM SET max_wal_senders = 10, then restart the server",
        )
    elif server.used_senders < server.max_senders:
        if server.may_replicate:
            yield Finding.error("source", f"a replication connection is refused: {error.message}", error.hint)
    elif slot is None or slot.active_pid is None:  # else the worker that reads the slot has its sender
        yield Finding.error(
            "source",
            f"all {server.max_senders} WAL senders are taken",
            "end a standby or backup that is not needed, or raise max_wal_senders and restart the server",
        )


def slot_faults(slot: Slot, *, resync: bool, begun: bool = True) -> Iterator[Finding]:
    """Say whether the slot that exists can be read by us, and from where it was left.

    :param resync: a gap heals itself: `run` loads the indexes anew, or nothing is loaded yet.
    :param begun: whether the pipeline has a checkpoint, and so the slot is its own.
    """
    where = f"slot {slot.name}"
    if (refused := misfit(slot, begun=begun)) is not None:
        yield Finding.error(where, *refused)
        return
    if slot.two_phase:
        if resync:
            yield Finding.warning(where, f"{SENDS_PREPARED}; run creates a new slot and reads the tables again")
        else:
            yield Finding.error(where, SENDS_PREPARED, RESYNC)
    if slot.wal_status == "lost":
        lost = (
            f"the server has removed WAL that the slot still needed ({why_lost(slot)}):"
            " its changes cannot be received any more"
        )
        if resync:
            yield Finding.warning(where, f"{lost}; run creates a new slot and reads the tables again")
        else:
            yield Finding.error(where, lost, RESYNC)
    elif slot.wal_status == "unreserved":
        yield Finding.warning(
            where,
            "retains more WAL than max_slot_wal_keep_size allows: the server's next checkpoint may remove it",
            "start the worker now, and raise max_slot_wal_keep_size",
        )
    elif slot.expires is not None:
        yield Finding.warning(
            where,
            f"nothing has read it for long: from {slot.expires} on, the server's next checkpoint invalidates it"
            " (idle_replication_slot_timeout), and its changes cannot be received any more",
            "start the worker now, and set idle_replication_slot_timeout to 0, or well above your longest stop",
        )
    if slot.active_pid is not None:
        yield Finding.warning(
            where,
            f"a worker is reading it (server process {slot.active_pid}): another one waits as its standby",
            "if this is another pipeline, give it a slot of its own with source.slot",
        )


def adoption_fault(slot: Slot, readers: Sequence[str]) -> Finding:
    """Report a slot that exists before its pipeline has begun: another reader would miss what this one confirms.

    :param readers: the schemas whose pipelines continue from this slot.
    """
    where = f"slot {slot.name}"
    if readers:
        return Finding.error(
            where,
            f"belongs to the pipeline in the schema {named(readers)}, which would miss what this one confirms",
            "name another slot with source.slot; run creates it",
        )
    return Finding.warning(
        where,
        "is there already, and this pipeline has not begun: it begins where that is",
        "if anything else reads the slot, that would miss what this pipeline confirms: name another with source.slot",
    )


def orphan_faults(slot: Slot, publication: str, *, followed_by: str | None) -> Iterator[Finding]:
    """Say why a slot is of no use without its publication: it looks it up in the catalog of the time of each change.

    :param followed_by: the publication through which indexes follow their tables already, if any do. If it is this one,
        it was dropped, and comes back; else it has another name now.
    """
    if followed_by is not None:
        compares = "and compares source and index, because nothing was sent meanwhile"
        gap = (
            "before PostgreSQL 18 the server cannot decode what was written until then, which is a gap:"
            ' docs/operations.md, "After a gap"'
        )
        if followed_by == publication:
            yield Finding.warning(f"publication {publication}", f"was dropped: run creates it again, {compares}", gap)
        else:
            yield Finding.warning(
                f"publication {publication}",
                f"does not exist, and the pipeline has followed {followed_by} until now: run creates it, {compares}",
                f"if nothing else needs the old one, then DROP PUBLICATION IF EXISTS {quote(followed_by)}; {gap}",
            )
        return
    yield Finding.error(
        f"publication {publication}",
        f"does not exist, and the slot {slot.name} does: changes from before its creation could not be sent",
        f"{slot.drop} if no index depends on it, and run creates both in order;"
        ' if one does, see docs/operations.md, "After a gap"',
    )


def read_only_faults(server: Server, catalog: Catalog, tables: Sequence[QualifiedName]) -> Iterator[Finding]:
    """Say that the publication can be neither created nor extended because transactions are read-only by default.

    That is all that `run` needs to write there: marks in the WAL, and slots, can be made in such transactions, too.
    """
    name, publication = catalog.publication_name, catalog.publication
    missing = [one for one in tables if publication is None or one not in publication.tables]
    if not missing or server.read_only_by is None or server.in_recovery:
        return
    statement = (
        create_publication_statement(name, missing, version=server.version)
        if publication is None
        else publish_statement(name, missing)
    )
    lack = "does not exist" if publication is None else f"does not send {named(map(str, missing))}"
    yield Finding.error(
        f"publication {name}",
        f"{lack}, and transactions are read-only here, so that run cannot change that",
        f"{allow_writes(server)}; or, as an owner of the tables: BEGIN READ WRITE; {statement.as_string(None)}; COMMIT",
    )


def publication_faults(publication: Publication) -> Iterator[Finding]:
    """Say which kinds of changes the publication that exists does not send."""
    missing = [operation for operation in OPERATIONS if operation not in publication.operations]
    if missing:
        yield Finding.error(
            f"publication {publication.name}",
            f"does not send {named(map(str, missing))}: the index would drift from its table",
            f"ALTER PUBLICATION {quote(publication.name)} SET (publish = '{', '.join(OPERATIONS)}')",
        )
