"""How often words occur in an index: what the keyword leg weights words by.

Counting all words of an index takes about a second for 100,000 chunks, so it is done beside the searches, and of a
sample where the index is large. A word that is not listed is taken to be rare.

Source: PostgreSQL, "Text Search" (Gathering Document Statistics), "SELECT" (TABLESAMPLE).
"""

from __future__ import annotations

from psycopg import sql

from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.estimates import estimate_rows
from cdcsync.postgres.locking import BRIEFLY
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import Names, words_name

SAMPLE_CHUNKS = 50_000
"""Words are counted in about this many chunks. The share of chunks with a word that is in one of a hundred is then
known to within a twentieth of it."""

KEPT_WORDS = 200_000
"""The most words that are listed, the most frequent ones; a language has fewer, identifiers and numbers have no end."""


async def count_words(connection: Connection, schema: str, spec: IndexSpec) -> int:
    """Count an index's words anew and store what changed; returns how many chunks were looked at.

    :param connection: a session on the target, in autocommit.
    """
    chunks = Names(schema, spec.relations).chunks
    rows, _ = await estimate_rows(connection, chunks)
    share = min(1.0, SAMPLE_CHUNKS / rows) if rows else 1.0
    sample = sql.SQL("SELECT search FROM {}").format(chunks)
    if share < 1:
        sample += sql.SQL(" TABLESAMPLE SYSTEM ({})").format(sql.Literal(100 * share))
    async with connection.transaction():
        # One process at a time; the next one finds little to change.
        await connection.execute(
            "SELECT pg_advisory_xact_lock(hashtextextended('cdcsync words ' || %s, 0))", [spec.name]
        )
        await connection.execute(BRIEFLY)
        await connection.execute(
            'CREATE TEMP TABLE counted (lexeme text COLLATE "C" PRIMARY KEY, chunks bigint, occurrences bigint)'
            " ON COMMIT DROP"
        )
        await connection.execute(
            sql.SQL(
                "WITH looked_at AS MATERIALIZED ({sample}),"
                " counts AS (SELECT u.lexeme, count(*) AS chunks, sum(coalesce(cardinality(u.positions), 1)) AS n"
                " FROM looked_at AS s CROSS JOIN LATERAL unnest(s.search) AS u GROUP BY u.lexeme),"
                " totals AS (SELECT (SELECT count(*) FROM looked_at) AS chunks, (SELECT sum(chunks) FROM counts) AS n)"
                " INSERT INTO pg_temp.counted"
                " SELECT '', t.chunks / {share}, coalesce(t.n, 0) / {share} FROM totals AS t UNION ALL"
                " (SELECT lexeme, c.chunks / {share}, c.n / {share} FROM counts AS c"
                " WHERE c.chunks > 1 AND lexeme <> '' ORDER BY c.chunks DESC LIMIT {kept})"
            ).format(sample=sample, share=sql.Literal(share), kept=sql.Literal(KEPT_WORDS))
        )
        # Weights go by the logarithm of these numbers: what changed by less than a tenth is as good as it was.
        await connection.execute(
            sql.SQL(
                "INSERT INTO {table} AS w SELECT * FROM pg_temp.counted ON CONFLICT (lexeme) DO UPDATE"
                " SET chunks = excluded.chunks, occurrences = excluded.occurrences"
                " WHERE abs(w.chunks - excluded.chunks) > w.chunks / 10 OR w.lexeme = ''"
            ).format(table=words_name(schema, spec.relations))
        )
        await connection.execute(
            sql.SQL(
                "DELETE FROM {} AS w WHERE NOT EXISTS (SELECT FROM pg_temp.counted AS c WHERE c.lexeme = w.lexeme)"
            ).format(words_name(schema, spec.relations))
        )
        cursor = await connection.execute("SELECT chunks FROM pg_temp.counted WHERE lexeme = ''")
        row = await cursor.fetchone()
        crash_point("words counted")
    crash_point("counts of words committed")
    return round(row[0] * share) if row is not None else 0
