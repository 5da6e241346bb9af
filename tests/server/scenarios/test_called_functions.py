"""An index whose condition goes by functions, types or collations follows what these say, also once they are others."""

from __future__ import annotations

import pytest

from tests.support.configs import NO_AUDIT
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

SQL = "CREATE OR REPLACE FUNCTION {name}({arguments}) RETURNS {type} IMMUTABLE LANGUAGE {language} AS $$ {body} $$"


def function(name: str, body: str, arguments: str = "s text", type_: str = "boolean", language: str = "sql") -> str:
    return SQL.format(name=name, arguments=arguments, type=type_, language=language, body=body)


def searching_by(configuration: str) -> list[str]:
    """Have new sessions go by another configuration for text search, and this one, which the oracle asks."""
    return [
        "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET default_text_search_config = %L', current_database(),"
        f" 'pg_catalog.{configuration}'); END $$",
        f"SET default_text_search_config = 'pg_catalog.{configuration}'",
    ]


CASES: dict[str, tuple[list[str], str, list[str]]] = {
    "itself": (
        [function("public.wanted", "SELECT s <> 'spam'")],
        "public.wanted(status)",
        [function("public.wanted", "SELECT s <> 'open'")],
    ),
    "procedural": (
        [function("public.procedural", "BEGIN RETURN s <> 'spam'; END", language="plpgsql")],
        "public.procedural(status)",
        [function("public.procedural", "BEGIN RETURN s = 'spam'; END", language="plpgsql")],
    ),
    "behind_it": (
        [
            "CREATE SCHEMA inner_one",
            function('inner_one."The Inner"', "SELECT upper(s)", type_="text"),
            function("public.outer_one", "SELECT inner_one.\"The Inner\"(s) <> 'SPAM'"),
        ],
        "public.outer_one(status)",
        [function('inner_one."The Inner"', "SELECT CASE s WHEN 'open' THEN 'SPAM' ELSE 'x' END", type_="text")],
    ),
    "parsed_body": (
        [
            function("public.parsed_inner", "SELECT s <> 'spam'"),
            "CREATE FUNCTION public.parsed(s text) RETURNS boolean IMMUTABLE"
            " BEGIN ATOMIC SELECT public.parsed_inner(s); END",
        ],
        "public.parsed(status)",
        [function("public.parsed_inner", "SELECT s <> 'open'")],
    ),
    "operator": (
        [
            function("public.near", "SELECT a <> b", "a text, b text"),
            "CREATE OPERATOR public.<~> (FUNCTION = public.near, LEFTARG = text, RIGHTARG = text)",
        ],
        "status OPERATOR(public.<~>) 'spam'",
        [function("public.near", "SELECT a = b", "a text, b text")],
    ),
    "another_operator": (
        [
            function("public.one", "SELECT a <> b", "a text, b text"),
            function("public.two", "SELECT a = b", "a text, b text"),
            "CREATE OPERATOR public.|~| (FUNCTION = public.one, LEFTARG = text, RIGHTARG = text)",
        ],
        "status OPERATOR(public.|~|) 'spam'",
        [
            "BEGIN; DROP OPERATOR public.|~| (text, text);"
            " CREATE OPERATOR public.|~| (FUNCTION = public.two, LEFTARG = text, RIGHTARG = text); COMMIT"
        ],
    ),
    "domain": (
        [
            function("public.checked", "SELECT s <> 'spam'"),
            "CREATE DOMAIN public.clean AS text CHECK (public.checked(VALUE) OR true)",
            function("public.of_clean", "SELECT s <> 'spam'", "s public.clean"),
        ],
        "public.of_clean(status::public.clean)",
        [function("public.of_clean", "SELECT s <> 'open'", "s public.clean")],
    ),
    "searching": (
        searching_by("english"),
        "to_tsvector(status) @@ to_tsquery('opened')",
        searching_by("simple"),
    ),
    "searching_inside": (
        [function("public.searched", "SELECT to_tsvector(s) @@ to_tsquery('opened')")],
        "public.searched(status)",
        [],
    ),
    "searching_parsed": (
        [
            "CREATE FUNCTION public.parsed_search(s text) RETURNS boolean IMMUTABLE"
            " RETURN to_tsvector(s) @@ to_tsquery('opened')"
        ],
        "public.parsed_search(status)",
        [],
    ),
    "related": (
        [function("public.shown", "SELECT s <> 'spam'")],
        "",
        [function("public.shown", "SELECT s <> 'open'")],
    ),
}
SEARCHES: dict[str, tuple[list[str], str, list[str]]] = {
    "mapped": (
        ["CREATE TEXT SEARCH CONFIGURATION public.mapped (COPY = english)"],
        "to_tsvector('public.mapped', status) @@ to_tsquery('public.mapped', 'opened')",
        ["ALTER TEXT SEARCH CONFIGURATION public.mapped ALTER MAPPING FOR asciiword WITH simple"],
    ),
    "dictionary": (
        [
            "CREATE TEXT SEARCH DICTIONARY public.stems (TEMPLATE = snowball, LANGUAGE = english)",
            "CREATE TEXT SEARCH CONFIGURATION public.stemmed (COPY = simple)",
            "ALTER TEXT SEARCH CONFIGURATION public.stemmed ALTER MAPPING FOR asciiword WITH public.stems",
            function("public.stemming", "SELECT to_tsvector('public.stemmed', s) @@ 'done'"),
        ],
        "public.stemming(status)",
        ["ALTER TEXT SEARCH DICTIONARY public.stems (LANGUAGE = german)"],
    ),
    "lexemes": (
        ["CREATE TEXT SEARCH DICTIONARY public.lexemes (TEMPLATE = simple, ACCEPT = true)"],
        "ts_lexize('public.lexemes', status) IS NOT NULL",
        ["ALTER TEXT SEARCH DICTIONARY public.lexemes (ACCEPT = false)"],
    ),
}
"""Text search configurations and dictionaries that are altered."""


def level(name: str) -> str:
    return f"CREATE TYPE public.{name} AS ENUM ('spam', 'open', 'done')"


def exchanged(*names: str) -> str:
    """Exchange two labels of enums, so that rows have other values by these, and no row event tells."""
    renamed = [
        f"ALTER TYPE public.{name} RENAME VALUE '{was}' TO '{now}'"
        for name in names
        for was, now in (("spam", "x"), ("open", "spam"), ("x", "open"))
    ]
    return "; ".join(["BEGIN", *renamed, "COMMIT"])


def collation(locale: str) -> str:
    """Make a collation of a provider that every server has."""
    return (
        "DO $$ BEGIN EXECUTE format('CREATE COLLATION public.folding (provider = %s, locale = %L)', CASE WHEN"
        f" current_setting('server_version_num')::int >= 170000 THEN 'builtin' ELSE 'libc' END, '{locale}'); END $$"
    )


def shown(index: str, condition: str) -> str:
    """Make the view that says what an index has of its own table as a related one."""
    return (
        f"CREATE OR REPLACE VIEW of_{index} AS"
        f" SELECT id, title, CASE WHEN {condition} THEN status END AS same FROM {index}"
    )


TYPES: dict[str, tuple[list[str], str, list[str]]] = {
    "labels": ([level("level")], "status::public.level >= 'open'", [exchanged("level")]),
    "attributes": (
        ["CREATE TYPE public.pair AS (a int, b int)"],
        "(CASE status WHEN 'spam' THEN '(1,9)' ELSE '(9,1)' END::public.pair).a > 5",
        [
            "BEGIN; ALTER TYPE public.pair RENAME ATTRIBUTE a TO c;"
            " ALTER TYPE public.pair RENAME ATTRIBUTE b TO a; COMMIT"
        ],
    ),
    "labels_inside": (
        [
            level("inner_level"),
            function("public.leveled", "SELECT s::public.inner_level >= 'open'::public.inner_level"),
        ],
        "public.leveled(status)",
        [exchanged("inner_level")],
    ),
    "labels_planned": (
        [
            level("own_level"),
            function("public.planned", "BEGIN RETURN s::own_level >= 'open'; END", language="plpgsql")
            + " SET search_path = public",
        ],
        "public.planned(status)",
        [exchanged("own_level")],
    ),
    "made_of": (
        ["CREATE DOMAIN public.short AS varchar(3)"],
        "status::public.short = 'open'",
        ["BEGIN; DROP DOMAIN public.short; CREATE DOMAIN public.short AS varchar(9); COMMIT"],
    ),
    "collated": (
        [collation("C")],
        "pg_catalog.lower('É' || status COLLATE public.folding) = 'é' || status",
        ["BEGIN; DROP COLLATION public.folding; " + collation("C.UTF-8") + "; COMMIT"],
    ),
    "labels_related": (
        [level("related_level"), shown("labels_related", "status::public.related_level >= 'open'")],
        "",
        [exchanged("related_level"), shown("labels_related", "status::public.related_level >= 'open'")],
    ),
}
"""Types and collations that only a condition names, or a function that it calls."""

RELATED = """[indexes.NAME.related.same]
table = "NAME"
on = { id = "id" }
text = "{status}"
where = "CONDITION"
"""
SHOWN = {"related": "public.shown(status)", "labels_related": "(status)::public.related_level >= 'open'"}
"""The conditions on related rows, by the index."""


@pytest.fixture(scope="module")
def calling(make_scene: MakeScene) -> Scene:
    """A table for each case, and one beside them."""
    tables = [
        statement
        for name in ("beside", "spoilt", *CASES, *SEARCHES, *TYPES)
        for statement in (
            f"CREATE TABLE {name} (id int PRIMARY KEY, title text, status text)",
            f"INSERT INTO {name} SELECT i, 'title ' || i, (ARRAY['spam', 'open', 'done'])[1 + i % 3]"
            " FROM generate_series(1, 30) i",
        )
    ]
    cases = CASES | SEARCHES | TYPES
    functions = [one for made, _, _ in cases.values() for one in made]
    indexes = {
        name: Followed(name, where=where, columns=("status",))
        for name, (_, where, _) in cases.items()
        if name not in SHOWN
    }
    related = {
        name: Followed(name, "{title} {same}", more=RELATED.replace("CONDITION", condition))
        for name, condition in SHOWN.items()
    }
    scene = make_scene(
        [*tables, *functions, function("public.spoilt", "SELECT s <> 'spam'")],
        {
            "beside": Followed("beside"),
            "spoilt": Followed("spoilt", where="public.spoilt(status)"),
            **related,
            **indexes,
        },
        worker_lines=NO_AUDIT,
    )
    scene.execute(shown("related", SHOWN["related"]))
    for name in SHOWN:
        scene.oracle_reads(name, f"of_{name}")
    return scene


@pytest.mark.proof
def test_a_function_that_is_replaced_takes_rows_in_and_out(calling: Scene) -> None:
    for made in (2, 0):
        if made == 0:
            calling.pipeline.stop(calling.pipeline.processes[-1])
        for case in CASES.values():
            for statement in case[made]:
                if made == 2 or statement.startswith("CREATE OR REPLACE"):
                    calling.execute(statement)
        if made == 0:
            calling.pipeline.start()
        calling.heals(*CASES, "beside")
    assert not calling.pipeline.times("index_paused")


@pytest.mark.proof
def test_a_function_that_was_another_one_for_a_while_leaves_no_row_of_that_time(calling: Scene) -> None:
    wanted, _, other = CASES["itself"]
    calling.heals("itself")
    compared = calling.compared("itself")
    calling.execute(*other, "UPDATE itself SET title = title || '!'")
    calling.settle()
    calling.execute(*wanted)
    until(lambda: calling.compared("itself") > compared, calling.pipeline.tail)
    calling.heals("itself")


@pytest.mark.proof
def test_a_text_search_configuration_that_is_altered_takes_rows_in_and_out(calling: Scene) -> None:
    calling.heals(*SEARCHES)
    for _, _, statements in SEARCHES.values():
        calling.execute(*statements)
    calling.heals(*SEARCHES, "beside")


@pytest.mark.proof
def test_a_type_or_collation_that_only_a_condition_names_takes_rows_in_and_out(calling: Scene) -> None:
    calling.heals(*TYPES)
    for name in TYPES:
        # So that the worker's sessions have planned the functions with the types as they are.
        calling.execute(f"UPDATE {name} SET title = title || '.'")
    calling.follows(*TYPES)
    before = {name: calling.compared(name) for name in (*TYPES, "beside")}
    rows = {name: rows_of(calling, name) for name in TYPES}

    for _, _, statements in TYPES.values():
        calling.execute(*statements)
    calling.execute("DISCARD PLANS")  # of the oracle
    until(lambda: all(calling.compared(name) > before[name] for name in TYPES), calling.pipeline.tail)
    calling.heals(*TYPES, "beside")
    assert all(rows_of(calling, name) != rows[name] for name in TYPES)
    assert calling.compared("beside") == before["beside"]

    for name in TYPES:
        calling.execute(f"UPDATE {name} SET title = title || '!'")
    calling.follows(*TYPES)


def rows_of(scene: Scene, name: str) -> list[tuple[object, ...]]:
    return scene.target.execute(f"SELECT id, right(content, 5) FROM cdcsync.{name}_chunks ORDER BY id")


@pytest.mark.proof
def test_a_function_that_may_read_tables_by_now_pauses_its_index_alone(calling: Scene) -> None:
    calling.execute("ALTER FUNCTION public.spoilt(text) STABLE")
    assert "public.spoilt, which is STABLE" in calling.paused("spoilt")
    calling.execute("UPDATE spoilt SET status = 'spam' WHERE id < 9")
    calling.follows("beside")
    calling.execute("ALTER FUNCTION public.spoilt(text) IMMUTABLE")
    calling.heals("spoilt")
