"""Servers render and hash documents as we do: the same text from the same row, whatever the types."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from psycopg import pq, sql

from cdcsync.documents.templates import Template, hash_text, sql_hash
from tests.support.servers import Row, Server, fresh_database

pytestmark = pytest.mark.server

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=40)

TYPES = """
CREATE TYPE mood AS ENUM ('sad', 'O''K, "really"');
CREATE TYPE pair AS (flag boolean, note text);
CREATE DOMAIN yes_no AS boolean;
CREATE TABLE kinds (kind text, value text);
"""

VALUES = {
    "boolean": ["true", "false"],
    "yes_no": ["true"],
    "char(8)": ["'ab'", "''"],
    '"char"': ["'x'"],
    "name": ["'a name'"],
    "varchar(5)": ["'ab  '"],
    "numeric(12, 4)": ["1.5", "'NaN'"],
    "numeric": ["1e30", "-0.000001"],
    "real": ["0.1", "1e-30"],
    "double precision": ["0.1::float8 + 0.2::float8", "'-Infinity'"],
    "money": ["'12.34'"],
    "date": ["'0044-03-15 BC'"],
    "timestamp": ["'2024-02-29 12:34:56.789'"],
    "timestamptz": ["'2024-02-29 12:34:56.789+05:30'", "'infinity'"],
    "interval": ["'1 year 2 months -3 days 04:05:06.7'"],
    "bytea": [r"'\x00ff41'"],
    "json": ["""'{"b" : 1,  "a":null}'"""],
    "jsonb": ["""'{"b" : 1,  "a":null}'"""],
    "uuid": ["'A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11'"],
    "inet": ["'10.0.0.1/8'", "'::1'"],
    "int4range": ["'[1,5]'"],
    "bit(5)": ["B'10110'"],
    "boolean[]": ["'{t,f,null}'"],
    "text[]": ["""ARRAY['a,b', 'c"d', '', 'NULL', null]""", "'[2:3]={x,y}'"],
    "char(4)[]": ["ARRAY['a', 'bc']::char(4)[]"],
    "mood": ["'O''K, \"really\"'"],
    "mood[]": ["'{sad}'"],
    "pair": ["ROW(true, 'a \"b\", c')", "ROW(null, '')"],
    "tsvector": ["'a fat cat'"],
    "point": ["'(1.5,2)'"],
    "vector(3)": ["'[1,2.5,0.1]'"],
    "regtype": ["'integer'"],
    "pg_lsn": ["'16/B374D848'"],
}


@pytest.fixture(scope="module")
def connection(server: Server) -> Iterator[psycopg.Connection[Row]]:
    with fresh_database(server) as database, database.connect() as connection:
        connection.execute("SET extra_float_digits = 3")
        connection.execute(TYPES)
        yield connection


def wire_text(connection: psycopg.Connection[Row], query: str) -> bytes | None:
    """Return a value in the protocol's text format: what the type's output function writes, as in pgoutput."""
    result = connection.pgconn.exec_(query.encode())
    assert result.status == pq.ExecStatus.TUPLES_OK, result.error_message
    return result.get_value(0, 0)


@pytest.mark.parametrize(("kind", "value"), [(kind, value) for kind, values in VALUES.items() for value in values])
def test_sql_renders_a_value_as_its_output_function_does(
    connection: psycopg.Connection[Row], kind: str, value: str
) -> None:
    template = Template.parse("<{column}>")
    row = f"(SELECT CAST({value} AS {kind}) AS column) AS source"
    output = wire_text(connection, f"SELECT source.column FROM {row}")
    assert output is not None
    expression = template.sql(lambda name: f'source."{name}"')

    rendered = connection.execute(f"SELECT {expression}, {sql_hash(expression)} FROM {row}").fetchone()

    document = template.render([output.decode()])
    assert rendered == (document, hash_text(document))


@settings(max_examples=100)
@given(
    literals=st.tuples(TEXTS, TEXTS, TEXTS),
    values=st.tuples(st.none() | TEXTS, st.none() | TEXTS),
    conforming=st.sampled_from(["on", "off"]),
)
def test_server_and_python_agree_on_any_text(
    connection: psycopg.Connection[Row],
    literals: tuple[str, str, str],
    values: tuple[str | None, str | None],
    conforming: str,
) -> None:
    first, between, last = (text.replace("{", "{{").replace("}", "}}") for text in literals)
    template = Template.parse(f"{first}{{a}}{between}{{b}}{last}")
    expression = template.sql(lambda name: sql.Identifier(name).as_string(connection))
    with connection.transaction(force_rollback=True):
        connection.execute("SELECT set_config('standard_conforming_strings', %s, true)", [conforming])
        connection.execute("CREATE TEMP TABLE source (a text, b text)")
        connection.execute("INSERT INTO source VALUES (%s, %s)", values)

        rendered = connection.execute(f"SELECT {expression}, {sql_hash(expression)} FROM source").fetchone()

    document = template.render(values)
    assert rendered == (document, hash_text(document))


def test_more_columns_than_a_function_takes_arguments_are_rendered(connection: psycopg.Connection[Row]) -> None:
    names = [f"c{number}" for number in range(150)]
    template = Template.parse(" ".join(f"{{{name}}}" for name in names))
    row = ", ".join(f"{number} AS c{number}" for number in range(150))

    rendered = connection.execute(f"SELECT {template.sql(str)} FROM (SELECT {row}) AS source").fetchone()

    assert rendered == (template.render([str(number) for number in range(150)]),)
