"""The view of an index's chunks, beside the view of its vectors: a new text is in it before it has a vector.

Source: PostgreSQL, "CREATE VIEW".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import structlog
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.config.names import MAX_NAME_BYTES
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.grants import replace_view, view_settings
from cdcsync.target.ddl.names import Names

log = structlog.get_logger()


def chunks_view_name(view: QualifiedName) -> QualifiedName:
    """Return the name of the view of chunks that is beside an index's view."""
    name = f"{view.name}_chunks"
    if len(name.encode()) > MAX_NAME_BYTES:
        digest = hashlib.sha256(view.name.encode()).hexdigest()[:8]
        kept = view.name.encode()[: MAX_NAME_BYTES - len("_chunks_") - len(digest)].decode(errors="ignore")
        name = f"{kept}_chunks_{digest}"
    return QualifiedName(view.schema, name)


def chunks_marker(spec: IndexSpec) -> str:
    """Return how the comment of an index's own view of chunks begins."""
    return f"cdcsync chunks of index {spec.name}: "


async def chunks_view_settings(connection: Connection, spec: IndexSpec) -> list[sql.Composed] | None:
    """Return the statements that give the view of chunks its options and grants again.

    None where the name is another relation's.
    """
    view = chunks_view_name(spec.config.view_name)
    existing = await fetch_row(
        connection,
        "SELECT c.oid, c.relkind = 'v' AND starts_with(obj_description(c.oid, 'pg_class'), %s) FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        [chunks_marker(spec), view.schema, view.name],
    )
    if existing is None:
        return []
    if not existing[1]:
        return None
    return await view_settings(connection, existing[0], sql.Identifier(view.schema, view.name))


async def drop_chunks_view(connection: Connection, spec: IndexSpec) -> None:
    """Drop the view of chunks; `put_chunks_view` makes it again."""
    view = chunks_view_name(spec.config.view_name)
    await connection.execute(sql.SQL("DROP VIEW IF EXISTS {}").format(sql.Identifier(view.schema, view.name)))


async def put_chunks_view(
    connection: Connection, schema: str, spec: IndexSpec, settings: Sequence[sql.Composed] | None
) -> None:
    """Create the view of chunks, or give it the columns that the index has now. The caller's transaction commits.

    :param settings: from `chunks_view_settings`; None leaves the relation of that name alone.
    """
    view = chunks_view_name(spec.config.view_name)
    if settings is None:
        log.warning("chunks_view_left_out", index=spec.name, view=str(view))
        return
    identifier = sql.Identifier(view.schema, view.name)
    searchable = () if spec.config.search is None else ("search",)
    columns = [*spec.shape.key, *spec.shape.carried, "chunk_no", "content", *searchable]
    present = await fetch_row(
        connection,
        "SELECT array(SELECT attname::text FROM pg_attribute WHERE attrelid = c.oid AND attnum > 0 ORDER BY attnum)"
        " FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        [view.schema, view.name],
    )
    if present is not None and present[0] == columns:
        return
    statement = sql.SQL("CREATE OR REPLACE VIEW {} AS SELECT {} FROM {} AS c").format(
        identifier,
        sql.SQL(", ").join(sql.Identifier("c", name) for name in columns),
        Names(schema, spec.name).chunks,
    )
    await replace_view(connection, identifier, statement, settings)
    comment = f"{chunks_marker(spec)}all chunks of {spec.shape.table}, also those without a vector"
    await connection.execute(sql.SQL("COMMENT ON VIEW {} IS {}").format(identifier, sql.Literal(comment)))
