"""The table `backfills`, and those of the keys and of the findings that belong to its rows.

Source: PostgreSQL, "NOTIFY".
"""

from __future__ import annotations

import hashlib
from typing import Any, LiteralString

from psycopg import sql

from cdcsync.model.requests import Request

DDL: tuple[LiteralString, ...] = (
    """
    CREATE TABLE IF NOT EXISTS {schema}.backfills (
        id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        index_name text NOT NULL REFERENCES {schema}.indexes ON DELETE CASCADE,
        kind text NOT NULL,
        rewrite boolean NOT NULL DEFAULT false,
        force_embed boolean NOT NULL DEFAULT false,
        filter text,
        keyed boolean NOT NULL DEFAULT false,
        max_rows_per_s int CHECK (max_rows_per_s > 0),
        state text NOT NULL DEFAULT 'requested'
            CHECK (state IN ('requested', 'running', 'paused', 'done', 'failed', 'cancelled')),
        phase text NOT NULL DEFAULT 'rows' CHECK (phase IN ('rows', 'orphans')),
        cursor text[],
        rows_done bigint NOT NULL DEFAULT 0,
        rows_total bigint,
        error text,
        requested_at timestamptz NOT NULL DEFAULT now(),
        started_at timestamptz,
        finished_at timestamptz
    )
    """,
    # Earlier versions held the kinds to a list that could not be added to.
    "ALTER TABLE {schema}.backfills DROP CONSTRAINT IF EXISTS backfills_kind_check",
    "ALTER TABLE {schema}.backfills ADD COLUMN IF NOT EXISTS through text",
    "ALTER TABLE {schema}.backfills ADD COLUMN IF NOT EXISTS owed boolean NOT NULL DEFAULT false",
    "ALTER TABLE {schema}.backfills ADD COLUMN IF NOT EXISTS up_to text[]",
    "COMMENT ON COLUMN {schema}.backfills.up_to IS"
    " 'The key after which it ends, if another request had yet to read what follows when this one was asked for.'",
    "COMMENT ON COLUMN {schema}.backfills.owed IS"
    " 'Whether the worker asked for it because the index would be out of date without it: it cannot be cancelled.'",
    "COMMENT ON COLUMN {schema}.backfills.through IS"
    " 'The related table whose change asks for documents to be rebuilt.'",
    "COMMENT ON TABLE {schema}.backfills IS 'cdcsync: requests to read source tables, and how far each is.'",
    "COMMENT ON COLUMN {schema}.backfills.phase IS"
    " 'rows: reading the source; orphans: asking it which index keys it still has.'",
    "COMMENT ON COLUMN {schema}.backfills.cursor IS"
    " 'The key of the last row that was applied; commits together with the rows.'",
    "COMMENT ON COLUMN {schema}.backfills.keyed IS"
    " 'Only the keys in backfill_keys are read; cursor is then the place of the last one that was.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.backfill_keys (
        backfill_id bigint NOT NULL REFERENCES {schema}.backfills ON DELETE CASCADE,
        place bigint NOT NULL,
        key text[] NOT NULL,
        PRIMARY KEY (backfill_id, place)
    )
    """,
    "COMMENT ON TABLE {schema}.backfill_keys IS"
    " 'cdcsync: the keys that a request is about, where it is not about all; removed when the request has ended.'",
    """
    CREATE TABLE IF NOT EXISTS {schema}.differences (
        backfill_id bigint NOT NULL REFERENCES {schema}.backfills ON DELETE CASCADE,
        key text[] NOT NULL,
        problem text NOT NULL,
        PRIMARY KEY (backfill_id, key)
    )
    """,
    # Earlier versions held the problems to a list that could not be added to.
    "ALTER TABLE {schema}.differences DROP CONSTRAINT IF EXISTS differences_problem_check",
    "COMMENT ON TABLE {schema}.differences IS 'cdcsync: what a verification found to differ from the source.'",
    "CREATE INDEX IF NOT EXISTS backfills_open ON {schema}.backfills (index_name, id) "
    "WHERE state IN ('requested', 'running', 'paused')",
    # Ended requests are kept for a week, and there may be hundreds of thousands of them.
    "CREATE INDEX IF NOT EXISTS backfills_last ON {schema}.backfills (index_name, id)",
    "CREATE INDEX IF NOT EXISTS backfills_loads ON {schema}.backfills (index_name, id) "
    "WHERE kind IN ('initial', 'resync')",
    "CREATE INDEX IF NOT EXISTS backfills_ended ON {schema}.backfills (finished_at) "
    "WHERE kind IN ('replay', 'verify', 'compare', 'related')",
)
"""Needs the table `indexes`."""

COLUMNS = (
    "id, index_name, kind, rewrite, filter, state, phase, cursor, rows_done, rows_total, started_at,"
    " force_embed, keyed, max_rows_per_s, error, through, finished_at"
)
"""The columns that commands read too, which may be newer than the worker and its tables."""

SERVED = f"{COLUMNS}, up_to, owed"
"""The columns that the worker reads of the requests that it serves."""


class Tables:
    """The names of these tables in one schema, and of the channel on which the worker is told of a new request."""

    def __init__(self, schema: str) -> None:
        self.requests = sql.Identifier(schema, "backfills")
        self.keys = sql.Identifier(schema, "backfill_keys")
        self.differences = sql.Identifier(schema, "differences")
        # A hash: the server refuses channels with names of more than 63 bytes, and a schema's may have as many.
        self.channel = "cdcsync_" + hashlib.sha256(schema.encode()).hexdigest()[:16]


def to_request(row: tuple[Any, ...]) -> Request:
    """Return the request that a row of `COLUMNS`, or of `SERVED`, stands for."""
    values = list(row)
    values[7] = None if values[7] is None else tuple(values[7])
    values[17:18] = [None if key is None else tuple(key) for key in values[17:18]]
    return Request(*values)
