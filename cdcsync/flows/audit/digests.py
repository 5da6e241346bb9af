"""Sums of document hashes per bucket of keys, computed by each server over its own rows.

A document's digest covers its key, its carried columns and its text, all as the servers render them. Sums of digests
do not depend on the order of rows, so it does not matter that two servers may sort text differently. The source is
read in pages, so that no snapshot there is held for longer than a page takes.

Source: PostgreSQL, "Binary String Functions" (sha256), "Composite Types" (their text form).
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from typing import Any, cast

import anyio.to_thread
import msgspec
from psycopg import sql

from cdcsync.config.names import quote
from cdcsync.documents.chunks.sizes import WHITE_SPACE
from cdcsync.errors import DocumentError
from cdcsync.model.rows import Key, Row
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.comparisons import comparisons, follows
from cdcsync.postgres.queries import fetch_texts
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.relations import Names

PAGE_ROWS = 50_000
"""Rows of the source in one query: a fraction of a second, so that its snapshot keeps no row versions alive."""

MADE_HERE_ROWS = 1_000
"""Rows in one query where documents are made by code: their texts are all in memory here."""


class Sums(msgspec.Struct):
    """Count and sum of digests per bucket; `rows` of them all."""

    by_bucket: dict[int, tuple[int, int]]
    rows: int = 0

    def add(self, bucket: int, rows: int, total: int) -> None:
        """Add the sum of a part of a bucket."""
        known_rows, known = self.by_bucket.get(bucket, (0, 0))
        self.by_bucket[bucket] = (known_rows + rows, known + total)
        self.rows += rows

    def differing(self, other: Sums) -> dict[int, int]:
        """Return the buckets in which the two differ, each with the rows that both sides have there."""
        buckets = self.by_bucket.keys() | other.by_bucket.keys()
        nothing = (0, 0)
        return {
            bucket: self.by_bucket.get(bucket, nothing)[0] + other.by_bucket.get(bucket, nothing)[0]
            for bucket in buckets
            if self.by_bucket.get(bucket, nothing) != other.by_bucket.get(bucket, nothing)
        }


class SourceDigests:
    """The digests of the source's rows: what each comes to as a document."""

    def __init__(self, connection: Connection, spec: IndexSpec) -> None:
        self._connection = connection
        self._spec = spec

    async def sums(self, buckets: int) -> Sums:
        """Return the sums of all rows."""
        sums = Sums({})
        if self._spec.documents.by_code:
            async for bucket, _, digest in self._made_here(buckets):
                sums.add(bucket, 1, digest)
            return sums
        async for row in self._scan(buckets, "count(*), sum(p.digest)", sql.SQL("GROUP BY p.bucket"), None):
            sums.add(int(row[0]), int(row[1]), int(row[2]))
        return sums

    async def rows(self, buckets: int, wanted: Sequence[int]) -> AsyncIterator[tuple[Key, int]]:
        """Yield key and digest of each row in the wanted buckets."""
        if self._spec.documents.by_code:
            among = set(wanted)
            async for bucket, key, digest in self._made_here(buckets):
                if bucket in among:
                    yield key, digest
            return
        async for row in self._scan(buckets, "1, p.digest", sql.SQL(""), wanted):
            yield tuple(row[3:]), int(row[2])

    async def _made_here(self, buckets: int) -> AsyncIterator[tuple[int, Key, int]]:
        """Yield bucket, key and digest of all rows, whose documents are made by code and so not by the server."""
        spec = self._spec
        keys, above = await self._keys()
        ordered = sql.SQL(", ").join(keys)
        after: Key | None = None
        while True:
            page = await fetch_texts(
                self._connection,
                sql.SQL(
                    "SELECT ROW({ordered})::text, ROW({carried})::text, {columns}"
                    " FROM {published} AS t {above} ORDER BY {ordered} LIMIT {limit}"
                ).format(
                    ordered=ordered,
                    carried=sql.SQL(", ").join(sql.Identifier("t", name) for name in spec.shape.carried),
                    columns=sql.SQL(", ").join(sql.Identifier("t", name) for name in spec.shape.columns),
                    published=published(spec),
                    above=sql.SQL("") if after is None else sql.SQL("WHERE {}").format(above),
                    limit=sql.Literal(MADE_HERE_ROWS),
                ),
                list(after or ()),
            )
            for bucket, key, digest in await anyio.to_thread.run_sync(_digests, spec, page, buckets):
                yield bucket, key, digest
            if len(page) < MADE_HERE_ROWS:
                return
            after = spec.shape.key_of(tuple(page[-1][2:]))

    async def _keys(self) -> tuple[list[sql.Identifier], sql.Composable]:
        """Return the key's columns, and the condition for rows after the one whose key is given."""
        keys = [sql.Identifier("t", name) for name in self._spec.shape.key]
        above = follows(
            keys,
            [sql.SQL(f"${at}::text::{type_}") for at, type_ in enumerate(self._spec.source_key_types, start=1)],
            await comparisons(self._connection, self._spec.source_key_types),
        )
        return keys, above

    async def _scan(
        self, buckets: int, figures: str, grouped: sql.Composable, wanted: Sequence[int] | None
    ) -> AsyncIterator[Sequence[str]]:
        """Yield (bucket, figures…, key…) over all pages; grouped rows have no key."""
        spec = self._spec
        keys, above = await self._keys()
        ordered = sql.SQL(", ").join(keys)
        document = spec.documents.sql(lambda name: f"t.{quote(name)}")
        document_hash = spec.documents.hash_sql(lambda name: f"t.{quote(name)}")
        places = [sql.Identifier(f"k{at}") for at in range(len(keys))]
        blank = WHITE_SPACE if self._connection.info.parameter_status("server_encoding") == "UTF8" else " \t\n\v\f\r"
        no_key = sql.SQL(", ").join(sql.SQL(f"NULL::{type_}") for type_ in spec.source_key_types)
        listed = sql.SQL(", ").join(sql.SQL("p.{}").format(place) for place in places)
        after: Key | None = None
        while True:
            statement = sql.SQL(
                """
                WITH page AS MATERIALIZED (
                    SELECT r.*, {bucket} AS bucket, {digest} AS digest FROM (
                        SELECT {keys}, row_number() OVER (ORDER BY {ordered}) AS place,
                               ROW({ordered})::text AS key_text, ROW({carried})::text AS carried_text,
                               {document} AS document, {document_hash} AS document_hash
                        FROM {published} AS t {above} ORDER BY {ordered} LIMIT {limit}
                    ) AS r
                )
                SELECT p.bucket, {figures}, {own_key} FROM page AS p
                WHERE p.digest IS NOT NULL {wanted} {grouped}
                UNION ALL
                (SELECT NULL, p.place, NULL, {listed} FROM page AS p ORDER BY p.place DESC LIMIT 1)
                """
            ).format(
                bucket=_bucket(buckets, "r.key_text"),
                digest=sql.SQL("CASE WHEN btrim(r.document, {}) <> '' THEN {} END").format(
                    sql.Literal(blank), _digest("r.key_text", "r.carried_text", "r.document_hash")
                ),
                keys=sql.SQL(", ").join(
                    sql.SQL("{} AS {}").format(key, place) for key, place in zip(keys, places, strict=True)
                ),
                ordered=ordered,
                carried=sql.SQL(", ").join(sql.Identifier("t", name) for name in spec.shape.carried),
                document=sql.SQL(document),
                document_hash=sql.SQL(document_hash),
                published=published(spec),
                above=sql.SQL("") if after is None else sql.SQL("WHERE {}").format(above),
                limit=sql.Literal(PAGE_ROWS),
                figures=sql.SQL(figures),
                own_key=listed if wanted is not None else no_key,
                listed=listed,
                wanted=_among(wanted, "p.bucket"),
                grouped=grouped,
            )
            end: Sequence[Any] | None = None
            for row in await fetch_texts(self._connection, statement, after or ()):
                if row[0] is None:
                    end = row
                else:
                    yield cast(Sequence[str], row)
            if end is None or int(end[1]) < PAGE_ROWS:
                return
            after = tuple(end[3:])


def _digests(spec: IndexSpec, page: Sequence[Row], buckets: int) -> list[tuple[int, Key, int]]:
    """Return what the server's SQL would: bucket, key and digest of each row that has a place in the index.

    A row that a function fails for should have one: its digest is of no document that the index could hold.
    """
    found = []
    for key_text, carried_text, *values in cast(Sequence[Sequence[str | None]], page):
        row: Row = tuple(values)
        try:
            made = spec.render(row)
            if not made.text.strip(WHITE_SPACE):
                continue
            document_hash = made.hash
        except DocumentError:
            document_hash = b""
        digest = hashlib.sha256(f"{key_text} {carried_text}".encode() + document_hash).digest()
        bucket = hashlib.sha256(str(key_text).encode()).digest()
        found.append(
            (
                int.from_bytes(bucket[:4]) & (buckets - 1),
                spec.shape.key_of(row),
                int.from_bytes(digest[:8], signed=True),
            )
        )
    return found


class IndexDigests:
    """The digests of the index's documents."""

    def __init__(self, connection: Connection, schema: str, spec: IndexSpec) -> None:
        self._connection = connection
        self._spec = spec
        self._chunks = Names(schema, spec.name).chunks

    async def sums(self, buckets: int) -> Sums:
        """Return the sums of all documents."""
        sums = Sums({})
        found = await self._select(
            buckets, sql.SQL("count(*), sum(d.digest)"), sql.SQL("GROUP BY d.bucket"), sql.SQL("")
        )
        for bucket, rows, total in cast(list[tuple[str, str, str]], found):
            sums.add(int(bucket), int(rows), int(total))
        return sums

    async def rows(self, buckets: int, wanted: Sequence[int]) -> AsyncIterator[tuple[Key, int]]:
        """Yield key and digest of each document in the wanted buckets."""
        keys = sql.SQL(", ").join(sql.Identifier("d", f"k{at}") for at in range(len(self._spec.shape.key)))
        found = await self._select(
            buckets, sql.SQL("d.digest, {}").format(keys), sql.SQL(""), _among(wanted, "d.bucket")
        )
        for _, digest, *key in cast(list[list[str]], found):
            yield tuple(key), int(digest)

    async def _select(
        self, buckets: int, figures: sql.Composable, grouped: sql.Composable, wanted: sql.Composable
    ) -> list[Row]:
        keys = [sql.Identifier("c", name) for name in self._spec.shape.key]
        return await fetch_texts(
            self._connection,
            sql.SQL(
                """
                SELECT d.bucket, {figures} FROM (
                    SELECT {keys}, {bucket} AS bucket, {digest} AS digest FROM (
                        SELECT c.*, ROW({ordered})::text AS "key text", ROW({carried})::text AS "carried text"
                        FROM {chunks} AS c WHERE c.chunk_no = 0
                    ) AS c
                ) AS d WHERE true {wanted} {grouped}
                """
            ).format(
                figures=figures,
                keys=sql.SQL(", ").join(
                    sql.SQL("{} AS {}").format(key, sql.Identifier(f"k{at}")) for at, key in enumerate(keys)
                ),
                bucket=_bucket(buckets, 'c."key text"'),
                digest=_digest('c."key text"', 'c."carried text"', "c.document_hash"),
                ordered=sql.SQL(", ").join(keys),
                carried=sql.SQL(", ").join(sql.Identifier("c", name) for name in self._spec.shape.carried),
                chunks=self._chunks,
                wanted=wanted,
                grouped=grouped,
            ),
        )


def published(spec: IndexSpec) -> sql.Composable:
    """Return SQL of the rows that the publication sends, as a subquery; the role may be allowed no other columns."""
    filter_ = sql.SQL("(" + spec.row_filter + ")") if spec.row_filter else sql.SQL("true")
    table = sql.Identifier(spec.shape.table.schema, spec.shape.table.name)
    columns = sql.SQL(", ").join(sql.Identifier("t", name) for name in dict.fromkeys(spec.shape.columns))
    return sql.SQL("(SELECT {} FROM {} AS t WHERE {})").format(columns, table, filter_)


def _among(wanted: Sequence[int] | None, column: str) -> sql.Composable:
    if wanted is None:
        return sql.SQL("")
    return sql.SQL("AND " + column + " = ANY({}::int[])").format(sql.Literal("{" + ",".join(map(str, wanted)) + "}"))


def _digest(key: str, carried: str, document_hash: str) -> sql.Composable:
    """Return SQL of a 64-bit digest of a document."""
    text = f"convert_to({key} || ' ' || {carried}, 'UTF8')"
    return sql.SQL(f"('x' || encode(substring(sha256({text} || {document_hash}), 1, 8), 'hex'))::bit(64)::int8")


def _bucket(buckets: int, key: str) -> sql.Composable:
    """Return SQL of a key's bucket, of a power of two of them."""
    return sql.SQL(
        f"(('x' || encode(substring(sha256(convert_to({key}, 'UTF8')), 1, 4), 'hex'))::bit(32)::int & {buckets - 1})"
    )
