"""Grants and options outlive the relation: whoever drops or replaces it, the next one has what the last one had."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
import structlog
from psycopg import sql

from cdcsync.target.ddl.grants import settings_to_note
from cdcsync.target.ddl.missing import missing_relations
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.registry import Registry
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, make_spec, register
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

DROPPED = {
    "chunks": ("cdcsync.articles_chunks", "DROP TABLE cdcsync.articles_chunks CASCADE"),
    "vectors": ("cdcsync.articles_vectors_1", "DROP TABLE cdcsync.articles_vectors_1 CASCADE"),
    "words": ("cdcsync.articles_words", "DROP TABLE cdcsync.articles_words"),
    "view": ("public.articles_index", "DROP VIEW public.articles_index"),
    "view of chunks": ("public.articles_index_chunks", "DROP VIEW public.articles_index_chunks"),
}


@pytest.fixture
async def index(open_index: OpenIndex) -> LiveIndex:
    """An index with all relations that an index can have, which is registered."""
    opened = await open_index()
    await opened.connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('s', 'p')")
    await register(opened.connection, opened.spec, slot="s")
    return opened


@pytest.fixture
async def role(index: LiveIndex, target: Database) -> AsyncIterator[str]:
    """A role without any privilege that was not given to it."""
    name = f"cdcsync_test_{secrets.token_hex(4)}"
    await run(index, f"CREATE ROLE {name}")
    yield name
    # Roles belong to the whole server; what a test dropped is gone with its grants.
    target.execute(sql.SQL("DROP OWNED BY {0}; DROP ROLE {0}").format(sql.Identifier(name)))


async def run(index: LiveIndex, *statements: str) -> None:
    for statement in statements:
        await index.connection.execute(statement.encode())


async def note(index: LiveIndex) -> None:
    """Do what the watch does once a minute."""
    settings = await settings_to_note(index.connection, SCHEMA, index.spec.name)
    await Registry(SCHEMA).note_settings(index.connection, index.spec.name, settings)


async def start(index: LiveIndex, **settings: Any) -> None:
    """Do what a worker does with the relations when it starts."""
    async with index.connection.transaction():
        await create_index_relations(index.connection, SCHEMA, make_spec(**settings) if settings else index.spec)


async def may(index: LiveIndex, role: str, relation: str, column: str | None = None) -> bool:
    """Say whether a role may read a relation, or one column of it."""
    what = "has_column_privilege(%s, %s, %s, 'SELECT')" if column else "has_table_privilege(%s, %s, 'SELECT')"
    arguments = [role, relation, *([column] if column else [])]
    return bool((await index.rows(f"SELECT {what}", *arguments))[0][0])


@pytest.mark.parametrize("what", DROPPED)
async def test_whoever_could_read_what_somebody_dropped_can_read_what_comes_back(
    index: LiveIndex, role: str, what: str
) -> None:
    relation, drop = DROPPED[what]
    await run(index, f"GRANT SELECT ON {relation} TO {role}")
    await note(index)
    await run(index, drop)
    assert await missing_relations(index.connection, SCHEMA, index.spec)

    await start(index)

    assert await may(index, role, relation)


async def test_options_and_grants_on_columns_come_back_with_a_view_that_somebody_dropped(
    index: LiveIndex, role: str
) -> None:
    await run(
        index,
        "ALTER VIEW public.articles_index SET (security_barrier = true)",
        f"GRANT SELECT (id) ON public.articles_index TO {role} WITH GRANT OPTION",
    )
    await note(index)
    await run(index, "DROP VIEW public.articles_index")

    await start(index)

    assert await may(index, role, "public.articles_index", "id")
    assert not await may(index, role, "public.articles_index", "content")
    assert await index.rows(
        "SELECT reloptions, has_column_privilege(%s, c.oid, 'id', 'SELECT WITH GRANT OPTION') FROM pg_class c"
        " WHERE oid = 'public.articles_index'::regclass",
        role,
    ) == [(["security_barrier=true"], True)]


async def test_the_search_function_comes_back_for_those_who_could_call_it_and_no_others(
    index: LiveIndex, role: str
) -> None:
    await run(
        index,
        "REVOKE ALL ON FUNCTION cdcsync.articles_search FROM PUBLIC",
        f"GRANT EXECUTE ON FUNCTION cdcsync.articles_search TO {role}",
    )
    await note(index)
    await run(index, "DROP FUNCTION cdcsync.articles_search CASCADE")
    assert "articles_search" in (await missing_relations(index.connection, SCHEMA, index.spec)).built

    await start(index)

    assert await index.rows(
        "SELECT bool_or(a.grantee = 0), bool_or(a.grantee = %s::regrole) FROM pg_proc p, aclexplode(p.proacl) a"
        " WHERE p.oid = 'cdcsync.articles_search'::regproc",
        role,
    ) == [(False, True)]


async def test_a_grant_that_was_revoked_does_not_come_back_with_a_relation_that_we_replace(
    index: LiveIndex, role: str
) -> None:
    await run(index, f"GRANT SELECT ON public.articles_index TO {role}")
    await note(index)
    await run(index, f"REVOKE SELECT ON public.articles_index FROM {role}")

    await start(index, carried={"tenant": "bigint"})

    assert not await may(index, role, "public.articles_index")


async def test_nobody_is_granted_a_table_whose_policies_of_the_operators_own_are_gone(
    index: LiveIndex, role: str
) -> None:
    await run(
        index,
        f"GRANT SELECT ON cdcsync.articles_chunks TO {role}",
        "ALTER TABLE cdcsync.articles_chunks ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY own ON cdcsync.articles_chunks TO {role} USING (tenant = 1)",
    )
    await note(index)
    await run(index, "DROP TABLE cdcsync.articles_chunks CASCADE")

    with structlog.testing.capture_logs() as logged:
        await start(index)

    assert not await may(index, role, "cdcsync.articles_chunks")
    assert [(one["event"], one["relation"]) for one in logged] == [("grants_left_out", "cdcsync.articles_chunks")]


@pytest.mark.parametrize("what", [*DROPPED, "search function"])
async def test_default_privileges_give_nobody_what_was_revoked_before_a_relation_was_made_again(
    index: LiveIndex, role: str, what: str
) -> None:
    for schema in ("cdcsync", "public"):
        for objects, privilege in (("TABLES", "SELECT"), ("FUNCTIONS", "EXECUTE")):
            await run(index, f"ALTER DEFAULT PRIVILEGES IN SCHEMA {schema} GRANT {privilege} ON {objects} TO {role}")
    await run(index, "REVOKE ALL ON FUNCTION cdcsync.articles_search FROM PUBLIC")
    await note(index)
    if what == "search function":
        await run(index, "DROP FUNCTION cdcsync.articles_search CASCADE")
    else:
        await run(index, DROPPED[what][1])

    await start(index)

    if what == "search function":
        assert await index.rows(
            "SELECT has_function_privilege(%s, 'cdcsync.articles_search'::regproc::oid, 'EXECUTE')", role
        ) == [(False,)]
    else:
        assert not await may(index, role, DROPPED[what][0])


async def test_default_privileges_open_no_table_whose_policies_of_the_operators_own_are_gone(
    index: LiveIndex, role: str
) -> None:
    await run(
        index,
        f"ALTER DEFAULT PRIVILEGES IN SCHEMA cdcsync GRANT SELECT ON TABLES TO {role}",
        f"GRANT SELECT ON cdcsync.articles_chunks TO {role}",
        "ALTER TABLE cdcsync.articles_chunks ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY own ON cdcsync.articles_chunks TO {role} USING (tenant = 1)",
    )
    await note(index)
    await run(index, "DROP TABLE cdcsync.articles_chunks CASCADE")

    await start(index)

    assert not await may(index, role, "cdcsync.articles_chunks")


@pytest.mark.parametrize("view", ["articles_index", "articles_index_chunks"])
async def test_a_view_that_gets_another_name_and_another_type_at_once_keeps_its_grants(
    index: LiveIndex, role: str, view: str
) -> None:
    await run(
        index,
        f"GRANT SELECT ON public.{view} TO {role}",
        f"ALTER VIEW public.{view} SET (security_barrier = true)",
    )

    await start(index, carried={"tenant": "bigint"}, view="public.renamed")

    renamed = f"public.{view.replace('articles_index', 'renamed')}"
    assert await may(index, role, renamed)
    assert await index.rows("SELECT reloptions FROM pg_class WHERE oid = %s::regclass", renamed) == [
        (["security_barrier=true"],)
    ]


TABLES = ["articles_words", "articles_vectors_1", "articles_vectors_1_fresh", "articles_vectors_1_settled"]


@pytest.mark.parametrize("table", TABLES)
async def test_whoever_may_read_the_chunks_may_read_what_searches_read_besides_once_that_is_there(
    index: LiveIndex, role: str, table: str
) -> None:
    await run(
        index,
        f"DROP TABLE cdcsync.{table} CASCADE",  # nobody has noted what was granted on it
        f"GRANT SELECT, UPDATE ON cdcsync.articles_chunks TO {role} WITH GRANT OPTION",
        "GRANT SELECT (id) ON cdcsync.articles_chunks TO PUBLIC",
    )

    await start(index)

    assert await index.rows(
        "SELECT r.rolname::text, a.privilege_type, a.is_grantable FROM pg_class AS c, aclexplode(c.relacl) AS a"
        " LEFT JOIN pg_roles AS r ON r.oid = a.grantee WHERE c.oid = %s::regclass AND a.grantee <> c.relowner",
        f"cdcsync.{table}",
    ) == [(role, "SELECT", True)]
    await run(index, f"REVOKE SELECT ON cdcsync.{table} FROM {role}")
    await start(index)
    assert not await may(index, role, f"cdcsync.{table}")


async def test_whoever_reads_the_chunks_under_policies_of_the_operators_own_gets_no_new_table(
    index: LiveIndex, role: str
) -> None:
    await run(
        index,
        "DROP TABLE cdcsync.articles_words",
        f"GRANT SELECT ON cdcsync.articles_chunks TO {role}",
        "ALTER TABLE cdcsync.articles_chunks ENABLE ROW LEVEL SECURITY",
        f"CREATE POLICY own ON cdcsync.articles_chunks TO {role} USING (tenant = 1)",
    )

    with structlog.testing.capture_logs() as logged:
        await start(index)

    assert not await may(index, role, "cdcsync.articles_words")
    assert [(one["event"], one["relation"]) for one in logged] == [("grants_left_out", '"cdcsync"."articles_words"')]


async def test_a_role_that_is_gone_keeps_nothing_from_coming_back(index: LiveIndex, role: str) -> None:
    await run(index, f"GRANT SELECT ON public.articles_index TO {role}, PUBLIC")
    await note(index)
    await run(index, "DROP VIEW public.articles_index", f"DROP ROLE {role}")

    await start(index)

    assert await may(index, "pg_monitor", "public.articles_index")
    await run(index, f"CREATE ROLE {role}")


async def test_what_is_stored_is_what_is_there(index: LiveIndex) -> None:
    await note(index)
    entry = await Registry(SCHEMA).find(index.connection, index.spec.name)
    assert entry is not None
    assert entry.settings is not None
    assert entry.settings.keys() >= {relation for relation, _ in DROPPED.values()} | {"cdcsync.articles_search"}


async def test_the_type_of_a_column_changes_under_the_policy_of_a_tenant(index: LiveIndex) -> None:
    await run(index, "CREATE POLICY cdcsync_tenant ON cdcsync.articles_chunks USING (tenant::text = current_user)")
    await start(index, carried={"tenant": "bigint"})
    assert await index.rows("SELECT FROM pg_policy") == []  # `put_policy` is next


def test_a_privilege_that_is_none_is_not_put_into_a_statement() -> None:
    from cdcsync.target.ddl.grants import Grant

    with pytest.raises(ValueError, match="privilege"):
        Grant("SELECT; DROP TABLE x", None).on(psycopg.sql.Identifier("x"))
