"""A value that the target cannot hold costs its row: the row is listed, and all others are indexed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import psycopg
import pytest
from psycopg import conninfo, sql

from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

EMOJI = "a smile \U0001f600"


@pytest.fixture
def latin(database: Database) -> Iterator[str]:
    """The DSN of a target that has no characters beyond Latin-1."""
    name = f"{database.name}_latin"
    identifier = sql.Identifier(name)
    with database.connect() as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0").format(identifier))
        dsn = conninfo.make_conninfo(database.dsn, dbname=name)
        with psycopg.connect(dsn, autocommit=True) as inside:
            inside.execute("CREATE EXTENSION vector")
        yield dsn
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("role", ["text", "carried", "both"])
def test_rows_with_characters_that_the_target_lacks_are_listed_and_the_others_are_loaded(
    database: Database, latin: str, make_pipeline: Callable[[str], Pipeline], role: str
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, author text)")
    database.execute("CREATE TABLE notes (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, 'title ' || i, 'author' FROM generate_series(1, 50) AS i")
    columns = {"text": ["title"], "carried": ["author"], "both": ["title", "author"]}[role]
    for column in columns:
        database.execute(
            sql.SQL("UPDATE articles SET {} = %s WHERE id IN (7, 31)").format(sql.Identifier(column)), [EMOJI]
        )
    articles = {"columns": ["author"]}
    pipeline = make_pipeline(configuration(database.dsn, target=latin, indexes={"articles": articles, "notes": {}}))
    worker = pipeline.start()
    pipeline.live()

    assert pipeline.left_out("articles") == {("7",), ("31",)}
    held = pipeline.target.execute("SELECT count(*), bool_or(id IN (7, 31)) FROM cdcsync.articles_chunks")
    assert held.fetchone() == (48, False)
    assert EMOJI not in pipeline.log.read_text()
    listed = pipeline.answer("failures", "articles", "list")
    assert "UntranslatableCharacter" in str(listed)

    # Changed to what the target can hold, they come in; the other index was never held up.
    database.execute("UPDATE articles SET title = 'plain ' || id, author = 'author' WHERE id IN (7, 31)")
    database.execute("INSERT INTO notes VALUES (1, 'still followed')")
    pipeline.in_step()
    assert pipeline.left_out("articles") == set()
    assert worker.poll() is None


def test_where_the_target_refuses_most_rows_the_index_is_paused_and_says_why(
    database: Database, latin: str, make_pipeline: Callable[[str], Pipeline]
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text)")
    database.execute("CREATE TABLE notes (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, %s FROM generate_series(1, 50) AS i", [EMOJI])
    pipeline = make_pipeline(configuration(database.dsn, target=latin, indexes={"articles": {}, "notes": {}}))
    pipeline.start()
    paused = pipeline.event("index_paused")
    assert "UntranslatableCharacter" in paused["error"]
    database.execute("INSERT INTO notes VALUES (1, 'still followed')")
    until(lambda: pipeline.target.execute("SELECT FROM cdcsync.notes_chunks").fetchall(), pipeline.tail)


def test_a_value_that_the_stream_brings_costs_its_row_and_the_rows_beside_it_are_applied(
    make_database: Callable[[], Database], make_pipeline: Callable[[str], Pipeline]
) -> None:
    """A label of an enum that the target does not know, which somebody adds there later."""
    source, target = make_database(), make_database()
    for database in (source, target):
        database.execute("CREATE TYPE mood AS ENUM ('sad', 'happy')")
    source.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, mood mood)")
    source.execute("INSERT INTO articles SELECT i, 'title ' || i, 'sad' FROM generate_series(1, 20) AS i")
    text = configuration(source.dsn, target=target.dsn, indexes={"articles": {"columns": ["mood"]}})
    pipeline = make_pipeline(text)
    worker = pipeline.start()
    pipeline.live()
    source.execute("ALTER TYPE mood ADD VALUE 'new'")
    with source.connect() as writer, writer.transaction():
        writer.execute("UPDATE articles SET mood = 'new' WHERE id = 7")  # its text is as it was
        writer.execute("INSERT INTO articles VALUES (21, 'another', 'new')")
        writer.execute("UPDATE articles SET title = 'beside them' WHERE id = 8")
        writer.execute("DELETE FROM articles WHERE id = 9")
    pipeline.reach("articles")

    assert pipeline.left_out("articles") == {("7",), ("21",)}
    assert target.execute("SELECT content FROM articles_index_chunks WHERE id = 8") == [("beside them",)]
    assert target.execute("SELECT FROM articles_index_chunks WHERE id IN (7, 9, 21)") == []

    target.execute("ALTER TYPE mood ADD VALUE 'new'")
    pipeline.answer("failures", "articles", "retry")
    until(lambda: pipeline.left_out("articles") == set(), pipeline.tail)
    pipeline.in_step()
    assert worker.poll() is None
    assert not [one for one in pipeline.events() if one["event"] == "index_paused"]


LONG = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, {pieces}) n)"
"""Some text that hardly becomes smaller: 200 pieces are too long for a b-tree, 500 for any page of it."""


def test_a_value_too_long_for_a_b_tree_costs_its_row(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    database.execute("CREATE TABLE articles (id int PRIMARY KEY, title text, label text)")
    database.execute("CREATE TABLE notes (id int PRIMARY KEY, title text)")
    database.execute("INSERT INTO articles SELECT i, 'title ' || i, 'label' FROM generate_series(1, 20) AS i")
    database.execute(f"UPDATE articles SET label = {LONG.format(pieces=200)} WHERE id = 7")
    articles = {"columns": ["label"], "indexed": ["label"]}
    pipeline = make_pipeline(configuration(database.dsn, indexes={"articles": articles, "notes": {}}))
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.left_out("articles") == {("7",)}

    database.execute(f"UPDATE articles SET label = {LONG.format(pieces=500)} WHERE id = 8")  # its text is as it was
    database.execute(f"INSERT INTO articles VALUES (21, 'another', {LONG.format(pieces=200)})")
    database.execute("UPDATE articles SET label = repeat('x', 100000) WHERE id = 9")  # is short once it is compressed
    pipeline.reach("articles")
    assert pipeline.left_out("articles") == {("7",), ("8",), ("21",)}
    assert len(database.execute("SELECT FROM articles_index_chunks WHERE label = repeat('x', 100000)")) == 1
    assert "too long for the index" in str(pipeline.answer("failures", "articles", "list"))
    assert pipeline.answer("verify", "articles", status=1)["differences"] == {"failed": 3}

    database.execute("UPDATE articles SET label = 'short' WHERE id IN (7, 8, 21)")
    database.execute("INSERT INTO notes VALUES (1, 'still followed')")
    pipeline.in_step()
    assert pipeline.left_out("articles") == set()
    assert not pipeline.times("index_paused")
    assert worker.poll() is None
