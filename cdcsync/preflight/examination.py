"""The examination: every check in order, over one connection to each server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack

import msgspec

from cdcsync.config import Config
from cdcsync.config.names import quote
from cdcsync.embedders import Embedder
from cdcsync.errors import CdcsyncError
from cdcsync.model.pauses import Pause
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, Side, connect
from cdcsync.preflight.findings import Finding, Report, noting
from cdcsync.preflight.indexes import Plan, key_faults, make_plan, make_spec, stored_faults
from cdcsync.preflight.layout import examine_layout
from cdcsync.preflight.machine import machine_findings
from cdcsync.preflight.sending import creation_faults, sending_findings
from cdcsync.preflight.source import SourceFacts, examine_source
from cdcsync.preflight.tables import examine_row_filter, examine_table, needed_columns, table_faults
from cdcsync.preflight.target import TargetFacts, examine_target
from cdcsync.target.registry import Entry


async def examine(config: Config, embedders: Mapping[str, Embedder]) -> Report:
    """Check everything that can be checked without loading a model, and put the indexes together.

    Nothing is created or changed, and no fault hides another.

    :param embedders: those that could be made; one that is missing has its finding already.
    """
    findings: list[Finding] = list(machine_findings(config))
    specs: list[IndexSpec] = []
    broken: dict[str, Pause] = {}
    plans = [make_plan(name, index, embedders.get(index.embedder), findings) for name, index in config.indexes.items()]
    async with AsyncExitStack() as stack:
        source = await _connect(stack, config.source.dsn, "source", findings)
        target = await _connect(stack, config.target.dsn, "target", findings)
        source_facts = target_facts = None
        if source is not None and (source_facts := await examine_source(source, config, findings)) is not None:
            await _examine_tables(source, plans, source_facts, findings)
        if target is not None and (target_facts := await examine_target(target, config, findings)) is not None:
            if source_facts is not None:
                findings += own_tables(config, source_facts, target_facts)
            broken = _pause_broken(plans, target_facts, findings)
            specs = await _examine_indexes(
                target,
                config,
                [plan for plan in plans if plan.name not in broken],
                source_facts,
                target_facts,
                findings,
            )
    return Report(findings, specs, broken)


async def _connect(stack: AsyncExitStack, dsn: str, side: Side, findings: list[Finding]) -> Connection | None:
    try:
        return await stack.enter_async_context(await connect(dsn, side, application_name="cdcsync check"))
    except CdcsyncError as error:
        findings.append(Finding.of(error, side))
        return None


async def _examine_tables(
    source: Connection, plans: Sequence[Plan], facts: SourceFacts, findings: list[Finding]
) -> None:
    for plan in plans:
        plan.table = await examine_table(source, plan.name, plan.index, plan.findings)
        if plan.table is not None:
            needed = needed_columns(plan.index, plan.documents, plan.table)
            plan.findings += table_faults(plan.name, plan.index, plan.documents, plan.table, facts.server.role)
            plan.findings += sending_findings(plan.table, needed, facts)
            sent = facts.publication.tables.get(plan.table.name) if facts.publication is not None else None
            if sent is not None:
                with noting(plan.findings, "source", str(plan.table.name)):
                    plan.findings += await examine_row_filter(source, plan.table, sent, facts.server.role)
        findings += plan.findings
    if facts.publication is None:
        found = {plan.table.name: plan.table for plan in plans if plan.table is not None}
        findings += creation_faults(found.values(), facts)


def own_tables(config: Config, source: SourceFacts, target: TargetFacts) -> list[Finding]:
    """Say which indexes would be of our own tables, when source and target are one database."""
    ours = (source.server.started, source.server.database) == (target.server.started, target.server.database)
    return [
        Finding.error(
            f"indexes.{name}.table",
            f"{index.table_name} lies in the schema {quote(config.target.schema)}, which is cdcsync's own",
            "name another schema with target.schema, or index a table of another schema",
        )
        for name, index in config.indexes.items()
        if ours and index.table_name.schema == config.target.schema
    ]


def _pause_broken(plans: Sequence[Plan], facts: TargetFacts, findings: list[Finding]) -> dict[str, Pause]:
    """Return the indexes that exist and cannot follow their tables any more; their errors become warnings.

    Where the configuration asks for something else than before, the configuration is wrong: that stays an error.
    """
    broken = {}
    for plan in plans:
        errors = [finding for finding in plan.findings if finding.level == "error"]
        if errors and _as_before(plan, facts.stored.get(plan.name)):
            first = errors[0]
            broken[plan.name] = Pause(first.message, first.hint)
            for error in errors:
                findings[findings.index(error)] = Finding.warning(
                    error.where, f"{error.message}; the index {plan.name} is paused, the others go on", error.hint
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
) -> list[IndexSpec]:
    publication = source_facts.publication if source_facts is not None else None
    specs = []
    for plan in plans:
        errors = sum(finding.level == "error" for finding in findings)
        stored = facts.stored.get(plan.name)
        if stored is not None:
            findings += stored_faults(plan.name, plan.index, stored, config.source.slot, plan.embedder)
            if plan.table is not None:
                findings += key_faults(plan.name, stored, plan.table)
        await examine_layout(target, config, plan.name, facts, findings)
        published = publication.tables.get(plan.index.table_name) if publication is not None else None
        row_filter = published.row_filter if published is not None else None
        with noting(findings, "target", f"indexes.{plan.name}"):
            spec = await make_spec(target, config.target.schema, plan, facts, row_filter, findings)
            if spec is not None and errors == sum(finding.level == "error" for finding in findings):
                findings.append(_summary(plan, spec))
                specs.append(msgspec.structs.replace(spec, membership=published.membership if published else None))
    return specs


def _summary(plan: Plan, spec: IndexSpec) -> Finding:
    key = ", ".join(map(quote, spec.shape.key))
    estimate = plan.table.estimated_rows if plan.table is not None else 0
    rows = f", some {estimate:,} rows" if estimate else ""
    return Finding.ok(
        f"indexes.{plan.name}",
        f"{spec.shape.table} by ({key}){rows}, into {spec.config.view_name};"
        f" {spec.config.embedder} makes {spec.dimensions} dimensions",
    )
