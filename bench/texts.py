"""What does a changed text cost the target's backend, and which part of that could be saved?

10,000 texts of 500 bytes change, in batches of 2,000, in a copy of an index's table of chunks: as it is, and with parts
of it left out in turns. Each is done in five rounds, on a vacuumed table; the figures are medians of the microseconds
of a processor that the backend takes for a text. GIN keeps new entries aside for a while (`fastupdate`), and who moves
them into the index is chance: nobody vacuums meanwhile, and each round ends with that, which counts.

- whole: the UPDATE of the table as it is, with its tsvector, the GIN index on that, and two unique indexes.
- without_gin: no index has a column that changes, so PostgreSQL leaves all of them alone (HOT).
- without_tsvector: the same, and nothing computes the tsvector.
- without_unique_…: one of the two unique indexes, by which apply finds chunks, or both.

`applied` is what the backend of a worker takes for the same changes with all statements of apply, while the worker
catches up. What that is more than the UPDATE alone is the most that any other set of statements could save.

    python bench/texts.py      ROUNDS=5 ROWS=10000
"""

from __future__ import annotations

import os
import statistics
from typing import TYPE_CHECKING

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline, processor_ms
    from bench.report import report
else:
    from _pipeline import Pipeline, pipeline, processor_ms
    from report import report

ROWS = int(os.environ.get("ROWS", "10000"))
ROUNDS = int(os.environ.get("ROUNDS", "5"))
BATCH = 2_000
EMBEDDER = 'type = "hash"\ndimensions = 16\nlatency_ms = 20'
BODY = (
    "(SELECT 'article ' || i || ' ' || string_agg('w' || (20000 * power(random(), 4))::int, ' ')"
    " FROM generate_series(1, 90 + i %% 20))"
)
"""Of words as running text has them: few that are frequent, many that are rare."""

CHANGED = "'round' || %s || substr({text}, position(' ' in {text}))"

UNIQUE = {"chunk": "{chunk_id}", "key": "{id,chunk_no}"}
"""The unique indexes by the columns that they have."""

DROP_GIN = """
DO $$ BEGIN
    EXECUTE (SELECT 'DROP INDEX ' || c.oid::regclass FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid
        JOIN pg_am AS a ON a.oid = c.relam WHERE i.indrelid = 'measured'::regclass AND a.amname = 'gin');
END $$
"""

DROP_UNIQUE = """
DO $$ BEGIN
    EXECUTE (SELECT 'ALTER TABLE measured DROP CONSTRAINT ' || conname FROM pg_constraint
        WHERE conrelid = 'measured'::regclass AND contype IN ('p', 'u')
        AND (SELECT array_agg(attname ORDER BY attnum) FROM pg_attribute
             WHERE attrelid = conrelid AND attnum = ANY (conkey)) = '{columns}'::name[]);
END $$
"""

VARIANTS = {
    "whole": (),
    "without_gin": (DROP_GIN,),
    "without_tsvector": ("ALTER TABLE measured DROP COLUMN search",),
    "without_unique_chunk": (DROP_UNIQUE.replace("{columns}", UNIQUE["chunk"]),),
    "without_unique_key": (DROP_UNIQUE.replace("{columns}", UNIQUE["key"]),),
    "without_both_unique": tuple(DROP_UNIQUE.replace("{columns}", columns) for columns in UNIQUE.values()),
}

UPDATE = """
UPDATE measured AS c SET content = s.content, content_hash = s.content_hash, document_hash = s.content_hash,
    commit_lsn = s.commit_lsn, applied_at = now()
FROM stage AS s WHERE c.ctid = s.place AND s.batch = %s
"""


def copied(made: Pipeline, without: tuple[str, ...]) -> None:
    """Make `measured`: the table of chunks with its rows, its storage and its indexes, but for some."""
    run = made.target.execute
    run("DROP TABLE IF EXISTS measured")
    run("CREATE TABLE measured (LIKE cdcsync.articles_chunks INCLUDING ALL)")
    options = made.indexed(
        "SELECT array_to_string(reloptions, ',') FROM pg_class WHERE oid = 'cdcsync.articles_chunks'::regclass"
    )
    if options:
        run(f"ALTER TABLE measured SET ({options})".encode())
    columns = made.indexed(
        "SELECT string_agg(quote_ident(attname), ', ') FROM pg_attribute"
        " WHERE attrelid = 'measured'::regclass AND attnum > 0 AND NOT attisdropped AND attgenerated = ''"
    )
    rows = f"SELECT {columns} FROM cdcsync.articles_chunks"
    run(f"INSERT INTO measured ({columns}) OVERRIDING SYSTEM VALUE {rows}".encode())
    for statement in without:
        run(statement.encode())


def merged_ms(made: Pipeline, table: str) -> float:
    """Move what is pending into the GIN index of a table, if it has one; return what that takes of a processor."""
    pid = made.target.info.backend_pid
    used_ms = processor_ms(pid)
    made.target.execute(
        "SELECT gin_clean_pending_list(i.indexrelid) FROM pg_index AS i JOIN pg_class AS c ON c.oid = i.indexrelid"
        " JOIN pg_am AS a ON a.oid = c.relam WHERE i.indrelid = %s::regclass AND a.amname = 'gin'",
        [table],
    )
    return processor_ms(pid) - used_ms


def updated_us(made: Pipeline, round_: int) -> float:
    """Change every text once; return what the backend takes for one."""
    run = made.target.execute
    run("VACUUM (ANALYZE) measured")
    run("DROP TABLE IF EXISTS stage")
    run(
        (
            "CREATE TEMP TABLE stage AS SELECT ctid AS place, row_number() OVER (ORDER BY id) / %s AS batch,"
            f" {CHANGED.format(text='content')} AS content,"
            " int8send(id * 1000 + %s) AS content_hash, commit_lsn FROM measured"
        ).encode(),
        [BATCH, str(round_), round_],
    )
    run("ANALYZE stage")
    run("CHECKPOINT")
    pid = made.target.info.backend_pid
    used_ms, changed = processor_ms(pid), 0
    for batch in range(ROWS // BATCH + 1):
        changed += run(UPDATE, [batch]).rowcount
    used_ms = processor_ms(pid) - used_ms + merged_ms(made, "measured")
    if changed != ROWS:
        raise SystemExit(f"{changed} of {ROWS} texts were changed")
    return used_ms / ROWS * 1000


def applied_us(made: Pipeline, round_: int) -> float:
    """Change every text once in the source; return what the worker's backend takes for one while it catches up."""
    made.target.execute("VACUUM (ANALYZE) cdcsync.articles_chunks")
    for first in range(1, ROWS + 1, 100):
        made.connection.execute(
            f"UPDATE articles SET body = {CHANGED.format(text='body')} WHERE id BETWEEN %s AND %s".encode(),
            [str(round_), first, first + 99],
        )
    made.start()
    made.event("streaming")
    pid = made.backend()
    used_ms = processor_ms(pid)
    made.text_in_step()
    used_ms = processor_ms(pid) - used_ms + merged_ms(made, "cdcsync.articles_chunks")
    made.vectors_in_step(0.05)
    made.stop()
    return used_ms / ROWS * 1000


def main() -> None:
    """Measure and report."""
    taken: dict[str, list[float]] = {}
    settings = {"shared_buffers": "512MB", "max_wal_size": "8GB", "autovacuum": "off"}
    with pipeline(EMBEDDER, 'search = "english"', apart=True, **settings) as made:
        made.connection.execute(
            f"INSERT INTO articles SELECT i, i %% 50, {BODY} FROM generate_series(1, %s) AS i".encode(), [ROWS]
        )
        made.start()
        made.live()
        made.text_in_step()
        made.vectors_in_step(0.05)
        made.stop()
        taken["applied"] = [applied_us(made, round_) for round_ in range(ROUNDS)]
        for name, without in VARIANTS.items():
            copied(made, without)
            taken[name] = [updated_us(made, round_) for round_ in range(ROUNDS)]
    of = {name: statistics.median(values) for name, values in taken.items()}
    figures = {f"{name}_us_per_text": value for name, value in of.items()}
    figures["other_statements_us_per_text"] = of["applied"] - of["whole"]
    report("texts", figures)


if __name__ == "__main__":
    main()
