"""The examination: every check in order, over one connection to each server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import anyio
import msgspec

from cdcsync.config import Config, Index
from cdcsync.config.names import beside_name, own_name, quote
from cdcsync.embedders import Embedder
from cdcsync.errors import AnotherServer, CdcsyncError
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.locking import exclusive_locks
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.postgres.settings import ALWAYS_BRIEFLY, Side
from cdcsync.preflight.beside import beside_findings
from cdcsync.preflight.connections import needed, read_room, room_findings
from cdcsync.preflight.dependents import dependents_findings
from cdcsync.preflight.expressions import examine_expressions
from cdcsync.preflight.families import followed_catalog, left_out_findings
from cdcsync.preflight.findings import Finding, noting
from cdcsync.preflight.following import following_findings, seen_fingerprint
from cdcsync.preflight.generations import follow_generations, live_generation, vector_findings
from cdcsync.preflight.hosts import connection_options, examine_addresses, host_faults
from cdcsync.preflight.identity import connect_source, known_state, refuse_elsewhere
from cdcsync.preflight.indexes import Plan, make_plan, make_spec, stored_faults, vector_faults
from cdcsync.preflight.layout import examine_layout, width_faults
from cdcsync.preflight.machine import machine_findings
from cdcsync.preflight.related import computed_types, examine_statement
from cdcsync.preflight.report import Report
from cdcsync.preflight.sending import creation_faults
from cdcsync.preflight.source import SourceFacts, examine_source
from cdcsync.preflight.surroundings import surrounding_findings
from cdcsync.preflight.tables import examine_row_filter, examine_where, kind_faults, no_such_table
from cdcsync.preflight.target import TargetFacts, examine_target
from cdcsync.source.catalog import Catalog, facts_of
from cdcsync.source.families import rows_sent
from cdcsync.target.beside import with_beside
from cdcsync.target.entries import Entry


async def examine(config: Config, embedders: Mapping[str, Embedder]) -> Report:
    """Check everything that can be checked without loading a model, and put the indexes together.

    Nothing is created or changed, and no fault hides another.

    :param embedders: those that could be made; one that is missing has its finding already.
    """
    findings: list[Finding] = list(machine_findings(config))
    before = len(findings)
    specs: list[IndexSpec] = []
    async with AsyncExitStack() as stack:
        source, target = await _connect_both(stack, config, findings)
        if source is not None and target is not None:
            source = await _followed(stack, config, source, target, findings)
        source_facts = target_facts = None
        on_target: list[Finding] = []
        if target is not None:
            target_facts = await examine_target(target, config, on_target)
        stored = target_facts.stored if target_facts is not None else {}
        asked, config = config.indexes, with_beside(config, stored)
        made: list[Finding] = []
        plans = [_make_plan(name, one, embedders, made) for name, one in config.indexes.items()]
        findings[before:before] = made
        if source is not None:
            known = [oid for one in stored.values() for oid in one.oids.values()]
            begun = target_facts is not None and target_facts.begun
            elsewhere = target_facts.elsewhere if target_facts is not None else {}
            followed_by = target_facts.publication if target_facts is not None and known else None
            source_facts = await examine_source(
                *(source, config, findings), known=known, begun=begun, followed_by=followed_by, elsewhere=elsewhere
            )
            if source_facts is not None:
                await _examine_tables(source, plans, source_facts, stored)
        findings += on_target
        if target is not None and target_facts is not None:
            if source_facts is not None:
                findings += own_tables(config, source_facts, target_facts)
            specs = await _examine_indexes(target, config, plans, source_facts, target_facts, findings, embedders)
            for name in asked.keys() & stored.keys():
                findings += beside_findings(name, asked[name], stored[name], stored.get(beside_name(name)))
        broken = _pause_broken(plans, stored)
        if source_facts is not None and source_facts.catalog.publication is None:
            findings += creation_faults(source_facts)
        if source_facts is not None and target_facts is not None:
            assert source is not None
            assert target is not None
            kept = [one for plan in plans for one in plan.others]
            filling = sum(one.state == "filling" for one in kept)
            sessions = needed(config, generations=len(plans) + len(kept), filling=filling)
            wanted = {side: sum(of_flows.values()) for side, of_flows in sessions.items()}
            findings += await _examine_connections(source, target, wanted, source_facts, target_facts)
    for plan in plans:
        findings += [finding for finding in plan.findings if not _said(finding, plan, findings)]
    specs = _paired([spec for spec in specs if spec.name not in broken])
    catalog = source_facts.catalog if source_facts is not None else None
    findings = list(dict.fromkeys(findings))  # one DSN may be that of both servers
    return Report(findings, specs, broken, plans, catalog, config.indexes, target is not None)


def _make_plan(name: str, index: Index, embedders: Mapping[str, Embedder], findings: list[Finding]) -> Plan:
    """Check what the configuration says of an index; a fault of one that stands beside another is that one's alone."""
    found: list[Finding] = []
    plan = make_plan(name, index, embedders.get(index.embedder), found)
    (plan.findings if own_name(name) != name else findings).extend(found)
    return plan


def _said(finding: Finding, plan: Plan, findings: Sequence[Finding]) -> bool:
    """Say whether a finding is among others; what is wrong with a table is so for both sides of an index."""
    names = (plan.name, own_name(plan.name))
    own = msgspec.structs.replace(
        finding,
        where=finding.where.replace(*names),
        message=finding.message.replace(*names),
        hint=finding.hint and finding.hint.replace(*names),
    )
    return finding in findings or (own in findings and finding.level != "ok")


def _paired(specs: Sequence[IndexSpec]) -> list[IndexSpec]:
    """Return the indexes, each with the one that has other chunks for the same name, where there is one."""
    found = {spec.name: spec for spec in specs}
    names = {spec.name: own_name(spec.name) if spec.hidden else beside_name(spec.name) for spec in specs}
    return [msgspec.structs.replace(spec, beside=found.get(names[spec.name])) for spec in specs]


async def _connect_both(
    stack: AsyncExitStack, config: Config, findings: list[Finding]
) -> tuple[WatchedConnection | None, WatchedConnection | None]:
    """Connect to both servers at the same time: one that is away, or far, is waited for once."""
    dsns: dict[Side, str] = {"source": config.source.dsn, "target": config.target.dsn}
    connections: dict[Side, WatchedConnection | None] = {}
    found: dict[Side, list[Finding]] = {side: [] for side in dsns}

    async def enter(side: Side) -> None:
        connections[side] = await _connect(stack, dsns[side], side, found[side])

    async with anyio.create_task_group() as tasks:
        for side in dsns:
            tasks.start_soon(enter, side)
    for side in dsns:
        findings += found[side]
    return connections["source"], connections["target"]


async def _connect(stack: AsyncExitStack, dsn: str, side: Side, findings: list[Finding]) -> WatchedConnection | None:
    try:
        findings += host_faults(side, connection_options(dsn))
        connection = await stack.enter_async_context(await connect(dsn, side, application_name="cdcsync check"))
        with speaking_of(side):
            await connection.execute(ALWAYS_BRIEFLY)
            findings += await examine_addresses(side, dsn, connection)
    except CdcsyncError as error:
        findings.append(Finding.of(error, side))
        return None
    return connection


async def _followed(
    stack: AsyncExitStack, config: Config, source: WatchedConnection, target: Connection, findings: list[Finding]
) -> WatchedConnection | None:
    """Return a session with the host of the source that the pipeline follows; None if it is away just now.

    On another one there would be other tables in the place of those that are indexed, or none. If no host is the right
    one, that is said where gaps are.
    """
    try:
        state = await known_state(target, config)
    except CdcsyncError:
        return source  # what is wrong with our tables is found there
    try:
        refuse_elsewhere(source, state, config)
    except AnotherServer:
        try:
            found = await connect_source(config, state, application_name="cdcsync check")
        except AnotherServer:
            return source
        except CdcsyncError as error:
            findings.append(Finding.of(error, "source"))
            return None
        return await stack.enter_async_context(found)
    return source


async def _examine_tables(
    source: Connection, plans: Sequence[Plan], facts: SourceFacts, stored: Mapping[str, Entry]
) -> None:
    for plan in plans:
        name, entry = plan.index.table_name, stored.get(plan.name)
        plan.in_use = entry.conditions if entry is not None else frozenset()
        catalog = followed_catalog(plan, facts.catalog, facts.wanted, entry)
        plan.findings += following_findings(plan, catalog, facts.wanted, entry)
        plan.findings += left_out_findings(plan)
        plan.unfit = any(finding.level == "error" for finding in plan.findings)
        table = catalog.tables.get(name)
        with noting(plan.findings, "source", str(name)):
            if table is None:
                if not plan.findings and name.patterns:
                    plan.findings.append(_no_match(plan))
                elif not plan.findings:
                    plan.findings.append(await no_such_table(source, f"indexes.{plan.name}.table", name))
                continue
            if kind_faults(f"indexes.{plan.name}.table", table):
                continue
            plan.table = table = table.keyed_by(plan.index.key, entry.key if entry is not None else ())
            related = plan.documents.related if plan.documents is not None else ()
            plan.facts = facts_of(catalog, table, related)
            plan.oids = {one: catalog.tables[one].oid for one in plan.facts}
            plan.computed = computed_types(related, catalog)
            if related and not plan.unfit:
                in_use = entry is not None and _as_before(plan, entry)
                plan.findings += await examine_statement(source, plan, table, in_use=in_use)
            members = catalog.members.get(name, ())
            publication = catalog.publication
            for one in members or (name,):
                sent = publication.tables.get(one) if publication is not None else None
                if sent is not None:
                    of = catalog.tables[one]
                    plan.findings += await examine_row_filter(source, of, sent, catalog.role)
            plan.members = rows_sent(publication, members)
            plan.oids |= {one: catalog.tables[one].oid for one in members}
            plan.findings += await examine_expressions(source, plan.name, [table.oid, *plan.oids.values()])
            plan.where = await examine_where(source, plan.name, plan.index, table, catalog, plan.in_use, plan.findings)
            if entry is not None:
                plan.seen = seen_fingerprint(plan, catalog, entry)
        if any(finding.locked for finding in plan.findings):
            plan.locked = True
            await _name_locks(source, plan, catalog)


async def _name_locks(source: Connection, plan: Plan, catalog: Catalog) -> None:
    """Say who holds the tables of an index, in place of what failed because of that."""
    found: list[Finding] = []
    with noting(found, "source", "source"):
        locks = await exclusive_locks(source, catalog.single(plan.index.followed))
        found = [Finding.of_lock(f"indexes.{plan.name}.table", lock) for lock in locks]
    if found:
        plan.findings = [finding for finding in plan.findings if not finding.locked] + found


async def _examine_connections(
    source: Connection,
    target: Connection,
    wanted: Mapping[Side, int],
    source_facts: SourceFacts,
    target_facts: TargetFacts,
) -> list[Finding]:
    """Say whether a worker finds the connections that it opens, on one server or on two."""
    findings: list[Finding] = []
    with noting(findings, "source", "source"):
        if source_facts.server.started == target_facts.server.started:
            return list(room_findings("source and target", await read_room(source), sum(wanted.values())))
        findings += room_findings("source", await read_room(source), wanted["source"])
    with noting(findings, "target", "target"):
        findings += room_findings("target", await read_room(target), wanted["target"])
    return findings


def _no_match(plan: Plan) -> Finding:
    return Finding.error(
        f"indexes.{plan.name}.tables",
        f"no table of the source database matches {plan.index.table_name}",
        "correct the patterns, or create the first table: tables that match later are followed by themselves",
    )


def one_database(source: SourceFacts, target: TargetFacts) -> bool:
    """Say whether source and target are one database of one server."""
    return (source.server.started, source.server.database) == (target.server.started, target.server.database)


def own_tables(config: Config, source: SourceFacts, target: TargetFacts) -> list[Finding]:
    """Say which indexes would be of our own tables, when source and target are one database."""
    return [
        Finding.error(
            f"indexes.{name}.table",
            f"{table} lies in the schema {quote(config.target.schema)}, which is cdcsync's own",
            "name another schema with target.schema, or index a table of another schema",
        )
        for name, index in config.indexes.items()
        for table in index.followed
        if one_database(source, target) and table.schema == config.target.schema
    ]


def _pause_broken(plans: Sequence[Plan], stored: Mapping[str, Entry]) -> dict[str, Pause]:
    """Return the indexes that exist and cannot be kept up any more; their errors become warnings.

    So do those of an index whose tables somebody holds locked, whether it exists or not: it waits, and no other.

    If the configuration asks for something else than before, the configuration is wrong: that stays an error. So does
    an outage, which is not a fault of any index. Other vectors are a warning in any case: a migration may be on its way
    to them.
    """
    broken = {}
    for plan in plans:
        errors = [finding for finding in plan.findings if finding.level == "error"]
        outage = any(error.passes and not error.locked for error in errors)
        hidden = own_name(plan.name) != plan.name
        waits = all(error.locked for error in errors)
        as_before = waits or hidden or errors == plan.unlike or _as_before(plan, stored.get(plan.name))
        if errors and not outage and as_before:
            broken[plan.name] = Pause(errors[0].sentence, errors[0].hint)
        else:
            errors = plan.unlike
        for error in errors:
            becomes = "is paused" if plan.name in stored else "waits"
            plan.findings[plan.findings.index(error)] = Finding.warning(
                error.where, f"{error.message}; the index {plan.name} {becomes}, the others continue", error.hint
            )
    return broken


def _as_before(plan: Plan, stored: Entry | None) -> bool:
    if stored is None:
        return False
    wanted = (str(plan.index.table_name), plan.fingerprint, plan.index.columns)
    return wanted == (stored.source_table, stored.fingerprint, stored.columns)


async def _examine_indexes(
    target: Connection,
    config: Config,
    plans: Sequence[Plan],
    source_facts: SourceFacts | None,
    facts: TargetFacts,
    findings: list[Finding],
    embedders: Mapping[str, Embedder],
) -> list[IndexSpec]:
    publication = source_facts.catalog.publication if source_facts is not None else None
    shared = source_facts is not None and one_database(source_facts, facts)
    specs = []
    for plan in plans:
        stored = facts.stored.get(plan.name)
        if stored is not None:
            # This concerns another index than the existing one: the author of the configuration has to decide.
            findings += stored_faults(plan.name, plan.index, stored, config.source.slot)
            follow_generations(plan, stored, facts.generations.get(plan.name, []), embedders)
            plan.unlike = list(vector_faults(plan, stored))
            if not plan.unlike:
                plan.findings += vector_findings(plan, live_generation(stored, facts.generations.get(plan.name, [])))
            plan.findings += plan.unlike
        with noting(plan.findings, "target", f"indexes.{plan.name}"):
            await examine_layout(target, config, plan, facts, plan.findings)
            if stored is not None:
                catalog = source_facts.catalog if source_facts is not None else None
                plan.findings += await surrounding_findings(target, config, plan, stored, catalog)
        published = publication.tables.get(plan.index.table_name) if publication is not None else None
        row_filter = published.row_filter if published is not None else None
        with noting(plan.findings, "target", f"indexes.{plan.name}"):
            spec = await make_spec(target, config.target.schema, plan, facts, row_filter, plan.findings, shared=shared)
            if spec is not None:
                plan.findings += await width_faults(target, spec)
            if spec is not None and stored is not None and not spec.hidden:
                plan.findings += await dependents_findings(target, config.target.schema, spec)
            if spec is not None and not any(finding.level == "error" for finding in plan.findings):
                plan.findings.append(_summary(plan, spec))
                specs.append(spec)
    return specs


def _summary(plan: Plan, spec: IndexSpec) -> Finding:
    key = ", ".join(map(quote, spec.shape.key))
    estimate = plan.table.estimated_rows if plan.table is not None else 0
    rows = f", some {estimate:,} rows" if estimate else ""
    if spec.where is not None:
        who = "the worker" if spec.where.terms is not None else "the source, by reading each changed row again"
        rows += f", those where {spec.where.text} (decided by {who})"
    into = f"beside {spec.searched_as}" if spec.hidden else f"into {spec.config.view_name}"
    return Finding.ok(
        f"indexes.{plan.name}",
        f"{spec.shape.table} by ({key}){rows}, {into}; {spec.config.embedder} makes {spec.dimensions} dimensions",
    )
