"""Statements that are left out where they would change nothing: they would wait for whoever has the table."""

from __future__ import annotations

import psycopg
import pytest
from psycopg import sql

from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import connect
from cdcsync.target.ddl.standing import continue_numbers, create_index, describe_column, describe_table
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TABLE = sql.Identifier("public", "articles")
OF_TITLE = sql.SQL("{} (title)").format(TABLE)


async def test_what_stands_is_left_alone_and_what_does_not_is_made(database: Database) -> None:
    database.execute("CREATE TABLE articles (id int, title text)")
    target = await connect(database.dsn, "target")
    await create_index(target, "public", "articles_title", OF_TITLE)
    await describe_table(target, TABLE, "articles, by title")
    assert await describe_column(target, TABLE, "title", "what it is called")
    with psycopg.connect(database.dsn) as vacuum:
        vacuum.execute("LOCK TABLE articles IN SHARE UPDATE EXCLUSIVE MODE")
        await target.execute("SET lock_timeout = '50ms'")
        await create_index(target, "public", "articles_title", OF_TITLE)
        await describe_table(target, TABLE, "articles, by title")
        assert not await describe_column(target, TABLE, "title", "what it is called")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await create_index(target, "public", "articles_title_again", OF_TITLE)
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await describe_table(target, TABLE, "articles")
        with pytest.raises(psycopg.errors.LockNotAvailable):
            await describe_column(target, TABLE, "title", "its name")
    await describe_table(target, TABLE, "articles")
    described = await target.execute("SELECT obj_description('public.articles'::regclass)")
    assert await described.fetchone() == ("articles",)
    await target.close()


async def test_numbers_continue_after_the_highest_that_the_table_has(database: Database) -> None:
    numbered = sql.Identifier("public", "Numbered")
    database.execute('CREATE TABLE "Numbered" (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY)')
    another = 'INSERT INTO public."Numbered" DEFAULT VALUES RETURNING id'
    target = await connect(database.dsn, "target")

    async def taken() -> int:
        await continue_numbers(target, numbered, "id")
        return int(await fetch_value(target, another))

    assert [await taken() for _ in range(3)] == [1, 2, 3]
    # As logical replication leaves it: the rows are there, and the sequence is a new one.
    await target.execute('ALTER TABLE public."Numbered" ALTER id RESTART')
    assert await taken() == 4
    # Numbers are not used twice because the rows that had them are gone.
    await target.execute('DELETE FROM public."Numbered"')
    assert await taken() == 5
    await target.close()
