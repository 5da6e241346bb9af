"""The types that columns have in the target."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from psycopg import AsyncConnection, conninfo, sql
from psycopg.abc import Query

from cdcsync.postgres.sessions import connect
from cdcsync.preflight import Finding
from cdcsync.preflight.types import choose_types
from cdcsync.source.columns import Column
from tests.support.preflight import ARTICLES, SLOT, configured, examined, lay_out, stored_spec, warnings
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def test_types_that_the_target_lacks_become_text_with_a_warning(make_database: Callable[[], Database]) -> None:
    source, target = make_database(), make_database()
    create = "CREATE TYPE mood AS ENUM ('calm', 'cross'); CREATE TYPE same AS ENUM ('a'); CREATE DOMAIN known AS int"
    source.execute(f"{create}; CREATE TYPE pair AS (a int, b int); ALTER TYPE same ADD VALUE 'b'")
    source.execute("CREATE DOMAIN label AS varchar(9); CREATE DOMAIN tag AS label NOT NULL")
    source.execute(
        "CREATE TABLE t (id tag PRIMARY KEY, mood mood, same same, pair pair, known known, many mood[],"
        " price numeric(8,2), at timestamptz(3), place vector(3), body text)"
    )
    target.execute(f"{create}; DROP TYPE mood")
    columns = ["mood", "same", "pair", "known", "many", "price", "at", "place"]
    report = await examined(
        configured(source.dsn, target.dsn, t=f'table = "t"\ntext = "{{body}}"\ncolumns = {columns}')
    )
    assert report.errors == []
    (spec,) = report.specs
    assert dict(zip(columns, spec.carried_types, strict=True)) == {
        "mood": "text",
        "same": "text",
        "pair": "text",
        "known": "integer",
        "many": "text",
        "price": "numeric(8,2)",
        "at": "timestamp(3) with time zone",
        "place": "public.vector(3)",
    }
    assert (spec.source_key_types, spec.key_types) == (("character varying(9)",), ("character varying(9)",))
    told = "\n".join(finding.message for finding in warnings(report))
    assert [line.partition(" is carried as text")[0] for line in told.splitlines()] == [
        "the column mood",
        "the column same",
        "the column pair",
        "the column many",
    ]
    assert "public.same lacks 'b'" in told
    assert "public.pair does not exist" in told


async def test_another_type_of_the_same_name_is_not_taken_for_the_columns(
    make_database: Callable[[], Database],
) -> None:
    source, target = make_database(), make_database()
    source.execute("CREATE TABLE t (id int PRIMARY KEY, place vector(3), body text)")
    target.execute("CREATE SCHEMA tools; ALTER EXTENSION vector SET SCHEMA tools; CREATE TYPE vector AS (x float)")
    report = await examined(configured(source.dsn, target.dsn, t='table = "t"\ntext = "{body}"\ncolumns = ["place"]'))
    assert report.errors == []
    assert report.specs[0].carried_types == ("text",)


@pytest.mark.proof_from(3)
@pytest.mark.parametrize("type_", ["regclass", "regrole", "regprocedure[]", "aclitem[]", "relation"])
@pytest.mark.parametrize("paused", [False, True], ids=["new", "paused with it"])
async def test_names_of_what_the_source_has_are_text_in_another_database_and_an_index_gives_up_their_type(
    make_database: Callable[[], Database], type_: str, paused: bool
) -> None:
    source, target = make_database(), make_database()
    for database in (source, target):
        database.execute("CREATE DOMAIN public.relation AS regclass; CREATE SCHEMA kept")
        database.execute(f"SET search_path = public; CREATE TABLE kept.t_chunks (what {type_})")
    base = "regclass" if type_ == "relation" else None
    column = Column("what", "public.relation" if base else type_, not_null=False, generated="", base_type=base)
    for shared in (False, True):
        findings: list[Finding] = []
        async with await connect(target.dsn, "target") as connection:
            schema = "kept" if paused else "cdcsync"
            chosen = await choose_types(connection, schema, "t", [column], findings, paused=paused, shared=shared)
        assert chosen == {"what": (base or type_) if shared else "text"}
        assert ["names something in the source" in one.message for one in findings] == [True] * (not (paused or shared))


async def test_in_one_database_every_type_is_kept(database: Database) -> None:
    database.execute("CREATE TYPE mood AS ENUM ('calm'); CREATE TABLE t (id int PRIMARY KEY, mood mood, body text)")
    report = await examined(configured(database.dsn, t='table = "t"\ntext = "{body}"\ncolumns = ["mood"]'))
    assert report.specs[0].carried_types == ("public.mood",)
    assert warnings(report) == []


async def test_a_b_tree_on_what_cannot_be_sorted_is_refused(database: Database) -> None:
    database.execute(f"{ARTICLES}; ALTER TABLE articles ADD facts json, ADD spot point")
    columns = 'columns = ["facts", "spot", "tenant"]\nindexed = ["facts", "spot", "tenant", "id"]'
    report = await examined(configured(database.dsn, articles=columns))
    assert [finding.hint for finding in report.errors] == [
        'remove "facts" from indexes.articles.indexed',
        'remove "spot" from indexes.articles.indexed',
    ]


async def test_an_examination_asks_once_for_each_type_however_many_columns_have_it(
    make_database: Callable[[], Database], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = make_database(), make_database()
    for database in (source, target):
        database.execute("CREATE TYPE mood AS ENUM ('calm'); CREATE DOMAIN label AS varchar(9)")
    types = ("bigint", "numeric(8,2)", "mood", "label", "text")
    columns = [f"c{at}" for at in range(100)]
    defined = ", ".join(f"{column} {types[at % len(types)]}" for at, column in enumerate(columns))
    source.execute(f"CREATE TABLE t (id int PRIMARY KEY, body text, {defined})")
    executed: list[object] = []
    execute = AsyncConnection.execute

    async def counted(connection: AsyncConnection, query: Query, *args: Any, **options: Any) -> Any:
        executed.append(query)
        return await execute(connection, query, *args, **options)

    monkeypatch.setattr(AsyncConnection, "execute", counted)

    async def statements(carried: list[str]) -> int:
        executed.clear()
        lines = f'table = "t"\ntext = "{{body}}"\ncolumns = {carried}\nindexed = {carried}'
        assert (await examined(configured(source.dsn, target.dsn, t=lines))).errors == []
        return len(executed)

    assert await statements(columns) == await statements(columns[: len(types)])


async def test_a_column_that_grew_in_the_source_is_warned_of_and_followed(database: Database) -> None:
    database.execute(f"{ARTICLES}; ALTER TABLE articles ALTER tenant TYPE bigint")
    await lay_out(database, stored_spec(carried={"tenant": "integer"}), slot=SLOT)
    config = configured(database.dsn, slot=SLOT, articles='columns = ["tenant"]\nsearch = ""')
    report = await examined(config)
    (warning,) = warnings(report)
    assert "tenant is bigint in the source and integer in the existing index" in warning.message
    assert report.specs[0].carried_types == ("bigint",)
    await lay_out(database, report.specs[0])
    assert warnings(await examined(config)) == []


OWNERS = {
    "a stranger": ("SELECT", "text"),
    "the database's": ("ALTER DATABASE {database} OWNER TO {owner}", "public.mood"),
    "the schema's": ("ALTER SCHEMA public OWNER TO {owner}", "public.mood"),
    "one of the worker's roles": ("GRANT {owner} TO {worker}", "public.mood"),
}


@pytest.mark.parametrize("owner", OWNERS)
async def test_a_type_of_the_target_is_used_if_its_owner_is_trusted_there(
    make_database: Callable[[], Database], owner: str
) -> None:
    source, target = make_database(), make_database()
    source.execute("CREATE TYPE mood AS ENUM ('calm'); CREATE TABLE t (id int PRIMARY KEY, mood mood, body text)")
    names = {"owner": f"{target.name}_owner", "worker": f"{target.name}_worker", "database": target.name}
    made, type_ = OWNERS[owner]
    roles = {name: sql.Identifier(value) for name, value in names.items()}
    with target.connect() as admin:
        try:
            admin.execute("CREATE TYPE mood AS ENUM ('calm')")
            # Another database may give its type the same OID.
            (oid,) = admin.execute("SELECT 'mood'::regtype::oid::int8").fetchall()[0]
            column = Column("mood", "public.mood", not_null=False, generated="", labels=("calm",), wire_type=(oid, -1))
            for statement in (
                "CREATE ROLE {owner}; CREATE ROLE {worker} LOGIN PASSWORD 'w'; ALTER TYPE mood OWNER TO {owner}",
                made,
            ):
                admin.execute(sql.SQL(statement).format(**roles))
            dsn = conninfo.make_conninfo(target.dsn, user=names["worker"], password="w")
            findings: list[Finding] = []
            async with await connect(dsn, "target") as connection:
                chosen = await choose_types(connection, "cdcsync", "t", [column], findings)
        finally:
            admin.execute("DROP TYPE mood")
            admin.execute(sql.SQL("ALTER DATABASE {database} OWNER TO CURRENT_USER").format(**roles))
            admin.execute("ALTER SCHEMA public OWNER TO pg_database_owner")
            admin.execute(sql.SQL("DROP ROLE {owner}, {worker}").format(**roles))

    assert chosen == {"mood": type_}
    assert [one.message for one in findings] == (
        [
            f"the column mood is carried as text: its type public.mood belongs to {names['owner']} in the target, who"
            " could have it run code as the worker's role"
        ]
        if type_ == "text"
        else []
    )
