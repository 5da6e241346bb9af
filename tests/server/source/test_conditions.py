"""Conditions on the source: what is refused, what the worker decides itself, and that the server would say the same."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from cdcsync.config import QualifiedName
from cdcsync.documents.lexer import tokens
from cdcsync.model.conditions import ColumnKind, understood
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.postgres.settings import RENDERING
from cdcsync.source.conditions import Refused, examine_condition, examine_order, try_condition
from tests.support.servers import Database, Server, fresh_database

pytestmark = [pytest.mark.server]

T = QualifiedName("public", "t")
COLUMNS = (
    "id",
    "n",
    "small",
    "big",
    "status",
    "short",
    "active",
    "deleted_at",
    "body",
    "tags",
    "pair",
    "user",
    "fixed",
)
SET_UP = """
    CREATE TYPE pair AS (a int, b int);
    CREATE TABLE t (id int PRIMARY KEY, n int, small int2, big int8, status text, short varchar(9), active boolean,
        deleted_at timestamptz, body text, tags text[], pair pair, "user" text, fixed char(3));
    CREATE TABLE other (id int);
    CREATE FUNCTION steady(int) RETURNS boolean IMMUTABLE LANGUAGE sql AS 'SELECT $1 > 3';
    CREATE FUNCTION reading(int) RETURNS boolean STABLE LANGUAGE sql AS 'SELECT EXISTS (SELECT FROM public.other)';
    CREATE FUNCTION writing(int) RETURNS boolean LANGUAGE sql AS 'INSERT INTO public.other VALUES ($1) RETURNING true';
    CREATE FUNCTION posing(int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
        'BEGIN INSERT INTO public.other VALUES ($1); RETURN true; END';
    CREATE OPERATOR ~~~ (RIGHTARG = int, FUNCTION = writing);
    INSERT INTO t (id, n, status) VALUES (1, 1, 'a'), (2, 2, 'b');
"""


@pytest.fixture(scope="module")
def laid_out(server: Server) -> Iterator[Database]:
    """The table that the conditions are on."""
    with fresh_database(server) as database:
        database.execute(SET_UP)
        yield database


@pytest.fixture
async def source(laid_out: Database) -> AsyncIterator[Connection]:
    """A session as the checks have it."""
    connection = await connect(laid_out.dsn, "source")
    yield connection
    await connection.close()


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("n = ", "it is not complete"),
        ("n", "must be type boolean"),
        ("nn = 1", 'column "nn" does not exist'),
        ("n = 1) OR (n = 2", "syntax error"),
        ("n = 1; DROP TABLE t", "more than one statement"),
        ("n = 1 -- always", "a comment"),
        ("n = $1", "a parameter"),
        ("count(*) > 1", "aggregate functions are not allowed in WHERE"),
        ("row_number() OVER () = 1", "window functions are not allowed in WHERE"),
        ("generate_series(1, n) = 1", "set-returning functions are not allowed in WHERE"),
        ("EXISTS (SELECT FROM public.other)", "reads the table other"),
        ("n IN (SELECT id FROM public.other o WHERE o.id = t.id)", "reads the table other"),
        ("n = (SELECT max(n) FROM public.t)", "reads the table t"),
        ("EXISTS (WITH w AS (INSERT INTO public.other VALUES (1) RETURNING 1) SELECT FROM w)", "data-modifying"),
        ("random() < 0.5", "calls random, which is volatile"),
        ('pg_catalog."random"() < 0.5', "calls random, which is volatile"),
        ("pg_advisory_lock(n) IS NULL", "volatile"),
        ("nextval('s'::regclass) > 0", "does not exist"),
        ("public.writing(n)", "calls writing, which is volatile"),
        ("CASE WHEN n > 100 THEN public.writing(n) ELSE true END", "calls writing, which is volatile"),
        ("(OPERATOR(public.~~~) CASE WHEN n > 100 THEN n END)", "calls ~~~, which is volatile"),
        ("public.posing(n)", "INSERT is not allowed in a non-volatile function"),
        ("public.reading(n)", "which is STABLE"),
        ("deleted_at < now()", "changes with time"),
        ("deleted_at < CURRENT_TIMESTAMP - interval '1 day'", "changes with time"),
        ("deleted_at < localtimestamp", "changes with time"),
        ("deleted_at > 'now'", "changes with time ('now')"),
        ("deleted_at >= ' Today '", "changes with time ('Today')"),
        ("deleted_at IN ('2026-01-01', 'yesterday 12:00')", "changes with time ('yesterday')"),
        ("deleted_at < '10:00 tomorrow'", "changes with time ('tomorrow')"),
        ("deleted_at < E'today' OR n = 1", "changes with time ('today')"),
        ("deleted_at < $q$today$q$", "changes with time ('today')"),
        ("deleted_at = ANY ('{2026-01-01,today}')", "changes with time ('today')"),
        ("deleted_at <@ '[2026-01-01,now)'::tstzrange", "changes with time ('now')"),
        ("deleted_at < 'today'::text::timestamptz", "changes with time ('today')"),
        ("user = 'x'", "changes with the session"),
        ("status = current_setting('role')", "changes with the session"),
        ("pg_has_role(status, 'USAGE')", "changes with the session"),
        ('U&"now"() > deleted_at', "write it plainly"),
        ('U&"pg_sleep"(0) IS NOT NULL', "write it plainly"),
        ('public.U&"writing"(n)', "write it plainly"),
        ("xmin = '1'::xid", "the system column xmin"),
        ("t.ctid IS NOT NULL", "the system column ctid"),
        ("t.to_jsonb ->> 'n' = '1'", "calls to_jsonb as if that were a column"),
        ("1 / (n - 1) > 0", "division by zero"),
    ],
)
async def test_a_condition_that_cannot_say_which_rows_an_index_has_is_refused(
    source: Connection, text: str, why: str
) -> None:
    with pytest.raises(Refused) as refused:
        await examine_condition(source, T, text, COLUMNS)
    assert why in refused.value.message
    assert refused.value.hint
    cursor = await source.execute("SELECT count(*) FROM public.other")
    assert await cursor.fetchone() == (0,)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("lower(status) LIKE 'a%'", ("status",)),
        ("public.steady(n) OR t.body ~ '[0-9]'", ("n", "body")),
        ("'x' = ANY(tags)", ("tags",)),
        ("EXISTS (SELECT FROM unnest(tags) AS tag WHERE tag LIKE 'a%')", ("tags",)),
        ("deleted_at > '2026-01-01' AND n > 3", ("deleted_at", "n")),
        ("\"user\" = 'me' OR false", ("user",)),
        ("fixed = 'a'", ("fixed",)),
        ("pair IS NULL", ("pair",)),
        ("to_char(deleted_at, 'YYYY') = '2026'", ("deleted_at",)),
        ("status = E'a\\\\b' OR status = $q$;--$q$", ("status",)),
        ("status = 'now'::text OR body LIKE 'today%' OR status IN ('nowhere', 'not now')", ("status", "body")),
        ("to_jsonb(tags) ->> 'today' IS NULL", ("tags",)),
        ("tags @> '{urgent}' AND tags <> '{}'", ("tags",)),
        ("status LIKE 'a{1}%' OR status LIKE '{n}{{%'", ("status",)),
    ],
)
async def test_a_condition_on_the_row_alone_is_left_to_the_server_where_it_has_no_simple_form(
    source: Connection, text: str, columns: tuple[str, ...]
) -> None:
    where = await examine_condition(source, T, text, COLUMNS)
    assert (where.terms, where.deciding, where.columns) == (None, (), columns)


@pytest.mark.anyio
async def test_a_text_that_another_of_many_tables_compares_loosely_is_left_to_the_server(source: Connection) -> None:
    text = "status <> 'spam' AND n = 1"
    assert (await examine_condition(source, T, text, COLUMNS, exact=["status"])).terms is not None
    assert (await examine_condition(source, T, text, COLUMNS, exact=["n"])).terms is None
    assert (await examine_condition(source, T, "status IS NULL", COLUMNS, exact=[])).terms is not None


@pytest.mark.anyio
@pytest.mark.parametrize("text", ["status = 'now'", "status IN ('today', 'tomorrow') AND deleted_at IS NULL"])
async def test_a_text_that_is_compared_with_texts_alone_is_no_date(source: Connection, text: str) -> None:
    assert (await examine_condition(source, T, text, COLUMNS)).terms is not None
    assert (await examine_condition(source, T, text, ())).terms is None


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("random()", "calls random, which is volatile"),
        ('U&"random"()', "write it plainly"),
        ("now() - deleted_at", "changes with time"),
        ("deleted_at > 'today', id", "changes with time"),
        ("n, (SELECT max(id) FROM public.other)", "it holds a query"),
        ("(TABLE public.other)", "it holds a query"),
        ("n = ANY (TABLE public.other)", "it holds a query"),
        ("(VALUES (1))", "it holds a query"),
    ],
)
async def test_an_order_that_is_not_the_same_each_time_is_refused(source: Connection, text: str, why: str) -> None:
    with pytest.raises(Refused) as refused:
        await examine_order(source, T, text)
    assert why in refused.value.message
    assert refused.value.hint


@pytest.mark.anyio
@pytest.mark.parametrize(
    "text", ["n DESC, id", 't.table, "select", t.values, values DESC', "tags = '{}' DESC, lower(status)"]
)
async def test_an_order_by_the_row_s_own_values_can_be_used(source: Connection, text: str) -> None:
    await examine_order(source, T, text)


@pytest.mark.anyio
async def test_a_condition_is_decided_here_only_if_the_stream_brings_its_columns(source: Connection) -> None:
    text = "active AND status <> 'spam' AND deleted_at IS NULL AND n IN (1, 2) AND short = 'x' AND big = 3"
    sent = await examine_condition(source, T, text, COLUMNS)
    unsent = await examine_condition(source, T, text, [name for name in COLUMNS if name != "n"])
    assert sent.deciding == ("active", "status", "deleted_at", "n", "short", "big")
    assert unsent.terms is None
    assert set(unsent.columns) == set(sent.columns)


@pytest.mark.anyio
async def test_a_condition_that_takes_too_long_is_given_up(source: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cdcsync.source.conditions.TRIAL_S", 0.2)
    await source.execute("INSERT INTO public.t (id, n) VALUES (3, 3) ON CONFLICT DO NOTHING")
    with pytest.raises(Refused, match=r"it takes more than 0\.2 s for 100 rows"):
        await examine_condition(source, T, "(SELECT count(*) FROM generate_series(1, 1000000000 + n)) > 0", COLUMNS)


@pytest.mark.anyio
@pytest.mark.parametrize("table", [None, "public.t"])
async def test_a_condition_that_is_only_tried_may_hold_braces(source: Connection, table: str | None) -> None:
    await try_condition(source, T, "tags @> '{urgent}' OR tags = '{}' OR status LIKE 'a{1}%'", source=table)


@pytest.mark.anyio
async def test_a_condition_that_is_only_tried_may_tell_the_time(source: Connection) -> None:
    await try_condition(source, T, "deleted_at < now() OR deleted_at IS NULL")


# -- the same answer as the server's ----------------------------------------------------------------------------

CONSTANTS = {
    "status": ("'a'", "'A'", "'ä'", "''", "'it''s'", "'a '", "E'a'", "NULL"),
    "short": ("'a'", "'b'", "''", "'a '"),
    "n": ("0", "1", "-1", "007", "5.0", "'1'", "99999999999"),
    "small": ("0", "-1", "70000"),
    "big": ("0", "9223372036854775807", "- 1"),
    "active": ("true", "false", "'t'"),
    "fixed": ("'a'", "'a '"),
}
VALUES = {
    "status": (None, "a", "A", "ä", "", "it's", "a "),
    "short": (None, "a", "b", "", "a "),
    "n": (None, "0", "1", "-1", "7", "5"),
    "small": (None, "0", "-1", "4464"),
    "big": (None, "0", "-1", "9223372036854775807"),
    "active": (None, "t", "f"),
    "deleted_at": (None, "2026-01-01 00:00:00+00"),
    "pair": (None, "(,)", "(1,)", "(1,2)"),
    "fixed": (None, "a", "b"),
}


@st.composite
def terms(draw: st.DrawFn) -> str:
    column = draw(st.sampled_from([*CONSTANTS, "deleted_at", "pair"]))
    constant = st.sampled_from(CONSTANTS.get(column, ("NULL",)))
    form = draw(st.sampled_from(["null", "=", "<>", "!=", "distinct", "in", "bare", "not", "is", ">"]))
    negation = draw(st.sampled_from(["", "NOT "]))
    match form:
        case "null":
            return f"{column} IS {negation}NULL"
        case "distinct":
            return f"{column} IS {negation}DISTINCT FROM {draw(constant)}"
        case "in":
            return f"{column} {negation}IN ({', '.join(draw(st.lists(constant, min_size=1, max_size=3)))})"
        case "bare":
            return column
        case "not":
            return f"NOT {column}"
        case "is":
            return f"{column} IS {negation}{draw(st.sampled_from(['TRUE', 'FALSE', 'UNKNOWN']))}"
        case _:
            return f"{column} {form} {draw(constant)}"


@st.composite
def conditions(draw: st.DrawFn) -> str:
    parts = draw(st.lists(st.one_of(terms(), terms().map(lambda term: f"({term})")), min_size=1, max_size=3))
    joined = parts[0]
    for part in parts[1:]:
        joined += draw(st.sampled_from([" AND ", " AND ", " OR "])) + part
    return draw(st.sampled_from([joined, f"({joined})", f"NOT {joined}"]))


ROWS = st.lists(st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()}), max_size=6)
KINDS: dict[str, ColumnKind] = {
    "status": "text",
    "short": "text",
    "n": "integer",
    "small": "integer",
    "big": "integer",
    "active": "boolean",
    "deleted_at": "plain",
    "pair": "row",
    "fixed": "plain",
}
"""As `examine_condition` reads them from the catalog, which the tests above hold it to."""


@pytest.fixture(scope="module")
def session(laid_out: Database) -> Iterator[psycopg.Connection[Any]]:
    """A session that renders values as ours do."""
    with laid_out.connect() as connection:
        connection.execute(RENDERING)
        yield connection


@settings(max_examples=300, suppress_health_check=[HealthCheck.filter_too_much])
@given(text=conditions(), rows=ROWS)
def test_what_is_decided_here_the_server_would_decide_alike(
    session: psycopg.Connection[Any], text: str, rows: Sequence[dict[str, str | None]]
) -> None:
    where = understood(text, tokens(text), KINDS, utf8=True)
    assume(where.terms is not None)
    names = list(VALUES)
    with session.transaction(force_rollback=True):
        session.execute("DELETE FROM public.t")
        for place, row in enumerate(rows):
            session.execute(
                f"INSERT INTO public.t (id, {', '.join(names)}) VALUES (%s{', %s' * len(names)})",
                [place, *(row[name] for name in names)],
            )
        try:
            with session.transaction():
                found = session.execute(f"SELECT id FROM public.t WHERE {text}").fetchall()
        except psycopg.Error:
            return  # a condition that the server refuses is not used
    decided = {place for place, row in enumerate(rows) if where.holds([row[name] for name in where.deciding])}
    assert decided == {place for (place,) in found}
