"""docs/searching.md: every statement in it can be run."""

from __future__ import annotations

import re

import pytest

from cdcsync.target.pipelines import Pipelines
from tests import ROOT
from tests.support.indexes import SCHEMA, OpenIndex, changes, document, register

pytestmark = [pytest.mark.server, pytest.mark.anyio]

PAGE = (ROOT / "docs" / "searching.md").read_text(encoding="utf-8")


async def test_every_statement_of_the_page_runs_and_searches_find_something(open_index: OpenIndex) -> None:
    index = await open_index()
    await Pipelines(SCHEMA, "s").ensure(index.connection, "p")
    await register(index.connection, index.spec, slot="s")
    await index.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = '0/2'")
    await index.apply(changes(document("1", "a forgotten password"), document("2", "another password", carried=("2",))))
    await index.embed()
    await index.connection.execute("SET search_path TO public")
    statements = [
        statement
        for block in re.findall(r"```sql\n(.*?)```", PAGE, re.DOTALL)
        for statement in block.split(";")
        if statement.strip()
    ]
    assert len(statements) >= 11
    for statement in statements:
        cursor = await index.connection.execute(statement.encode())
        if cursor.description is not None and "null}" not in statement:
            assert await cursor.fetchall(), statement
    await index.connection.execute("DROP TEXT SEARCH CONFIGURATION public.french_plain; DROP EXTENSION unaccent")
