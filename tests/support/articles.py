"""A table of articles whose documents have several chunks, and a pipeline that indexes it."""

from __future__ import annotations

from cdcsync.config import Config, parse
from tests.support.configs import NO_AUDIT, Section, configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline

TABLE = "CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, title text NOT NULL, body text)"

INDEX: Section = {
    "text": "{title}\n\n{body}",
    "columns": ["tenant"],
    "chunking": {"max_tokens": 32, "overlap_tokens": 4},
}


def articles(
    source: Database, target: Database | None = None, *, page_rows: int = 20, worker_lines: str = "", **changes: object
) -> str:
    """Return a configuration of one index over the table.

    :param changes: keys of the index that differ from `INDEX`.
    """
    return configuration(
        source.dsn,
        target=(target or source).dsn,
        worker_lines=f'{NO_AUDIT}\nbackfill_page_rows = {page_rows}\nlog_level = "debug"\n{worker_lines}',
        embedders={"fake": {"type": "hash", "dimensions": 16}},
        indexes={"articles": {**INDEX, **changes}},
    )


def fill(pipeline: Pipeline, rows: int, table: str = TABLE) -> None:
    """Make the table; the bodies of its rows have up to sixteen sentences."""
    pipeline.source.execute(table)
    pipeline.source.execute(
        "INSERT INTO articles SELECT i, i %% 5, 'title ' || i, repeat('sentence number ' || i || '. ', i %% 17)"
        " FROM generate_series(1, %s) AS i",
        [rows],
    )


def live_articles(pipeline: Pipeline, rows: int = 100) -> Pipeline:
    """Have a worker load the table, and return its pipeline once the index equals it."""
    fill(pipeline, rows)
    pipeline.start()
    pipeline.live()
    pipeline.in_step()
    return pipeline


def read(text: str) -> Config:
    return parse(text, {}, where="test")
