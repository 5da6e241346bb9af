"""Which row a change is of: keys of every kind, every replica identity, and values that an UPDATE does not send."""

from __future__ import annotations

import pytest

from tests.support.scenes import Followed, MakeScene, Scene

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]  # dozens of indexes, on a machine that may be busy

LONG_KEY = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 80) i)"
"""2,560 characters that hardly compress: long enough to be stored apart from its row, short enough for a key."""

KEYS = {
    "composite": (
        "a int, b text, PRIMARY KEY (b, a)",
        "(1, 'x')",
        "(1, 'y')",
        "(2, E'tab\\t, line\\n, \\\\ and {brace}')",
        "(2, '')",
    ),
    "varchar": ("a varchar(20) PRIMARY KEY", "('')", "('Ünïcödé 日本語')", "(' blanks ')", "(E'\\\\N')"),
    "uuid": ("a uuid PRIMARY KEY", *(f"('00000000-0000-0000-0000-00000000000{i}')" for i in range(4))),
    "numeric": ("a numeric PRIMARY KEY", "(1.0)", "(1.000000000000000000001)", "('NaN')", "('-Infinity')"),
    "timestamptz": (
        "a timestamptz PRIMARY KEY",
        "('infinity')",
        "('-infinity')",
        "('0044-03-15 12:00:00+00 BC')",
        "('2026-02-28 23:59:59.999999+14')",
    ),
    "bytea": ("a bytea PRIMARY KEY", "('\\x')", "('\\x00ff')", "('\\x5c')", "('\\x00')"),
    "enum": ("a mood PRIMARY KEY", "('sad')", "('it''s, \"fine\"')", "('glad')", "('')"),
    "domain": ("a short PRIMARY KEY", "('aa')", "('bb')", "('cc')", "('')"),
    "array": ("a text[] PRIMARY KEY", "('{}')", "('{a,NULL,\"b c\"}')", "(ARRAY['\"','\\'])", "('{{1,2},{3,4}}')"),
    "float": ("a float8 PRIMARY KEY", "('NaN')", "(0.1)", "('-0')", "('-Infinity')"),
    "jsonb": ("a jsonb PRIMARY KEY", "('null')", '(\'{"b": 1, "a": [1.00]}\')', "('\"\\u00e9\"')", "('[]')"),
    "char": ("a char(5) PRIMARY KEY", "('a')", "('b')", "('')", "('ab  ')"),
    "row": ("a pair PRIMARY KEY", "('(1,x)')", "('(1,\"a,b\")')", "('(,)')", "('(2,)')"),
    "range": ("a tstzrange PRIMARY KEY", "('empty')", "('[2026-01-01,)')", "('(,)')", "('[2026-01-01,2026-01-02)')"),
    "interval": ("a interval PRIMARY KEY", "('1 day')", "('1 mon -2 days')", "('-00:00:01')", "('1.5 years')"),
    "inet": ("a inet PRIMARY KEY", "('10.0.0.1/8')", "('10.0.0.1')", "('::1')", "('fe80::/10')"),
    "long": (
        "a text PRIMARY KEY",
        f"({LONG_KEY})",
        f"({LONG_KEY} || 'y')",
        f"({LONG_KEY} || 'z')",
        f"('x' || {LONG_KEY})",
    ),
}
"""Columns of a table, and four keys."""

TYPES = [
    "CREATE TYPE mood AS ENUM ('glad', 'sad', '', 'it''s, \"fine\"')",
    "CREATE DOMAIN short AS varchar(3) CHECK (VALUE <> 'no')",
    "CREATE TYPE pair AS (x int, y text)",
]

IDENTITIES = {
    "default": "REPLICA IDENTITY DEFAULT",
    "index": "REPLICA IDENTITY USING INDEX identity_index_code_key",
    "full": "REPLICA IDENTITY FULL",
}
"""The index's key is the primary key, but for the identity that is an index: there it is that one's."""

BIG = "(SELECT string_agg(md5(i::text || {seed}::text), '') FROM generate_series(1, 300) i)"
"""Some 10 kB that do not compress."""


@pytest.fixture(scope="module", params=[False, True], ids=["one database", "two databases"])
def keyed(make_scene: MakeScene, request: pytest.FixtureRequest) -> Scene:
    """A table for each kind of key; where the target is another database, it lacks our types."""
    return make_scene(
        [*TYPES, *(f"CREATE TABLE {name}_key ({columns}, title text, n int)" for name, (columns, *_) in KEYS.items())],
        {f"{name}_key": Followed(f"{name}_key", columns=("n",)) for name in KEYS},
        apart=request.param,
    )


@pytest.mark.proof_from(1)
def test_a_row_is_found_by_its_key_whatever_type_that_has(keyed: Scene) -> None:
    """Inserted, changed, moved and deleted, each in a transaction of its own and all in one."""

    def everywhere(statement: str, *, at_once: bool = False) -> None:
        for name, (columns, *keys) in KEYS.items():
            key = "(a, b)" if "b text" in columns else "(a)"
            one, two, three, four = (
                value if key == "(a, b)" else f"({value}::{columns.split(' PRIMARY')[0][2:]})" for value in keys
            )
            texts = statement.format(t=f"{name}_key", key=key, one=one, two=two, three=three, four=four)
            (keyed.at_once if at_once else keyed.execute)(*texts.split(";"))

    everywhere(
        "INSERT INTO {t} SELECT r.*, 'row', 0 FROM (VALUES {one}, {two}, {three}) AS r;"
        "UPDATE {t} SET title = 'changed' WHERE {key} = {one};"
        "UPDATE {t} SET {key} = ROW{four} WHERE {key} = {two};"
        "DELETE FROM {t} WHERE {key} = {three}"
    )
    keyed.follows()
    everywhere(
        "INSERT INTO {t} SELECT r.*, 'again', 1 FROM (VALUES {three}) AS r;"
        "UPDATE {t} SET {key} = ROW{two}, n = 2 WHERE {key} = {three};"
        "DELETE FROM {t} WHERE {key} = {one};"
        "INSERT INTO {t} SELECT r.*, 'anew', 3 FROM (VALUES {one}) AS r;"
        "UPDATE {t} SET n = 4 WHERE {key} = {four}",
        at_once=True,
    )
    keyed.follows()
    everywhere("DELETE FROM {t}")
    keyed.follows()


@pytest.fixture(scope="module")
def toasted(make_scene: MakeScene) -> Scene:
    """Tables with large values, one for each way to know what an UPDATE does not send."""
    tables = [*(f"identity_{name}" for name in IDENTITIES), "unneeded", "carried", "numbered"]
    statements = []
    for table in tables:
        statements += [
            f"CREATE TABLE {table} (id int PRIMARY KEY, code text NOT NULL UNIQUE, title text, body text, n numeric)",
            f"ALTER TABLE {table} ALTER body SET STORAGE EXTERNAL",
        ]
    statements += [f"ALTER TABLE identity_{name} {identity}" for name, identity in IDENTITIES.items()]
    whole = "{title}\n{body}"
    return make_scene(
        statements,
        {
            **{f"identity_{name}": Followed(f"identity_{name}", whole, ("n",)) for name in IDENTITIES},
            "unneeded": Followed("unneeded", "{title}", ("n",)),
            "carried": Followed("carried", "{title}", ("body",)),
            "numbered": Followed("numbered", "{title} {n}", ("n", "code")),
        },
    )


@pytest.mark.parametrize("at_once", [False, True], ids=["one by one", "at once"])
def test_large_values_that_an_update_does_not_send_are_known_all_the_same(toasted: Scene, at_once: bool) -> None:
    digits = "repeat('123456789', 1500)::numeric"
    for table in toasted.pipeline.config.indexes:
        if table == "beat":
            continue
        statements = [
            f"TRUNCATE {table}",
            f"INSERT INTO {table} SELECT i, 'c' || i, 'title ' || i, {BIG.format(seed='i')}, {digits} + i"
            " FROM generate_series(1, 6) i",
            f"UPDATE {table} SET title = 'another' WHERE id = 1",
            f"UPDATE {table} SET code = 'moved', title = NULL WHERE id = 2",
            f"UPDATE {table} SET id = 30 WHERE id = 3",
            f"UPDATE {table} SET body = NULL WHERE id = 4",
            f"UPDATE {table} SET title = 'after' WHERE id = 4",
            f"UPDATE {table} SET title = 'gone soon' WHERE id = 5",
            f"DELETE FROM {table} WHERE id = 5",
            f"UPDATE {table} SET body = {BIG.format(seed=9)} || body WHERE id = 6",
            f"UPDATE {table} SET title = title || '!', id = 60 WHERE id = 6",
        ]
        (toasted.at_once if at_once else toasted.execute)(*statements)

    toasted.follows()


def test_values_are_read_again_only_where_nothing_else_tells_them(toasted: Scene) -> None:
    for table in ("identity_default", "identity_full", "unneeded"):
        toasted.execute(
            f"INSERT INTO {table} VALUES (100, 'c100', 'title', {BIG.format(seed=100)}) ON CONFLICT DO NOTHING"
        )
    toasted.follows()
    before = toasted.rereads()
    for table in ("identity_default", "identity_full", "unneeded"):
        toasted.execute(f"UPDATE {table} SET title = title || '?' WHERE id = 100")
    toasted.follows()
    after = toasted.rereads()

    assert after["identity_default"] == before["identity_default"] + 1
    assert after["identity_full"] == before["identity_full"]
    assert after["unneeded"] == before["unneeded"]


def test_a_table_whose_identity_is_nothing_is_refused_with_the_fix(make_scene: MakeScene) -> None:
    scene = make_scene(
        ["CREATE TABLE bare (id int PRIMARY KEY, title text)", "ALTER TABLE bare REPLICA IDENTITY NOTHING"],
        {"bare": Followed("bare")},
        started=False,
    )

    refused = scene.command("run")

    assert refused.returncode == 2
    assert "ALTER TABLE public.bare REPLICA IDENTITY DEFAULT" in refused.stderr
