"""How fast does an index's text catch up, against PostgreSQL's own logical replication of the same changes?

20,000 rows change 60,000 times in transactions of ten, while neither side runs. Then each catches up from a slot of its
own, one after the other, and who begins alternates from round to round. Both write to a second server, each to its own
database: with one server, who comes second would have to read what the first one wrote. A round is timed from the
moment at which the source shows the side's slot as active, asked alike for both, to where the side has the last change.

- keywords: the index as it is by default, against a subscription into a table with the same generated tsvector and GIN
  index. Without keywords: against a plain copy of the table.
- mixed: half of the changes are of the text, half of a carried column only; text; carried: all of one kind.
- large: one transaction of 500,000 new rows, with keywords; each round on a new server, so that no round begins with
  the vectors that the one before it left to the model.

The other side stores rows as they are. Ours makes documents, hashes and chunks of them, finds out which texts are new,
keeps them for the model, and moves a checkpoint with them. Vectors are not waited for: the provider takes 20 ms.

    python bench/native.py [keywords|plain|large …]      ROUNDS=3 UPDATES=60000
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import conninfo

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, pipeline, processor_ms
    from bench.report import of_goal, report
else:
    from _pipeline import Pipeline, pipeline, processor_ms
    from report import of_goal, report

ROWS = 20_000
GOAL_UPDATES, GOAL_LARGE_ROWS, GOAL_ROUNDS = 60_000, 500_000, 3
UPDATES = int(os.environ.get("UPDATES", str(GOAL_UPDATES)))
ROUNDS = int(os.environ.get("ROUNDS", str(GOAL_ROUNDS)))
LARGE_ROWS = int(os.environ.get("LARGE_ROWS", str(GOAL_LARGE_ROWS)))
TRANSACTION = 10
EMBEDDER = 'type = "hash"\ndimensions = 384\nlatency_ms = 20'

BODY = "'article ' || i || ' ' || repeat('some more words of its text ', 16) || %s"

SEARCH = "ALTER TABLE articles ADD search tsvector GENERATED ALWAYS AS (to_tsvector('english', body)) STORED"
GIN = "CREATE INDEX ON articles USING gin (search)"

CHANGE = f"""
DO $$
DECLARE first int;
BEGIN
    FOR number IN 0..{UPDATES // TRANSACTION - 1} LOOP
        first := number * {TRANSACTION} % {ROWS} + 1;
        IF {{of_text}} THEN
            UPDATE articles SET body = 'round {{round}} ' || number || substr(body, position(' some' in body))
                WHERE id BETWEEN first AND first + {TRANSACTION - 1};
        ELSE
            UPDATE articles SET tenant = tenant + 1 WHERE id BETWEEN first AND first + {TRANSACTION - 1};
        END IF;
        COMMIT;
    END LOOP;
END $$
"""
"""On the server, where so many transactions take a third of the time that they take one by one from here."""

NOTES = {
    "keywords_text": "both sides pay for the tsvector, its GIN index and the new row. Ours also looks for the vector of"
    " an equal text and queues the text for the model, and keeps two unique indexes where the other side has one",
    "plain": "the worker is one thread of Python, which takes `worker_us_per_row` for a row; native replication is C."
    " The goals are older than this clock: it begins where the source shows a side's slot as active, when the other"
    " side has started its processes. When the goals were set, its start was in the clock, and it read 28,000 to 63,000"
    " rows a second. What is left of its time is `peer_s`, which the clock knows to some 2 ms",
}

GOALS = {
    "keywords": {"mixed": 1.0, "text": 1.0, "carried": 2.0},
    "plain": {"mixed": 0.6, "text": 0.6, "carried": 0.9},
}


Found = dict[str, dict[str, list[float]]]
"""By workload, and by side and what was measured, a figure of each round."""


class Peer:
    """A subscription in another database of the server on which the index is."""

    def __init__(self, made: Pipeline, *, keywords: bool) -> None:
        self._made = made
        made.target.execute("CREATE DATABASE peer")
        database = conninfo.make_conninfo(made.target.info.dsn, dbname="peer")
        self.connection = psycopg.connect(database, autocommit=True)
        run = self.connection.execute
        run("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int NOT NULL, body text NOT NULL)")
        if keywords:
            run(SEARCH)
        made.connection.execute("CREATE PUBLICATION peer FOR TABLE articles")
        made.connection.execute("SELECT pg_create_logical_replication_slot('peer', 'pgoutput')")
        subscribe = (
            f"CREATE SUBSCRIPTION peer CONNECTION '{made.dsn}' PUBLICATION peer"
            " WITH (slot_name = 'peer', create_slot = false, copy_data = false, enabled = false, streaming = on)"
        )
        run(subscribe.encode())
        copied = made.connection.cursor().copy("COPY articles (id, tenant, body) TO STDOUT")
        with copied as source, self.connection.cursor().copy("COPY articles (id, tenant, body) FROM STDIN") as target:
            for block in source:
                target.write(block)
        if keywords:
            run(GIN)
        run("VACUUM ANALYZE")

    def catches_up(self, last: str) -> float:
        """Return the seconds from where its slot is active to where it has the last change."""
        self._made.slot_is(False, "peer")
        self.connection.execute("ALTER SUBSCRIPTION peer ENABLE")
        self._made.slot_is(True, "peer")
        began = time.perf_counter()
        statement = "SELECT FROM articles WHERE id = 1 AND body = %s"
        self._made.until(lambda: self.connection.execute(statement, [last]).fetchone() is not None, "its last change")
        elapsed = time.perf_counter() - began
        # Until what it has taken is acknowledged: else the next round begins with this one's changes.
        self._made.until(
            lambda: self._made.value(
                "SELECT confirmed_flush_lsn >= %s FROM pg_replication_slots WHERE slot_name = 'peer'", self._written
            ),
            "acknowledgement",
            0.05,
        )
        self.connection.execute("ALTER SUBSCRIPTION peer DISABLE")
        return elapsed

    def note_written(self) -> None:
        """Remember where the changes of this round end."""
        self._written = self._made.value("SELECT pg_current_wal_insert_lsn()::text")

    def close(self) -> None:
        """End the connection."""
        self.connection.close()


def ours_catches_up(made: Pipeline, last: str) -> dict[str, float]:
    """Return the seconds from where the worker's slot is active to where it has the last change, and who was busy."""
    made.slot_is(False)
    made.start()
    made.slot_is(True)
    began, used = time.perf_counter(), busy_s(made)
    statement = "SELECT EXISTS (SELECT FROM cdcsync.articles_chunks WHERE id = 1 AND content = %s)"
    made.until(lambda: made.indexed(statement, last), "last change in the index")
    elapsed = time.perf_counter() - began
    found = {name: ms - used[name] for name, ms in busy_s(made).items()}
    made.text_in_step()
    made.stop()
    return {"s": elapsed, **found}


def busy_s(made: Pipeline) -> dict[str, float]:
    """Return the processor seconds of the worker and of the backend that writes for it."""
    return {"worker_s": processor_ms(made.pid) / 1000, "backend_s": processor_ms(made.backend()) / 1000}


def change(made: Pipeline, workload: str, round_: int) -> str:
    """Change rows in small transactions; returns the text of the last change."""
    of_text = {"text": "true", "mixed": "number % 2 = 1", "carried": "false"}[workload]
    made.connection.execute(CHANGE.format(round=round_, of_text=of_text).encode())
    last = f"the last text of round {workload} {round_}"
    made.connection.execute("UPDATE articles SET body = %s WHERE id = 1", [last])
    return last


def insert(made: Pipeline, round_: int) -> str:
    """Insert many rows in one transaction, and change one after it."""
    first = ROWS + 1 + round_ * LARGE_ROWS
    made.connection.execute(
        f"INSERT INTO articles SELECT i, i %% 50, {BODY} FROM generate_series(%s::int, %s::int) AS i".encode(),
        [str(round_), first, first + LARGE_ROWS - 1],
    )
    last = f"the text after {round_} large transactions"
    made.connection.execute("UPDATE articles SET body = %s WHERE id = 1", [last])
    return last


def compare(kind: str, workloads: list[str], rounds: range, found: Found) -> None:
    """Add what both sides took in each round, by workload."""
    keywords = kind != "plain"
    with pipeline(
        EMBEDDER,
        'search = "english"' if keywords else 'search = ""',
        apart=True,
        shared_buffers="512MB",
        max_wal_size="8GB",
    ) as made:
        made.connection.execute(
            f"INSERT INTO articles SELECT i, i %% 50, {BODY} FROM generate_series(1, %s) AS i".encode(), ["", ROWS]
        )
        made.start()
        made.live()
        made.text_in_step()
        made.vectors_in_step()
        made.stop()
        peer = Peer(made, keywords=keywords)
        for round_ in rounds:
            for workload in workloads:
                last = insert(made, round_) if workload == "large" else change(made, workload, round_)
                peer.note_written()
                made.connection.execute("CHECKPOINT")
                for side in ("ours", "peer") if round_ % 2 else ("peer", "ours"):
                    taken = ours_catches_up(made, last) if side == "ours" else {"s": peer.catches_up(last)}
                    for name, seconds in taken.items():
                        found.setdefault(workload, {}).setdefault(f"{side}_{name}", []).append(seconds)
        compared(made, peer.connection)
        peer.close()


def compared(made: Pipeline, peer: psycopg.Connection[Any]) -> None:
    """End the bench unless both sides hold what the source does."""
    row = "id || ' ' || tenant || ' ' || rtrim(body)"
    digest = f"SELECT md5(string_agg(md5({row}), ',' ORDER BY id)) FROM articles"
    source = made.value(digest)
    ours = made.indexed(digest.replace("body", "content").replace("articles", "cdcsync.articles_chunks"))
    theirs = peer.execute(digest.encode()).fetchone()
    if ours != source or theirs != (source,):
        raise SystemExit(f"a side differs from the source: ours {ours == source}, theirs {theirs == (source,)}")


def main() -> None:
    """Measure and report."""
    parts = sys.argv[1:] or ["keywords", "plain", "large"]
    figures: dict[str, float] = {"load_at_start": os.getloadavg()[0]}
    ratios, goals, smaller = {}, {}, {}
    for part in parts:
        large = part == "large"
        rows = LARGE_ROWS if large else UPDATES
        found: Found = {}
        if large:
            for round_ in range(ROUNDS):
                compare(part, [part], range(round_, round_ + 1), found)
        else:
            compare(part, list(GOALS[part]), range(ROUNDS), found)
        for workload, taken in found.items():
            of = {name: statistics.median(one) for name, one in taken.items()}
            name = "large" if large else f"{part}_{workload}"
            figures |= {f"{name}_{side}_rows_per_s": rows / of[f"{side}_s"] for side in ("ours", "peer")}
            figures[f"{name}_peer_s"] = of["peer_s"]
            figures |= {
                f"{name}_{side}_us_per_row": of[f"ours_{side}_s"] / rows * 1e6 for side in ("worker", "backend")
            }
            ratio = f"{name}_ours_over_native"
            ratios[ratio] = of["peer_s"] / of["ours_s"]
            goals[ratio] = 0.5 if large else GOALS[part][workload]
            size = of_goal(rows, GOAL_LARGE_ROWS, "rows") if large else of_goal(rows, GOAL_UPDATES, "updates")
            smaller[ratio] = size or of_goal(ROUNDS, GOAL_ROUNDS, "rounds")
    figures["load_at_end"] = os.getloadavg()[0]
    report("native", figures, ratios, goals, "native replication, same run", smaller, notes=NOTES)


if __name__ == "__main__":
    main()
