"""Look-ups in one index that tell what of a batch is new to it. They read what is committed and change nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import psycopg
from psycopg import sql

from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.comparisons import comparisons
from cdcsync.postgres.liveness import same_cluster
from cdcsync.postgres.queries import BY_INDEX, fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names
from cdcsync.target.vectors import within_reach


async def texts_with_vector(
    connection: Connection, schema: str, spec: IndexSpec, hashes: Sequence[bytes]
) -> set[bytes]:
    """Return those hashes of texts that have a vector already which chunks of the index can take."""
    alike = await within_reach(connection, schema, spec, spec.alike(spec))
    of_text = [
        sql.SQL("EXISTS (SELECT FROM {} AS v WHERE v.content_hash = h OFFSET 0)").format(
            Names(schema, one.relations).vectors(one.generation)
        )
        for one in (spec, *alike)
    ]
    cursor = await connection.execute(
        sql.SQL("SELECT h FROM unnest(%s::bytea[]) AS h WHERE {}").format(sql.SQL(" OR ").join(of_text)),
        [list(hashes)],
    )
    return {cast(bytes, row[0]) for row in await cursor.fetchall()}


class LookUps:
    """Looks up in one index over one connection; `open` prepares it."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec) -> None:
        self._connection = connection
        self._schema = schema
        self.spec = self._spec = spec
        self._names = Names(schema, spec.relations)
        self._keys = [sql.Identifier(name) for name in spec.shape.key]
        self._places = [sql.Identifier(f"k{at}") for at in range(len(self._keys))]
        self._equal: list[sql.Composable] = []
        """The key columns' operators."""
        self._hashes = b""
        """The statement that looks up documents, as it is sent."""
        self._types: Sequence[str] | None = None
        """The types of the index's columns by the names that the statements know them by."""

    def flush_with(self, source: Connection) -> bool:
        """Say whether a commit in the target flushes all that this session of the source has seen: they share a WAL."""
        return same_cluster(self._connection, source)

    async def open(self) -> None:
        """Have rows looked up by an index, and ask how keys are compared; once per connection."""
        await self._connection.execute(BY_INDEX)
        self._types = await self._types_now()
        self._equal = [one.equal for one in await comparisons(self._connection, self._spec.key_types)]
        self._hashes = (
            sql.SQL(
                "SELECT s.place, c.chunk_id, c.document_hash FROM unnest({}) WITH ORDINALITY AS s({}, place)"
                " CROSS JOIN LATERAL"
                " (SELECT chunk_id, document_hash FROM {} AS c WHERE {} AND chunk_no = 0 OFFSET 0) AS c"
            )
            .format(
                sql.SQL(", ").join(sql.SQL(f"${at}::text[]") for at in range(1, len(self._keys) + 1)),
                sql.SQL(", ").join(self._places),
                self._names.chunks,
                sql.SQL(" AND ").join(
                    sql.SQL("c.{} {} s.{}::{}").format(key, equal, place, sql.SQL(type_))
                    for key, equal, place, type_ in zip(
                        self._keys, self._equal, self._places, self._spec.key_types, strict=True
                    )
                ),
            )
            .as_bytes(self._connection)
        )

    async def renamed(self) -> bool:
        """Say whether somebody has renamed or moved a type of the index's columns since `open`, pgvector's included."""
        return self._types is not None and await self._types_now() != self._types

    async def _types_now(self) -> Sequence[str]:
        vectors = [self._names.vectors(one.generation) for one in self._spec.generations]
        row = await fetch_one(
            self._connection,
            "SELECT coalesce(array_agg(format_type(atttypid, atttypmod) ORDER BY attrelid, attnum), '{}')"
            " FROM pg_attribute WHERE attrelid = ANY(SELECT to_regclass(name) FROM unnest(%s::text[]) AS name)"
            " AND attnum > 0 AND NOT attisdropped",
            [[table.as_string(self._connection) for table in (self._names.chunks, *vectors)]],
        )
        return cast(Sequence[str], row[0])

    async def stored_hashes(self, keys: Sequence[Key]) -> dict[Key, bytes]:
        """Return the document hash of each key that the index holds, read outside the apply transaction.

        Two of `keys` that the server takes for the same key have no hash here: their order decides, not their content.
        """
        if not keys:
            return {}
        # A raw cursor: a column's name may hold a % that is not a placeholder.
        cursor = psycopg.AsyncRawCursor(self._connection)
        await cursor.execute(self._hashes, [list(column) for column in zip(*keys, strict=True)])
        by_chunk: dict[int, tuple[Key, bytes] | None] = {}
        for place, chunk_id, document_hash in await cursor.fetchall():
            by_chunk[chunk_id] = None if chunk_id in by_chunk else (keys[place - 1], document_hash)
        return dict(entry for entry in by_chunk.values() if entry is not None)

    async def known_vectors(self, hashes: Sequence[bytes]) -> set[bytes]:
        """Return those hashes that some chunk has a vector of."""
        return await texts_with_vector(self._connection, self._schema, self._spec, hashes)
