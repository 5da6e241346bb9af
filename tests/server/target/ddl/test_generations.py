"""The relations of generations beside the live one: made where they are missing, and filled again if they were lost."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.errors import SetupError
from cdcsync.target.ddl.generations import create_generations, exchange_relations, open_beside, switch_relations
from tests.support.indexes import SCHEMA, begin_generations, live_index, make_spec, two_generations
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.mark.parametrize("dropped", ["articles_vectors_2", "articles_vectors_2_settled", "articles_vectors_2_fresh"])
async def test_a_generation_that_lost_a_table_is_made_whole_and_told_of(database: Database, dropped: str) -> None:
    async with live_index(database, two_generations()) as live:
        await begin_generations(live)
        assert await create_generations(live.connection, SCHEMA, live.spec) == []
        await live.connection.execute(
            f"GRANT SELECT ON cdcsync.articles_vectors_2 TO PUBLIC; DROP TABLE cdcsync.{dropped} CASCADE".encode()
        )

        created = await create_generations(live.connection, SCHEMA, live.spec)

        assert created == [2]
        assert await live.rows(
            "SELECT count(*) FROM pg_inherits WHERE inhparent = 'cdcsync.articles_vectors_2'::regclass"
        ) == [(2,)]


async def test_the_vectors_of_another_model_open_nothing_that_an_operator_guards(database: Database) -> None:
    async with live_index(database, two_generations()) as live:
        for table in ("articles_vectors_1", "articles_vectors_1_settled"):
            await live.connection.execute(
                f"GRANT SELECT ON cdcsync.{table} TO PUBLIC;"
                f" ALTER TABLE cdcsync.{table} ENABLE ROW LEVEL SECURITY".encode()
            )
        await live.connection.execute(b"GRANT SELECT ON cdcsync.articles_vectors_1_fresh TO PUBLIC")

        await begin_generations(live)

        readable = (
            "SELECT relname::text FROM pg_class WHERE has_table_privilege('pg_monitor', oid, 'SELECT')"
            " AND relname LIKE 'articles_vectors_2%%' AND relkind IN ('r', 'p')"
        )
        assert await live.rows(readable) == [("articles_vectors_2_fresh",)]
        other = msgspec.structs.replace(live.spec.others[0], others=(live.spec,))
        with pytest.raises(SetupError, match="row-level security of your own"):
            async with live.connection.transaction():
                await switch_relations(live.connection, SCHEMA, other, live.spec.generation)
        assert await live.rows(readable) == [("articles_vectors_2_fresh",)]


async def test_other_chunks_open_no_vectors_that_an_operator_guards(database: Database) -> None:
    searched, hidden = make_spec(), make_spec(name="articles~other")
    pair = (msgspec.structs.replace(searched, beside=hidden), msgspec.structs.replace(hidden, beside=searched))
    async with live_index(database, pair[0]) as live, live_index(database, pair[1]) as other:
        guard = "GRANT SELECT ON cdcsync.articles_vectors_1 TO PUBLIC; ALTER TABLE {} ENABLE ROW LEVEL SECURITY"
        await live.connection.execute(guard.format("cdcsync.articles_vectors_1").encode())

        await open_beside(live.connection, SCHEMA, pair[0], created=True)

        readable = "SELECT has_table_privilege('pg_monitor', 'cdcsync.\"articles~other_vectors_1\"', 'SELECT')"
        assert await other.rows(readable) == [(False,)]
        with pytest.raises(SetupError, match=r"articles~other_vectors_1.* has not"):
            async with live.connection.transaction():
                await exchange_relations(live.connection, SCHEMA, pair[1])
        assert await other.rows(readable) == [(False,)]


async def test_chunks_that_stand_beside_open_their_words_to_readers_of_an_index_that_has_none(
    database: Database,
) -> None:
    searched, hidden = make_spec(search=None), make_spec(name="articles~other")
    pair = (msgspec.structs.replace(searched, beside=hidden), msgspec.structs.replace(hidden, beside=searched))
    async with live_index(database, pair[0]) as live, live_index(database, pair[1]) as other:
        await live.connection.execute(b"GRANT SELECT ON cdcsync.articles_chunks TO PUBLIC")

        await open_beside(live.connection, SCHEMA, pair[0], created=True)

        readable = "SELECT has_table_privilege('pg_monitor', 'cdcsync.\"articles~other_words\"', 'SELECT')"
        assert await other.rows(readable) == [(True,)]
