"""An index as the target has it."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.errors import SetupError
from cdcsync.postgres.sessions import Connection
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.search import served_now, stored_spec
from tests.support.indexes import SCHEMA, make_spec, register
from tests.support.relations import create, registered

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_the_stored_index_is_what_the_target_says_and_not_the_configuration(connection: Connection) -> None:
    spec = make_spec(carried={"tenant %": "integer"}, search="english")
    await create(connection, spec)
    with pytest.raises(SetupError, match="no such index"):
        await stored_spec(connection, SCHEMA, "articles", spec.config)
    await Pipelines(SCHEMA, "s").ensure(connection, "p")
    await register(connection, spec, slot="s")
    changed = msgspec.structs.replace(spec.config, vector_type="halfvec", columns=(), search="simple")
    assert await stored_spec(connection, SCHEMA, "articles", changed) == spec
    now = await served_now(connection, SCHEMA, "articles")
    assert now is not None
    assert now.fits(spec)
    assert not now.fits(msgspec.structs.replace(spec, generation=2))
    assert not now.fits(msgspec.structs.replace(spec, stem="articles~2"))
    other = msgspec.structs.replace(spec.shape, carried=())
    assert not now.fits(msgspec.structs.replace(spec, shape=other))
    assert await served_now(connection, SCHEMA, "nothing") is None


async def test_a_target_without_any_index_says_what_to_do(connection: Connection) -> None:
    with pytest.raises(SetupError, match="no such index") as refused:
        await stored_spec(connection, SCHEMA, "articles", make_spec().config)
    assert "cdcsync run" in (refused.value.hint or "")


async def test_an_index_without_its_table_is_told_from_one_that_never_was(connection: Connection) -> None:
    await registered(connection)
    await connection.execute("DROP TABLE cdcsync.articles_chunks CASCADE")
    with pytest.raises(SetupError, match=r"cdcsync\.articles_chunks is missing"):
        await stored_spec(connection, SCHEMA, "articles", make_spec().config)
