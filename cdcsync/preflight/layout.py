"""Where an index is to lie in the target: its tables, its view, its keyword search.

Source: PostgreSQL, "Text Search" (Configurations), "Generated Columns", "PostgreSQL Limits".
"""

from __future__ import annotations

from collections.abc import Iterator

from cdcsync.config import Config, Index
from cdcsync.config.names import own_name, quote
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding, nearest, noting
from cdcsync.preflight.indexes import Plan
from cdcsync.preflight.target import (
    OURS,
    SHARED,
    TargetFacts,
    access_faults,
    read_access,
    read_relations,
    relation_faults,
)
from cdcsync.target.ddl.languages import CJK, kept_search
from cdcsync.target.ddl.relations import entry_columns, relation_columns
from cdcsync.target.ddl.views import schemas_read
from cdcsync.target.stage import OWN as STAGED

MOST_COLUMNS = 1_600
"""MaxHeapAttributeNumber of PostgreSQL: the most columns of a table, a view or a composite type."""


async def examine_layout(
    connection: Connection, config: Config, plan: Plan, target: TargetFacts, findings: list[Finding]
) -> None:
    """Check that the index's relations can be made, or are there and ours, and note which keyword search it has."""
    name, index = plan.name, plan.index
    where = f"indexes.{name}"
    schema, view = config.target.schema, index.view_name
    stored = target.stored.get(name)
    stem = name if stored is None else stored.relations
    vectors = f"{stem}_vectors_{stored.generation if stored else 1}"
    own = [f"{stem}_chunks", f"{stem}_backlog", vectors, f"{vectors}_fresh", f"{vectors}_settled"]
    with noting(findings, "target", where):
        relations = await read_relations(connection, schema, own)
        findings += relation_faults("target.schema", relations, target.server, config)
        if own_name(name) == name:
            access = await read_access(connection, view.schema)
            findings += access_faults(f"{where}.view", access, target.server, created=view.schema == schema)
            findings += await _view_faults(connection, config, name, target)
        if index.search is not None:
            findings += await _search_faults(connection, name, index)
            if any(relation.name.name == own[0] and relation.of(OURS) for relation in relations):
                plan.search = await kept_search(connection, schema, stem, index)
            findings += search_findings(plan, schema, stem)


async def width_faults(connection: Connection, spec: IndexSpec) -> list[Finding]:
    """Say whether a table or an index of the target would have more columns than PostgreSQL allows."""
    where = f"indexes.{spec.name}"
    findings = []
    entry, most = len(entry_columns(spec)), await fetch_value(connection, "SHOW max_index_keys")
    if entry > int(most):
        findings.append(
            Finding.error(
                f"{where}.key",
                f"the key has {entry - 1} columns, and an index of the target can have {most}: the chunk's number is"
                " beside them",
                "have a unique index of fewer columns identify the rows:"
                f" ALTER TABLE {spec.shape.table} REPLICA IDENTITY USING INDEX …",
            )
        )
    widths = {what: len(columns) for what, columns in relation_columns(spec).items()}
    widths["the temporary table of a batch"] = len(spec.shape.key) + len(spec.shape.carried) + len(STAGED)
    widest = max(widths, key=widths.__getitem__)
    if (excess := widths[widest] - MOST_COLUMNS) > 0:
        findings.append(
            Finding.error(
                f"{where}.columns",
                f"{widest} would have {widths[widest]:,} columns, and PostgreSQL allows {MOST_COLUMNS:,}",
                f"take {excess:,} or more out of {where}.columns",
            )
        )
    return findings


async def _view_faults(connection: Connection, config: Config, name: str, target: TargetFacts) -> list[Finding]:
    view = config.indexes[name].view_name
    where = f"indexes.{name}.view"
    another = f"name another view with {where}"
    parts = ("chunks", "backlog", "vectors_1", "vectors_1_fresh", "vectors_1_settled")
    ours = {*SHARED, *(f"{index}_{part}" for index in config.indexes for part in parts)}
    if view.schema == config.target.schema and view.name in ours:
        return [Finding.error(where, f"{view} is the name of a table of cdcsync's own", another)]
    existing = await read_relations(connection, view.schema, [view.name])
    if any(relation.kind != "v" or not relation.of(f"{OURS} index {name}: ") for relation in existing):
        return [Finding.error(where, f"{view} exists and is not the view of this index", another)]
    schemas = await schemas_read(connection, view)
    if existing and config.target.schema not in schemas:
        of = ", ".join(map(quote, schemas))
        return [
            Finding.error(where, f"{view} is the view of an index in the schema {of}, of another pipeline", another)
        ]
    return list(relation_faults(where, existing, target.server, config))


def search_findings(plan: Plan, schema: str, relations: str) -> Iterator[Finding]:
    """Say that an index has another keyword search than the configuration asks for, and how it gets that.

    :param schema: that of our own tables.
    :param relations: how the names of the index's relations begin.
    """
    asked, has = plan.index.search, plan.search
    if has is None or has == asked:
        return
    table = f"{quote(schema)}.{quote(f'{relations}_chunks')}"
    yield Finding.warning(
        f"indexes.{plan.name}.search",
        f'the configuration asks for keyword search by "{asked}"; the index keeps that by "{has}"',
        f"ALTER TABLE {table} DROP COLUMN search CASCADE, then start the worker: it makes the column and the view"
        " again",
    )


async def _search_faults(connection: Connection, name: str, index: Index) -> list[Finding]:
    """Say whether the text search configuration exists."""
    wanted = str(index.search)
    if index.search_column is not None or wanted == CJK:
        return []
    where = f"indexes.{name}.search"
    cursor = await connection.execute(
        """
        SELECT c.oid::regconfig::text, c.cfgname = parts[cardinality(parts)],
               n.nspname = CASE cardinality(parts) WHEN 1 THEN 'pg_catalog' ELSE parts[1] END
        FROM pg_ts_config c JOIN pg_namespace n ON n.oid = c.cfgnamespace, parse_ident(%s) AS parts
        """,
        [wanted],
    )
    known = await cursor.fetchall()
    namesakes = {one: in_place for one, same_name, in_place in known if same_name}
    if any(namesakes.values()):
        return []
    best = next(iter(namesakes), None) or nearest(wanted, (one for one, *_ in known))
    return [
        Finding.error(
            where,
            f"there is no text search configuration {wanted} in the target",
            f'did you mean "{best}"?' if best else f'set {where} = "simple", or one that \\dF lists in psql',
        )
    ]
