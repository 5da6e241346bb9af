"""The view of an index's chunks, beside the view of its vectors: a new text is in it before it has a vector.

Source: PostgreSQL, "CREATE VIEW".
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection

from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.config.names import MAX_NAME_BYTES
from cdcsync.logs import get_logger
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.views import Column, put_view, release_columns

log = get_logger()


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


def chunks_view_columns(spec: IndexSpec) -> dict[str, Column]:
    """Return the columns of the view of chunks, in their order."""
    searchable = {} if spec.config.search is None else {"search": "tsvector"}
    types = dict(zip(spec.shape.key + spec.shape.carried, spec.key_types + spec.carried_types, strict=True))
    types |= {"chunk_no": "integer", "content": "text"} | searchable
    return {name: Column(sql.Identifier("c", name), type_) for name, type_ in types.items()}


async def is_free(connection: Connection, spec: IndexSpec) -> bool:
    """Say whether the view of chunks is there, or can be made: no other relation has its name."""
    view = chunks_view_name(spec.config.view_name)
    existing = await fetch_row(
        connection,
        "SELECT c.relkind = 'v' AND starts_with(obj_description(c.oid, 'pg_class'), %s) FROM pg_class c"
        " JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = %s AND c.relname = %s",
        [chunks_marker(spec), view.schema, view.name],
    )
    return existing is None or bool(existing[0])


async def put_chunks_view(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """Create the view of chunks, or give it the columns that the index has now. The caller's transaction commits."""
    view, chunks = chunks_view_name(spec.config.view_name), Names(schema, spec.relations).chunks
    if not await is_free(connection, spec):
        log.warning("chunks_view_left_out", index=spec.name, view=str(view))
        return
    from_ = sql.SQL("{} AS c").format(chunks)
    await put_view(connection, view, chunks_view_columns(spec), from_, chunks=chunks)
    comment = f"{chunks_marker(spec)}all chunks of {spec.shape.table}, also those without a vector"
    identifier = sql.Identifier(view.schema, view.name)
    await connection.execute(sql.SQL("COMMENT ON VIEW {} IS {}").format(identifier, sql.Literal(comment)))


async def release_chunks_view(connection: Connection, schema: str, spec: IndexSpec, columns: Collection[str]) -> None:
    """Stop the view of chunks from reading these columns, so that their types can change."""
    if await is_free(connection, spec):
        view, chunks = chunks_view_name(spec.config.view_name), Names(schema, spec.relations).chunks
        from_ = sql.SQL("{} AS c").format(chunks)
        await release_columns(connection, view, columns, chunks_view_columns(spec), from_, chunks=chunks)
