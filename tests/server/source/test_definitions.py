"""Whether what decoding looks up was changed: by any kind of definition, and by nothing else."""

from __future__ import annotations

import pytest

from cdcsync.postgres.sessions import Connection
from cdcsync.source.definitions import definitions_changed_since
from cdcsync.source.transactions import next_transaction

pytestmark = pytest.mark.server

LAYOUT = (
    "CREATE TYPE mood AS ENUM ('sad', 'happy')",
    "CREATE TYPE spot AS (x int, y int)",
    "CREATE DOMAIN short AS varchar(10)",
    "CREATE TABLE t (id int PRIMARY KEY, title text, mood mood, spot spot, name short, code int NOT NULL UNIQUE)",
    "CREATE TABLE parts (id int PRIMARY KEY) PARTITION BY RANGE (id)",
    "CREATE TABLE part (id int PRIMARY KEY)",
    "CREATE SCHEMA attic",
    "CREATE PUBLICATION p FOR TABLE t",
)

CHANGES = {
    "a table": "CREATE TABLE new (id int)",
    "a table in place of another": "DROP TABLE part; CREATE TABLE part (id int PRIMARY KEY)",
    "a partition": "CREATE TABLE low PARTITION OF parts FOR VALUES FROM (1) TO (9)",
    "a table that becomes a partition": "ALTER TABLE parts ATTACH PARTITION part FOR VALUES FROM (1) TO (9)",
    "a column": "ALTER TABLE t ADD note text",
    "a column that goes": "ALTER TABLE t DROP title",
    "a column's name": "ALTER TABLE t RENAME title TO heading",
    "a column's type, and no value": "ALTER TABLE t ALTER title TYPE varchar",
    "a table's name": "ALTER TABLE t RENAME TO u",
    "a table's schema": "ALTER TABLE t SET SCHEMA attic",
    "a schema's name": "ALTER SCHEMA attic RENAME TO cellar",
    "a table's file": "TRUNCATE t",
    "a replica identity": "ALTER TABLE t REPLICA IDENTITY USING INDEX t_code_key",
    "a primary key": "ALTER TABLE t DROP CONSTRAINT t_pkey, ADD PRIMARY KEY (code)",
    "a new type": "CREATE TYPE mood2 AS ENUM ('sad')",
    "a new label": "ALTER TYPE mood ADD VALUE 'content'",
    "a label's name": "ALTER TYPE mood RENAME VALUE 'sad' TO 'down'",
    "an attribute": "ALTER TYPE spot ADD ATTRIBUTE z int",
    "an attribute's name": "ALTER TYPE spot RENAME ATTRIBUTE x TO z",
    "a domain's name": "ALTER DOMAIN short RENAME TO shorter",
    "a publication": "CREATE PUBLICATION q",
    "what a publication sends": "ALTER PUBLICATION p SET (publish = 'insert')",
    "a table that a publication gets": "ALTER PUBLICATION p ADD TABLE part",
    "a schema that a publication gets": "ALTER PUBLICATION p SET TABLES IN SCHEMA attic",
}
OTHERS = {
    "nothing": "SELECT pg_current_xact_id()",
    "rows": "INSERT INTO t (id, code) VALUES (1, 1)",
    "statistics": "ANALYZE t",
    "an index for searches": "CREATE INDEX ON t (title)",
    "a temporary table": "CREATE TEMP TABLE passing (id int PRIMARY KEY, title text, name short)",
    "what is removed": "DROP TABLE part; DROP SCHEMA attic",
}


async def test_any_definition_that_decoding_looks_up_is_told_from_everything_else(
    source_session: Connection,
) -> None:
    source = source_session
    for statement in LAYOUT:
        await source.execute(f"SET search_path = public; {statement}".encode())
    told: dict[str, bool] = {}
    for name, statement in (CHANGES | OTHERS).items():
        before = await next_transaction(source)
        assert not await definitions_changed_since(source, before)
        async with source.transaction(force_rollback=True):
            await source.execute(statement.encode())
            told[name] = await definitions_changed_since(source, before)

    assert told == {name: name in CHANGES for name in told}
