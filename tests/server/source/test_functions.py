"""What conditions go by: found without waiting for the tables that anybody's functions read."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cdcsync.postgres.sessions import Connection, connect
from cdcsync.source.functions import Definition, functions_called
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

CONDITION = "public.wanted(status)"

LAYOUT = """
    CREATE SCHEMA other; CREATE SCHEMA odd;
    CREATE TABLE other.settings (word text);
    CREATE FUNCTION other.inner_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT s <> 'spam' $$;
    CREATE FUNCTION odd.inner_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT true $$;
    CREATE FUNCTION other.near(a text, b text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT a = b $$;
    CREATE OPERATOR other.<~> (FUNCTION = other.near, LEFTARG = text, RIGHTARG = text);
    CREATE FUNCTION other.checked(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT s <> '' $$;
    CREATE DOMAIN other.word AS text CHECK (other.checked(VALUE));
    CREATE FUNCTION other.fallback() RETURNS text IMMUTABLE LANGUAGE sql AS $$ SELECT 'x'::text $$;
    CREATE FUNCTION public.wanted(s text, d text DEFAULT other.fallback()) RETURNS boolean STABLE BEGIN ATOMIC
        SELECT other.inner_one(s) AND s OPERATOR(other.<~>) ANY (ARRAY(SELECT word FROM other.settings))
            AND ARRAY[s]::other.word[] IS NOT NULL;
    END;
"""

ODD = """
    CREATE FUNCTION other.far(a text, b text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ SELECT a <> b $$;
    CREATE OPERATOR odd.<~> (FUNCTION = other.near, LEFTARG = text, RIGHTARG = text);
    CREATE TYPE odd.pair AS (a int, b int);
    CREATE FUNCTION other.paired(s text) RETURNS odd.pair IMMUTABLE LANGUAGE sql AS $$ SELECT (1, 2)::odd.pair $$;
    CREATE CAST (text AS odd.pair) WITH FUNCTION other.paired(text);
    CREATE TYPE other.level AS ENUM ('low', 'high');
    CREATE COLLATION other.ordering (provider = libc, locale = 'C');
    CREATE DOMAIN other.leveled AS other.level;
    CREATE DOMAIN other.short AS varchar(3);
    CREATE TYPE other.span AS RANGE (SUBTYPE = other.level);
    CREATE TYPE other.halves AS (first other.level, last text COLLATE other.ordering);
    CREATE TABLE other.rated (id int, level other.level[]);
    CREATE FUNCTION other.level_of(s text) RETURNS other.halves IMMUTABLE LANGUAGE plpgsql AS
        $$ BEGIN RETURN NULL; END $$;
    CREATE FUNCTION other.ordered(s text) RETURNS boolean IMMUTABLE RETURN s < 'x' COLLATE other.ordering;
    CREATE FUNCTION other.pathed(s text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql SET search_path = other AS
        $$ DECLARE one level := s; BEGIN RETURN one > 'low'; END $$;
"""


@pytest.fixture
async def source(database: Database) -> AsyncIterator[Connection]:
    database.execute(LAYOUT)
    async with await connect(database.dsn, "source") as connection:
        yield connection


async def called(source: Connection, condition: str = CONDITION) -> dict[str, Definition]:
    """Return what a condition calls, without pgvector's operators: in a text, = and <> stand for those, too."""
    found = (await functions_called(source, [condition]))[condition]
    return {name: defined for name, defined in found.items() if "vec" not in name}


async def test_a_body_of_statements_calls_what_the_server_says_that_it_depends_on(source: Connection) -> None:
    assert set(await called(source)) == {
        "public.wanted(text,text)",
        "other.inner_one(text)",
        "other.near(text,text)",
        "other.checked(text)",
        "other.fallback()",
        "type other.word",
    }


@pytest.mark.parametrize(
    ("replaced", "edit"),
    [
        ("other.inner_one(text)", "FUNCTION other.inner_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"),
        ("other.near(text,text)", "FUNCTION other.near(a text, b text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"),
        ("other.checked(text)", "FUNCTION other.checked(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"),
    ],
)
async def test_a_function_that_a_body_of_statements_calls_is_seen_to_change(
    database: Database, source: Connection, replaced: str, edit: str
) -> None:
    before = await called(source)
    database.execute(f"CREATE OR REPLACE {edit} $$ SELECT false $$")
    after = await called(source)

    assert after.keys() == before.keys()
    assert [name for name in after if after[name] != before[name]] == [replaced]


LABELS = [f"ALTER TYPE other.level RENAME VALUE '{was}' TO '{now}'" for was, now in (("low", "l"), ("high", "low"))]
ORDERING = [
    "DROP COLLATION other.ordering CASCADE",
    "CREATE COLLATION other.ordering (provider = libc, locale = 'POSIX')",
]
TYPES = {
    "labels": ("status::other.level > 'low'", {"type other.level"}, LABELS),
    "a label more": ("status::other.level > 'low'", {"type other.level"}, ["ALTER TYPE other.level ADD VALUE 'top'"]),
    "the labels of elements": ("status::other.level[] IS NULL", {"type other.level"}, LABELS),
    "the labels of an array by its own name": ("status::other._level IS NULL", {"type other.level"}, LABELS),
    "the labels of a domain": ("status::other.leveled > 'low'", {"type other.level"}, LABELS),
    "the labels of a range": ("status::other.span IS NULL", {"type other.level"}, LABELS),
    "the labels of a multirange": ("status::other.span_multirange IS NULL", {"type other.level"}, LABELS),
    "the labels of an attribute": ("(status::other.halves).first > 'low'", {"type other.level"}, LABELS),
    "the labels of a table's column": ("(status::other.rated).level IS NULL", {"type other.level"}, LABELS),
    "the labels behind a function": ("(other.level_of(status)).first > 'low'", {"type other.level"}, LABELS),
    "labels that a body finds by its path": ("other.pathed(status)", {"type other.level"}, LABELS),
    "attributes": (
        "(status::odd.pair).a > 5",
        {"type odd.pair"},
        [f"ALTER TYPE odd.pair RENAME ATTRIBUTE {was} TO {now}" for was, now in (("a", "c"), ("b", "a"), ("c", "b"))],
    ),
    "a table's columns": (
        "(status::other.rated).id > 5",
        {"type other.rated"},
        ["ALTER TABLE other.rated ALTER id TYPE bigint"],
    ),
    "what a domain is made of": (
        "status::other.short = 'abc'",
        {"type other.short"},
        ["DROP DOMAIN other.short", "CREATE DOMAIN other.short AS varchar(9)"],
    ),
    "a collation": ("status COLLATE other.ordering > 'b'", {"collation other.ordering"}, ORDERING),
    "the collation of an attribute": (
        "(status::other.halves).last > 'b'",
        {"type other.halves", "collation other.ordering"},
        [*ORDERING, "ALTER TYPE other.halves ADD ATTRIBUTE last text COLLATE other.ordering"],
    ),
    "the collation in a body of statements": (
        "other.ordered(status)",
        {"collation other.ordering", "other.ordered(text)"},
        [
            *ORDERING,
            "CREATE FUNCTION other.ordered(s text) RETURNS boolean IMMUTABLE RETURN s < 'x' COLLATE other.ordering",
        ],
    ),
}


@pytest.mark.parametrize(("condition", "altered", "edits"), TYPES.values(), ids=TYPES)
async def test_a_type_or_collation_that_a_condition_goes_by_is_seen_to_change(
    database: Database, source: Connection, condition: str, altered: set[str], edits: list[str]
) -> None:
    database.execute(ODD)
    before = await called(source, condition)
    assert await called(source, condition) == before
    for edit in edits:
        database.execute(edit)
    after = await called(source, condition)

    assert after.keys() == before.keys()
    assert {name for name in after if after[name].digest != before[name].digest} == altered


async def test_a_word_of_a_body_counts_as_a_type_where_it_can_be_one_and_as_no_table(
    database: Database, source: Connection
) -> None:
    """Each tenant of an application may have a type of one name, and an extension brings dozens of types and casts."""
    database.execute(
        "CREATE EXTENSION IF NOT EXISTS vector; CREATE SCHEMA tenant;"
        " CREATE TABLE tenant.item (id int); CREATE TYPE tenant.kind AS ENUM ('item');"
        " CREATE TYPE other.kind AS ENUM ('item'); CREATE FUNCTION public.outer_one(s text) RETURNS boolean IMMUTABLE"
        " LANGUAGE sql AS $$ SELECT s = 'item' /* whatever kind */ $$;"
        " CREATE FUNCTION public.pathed(s text) RETURNS boolean IMMUTABLE LANGUAGE sql SET search_path = tenant, public"
        " AS $$ SELECT s::kind IS NOT NULL $$;"
        " CREATE FUNCTION public.full_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"
        " $$ SELECT s::other.kind IS NOT NULL $$;"
        " CREATE FUNCTION public.row_of(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"
        " $$ SELECT (s::tenant.item).id IS NOT NULL $$;"
        " CREATE FUNCTION public.taking(i tenant.item) RETURNS boolean IMMUTABLE LANGUAGE sql AS"
        " $$ SELECT i IS NOT NULL $$"
    )

    async def types(condition: str) -> set[str]:
        return {one for one in await called(source, condition) if one.startswith("type ")}

    assert await types("public.outer_one(status)") == set()
    assert await types("public.pathed(status)") == {"type tenant.kind"}
    assert await types("public.full_one(status)") == {"type other.kind"}
    assert await types("public.row_of(status)") == set()
    assert await types("public.taking(ROW(1)::tenant.item)") == {"type tenant.item"}


UNDONE = {
    "a function": (
        CONDITION,
        "other.inner_one(text)",
        [
            f"CREATE OR REPLACE FUNCTION other.inner_one(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS $$ {body} $$"
            for body in ("SELECT false", "SELECT s <> 'spam'")
        ],
    ),
    "a function whose privileges and cost changed, too": (
        CONDITION,
        "other.inner_one(text)",
        [
            "ALTER FUNCTION other.inner_one(text) STRICT",
            "ALTER FUNCTION other.inner_one(text) CALLED ON NULL INPUT COST 7",
            "REVOKE EXECUTE ON FUNCTION other.inner_one(text) FROM PUBLIC",
        ],
    ),
    "the function of an operator": (
        "status OPERATOR(odd.<~>) 'x'",
        "other.near(text,text)",
        [
            statement
            for function in ("far", "near")
            for statement in (
                "DROP OPERATOR odd.<~> (text, text)",
                f"CREATE OPERATOR odd.<~> (FUNCTION = other.{function}, LEFTARG = text, RIGHTARG = text)",
            )
        ],
    ),
    "the function of a cast": (
        "(status::odd.pair) IS NOT NULL",
        "other.paired(text)",
        [
            statement
            for how in ("WITH INOUT", "WITH FUNCTION other.paired(text)")
            for statement in ("DROP CAST (text AS odd.pair)", f"CREATE CAST (text AS odd.pair) {how}")
        ],
    ),
    "the labels of an enum": (
        "status::other.level > 'low'",
        "type other.level",
        [f"ALTER TYPE other.level RENAME VALUE '{was}' TO '{now}'" for was, now in (("low", "l"), ("l", "low"))],
    ),
    "the attributes of a composite type": (
        "(status::odd.pair).a > 5",
        "type odd.pair",
        [f"ALTER TYPE odd.pair RENAME ATTRIBUTE {was} TO {now}" for was, now in (("a", "c"), ("c", "a"))],
    ),
    "a collation": (
        "status COLLATE other.ordering > 'b'",
        "collation other.ordering",
        ["DROP COLLATION other.ordering CASCADE", "CREATE COLLATION other.ordering (provider = libc, locale = 'C')"],
    ),
    "the check of a domain": (
        CONDITION,
        "type other.word",
        [
            "ALTER DOMAIN other.word DROP CONSTRAINT word_check",
            "ALTER DOMAIN other.word ADD CHECK (other.checked(VALUE))",
        ],
    ),
}


@pytest.mark.parametrize(("condition", "altered", "edits"), UNDONE.values(), ids=UNDONE)
async def test_what_was_altered_and_altered_back_was_written_by_another_transaction(
    database: Database, source: Connection, condition: str, altered: str, edits: list[str]
) -> None:
    database.execute(ODD)
    before = await called(source, condition)
    assert await called(source, condition) == before
    for edit in edits:
        database.execute(edit)
    after = await called(source, condition)

    assert {name: one.digest for name, one in after.items()} == {name: one.digest for name, one in before.items()}
    assert [name for name in after if after[name].written != before[name].written] == [altered]


async def test_a_table_that_a_body_reads_is_not_waited_for_and_its_lock_changes_nothing(
    database: Database, source: Connection
) -> None:
    before = await called(source)
    await source.execute("SET lock_timeout = '400ms'")
    with database.connect() as other, other.transaction():
        other.execute("LOCK TABLE other.settings IN ACCESS EXCLUSIVE MODE")
        assert await called(source) == before
        # A name in a text counts as the function of that name in every schema.
        database.execute(
            "CREATE FUNCTION public.outer_one(s text) RETURNS boolean LANGUAGE sql AS"
            " $$ SELECT s <> 'wanted' /* wanted( */ $$"
        )
        found = await called(source, "public.outer_one(status)")
    assert found.keys() == {"public.outer_one(text)", *before}
