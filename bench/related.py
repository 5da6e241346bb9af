"""What do documents of several tables cost?

One worker keeps an index whose documents have a row of one table, notes of another and the name of a tenant, and an
index of a third table alone, whose rows are as many and as long. Three things are measured in one run:

    rate        notes change in bulk: how many documents a second are rebuilt and have their new text
    freshness   one row at a time, in turns, once nothing of the bulk is left to do: a note's change until it is found,
                against the change of a row of the index of one table, which is in no other index
    fan-out     a tenant's name changes, which is in every document, against the backfill after a change of the
                template, which changes every document, too: documents a second until all have their text, and until all
                have their vectors, since a backfill embeds some texts at once and a fan-out leaves them to the embed
                loop. A replay that chunks every document anew is timed as well, without a goal: it finds all texts as
                they were, so it stores no word and no vector

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
LOOK_S = 0.000_3
"""The pause between two looks for a change: much less than the difference that is measured."""

GOAL_FRESHNESS = 1 / 1.5
"""At most one and a half times as long."""
GOAL_FAN_OUT = 0.7

INDEXES = """
[indexes.single]
table = "singles"
text = "{body}"
columns = ["tenant"]
embedder = "model"
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
    "CREATE TABLE singles (LIKE articles INCLUDING ALL)",
    "CREATE TABLE tenants (id int PRIMARY KEY, name text)",
    "CREATE TABLE notes (id bigint PRIMARY KEY, article_id bigint NOT NULL, body text NOT NULL)",
    "CREATE UNIQUE INDEX notes_identity ON notes (article_id, id)",
    "ALTER TABLE notes REPLICA IDENTITY USING INDEX notes_identity",
    "CREATE INDEX ON articles (tenant)",
    "INSERT INTO tenants VALUES (1, 'the only tenant')",
)
LOAD = (
    "INSERT INTO articles SELECT i, 1, 'article number ' || i FROM generate_series(1, %s) AS i",
    "INSERT INTO singles SELECT i, 1, 'article number ' || i FROM generate_series(1, %s) AS i",
    "INSERT INTO notes SELECT i, i, 'the first note of ' || i FROM generate_series(1, %s) AS i",
)


def in_step(made: Pipeline) -> None:
    """Wait until the joined index has everything committed so far."""
    lsn = made.value("SELECT pg_current_wal_insert_lsn()::text")
    made.until(lambda: made.value("SELECT cdcsync.wait_for('joined', %s, '1 s')", lsn), f"joined text at {lsn}")


def drained(made: Pipeline) -> None:
    """Wait until every chunk of the indexes has its vector: what follows is to be measured by itself."""
    backlogs = " OR ".join(f"EXISTS (SELECT FROM cdcsync.{one}_backlog)" for one in ("articles", "joined"))
    made.until(lambda: not made.value(f"SELECT {backlogs}"), "empty backlogs", 0.02)


def took_s(made: Pipeline, request: int) -> tuple[float, float]:
    """Return how long a request took until its texts were there, and until all of them had their vectors."""
    ended = "SELECT extract(epoch FROM finished_at - started_at)::float8 FROM cdcsync.backfills WHERE id = %s"
    text_s = float(made.until(lambda: made.value(ended, request), "the end of the request"))
    drained(made)
    since = "SELECT extract(epoch FROM clock_timestamp() - started_at)::float8 FROM cdcsync.backfills WHERE id = %s"
    return text_s, float(made.value(since, request))


def seconds(made: Pipeline, statement: str, *arguments: object) -> float:
    """Run a statement and return how long it takes from there until the joined index has what it changed."""
    made.connection.execute(statement, arguments or None)
    committed = time.perf_counter()
    in_step(made)
    return time.perf_counter() - committed


def template_changed(made: Pipeline, after: int) -> int:
    """Change the template, and return the request that this asks for.

    :param after: the last request so far.
    """
    made.stop()
    made.configure('text = "{owner.name}: ', 'text = "{owner.name} - ')
    made.start()
    asked = "SELECT max(id) FROM cdcsync.backfills WHERE index_name = 'joined' AND id > %s AND rewrite"
    return int(made.until(lambda: made.value(asked, after), "a request of the worker"))


def found(reader: psycopg.Connection[Any], view: str, key: int, word: str) -> bool:
    """Say whether a view shows a text with this word and its own vector."""
    row = reader.execute(f"SELECT FROM {view} WHERE id = %s AND position(%s in content) > 0 AND NOT stale", [key, word])
    return row.fetchone() is not None


def at_rest(made: Pipeline) -> None:
    """Wait until the vectors of what came before are settled, and no index is being built."""
    busy = "SELECT pid FROM pg_stat_progress_create_index"
    for index in ("single", "joined"):
        busy += f" UNION ALL SELECT 0 FROM cdcsync.{index}_vectors_1_fresh"
    made.until(lambda: not made.value(f"SELECT EXISTS ({busy})"), "a worker at rest", 0.1)


def changes_ms(made: Pipeline, rows: int) -> tuple[list[float], list[float]]:
    """Change rows of two tables in turns, one at a time, and return how long each took to be found."""
    taken = dict[str, list[float]]()
    with psycopg.connect(made.dsn, autocommit=True) as reader:
        for number in range(CHANGES + WARM_UP):
            for table, view in (("singles", "single_index"), ("notes", "joined_index")):
                key, word = (number * 7919) % rows + 1, f"{table}{number}."
                made.connection.execute(f"UPDATE {table} SET body = %s WHERE id = %s", [f"now says {word}", key])
                committed = time.perf_counter()
                made.until(partial(found, reader, view, key, word), "new text", LOOK_S)
                taken.setdefault(table, []).append((time.perf_counter() - committed) * 1000)
    return taken["singles"][WARM_UP:], taken["notes"][WARM_UP:]


def main() -> None:
    """Measure and report."""
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    with pipeline(HASH, INDEXES) as made:
        for statement in TABLES:
            made.connection.execute(statement)
        for statement in LOAD:
            made.connection.execute(statement, [rows])
        made.connection.execute("ANALYZE")
        made.start()
        made.live(3)
        bulk_s = seconds(made, "UPDATE notes SET body = 'another note of ' || id")
        drained(made)
        fan_out_s = seconds(made, "UPDATE tenants SET name = 'renamed'")
        own = made.value("SELECT max(id) FROM cdcsync.backfills WHERE kind = 'related'")
        own_s, own_vectors_s = took_s(made, own)
        replay = made.value(
            "INSERT INTO cdcsync.backfills (index_name, kind, rewrite) VALUES ('joined', 'replay', true) RETURNING id"
        )
        # A request is looked for every five seconds; what is measured begins with its service.
        asked = time.perf_counter()
        replay_s, _ = took_s(made, replay)
        backfill_s, backfill_vectors_s = took_s(made, template_changed(made, replay))
        at_rest(made)
        alone, joined = changes_ms(made, rows)
        made.stop()
    one, several = percentile(alone, 0.5), percentile(joined, 0.5)
    report(
        "related",
        {
            "rows": rows,
            "bulk_documents_per_s": rows / bulk_s,
            "fan_out_s": fan_out_s,
            "fan_out_documents_per_s": rows / own_s,
            "fan_out_vectors_per_s": rows / own_vectors_s,
            "backfill_documents_per_s": rows / backfill_s,
            "backfill_vectors_per_s": rows / backfill_vectors_s,
            "replay_documents_per_s": rows / replay_s,
            "one_table_p50_ms": one,
            "several_tables_p50_ms": several,
            "several_tables_p99_ms": percentile(joined, 0.99),
            "waited_s": time.perf_counter() - asked,
        },
        {
            "freshness_one_over_several": one / several,
            "fan_out_over_backfill": backfill_s / own_s,
            "fan_out_vectors_over_backfill": backfill_vectors_s / own_vectors_s,
        },
        {
            "freshness_one_over_several": GOAL_FRESHNESS,
            "fan_out_over_backfill": GOAL_FAN_OUT,
            "fan_out_vectors_over_backfill": GOAL_FAN_OUT,
        },
        {
            "freshness_one_over_several": "our own of one table, same run",
            "fan_out_over_backfill": "our own backfill, same run",
            "fan_out_vectors_over_backfill": "our own backfill, same run",
        },
    )


if __name__ == "__main__":
    main()
