"""What do documents of several tables cost?

One worker keeps two indexes of one table: one of its rows alone, and one whose documents also have a note of another
table and the name of a tenant. Three things are measured in one run:

    rate        notes change in bulk: how many documents a second are rebuilt and have their new text
    freshness   one row at a time, as in `freshness.py`: a note's change until it is found, against the change of a row
                of the index of one table
    fan-out     a tenant's name changes, which is in every document: documents a second, against the backfill after a
                change of the template, which changes every document, too. A replay that chunks every document anew is
                timed as well: it finds all texts as they were, so it stores no word and no vector

    python bench/related.py [ROWS]
"""

from __future__ import annotations

import sys
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import psycopg

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, percentile, pipeline
    from bench.freshness import HASH
    from bench.report import report
else:
    from _pipeline import Pipeline, percentile, pipeline
    from freshness import HASH
    from report import report

ROWS = 20_000
CHANGES = 200
WARM_UP = 20
"""Changes that are not counted."""

GOAL_DOCUMENTS_PER_S = 3_000
GOAL_FRESHNESS = 1 / 1.5
"""At most one and a half times as long."""
GOAL_FAN_OUT = 0.7

JOINED = """
[indexes.joined]
table = "articles"
text = "{owner.name}: {body}\\n{notes}"
embedder = "model"
[indexes.joined.related.notes]
table = "notes"
on = { article_id = "id" }
text = "{body}"
[indexes.joined.related.owner]
table = "tenants"
on = { id = "tenant" }
"""

TABLES = (
    "CREATE TABLE tenants (id int PRIMARY KEY, name text)",
    "CREATE TABLE notes (id bigint PRIMARY KEY, article_id bigint NOT NULL, body text NOT NULL)",
    "CREATE UNIQUE INDEX notes_identity ON notes (article_id, id)",
    "ALTER TABLE notes REPLICA IDENTITY USING INDEX notes_identity",
    "CREATE INDEX ON articles (tenant)",
    "INSERT INTO tenants VALUES (1, 'the only tenant')",
)
LOAD = (
    "INSERT INTO articles SELECT i, 1, 'article number ' || i FROM generate_series(1, %s) AS i",
    "INSERT INTO notes SELECT i, i, 'the first note of ' || i FROM generate_series(1, %s) AS i",
)


def in_step(made: Pipeline) -> None:
    """Wait until the joined index has everything committed so far."""
    lsn = made.value("SELECT pg_current_wal_insert_lsn()::text")
    made.until(lambda: made.value("SELECT cdcsync.wait_for('joined', %s, '1 s')", lsn), f"joined text at {lsn}")


def drained(made: Pipeline) -> None:
    """Wait until every chunk of both indexes has its vector: what follows is to be measured by itself."""
    backlogs = "EXISTS (SELECT FROM cdcsync.articles_backlog) OR EXISTS (SELECT FROM cdcsync.joined_backlog)"
    made.until(lambda: not made.value(f"SELECT {backlogs}"), "empty backlogs", 0.05)


def seconds(made: Pipeline, statement: str, *arguments: object) -> float:
    """Run a statement and return how long it takes from there until the joined index has what it changed."""
    made.connection.execute(statement, arguments or None)
    committed = time.perf_counter()
    in_step(made)
    return time.perf_counter() - committed


def template_changed_s(made: Pipeline, after: int) -> float:
    """Change the template, and return how long the backfill takes that this asks for.

    :param after: the last request so far.
    """
    made.stop()
    made.configure('text = "{owner.name}: ', 'text = "{owner.name} - ')
    made.start()
    took = (
        "SELECT extract(epoch FROM finished_at - started_at)::float8 FROM cdcsync.backfills"
        " WHERE index_name = 'joined' AND id > %s AND rewrite AND state = 'done'"
    )
    return float(made.until(lambda: made.value(took, after), "the end of the backfill"))


def found(reader: psycopg.Connection[Any], view: str, key: int, word: str) -> bool:
    """Say whether a view shows a text with this word and its own vector."""
    row = reader.execute(f"SELECT FROM {view} WHERE id = %s AND position(%s in content) > 0 AND NOT stale", [key, word])
    return row.fetchone() is not None


def changes_ms(made: Pipeline, rows: int, table: str, view: str) -> list[float]:
    """Change rows one at a time and return how long each took to be found."""
    taken = []
    with psycopg.connect(made.dsn, autocommit=True) as reader:
        for number in range(CHANGES + WARM_UP):
            key, word = (number * 7919) % rows + 1, f"{table}{number}."
            made.connection.execute(f"UPDATE {table} SET body = %s WHERE id = %s", [f"now says {word}", key])
            committed = time.perf_counter()
            made.until(partial(found, reader, view, key, word), "new text")
            taken.append((time.perf_counter() - committed) * 1000)
    return taken[WARM_UP:]


def main() -> None:
    """Measure and report."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with pipeline(HASH, JOINED) as made:
        for statement in TABLES:
            made.connection.execute(statement)
        for statement in LOAD:
            made.connection.execute(statement, [rows])
        made.connection.execute("ANALYZE")
        made.start()
        made.live(2)
        bulk_s = seconds(made, "UPDATE notes SET body = 'another note of ' || id")
        drained(made)
        fan_out_s = seconds(made, "UPDATE tenants SET name = 'renamed'")
        drained(made)
        request = made.value(
            "INSERT INTO cdcsync.backfills (index_name, kind, rewrite) VALUES ('joined', 'replay', true) RETURNING id"
        )
        asked = time.perf_counter()
        # A request is looked for every five seconds; what is measured begins with its service.
        took = "SELECT extract(epoch FROM finished_at - started_at)::float8 FROM cdcsync.backfills WHERE id = %s"
        replay_s = made.until(lambda: made.value(took, request), "the end of the replay")
        own_s = made.value(
            "SELECT extract(epoch FROM finished_at - started_at)::float8 FROM cdcsync.backfills WHERE kind = 'related'"
            " AND state = 'done' ORDER BY id LIMIT 1"
        )
        drained(made)
        backfill_s = template_changed_s(made, request)
        drained(made)
        alone, joined = (
            changes_ms(made, rows, "articles", "articles_index"),
            changes_ms(made, rows, "notes", "joined_index"),
        )
        made.stop()
    one, several = percentile(alone, 0.5), percentile(joined, 0.5)
    report(
        "related",
        {
            "rows": rows,
            "bulk_documents_per_s": rows / bulk_s,
            "fan_out_s": fan_out_s,
            "fan_out_documents_per_s": rows / own_s,
            "backfill_documents_per_s": rows / backfill_s,
            "replay_documents_per_s": rows / replay_s,
            "one_table_p50_ms": one,
            "several_tables_p50_ms": several,
            "several_tables_p99_ms": percentile(joined, 0.99),
            "waited_s": time.perf_counter() - asked,
        },
        {
            "bulk_over_goal": rows / bulk_s / GOAL_DOCUMENTS_PER_S,
            "freshness_one_over_several": one / several,
            "fan_out_over_backfill": backfill_s / own_s,
        },
        {"bulk_over_goal": 1.0, "freshness_one_over_several": GOAL_FRESHNESS, "fan_out_over_backfill": GOAL_FAN_OUT},
    )


if __name__ == "__main__":
    main()
