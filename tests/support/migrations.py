"""Migrations of vectors: pipelines that load, ask for other vectors, and are filled."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anyio
import numpy as np

from cdcsync.config.names import beside_name
from cdcsync.postgres.sessions import connect
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.search import stored_spec
from tests import ROOT
from tests.support.configs import Section, configuration
from tests.support.servers import Database
from tests.support.turned import Turned
from tests.support.workers import Pipeline, until

OLD, NEW = Turned("a"), Turned("b")


def turned(model: Turned) -> Section:
    """Return the section of a model."""
    return {"type": "python", "class": "tests.support.turned:Turned", "options": {"way": model.identity[-1]}}


BOTH = {"old": turned(OLD), "new": turned(NEW)}

WATCHFUL = {"cdcsync.flows.watch.WATCH_S": 0.5}
"""A worker that sees ten times as soon what a command asked for: most steps of a migration wait for that."""


def hashed(dimensions: int) -> Section:
    """Return the section of a model that needs no code of ours."""
    return {"type": "hash", "dimensions": dimensions}


def loaded(pipeline: Pipeline, *tables: str, rows: int = 200) -> Pipeline:
    """Have a worker load tables of short texts; it notices each step of a migration soon."""
    pipeline.hurry.setdefault("cdcsync.flows.watch.WATCH_S", 0.5)
    for table in tables:
        pipeline.source.execute(f"CREATE TABLE {table} (id int PRIMARY KEY, title text)")
        pipeline.source.execute(
            f"INSERT INTO {table} SELECT i, 'article ' || i || ' is about ' || i % 17 FROM generate_series(1, {rows}) i"
        )
    pipeline.hurry |= WATCHFUL
    pipeline.start(PYTHONPATH=str(ROOT))
    pipeline.live()
    return pipeline


def asks_for(pipeline: Pipeline, text: str) -> None:
    """Have the configuration ask for other vectors, and start the worker again with it."""
    pipeline.configure(text)
    pipeline.stop(pipeline.processes[-1])
    pipeline.start(PYTHONPATH=str(ROOT))


def noted(pipeline: Pipeline, *known: bool) -> None:
    """Wait until the worker has noted which generations of an index it has an embedder for."""
    notes = "SELECT array_agg(has_embedder ORDER BY generation) FROM cdcsync.generations"
    until(lambda: pipeline.target.execute(notes).fetchone() == ([*known],), pipeline.tail)


def wanted(database: Database) -> str:
    """Return the configuration that asks for the vectors of the new model and still has the old one."""
    return configuration(database.dsn, embedders=BOTH, indexes={"articles": {"embedder": "new"}})


def of_the_old_model(make_pipeline: Callable[[str], Pipeline], database: Database, *, rows: int = 20) -> Pipeline:
    """Return a loaded index of the old model whose configuration asks for the new one by now."""
    pipeline = make_pipeline(configuration(database.dsn, embedders={"old": turned(OLD)}))
    loaded(pipeline, "articles", rows=rows)
    asks_for(pipeline, wanted(database))
    return pipeline


def filled(make_pipeline: Callable[[str], Pipeline], database: Database) -> Pipeline:
    """Return an index of the old model with a second generation, of the new one, that is ready."""
    pipeline = of_the_old_model(make_pipeline, database)
    assert migrate(pipeline, "start")["generation"] == 2
    ready(pipeline, 2)
    return pipeline


def migrate(pipeline: Pipeline, action: str, *options: str, index: str = "articles", status: int = 0) -> Any:
    """Run `cdcsync migrate`, and return what it answers."""
    return pipeline.answer("migrate", index, action, *options, status=status, PYTHONPATH=str(ROOT))


def state(pipeline: Pipeline, generation: int, index: str = "articles") -> str | None:
    """Return the state of a generation, which may have chunks of its own; None if there is none."""
    row = pipeline.target.execute(
        "SELECT state FROM cdcsync.generations WHERE index_name IN (%s, %s) AND generation = %s",
        [index, beside_name(index), generation],
    ).fetchone()
    return None if row is None else row[0]


def ready(pipeline: Pipeline, generation: int, *indexes: str) -> None:
    """Wait until a generation of these indexes is filled."""
    for index in indexes or ("articles",):
        until(
            lambda: state(pipeline, generation, index) == "ready",  # noqa: B023 - called in the loop
            lambda: f"a filled generation; {pipeline.tail()}",
        )


def complete(pipeline: Pipeline, generation: int, index: str = "articles") -> None:
    """Wait until each chunk has one vector of its text in a generation, and there are no others."""

    def whole() -> bool:
        row = pipeline.target.execute(
            f"SELECT (SELECT count(*) FROM cdcsync.{index}_chunks AS c WHERE 1 <> (SELECT count(*) FROM"
            f" cdcsync.{index}_vectors_{generation} AS v WHERE v.chunk_id = c.chunk_id"
            " AND v.content_hash = c.content_hash)),"
            f" (SELECT count(*) FROM cdcsync.{index}_vectors_{generation} AS v WHERE NOT EXISTS"
            f" (SELECT FROM cdcsync.{index}_chunks AS c WHERE c.chunk_id = v.chunk_id))"
        ).fetchone()
        return row == (0, 0)

    until(whole, lambda: f"generation {generation} to be whole; {pipeline.tail()}")


def of_model(pipeline: Pipeline, generation: int, model: Turned) -> None:
    """Fail unless every vector of a generation is what a model makes of its chunk's text."""
    rows = pipeline.target.execute(
        "SELECT c.content, v.embedding::text FROM cdcsync.articles_chunks AS c"
        f" JOIN cdcsync.articles_vectors_{generation} AS v USING (chunk_id)"
    ).fetchall()
    stored = np.array([json.loads(vector) for _, vector in rows], dtype=np.float32)
    assert np.allclose(stored, model.vectors([text for text, _ in rows]), atol=1e-5)


def leave_rebuilds(pipeline: Pipeline, index: str = "articles") -> None:
    """Leave of each set of vectors of an index what a kill leaves of a rebuild of its settled tier. No worker runs."""

    async def record() -> None:
        schema = pipeline.config.target.schema
        async with await connect(pipeline.config.target.dsn, "target") as connection:
            spec = await stored_spec(connection, schema, index, pipeline.config.index_named(index))
            for one in spec.searchable:
                await Rebuild(connection, schema, one).record()

    anyio.run(record)


def belongings(pipeline: Pipeline, stem: str) -> set[tuple[str, str]]:
    """Return the relations, functions, types and triggers in our schema whose names begin with that of a stem."""
    rows = pipeline.target.execute(
        """
        WITH named (kind, name, namespace) AS (
            SELECT 'relation', relname::text, relnamespace FROM pg_class
            UNION ALL SELECT 'function', proname::text, pronamespace FROM pg_proc
            UNION ALL SELECT 'type', typname::text, typnamespace FROM pg_type
            UNION ALL SELECT 'trigger of ' || relname, relname::text, relnamespace
            FROM pg_trigger AS t JOIN pg_class AS c ON c.oid = t.tgrelid
        )
        SELECT kind, name FROM named
        WHERE namespace = 'cdcsync'::regnamespace AND starts_with(ltrim(name, '_'), %s)
        """,
        [f"{stem}_"],
    ).fetchall()
    return set(rows)


def refused(pipeline: Pipeline, action: str, *options: str, index: str = "articles") -> str:
    """Run `cdcsync migrate`, which is refused, and return what it says."""
    done = pipeline.command("migrate", index, action, *options, PYTHONPATH=str(ROOT))
    assert (done.returncode, done.stdout) == (2, ""), done.stderr + done.stdout
    return " ".join(done.stderr.split())
