"""Which tables leave a publication with their index, and why others stay."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cdcsync.flows.teardown.publication import of_tables
from cdcsync.postgres.sessions import connect
from tests.support.servers import Database
from tests.support.teardowns import ANOTHER_SLOT, OF_WORKER, make
from tests.support.workers import Pipeline

pytestmark = pytest.mark.server


@pytest.mark.parametrize(
    ("statement", "reason"),
    [
        ("CREATE PUBLICATION cdcsync FOR ALL TABLES", "the publication was not made by a worker"),
        ("CREATE PUBLICATION cdcsync FOR TABLE public.articles, public.notes", "was not made by a worker"),
        (
            f"CREATE PUBLICATION cdcsync FOR TABLE public.articles, public.notes, public.elsewhere; {OF_WORKER}",
            "also sends public.elsewhere",
        ),
        (f"CREATE PUBLICATION cdcsync FOR TABLE public.notes; {OF_WORKER}", "it is the last one there"),
        (
            f"CREATE PUBLICATION cdcsync FOR TABLE public.articles, public.notes; {OF_WORKER}; SET ROLE pg_monitor",
            "belongs to another role",
        ),
        (
            f"CREATE PUBLICATION cdcsync FOR TABLE public.articles, public.notes; {OF_WORKER}; {ANOTHER_SLOT}",
            "may be read through another_",
        ),
    ],
    ids=["all tables", "made by hand", "another table", "the last table", "another role", "another slot"],
)
async def test_a_table_stays_in_the_publication_for_the_reason_that_is_told(
    database: Database, make_pipeline: Callable[[str], Pipeline], statement: str, reason: str
) -> None:
    for table in ("articles", "notes", "elsewhere"):
        database.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, title text)")
    config = make(make_pipeline, database, database).config
    async with await connect(database.dsn, "source", application_name="tests") as source:
        for part in statement.split("; "):
            await source.execute(part.encode())
        [step], leaving = await of_tables(source, config, {"public.notes"}, {"public.articles"})
    assert leaving == []
    assert step.outcome == "kept"
    assert reason in (step.note or "")
    assert 'DROP TABLE "public"."notes"' in (step.note or "")


@pytest.mark.anyio
async def test_a_table_that_is_sent_with_its_schema_stays_in_the_publication(
    database: Database, make_pipeline: Callable[[str], Pipeline]
) -> None:
    with database.connect() as session:
        if session.info.server_version < 150000:
            pytest.skip("publications of schemas came with PostgreSQL 15")
    for table in ("articles", "notes"):
        database.execute(f"CREATE TABLE {table} (id bigint PRIMARY KEY, title text)")
    database.execute("CREATE PUBLICATION cdcsync FOR TABLES IN SCHEMA public")
    database.execute(OF_WORKER)
    config = make(make_pipeline, database, database).config
    async with await connect(database.dsn, "source", application_name="tests") as source:
        [step], leaving = await of_tables(source, config, {"public.notes"}, {"public.articles"})
    assert (step.outcome, step.note, leaving) == ("kept", "it is sent with its schema", [])
