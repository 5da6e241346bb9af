"""The keys that an index holds, a page at a time, in the target's own order; and what is stored under given keys.

Every statement here goes through a raw cursor: a column's name may hold a % that is not a placeholder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import psycopg
from psycopg import sql

from cdcsync.model.changeset import BACKFILL
from cdcsync.model.rows import Key, Row
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.comparisons import comparisons, in_parts, parts_after
from cdcsync.postgres.queries import fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.relations import Names
from cdcsync.target.ddl.tiers import DISCARDED
from cdcsync.target.failures.documents import TABLE


async def page_of_keys(
    connection: Connection, schema: str, spec: IndexSpec, after: Key | None, limit: int
) -> list[Key]:
    """Return up to `limit` keys above `after`, of documents and of those that could not be made.

    They are as the target renders them. The order is the target's and means nothing to the source: two servers may
    sort text differently.
    """
    columns = [sql.Identifier(name) for name in spec.shape.key]
    listed = sql.SQL(", ").join(columns)
    values = [sql.SQL(f"${at}::text::{type_}") for at, type_ in enumerate(spec.key_types, start=1)]
    parts: list[sql.Composable] = [sql.SQL("true")]
    if after is not None:
        parts = parts_after(columns, values, await comparisons(connection, spec.key_types))
    documents = sql.SQL("{} WHERE chunk_no = 0").format(Names(schema, spec.relations).chunks)
    failed = sql.SQL("(SELECT {} FROM {} WHERE index_name = {} AND key <> '{{}}') AS f WHERE true").format(
        sql.SQL(", ").join(
            sql.SQL("key[{}]::{} AS {}").format(sql.Literal(at), sql.SQL(type_), column)
            for at, (column, type_) in enumerate(zip(columns, spec.key_types, strict=True), start=1)
        ),
        sql.Identifier(schema, TABLE),
        sql.Literal(spec.name),
    )
    of = [sql.SQL("{} AND {}").format(one, part) for one in (documents, failed) for part in parts]
    rows = await fetch_texts(
        connection,
        sql.SQL("SELECT {listed} FROM {of} AS k ORDER BY {listed} LIMIT {limit}").format(
            listed=listed, of=in_parts(listed, of, listed, limit), limit=sql.Literal(limit)
        ),
        list(after or ()),
    )
    return cast(list[Key], rows)


async def stored_documents(
    connection: Connection, schema: str, spec: IndexSpec, keys: Sequence[Key]
) -> dict[Key, tuple[Row, bytes]]:
    """Return the carried columns and the document hash that the index holds under each of `keys`, if it does."""
    columns = [sql.Identifier("c", name) for name in spec.shape.carried]
    rows = await fetch_texts(
        connection,
        sql.SQL("SELECT {} FROM {} AND c.chunk_no = 0").format(
            sql.SQL(", ").join([sql.SQL("k.place"), sql.SQL("encode(c.document_hash, 'hex')"), *columns]),
            await _joined(connection, schema, spec),
        ),
        _arrays(spec, keys),
    )
    return {
        keys[int(cast(str, place)) - 1]: (tuple(carried), bytes.fromhex(cast(str, hash_)))
        for place, hash_, *carried in rows
    }


async def stored_digests(
    connection: Connection, schema: str, spec: IndexSpec, keys: Sequence[Key], digest: sql.Composable
) -> dict[Key, int]:
    """Return a digest of each document that the index holds under one of `keys`.

    :param digest: SQL of it, over `c."key text"`, `c."carried text"` and `c.document_hash`.
    """
    if not keys:
        return {}
    rows = await fetch_texts(
        connection,
        sql.SQL(
            'SELECT c."key place", {digest} FROM (SELECT k.place AS "key place", ROW({keys})::text AS "key text",'
            ' ROW({carried})::text AS "carried text", c.document_hash FROM {joined} AND c.chunk_no = 0) AS c'
        ).format(
            digest=digest,
            keys=sql.SQL(", ").join(sql.Identifier("c", name) for name in spec.shape.key),
            carried=sql.SQL(", ").join(sql.Identifier("c", name) for name in spec.shape.carried),
            joined=await _joined(connection, schema, spec),
        ),
        _arrays(spec, keys),
    )
    return {keys[int(cast(str, place)) - 1]: int(cast(str, one)) for place, one in rows}


async def written_keys(connection: Connection, schema: str, spec: IndexSpec, keys: Sequence[Key]) -> dict[Key, Key]:
    """Return how the index writes each of `keys` that it holds: 1.0 for 1."""
    if not keys:
        return {}
    rows = await fetch_texts(
        connection,
        sql.SQL("SELECT k.place, {} FROM {} AND c.chunk_no = 0").format(
            sql.SQL(", ").join([sql.Identifier("c", name) for name in spec.shape.key]),
            await _joined(connection, schema, spec),
        ),
        _arrays(spec, keys),
    )
    return {keys[int(cast(str, place)) - 1]: cast(Key, tuple(key)) for place, *key in rows}


async def discard_vectors(connection: Connection, schema: str, spec: IndexSpec, keys: Sequence[Key]) -> int:
    """Queue the vectors of these documents to be made again, in every generation; the caller commits. Returns how many.

    The present vectors stay searchable, as stale ones, until their successors are stored.
    """
    names = Names(schema, spec.relations)
    cursor = psycopg.AsyncRawCursor(connection)
    # The backlog before the vectors: the embed loop locks in this order too.
    await cursor.execute(
        sql.SQL(
            "WITH touched AS (SELECT c.chunk_id, c.content_hash FROM {joined})"
            " INSERT INTO {backlog} AS b (generation, chunk_id, content_hash, lane)"
            " SELECT generation, chunk_id, content_hash, {lane} FROM touched"
            " CROSS JOIN unnest({generations}::integer[]) AS generation ON CONFLICT (chunk_id, generation)"
            " DO UPDATE SET attempts = 0, error = NULL, next_attempt_at = now(), content_hash = excluded.content_hash"
        ).format(
            joined=await _joined(connection, schema, spec),
            backlog=names.backlog,
            generations=sql.Literal([one.generation for one in spec.generations]),
            lane=sql.Literal(BACKFILL),
        ),
        _arrays(spec, keys),
    )
    queued = cursor.rowcount
    tiers = [tier for one in spec.generations for tier in names.tiers(one.generation).values()]
    await cursor.execute(sql.SQL("LOCK TABLE {} IN ROW EXCLUSIVE MODE").format(sql.SQL(", ").join(tiers)))
    for tier in tiers:
        await cursor.execute(
            sql.SQL(
                "UPDATE {tier} AS v SET content_hash = {none} FROM {joined}"
                " AND v.chunk_id = c.chunk_id AND v.content_hash <> {none}"
            ).format(tier=tier, none=DISCARDED, joined=await _joined(connection, schema, spec)),
            _arrays(spec, keys),
        )
    return queued


async def delete_vectors_without_chunks(connection: Connection, schema: str, spec: IndexSpec) -> int:
    """Delete the vectors, and the places in the backlog, that belong to no chunk; returns how many.

    Searches never see such vectors, HNSW does; a text that no chunk has would be waited for without an end.

    Needs a connection in autocommit: each table is read whole, so each has a transaction of its own, and no row stays
    locked while the next table is read. A kill in between leaves vectors that the next build or repair deletes.
    """
    names = Names(schema, spec.relations)
    tiers = [tier for one in spec.generations for tier in names.tiers(one.generation).values()]
    deleted = 0
    for table in (names.backlog, *tiers):
        cursor = await connection.execute(
            sql.SQL("DELETE FROM {} AS v WHERE NOT EXISTS (SELECT FROM {} AS c WHERE c.chunk_id = v.chunk_id)").format(
                table, names.chunks
            )
        )
        crash_point("vectors without a chunk deleted")
        deleted += cursor.rowcount
    return deleted


async def canonical(connection: Connection, spec: IndexSpec, keys: Sequence[Key]) -> list[Key]:
    """Return the keys as the server renders them: 7 for 007.

    :raises psycopg.DataError: one is not a value of its type; the message names it.
    """
    columns = [sql.SQL(f"k.k{at}::{type_}") for at, type_ in enumerate(spec.key_types)]
    rows = await fetch_texts(
        connection,
        sql.SQL("SELECT {} FROM {} ORDER BY k.place").format(sql.SQL(", ").join(columns), _given(spec)),
        _arrays(spec, keys),
    )
    return cast(list[Key], rows)


async def _joined(connection: Connection, schema: str, spec: IndexSpec) -> sql.Composable:
    """Return SQL of the given keys `k` with the chunks `c` under each; it ends in a WHERE that can be extended."""
    same = [
        sql.SQL("{} {} k.{}::{}").format(
            sql.Identifier("c", name), comparison.equal, sql.Identifier(f"k{at}"), sql.SQL(type_)
        )
        for at, (name, type_, comparison) in enumerate(
            zip(spec.shape.key, spec.key_types, await comparisons(connection, spec.key_types), strict=True)
        )
    ]
    return sql.SQL("{} CROSS JOIN LATERAL (SELECT * FROM {} AS c WHERE {} OFFSET 0) AS c WHERE true").format(
        _given(spec), Names(schema, spec.relations).chunks, sql.SQL(" AND ").join(same)
    )


def _given(spec: IndexSpec) -> sql.Composable:
    places = range(len(spec.shape.key))
    return sql.SQL("unnest({}) WITH ORDINALITY AS k({}, place)").format(
        sql.SQL(", ").join([sql.SQL(f"${at + 1}::text[]") for at in places]),
        sql.SQL(", ").join([sql.Identifier(f"k{at}") for at in places]),
    )


def _arrays(spec: IndexSpec, keys: Sequence[Key]) -> list[list[str]]:
    return [[key[at] for key in keys] for at in range(len(spec.shape.key))]
