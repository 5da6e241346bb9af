"""Rows asked for by key: keys that are written otherwise, and those that the key's type cannot have."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cdcsync.model.rows import Key
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.sessions import Connection
from tests.support.tables import source_table

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


SPELLINGS = {
    "public.citext": (["ABC", "x"], ["abc", "ABC", "X"]),
    "numeric": (["1.0", "2"], ["1.000", "1.0", "2.0", "3"]),
    "double precision": (["0", "5"], ["-0", "0", "5"]),
    "character(4)": (["a", "b"], ["a   ", "a", "c   "]),
    "text": (["a"], ["a", "A"]),
}
"""By type, what the source has and what the index has: equal to the source's type, and not written alike."""


@pytest.mark.parametrize("type_", SPELLINGS)
async def test_a_key_that_the_source_writes_otherwise_is_absent_as_it_is_written(
    database: Database, source_session: Connection, type_: str
) -> None:
    here, asked = SPELLINGS[type_]
    database.execute("CREATE EXTENSION IF NOT EXISTS citext SCHEMA public")
    database.execute(f"CREATE TABLE t (id {type_} PRIMARY KEY)")
    database.execute(f"INSERT INTO t SELECT unnest(%s::text[])::{type_}", [here])
    page = await source_table({"id": type_}).page(source_session, None, 10)
    written = {str(row[0]) for row in page.rows}

    snapshot, absent = await source_table({"id": type_}).absent(source_session, [(key,) for key in asked])

    assert absent == [(key,) for key in asked if key not in written]
    assert isinstance(snapshot, Snapshot)
    assert (await source_table({"id": type_}).absent(source_session, []))[1] == []


IMPOSSIBLE = {
    "integer": (["1", "2"], ["1", "one", "2", "99999999999", "3"], ["1", "2"]),
    "uuid": (["00000000-0000-0000-0000-000000000001"], ["7", "00000000-0000-0000-0000-000000000001"], None),
    "public.mood": (["ok"], ["ok", "sad"], ["ok"]),
    "public.low": (["3"], ["3", "30", "x"], ["3"]),
    "date": (["2026-01-02"], ["2026-01-02", "17", ""], ["2026-01-02"]),
}
"""By type, what the source has, what the index has from when the key was of another type, and what of that is there."""


@pytest.mark.parametrize("soft", [True, False], ids=["told by the server", "found by halves"])
@pytest.mark.parametrize("type_", IMPOSSIBLE)
async def test_a_key_that_is_no_value_of_the_sources_type_is_absent(
    database: Database, source_session: Connection, monkeypatch: pytest.MonkeyPatch, type_: str, soft: bool
) -> None:
    if not soft:
        monkeypatch.setattr("cdcsync.source.keys.SOFT_ERRORS_VERSION", 10**9)
    here, asked, present = IMPOSSIBLE[type_]
    database.execute("CREATE TYPE mood AS ENUM ('ok'); CREATE DOMAIN low AS int CHECK (VALUE < 10)")
    database.execute(f"CREATE TABLE t (id {type_} PRIMARY KEY, body text)")
    database.execute("ALTER TABLE t ALTER body SET STORAGE EXTERNAL")
    database.execute(f"INSERT INTO t SELECT id::{type_}, repeat('x', 5000) FROM unnest(%s::text[]) AS id", [here])
    table = source_table({"id": type_}, ["body"])
    keys: list[Key] = [(key,) for key in asked]

    assert (await table.absent(source_session, keys))[1] == [(key,) for key in asked if key not in (present or here)]
    assert (
        sorted(str(row[0]) for row in (await table.by_keys(source_session, keys)).rows) == here[: len(present or here)]
    )
    assert await table.fitting_keys(source_session, keys, 100_000) == len(keys)
    assert (await table.absent(source_session, [("no value",)]))[1] == [("no value",)]
