"""The stage: the temporary tables through which changes come to an index."""

from __future__ import annotations

import msgspec
import pytest
from psycopg import sql

from cdcsync.documents.templates import hash_text
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.names import Names
from cdcsync.target.stage import STAGED_ROWS, Op, Stage
from cdcsync.target.vectors import register_vectors
from tests.support.indexes import SCHEMA, changes, document, kept, make_spec, vector_text
from tests.support.relations import create, rows

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SPEC = make_spec(search=None)


@pytest.fixture(params=["inserted", "copied"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a test see both ways in which rows come to the stage."""
    if request.param == "copied":
        monkeypatch.setattr("cdcsync.target.stage.FEW_ROWS", 0)


@pytest.fixture
async def stage(connection: Connection) -> Stage:
    await create(connection, SPEC)
    await register_vectors(connection)
    stage = Stage(connection, SPEC)
    await stage.create(Names(SCHEMA, SPEC.name).chunks, sql.Identifier("public"))
    return stage


async def staged(connection: Connection, stage: Stage) -> list[tuple[object, ...]]:
    return await rows(
        connection,
        f"SELECT op, k0, c0, chunk_no, chunk_total, content FROM {stage.table.as_string(connection)}"
        " ORDER BY k0, op, chunk_no",
    )


@pytest.mark.usefixtures("way")
async def test_each_row_says_what_apply_does_with_it(connection: Connection, stage: Stage) -> None:
    batch = changes(
        document("1", "a", "b", carried=("7",)),
        document("2", "c", existed=True, carried=("8",)),
        document("3", carried=("9",)),
        kept("4", "5"),
        deleted=["5"],
        absent=["6"],
    )
    async with connection.transaction():
        await stage.fill(batch)
        assert await staged(connection, stage) == [
            (Op.PUT, 1, 7, 0, 2, "a"),
            (Op.PUT, 1, 7, 1, 2, "b"),
            (Op.REPLACE, 2, 8, 0, 1, "c"),
            (Op.DELETE, 3, None, 0, 0, None),
            (Op.KEEP, 4, 5, 0, 0, None),
            (Op.DELETE, 5, None, 0, 0, None),
            (Op.DELETE_AS_WRITTEN, 6, None, 0, 0, None),
        ]


async def test_what_was_written_down_ahead_is_copied_as_it_is(connection: Connection, stage: Stage) -> None:
    ahead = msgspec.structs.replace(changes(), staged=list(stage.blocks(changes(document("1", "a")))))
    async with connection.transaction():
        await stage.fill(ahead)
        assert await staged(connection, stage) == [(Op.PUT, 1, 1, 0, 1, "a")]


@pytest.mark.usefixtures("way")
async def test_what_has_a_vector_already_is_ready(connection: Connection, stage: Stage) -> None:
    async with connection.transaction():
        await stage.fill(changes(document("1", "a"), document("2", "b"), inline=["a"]))
        assert await rows(connection, "SELECT content_hash, embedding::text FROM pg_temp.ready") == [
            (hash_text("a"), vector_text("a"))
        ]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("rows_before", [0, STAGED_ROWS + 1])
async def test_every_batch_finds_the_tables_empty(connection: Connection, stage: Stage, rows_before: int) -> None:
    first = changes(document("1", "a"), inline=["a"])
    async with connection.transaction():
        await stage.fill(first)
        await connection.execute("INSERT INTO pg_temp.gone VALUES (1, ''); INSERT INTO pg_temp.put VALUES (1, '')")
        stage.used(rows_before)
    async with connection.transaction():
        await stage.fill(changes(document("2", "b")))
        assert await staged(connection, stage) == [(Op.PUT, 2, 1, 0, 1, "b")]
        others = "SELECT FROM pg_temp.gone UNION ALL SELECT FROM pg_temp.put UNION ALL SELECT FROM pg_temp.ready"
        assert await rows(connection, others) == []


async def test_indexes_of_equal_types_share_a_stage_and_others_do_not(connection: Connection, stage: Stage) -> None:
    same = Stage(connection, make_spec(name="notes", search=None))
    other = Stage(connection, make_spec(name="more", key={"id": "text"}, search=None))
    swapped = Stage(connection, make_spec(name="more", key={"id": "bigint", "at": "integer"}, carried={}, search=None))
    assert same.table == stage.table
    assert len({one.table.as_string(connection) for one in (stage, other, swapped)}) == 3
