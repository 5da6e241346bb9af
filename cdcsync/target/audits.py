"""How far the audit of each index is, and when the index was last proven equal to its source.

One row for each index. It is a note: a worker that lost its lock may still write it, which at worst has some rows
compared twice.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, LiteralString

import msgspec
from psycopg import sql

from cdcsync.model.rows import Key
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection

TABLE = "audits"

Phase = Literal["rows", "orphans", "chunks"]

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.audits (
        index_name text PRIMARY KEY REFERENCES {schema}.indexes ON DELETE CASCADE ON UPDATE CASCADE,
        phase text NOT NULL DEFAULT 'rows' CHECK (phase IN ('rows', 'orphans', 'chunks')),
        cursor text[],
        documents bigint NOT NULL DEFAULT 0,
        differences bigint NOT NULL DEFAULT 0,
        began_at timestamptz NOT NULL DEFAULT now(),
        finished_at timestamptz,
        proven_at timestamptz,
        found_at timestamptz
    )
    """,
    "COMMENT ON TABLE {schema}.audits IS 'cdcsync: how far the comparison of each index with its source is.'",
    "COMMENT ON COLUMN {schema}.audits.proven_at IS"
    " 'When the last comparison of the whole index ended that found nothing to differ.'",
    "COMMENT ON COLUMN {schema}.audits.found_at IS 'When something was last found to differ; it was read again.'",
    "ALTER TABLE {schema}.audits ADD COLUMN IF NOT EXISTS undecided bigint NOT NULL DEFAULT 0",
    "COMMENT ON COLUMN {schema}.audits.undecided IS"
    " 'How many documents this comparison could not judge so far, as they changed each time it looked at them.'",
    "ALTER TABLE {schema}.audits ADD COLUMN IF NOT EXISTS proven_without bigint NOT NULL DEFAULT 0",
    "COMMENT ON COLUMN {schema}.audits.proven_without IS"
    " 'How many documents the comparison that ended at proven_at could not judge: it proves nothing of these.'",
)
"""Needs the table `indexes`."""


class Place(msgspec.Struct, frozen=True):
    """Where a comparison is: `after` is the last key, or the number of the last chunk, that it has looked at."""

    phase: Phase
    after: Key | None


START = Place("rows", None)


class Audit(msgspec.Struct, frozen=True):
    """The audit of an index.

    :ivar documents: how many rows of the source this comparison has looked at.
    :ivar differences: how many documents and vectors it found to differ.
    :ivar began_at: when this comparison began.
    :ivar finished_at: when the last one ended.
    :ivar undecided: how many documents it could not judge so far.
    :ivar proven_without: how many documents the comparison that ended at `proven_at` could not judge.
    """

    place: Place
    documents: int
    differences: int
    began_at: datetime
    finished_at: datetime | None
    proven_at: datetime | None
    found_at: datetime | None
    undecided: int
    proven_without: int


class Audits:
    """The table `audits` of a schema."""

    def __init__(self, schema: str) -> None:
        self._table = sql.Identifier(schema, TABLE)

    async def begin(self, connection: Connection, index: str) -> None:
        """Begin a comparison from the start."""
        await connection.execute(
            sql.SQL(
                "INSERT INTO {} AS a (index_name) VALUES (%s) ON CONFLICT (index_name) DO UPDATE SET phase = 'rows',"
                " cursor = NULL, documents = 0, differences = 0, undecided = 0, began_at = now(), finished_at = NULL"
            ).format(self._table),
            [index],
        )

    async def read(self, connection: Connection, index: str) -> Audit | None:
        """Return the audit of an index, None if there never was one."""
        row = await fetch_row(connection, sql.SQL(_SELECT + " WHERE index_name = %s").format(self._table), [index])
        return None if row is None else _audit(row[1:])

    async def all(self, connection: Connection) -> dict[str, Audit]:
        """Return the audits by index."""
        cursor = await connection.execute(sql.SQL(_SELECT).format(self._table))
        return {row[0]: _audit(row[1:]) for row in await cursor.fetchall()}

    async def advance(
        self, connection: Connection, index: str, place: Place, *, documents: int, differences: int, undecided: int
    ) -> None:
        """Note how far a comparison is, and what it has found since it was last noted.

        :param undecided: how many documents it could not judge so far, in all.
        """
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET phase = %s, cursor = %s::text[], documents = documents + %s,"
                " differences = differences + %s, undecided = %s,"
                " found_at = CASE WHEN %s > 0 THEN clock_timestamp() ELSE found_at END,"
                # A time that is still to come was noted before the clock went back, and would look like a later proof.
                " proven_at = CASE WHEN %s = 0 OR proven_at <= clock_timestamp() THEN proven_at END"
                " WHERE index_name = %s"
            ).format(self._table),
            [
                place.phase,
                None if place.after is None else list(place.after),
                documents,
                differences,
                undecided,
                differences,
                differences,
                index,
            ],
        )

    async def finish(self, connection: Connection, index: str) -> None:
        """Note that a comparison has reached its end: if nothing was found, all that it could judge is proven equal."""
        await connection.execute(
            sql.SQL(
                "UPDATE {} SET finished_at = statement_timestamp(),"
                " found_at = CASE WHEN found_at <= statement_timestamp() THEN found_at END,"
                " proven_at = CASE WHEN differences = 0 THEN statement_timestamp() ELSE proven_at END,"
                " proven_without = CASE WHEN differences = 0 THEN undecided ELSE proven_without END"
                " WHERE index_name = %s"
            ).format(self._table),
            [index],
        )


_SELECT: LiteralString = (
    "SELECT index_name, phase, cursor, documents, differences, began_at, finished_at, proven_at, found_at,"
    " undecided, proven_without FROM {}"
)


def _audit(row: tuple[object, ...]) -> Audit:
    phase, cursor, *rest = row
    place = {"phase": phase, "after": cursor}
    return msgspec.convert({"place": place, **dict(zip(Audit.__struct_fields__[1:], rest, strict=True))}, Audit)
