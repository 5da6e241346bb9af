"""Objects of users that are built on an index, and what becomes of them when a column's type changes.

A view of ours that others are built on keeps its columns' types, so its index is followed all the same. An object that
reads the chunks table itself keeps the column from changing: that index would be paused.

Source: PostgreSQL, "ALTER TABLE" (SET DATA TYPE), "Dependency Tracking".
"""

from __future__ import annotations

from collections.abc import Mapping

from cdcsync.config.names import named, quote
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.types import stored_types
from cdcsync.target.ddl.chunks_view import chunks_view_name
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.policies import POLICY
from cdcsync.target.ddl.views import read_view


async def dependents_findings(connection: Connection, schema: str, spec: IndexSpec) -> list[Finding]:
    """Say what is built on columns whose types change with the next start."""
    stored = await stored_types(connection, schema, spec.relations)
    columns, types = spec.shape.key + spec.shape.carried, spec.key_types + spec.carried_types
    wanted = dict(zip(columns, types, strict=True))
    changed = {name: type_ for name, type_ in wanted.items() if stored.get(name, type_) != type_}
    if not changed:
        return []
    views = [spec.config.view_name, chunks_view_name(spec.config.view_name)]
    chunks = Names(schema, spec.relations).chunks
    findings = []
    for view in views:
        present = await read_view(connection, view, chunks)
        if present is not None and present.built_on and (shown := changed.keys() & present.columns.keys()):
            kept = ", ".join(f"{quote(name)} stays {present.columns[name]}" for name in sorted(shown))
            findings.append(
                Finding.warning(
                    str(view),
                    f"columns of the index get another type, and {named(present.built_on)} is built on {view}: there"
                    f" {kept}, and values that this type cannot have are NULL",
                    "drop what is built on it, start the worker, and create that again",
                )
            )
    cursor = await connection.execute(
        """
        SELECT DISTINCT coalesce(r.ev_class::regclass::text, pg_describe_object(d.classid, d.objid, d.objsubid))
        FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid
        LEFT JOIN pg_rewrite r ON d.classid = 'pg_rewrite'::regclass AND r.oid = d.objid
        LEFT JOIN pg_policy p ON d.classid = 'pg_policy'::regclass AND p.oid = d.objid
        LEFT JOIN pg_class c ON c.oid = r.ev_class LEFT JOIN pg_namespace n ON n.oid = c.relnamespace
        WHERE d.refobjid = to_regclass(%s) AND a.attname = ANY(%s) AND p.polname IS DISTINCT FROM %s
            AND d.classid IN ('pg_rewrite'::regclass, 'pg_policy'::regclass, 'pg_trigger'::regclass)
            AND (n.nspname, c.relname) IS DISTINCT FROM (%s::name, %s::name)
            AND (n.nspname, c.relname) IS DISTINCT FROM (%s::name, %s::name) ORDER BY 1
        """,
        [
            chunks.as_string(connection),
            list(changed),
            POLICY,
            *(part for one in views for part in (one.schema, one.name)),
        ],
    )
    if own := [name for (name,) in await cursor.fetchall()]:
        findings.append(
            Finding.error(
                f"indexes.{spec.name}",
                f"{_listed(changed)} of the chunks table, which {named(own)} reads",
                "drop that, and create it again once the index is live; build on the index's view instead: it does"
                " not stand in the way",
            )
        )
    return findings


def _listed(changed: Mapping[str, str]) -> str:
    return ", ".join(f"{quote(name)} has to become {type_}" for name, type_ in changed.items())
