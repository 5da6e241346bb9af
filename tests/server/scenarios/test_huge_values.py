"""A value that does not fit into the worker's memory costs its row, and neither the worker nor another index."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.process.memory import LEAST_BYTES
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

MEMORY_BYTES = 1_500 * 1024**2
"""A worker reserves some 700 MB of address space when it is idle, of which it uses 80."""

NO_SHARE = {"cdcsync.process.memory.SHARE": 1e12}
"""Leaves the least that is taken in: a megabyte."""

TOO_LARGE = LEAST_BYTES + 1
HUGE = 250 * 1024**2
LEFT_OUT = "larger than a sixteenth of the worker's memory"


@pytest.fixture
def pipeline(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """Two indexes; the table of one has columns for large values, of which one is not indexed."""
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, body text, picture bytea)")
    database.execute("CREATE TABLE notes (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, 'title ' || i, 'body ' || i FROM generate_series(1, 5) AS i")
    database.execute("INSERT INTO notes SELECT i, 'note ' || i FROM generate_series(1, 5) AS i")
    articles = {"text": "{body}", "columns": ["title"], "chunking": {"max_chunks": 3, "on_too_many": "truncate"}}
    return make_pipeline(configuration(database.dsn, indexes={"articles": articles, "notes": {}}))


def texts(pipeline: Pipeline) -> dict[str, str]:
    rows = pipeline.target.execute("SELECT id::text, content FROM cdcsync.articles_chunks WHERE chunk_no = 0")
    return dict(rows.fetchall())


def left_out(pipeline: Pipeline) -> dict[str, str]:
    rows = pipeline.target.execute("SELECT key[1], error FROM cdcsync.failed_documents WHERE index_name = 'articles'")
    return dict(rows.fetchall())


def goes_on(pipeline: Pipeline, note: int) -> None:
    """See that the other index is followed."""
    pipeline.source.execute("INSERT INTO notes VALUES (%s, 'another note')", [note])
    pipeline.in_step("notes")


@pytest.mark.parametrize(
    ("size", "memory_bytes"), [(TOO_LARGE, None), pytest.param(HUGE, MEMORY_BYTES, marks=pytest.mark.proof)]
)
def test_a_row_whose_value_does_not_fit_into_memory_is_listed_and_all_others_go_on(
    pipeline: Pipeline, size: int, memory_bytes: int | None
) -> None:
    pipeline.memory_bytes = memory_bytes
    pipeline.hurry = {} if memory_bytes else NO_SHARE
    pipeline.source.execute("UPDATE articles SET body = repeat('all of it ', %s) WHERE id = 3", [size // 10 + 1])
    worker = pipeline.start()
    pipeline.live()
    assert sorted(texts(pipeline)) == ["1", "2", "4", "5"]
    assert LEFT_OUT in left_out(pipeline)["3"]

    # By the stream: as a new row, as another value of a row that is indexed, and in a column that no index needs.
    pipeline.source.execute("INSERT INTO articles VALUES (6, 'new', repeat('x', %s))", [size])
    pipeline.source.execute("UPDATE articles SET body = repeat('x', %s) WHERE id = 1", [size])
    pipeline.source.execute(
        "UPDATE articles SET picture = decode(repeat('00', %s), 'hex'), title = 'with a picture' WHERE id = 2",
        [size // 2],
    )
    pipeline.reach("articles")
    assert sorted(texts(pipeline)) == ["2", "4", "5"]
    assert left_out(pipeline).keys() == {"1", "3", "6"}
    goes_on(pipeline, 10)
    if memory_bytes is None:  # the command has no limit here, and would read the values
        assert pipeline.answer("verify", "articles", status=1)["differences"] == {"failed": 3}

    # Another column changes, so that the value itself is not sent, and has to be read.
    pipeline.source.execute("UPDATE articles SET title = 'another title' WHERE id IN (1, 2, 3)")
    pipeline.reach("articles")
    assert sorted(texts(pipeline)) == ["2", "4", "5"]

    pipeline.source.execute("UPDATE articles SET body = 'small again ' || id WHERE id IN (1, 3, 6)")
    pipeline.in_step()
    assert left_out(pipeline) == {}
    assert texts(pipeline)["3"] == "small again 3"
    pipeline.answer("verify", "articles")  # ends with status 1 if anything differs
    goes_on(pipeline, 11)
    assert pipeline.processes == [worker]
    assert worker.poll() is None


@pytest.mark.proof
@pytest.mark.timeout(900)
def test_many_large_values_that_have_to_be_read_again_are_read_in_portions(pipeline: Pipeline) -> None:
    """Each fits into memory, and all of them together do not."""
    pipeline.memory_bytes = MEMORY_BYTES
    pipeline.source.execute(
        "INSERT INTO articles SELECT i, 'title', repeat('word ' || i || ' ', 800000) FROM generate_series(10, 200) AS i"
    )
    worker = pipeline.start()
    pipeline.live()
    pipeline.source.execute("UPDATE articles SET title = 'another title'")
    pipeline.reach("articles")

    def left() -> object:
        of_before = "SELECT count(*) FROM cdcsync.articles_chunks WHERE title <> 'another title'"
        return pipeline.target.execute(of_before).fetchone()

    until(lambda: left() == (0,), pipeline.tail, progress=left)
    assert left_out(pipeline) == {}
    assert worker.poll() is None
