"""Values of every type, in documents and in carried columns, on their way from one database into another."""

from __future__ import annotations

from functools import partial

import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]  # dozens of indexes, on a machine that may be busy

TYPES = [
    "CREATE EXTENSION hstore",
    "CREATE EXTENSION citext",
    "CREATE TYPE mood AS ENUM ('glad', 'sad')",
    "CREATE DOMAIN score AS numeric(5,2) CHECK (VALUE >= 0)",
    "CREATE DOMAIN scores AS score[]",
    "CREATE TYPE address AS (street text, number int, moods mood[])",
]

VALUES = {
    "boolean": ["true", "false"],
    "smallint": ["-32768", "32767"],
    "bigint": ["-9223372036854775808", "9223372036854775807"],
    "real": ["'NaN'", "'-Infinity'", "1.17549435e-38", "0.1"],
    "double precision": ["'Infinity'", "'-0'", "4.9e-324", "0.1::float8 + 0.2"],
    "numeric": ["'NaN'", "'Infinity'", "1.000", "10::numeric ^ 500 + 0.5"],
    "numeric(12,4)": ["'NaN'", "1", "-0.00005"],
    "money": ["'-92233720368547758.08'::money", "1234.5::numeric::money", "0::money"],
    "text": ["''", "'\\N'", "E'\\t\\r\\n\\\\'", "'日本語 🐘 ẞ'", "E'\\u0001\\u007f\\ufffe'", "repeat('ab ', 40000)"],
    "varchar(30)": ["''", "'  padded  '"],
    "character(6)": ["'ab'", "''"],
    '"char"': ["'x'", "''", "E'\\\\'"],
    "name": ["'a name'"],
    "bytea": ["''", "'\\x00'", "'\\x5c78'", "decode(repeat('00ff', 3000), 'hex')"],
    "date": ["'infinity'", "'-infinity'", "'4713-01-01 BC'", "'5874897-12-31'"],
    "time": ["'24:00'", "'00:00:00.000001'"],
    "time with time zone": ["'23:59:59.5+15:59'"],
    "timestamp": ["'infinity'", "'294276-12-31 23:59:59.999999'", "'0001-01-01 BC'"],
    "timestamp with time zone": ["'-infinity'", "'2026-03-29 02:30:00 Europe/Berlin'", "'1900-01-01 00:00+00:19:32'"],
    "interval": ["'1 year -2 mons +3 days -04:05:06.7'", "'0'", "'P1Y2M'"],
    "uuid": ["'{A0EEBC99-9C0B-4EF8-BB6D-6BB9BD380A11}'"],
    "json": ['\'{"b" :1, "a":[ 1.0, null ],  "a": "\\u0000"}\'', "'null'"],
    "jsonb": ['\'{"b" :1, "a":[ 1.0, null ],  "a": "\\u00e9\\n"}\'', "'\"\"'", "'null'"],
    "inet": ["'::ffff:1.2.3.4/120'", "'10.1.2.3/8'"],
    "cidr": ["'10.0.0.0/8'"],
    "macaddr8": ["'08:00:2b:01:02:03:04:05'"],
    "bit(5)": ["B'10101'"],
    "bit varying": ["B''", "B'111'"],
    "int4range": ["'empty'", "'[1,5)'", "'(,)'"],
    "tstzmultirange": ["'{}'", "'{[2026-01-01,2026-02-01),[2026-03-01,)}'"],
    "point": ["'(1e-300,-0)'", "'(NaN,Infinity)'"],
    "box": ["'((1,2),(3,4))'"],
    "path": ["'[(0,0),(1,1)]'"],
    "circle": ["'<(0,0),1>'"],
    "tsvector": ["'a:1A ''it''''s'':2,3'", "''"],
    "tsquery": ["'a & !b <-> c:*'"],
    "pg_lsn": ["'FFFFFFFF/FFFFFFFF'"],
    "regclass": ["'pg_class'", "'information_schema.tables'"],
    "text[]": ["'{}'", '\'{NULL,"NULL","","a,b","\\"","\\\\"}\'', "'[0:1]={x,y}'", "'{{a},{b}}'"],
    "numeric[]": ["'{NaN,1.10,NULL}'"],
    "mood": ["'sad'", "'glad'"],
    "mood[]": ["'{sad,NULL}'"],
    "score": ["7", "0.005"],
    "scores": ["'{1,2.5}'"],
    "address": ["('a \"street\", \\x', 5, '{sad,glad}')", "(NULL, NULL, '{}')"],
    "address[]": ["ARRAY[('x', 1, '{sad}')::address, NULL]"],
    "hstore": ['\'a=>1, "b c"=>NULL, ""=>"\\""\'', "''"],
    "citext": ["'MiXed'", "'mixed'"],
}
"""SQL expressions of each type; NULL goes without saying."""

COLUMNS = {f"c{at}": type_ for at, type_ in enumerate(VALUES)}
TABLE = (
    "CREATE TABLE things (id int PRIMARY KEY, " + ", ".join(f"{name} {type_}" for name, type_ in COLUMNS.items()) + ")"
)


@pytest.fixture(scope="module", params=[False, True], ids=["one database", "two databases"])
def things(make_scene: MakeScene, request: pytest.FixtureRequest) -> Scene:
    """A table with a column of every type; where the target is another database, it lacks our types and extensions."""
    return make_scene(
        [*TYPES, TABLE, *(inserted(number) for number in range(0, 3))],
        {
            "carried": Followed("things", "{id}", tuple(COLUMNS)),
            "rendered": Followed("things", " | ".join(f"{{{name}}}" for name in COLUMNS)),
        },
        apart=request.param,
    )


def inserted(number: int) -> str:
    """Return the INSERT of a row with each type's value of this number; NULL beyond."""
    values = [f"({options[number]})::{type_}" if number < len(options) else "NULL" for type_, options in VALUES.items()]
    return f"INSERT INTO things VALUES ({number}, {', '.join(values)})"


def test_values_arrive_as_they_are_by_the_first_load_and_by_the_stream(things: Scene) -> None:
    things.follows()
    most = max(map(len, VALUES.values()))

    things.execute(*(inserted(number) for number in range(3, most + 1)))
    things.follows()
    things.at_once("DELETE FROM things", *(inserted(number) for number in range(most + 1)))
    things.follows()


@pytest.mark.proof_from(1)
def test_each_value_may_become_null_and_another_again(things: Scene) -> None:
    things.execute("DELETE FROM things", inserted(0))
    for name, (type_, options) in zip(COLUMNS, VALUES.items(), strict=True):
        things.execute(f"UPDATE things SET {name} = NULL", f"UPDATE things SET {name} = ({options[-1]})::{type_}")

    things.follows()


def test_values_are_the_same_whatever_a_role_or_database_renders_them_by(make_scene: MakeScene) -> None:
    money = next(name for name, type_ in COLUMNS.items() if type_ == "money")
    scene = make_scene(
        [*TYPES, TABLE, inserted(0)],
        {"things": Followed("things", "{id}", tuple(COLUMNS)), "paid": Followed("things", f"{{{money}}} {{c18}}")},
        started=False,
    )
    for setting in (
        "datestyle = 'SQL, DMY'",
        "intervalstyle = 'iso_8601'",
        "extra_float_digits = -5",
        "bytea_output = 'escape'",
        "timezone = 'Asia/Kathmandu'",
        "lc_monetary = 'C.UTF-8'",
        "standard_conforming_strings = off",
        "quote_all_identifiers = on",
        "search_path = pg_catalog, public",
        "default_transaction_isolation = 'serializable'",
    ):
        scene.execute(f"ALTER DATABASE {scene.source.name} SET {setting}")
    scene.pipeline.start()
    scene.pipeline.live()

    scene.execute(inserted(1), inserted(2))

    scene.follows()


def test_names_of_what_only_the_source_has_arrive_in_another_database(make_scene: MakeScene) -> None:
    named = {
        "regclass": "'named'",
        "regtype": "'colour'",
        "regproc": "'shade'",
        "regprocedure": "'shade(int)'",
        "regnamespace": "'corner'",
        "regconfig": "'words'",
        "regdictionary": "'lexicon'",
        "regclass[]": "ARRAY['named'::regclass]",
        "aclitem": "makeaclitem(current_user::regrole, 0, 'SELECT', false)",
    }
    columns = {f"n{at}": type_ for at, type_ in enumerate(named)}
    defined = ", ".join(f"{name} {type_}" for name, type_ in columns.items())
    scene = make_scene(
        [
            "CREATE SCHEMA corner",
            "CREATE TYPE colour AS ENUM ('red')",
            "CREATE FUNCTION shade(int) RETURNS int LANGUAGE sql AS 'SELECT 1'",
            "CREATE TEXT SEARCH CONFIGURATION words (COPY = simple)",
            "CREATE TEXT SEARCH DICTIONARY lexicon (TEMPLATE = simple)",
            f"CREATE TABLE named (id int PRIMARY KEY, {defined})",
            f"INSERT INTO named VALUES (1, {', '.join(named.values())})",
            "CREATE TABLE keyed (id regclass PRIMARY KEY, title text)",
            "INSERT INTO keyed VALUES ('named', 'a key')",
            "CREATE TABLE beside (id int PRIMARY KEY, title text)",
        ],
        {
            "named": Followed("public.named", "{id}", tuple(columns)),
            "keyed": Followed("public.keyed"),
            "beside": Followed("public.beside"),
        },
        apart=True,
    )
    scene.execute(f"INSERT INTO named VALUES (2, {', '.join(named.values())})", "INSERT INTO beside VALUES (1, 'x')")
    scene.execute("UPDATE keyed SET id = 'beside'", "UPDATE named SET n0 = 'beside' WHERE id = 1")
    scene.settle()
    scene.execute("SET search_path = ''")  # as the index has the names
    for name in ("named", "keyed", "beside"):
        assert scene.state(name)[0] == "live"
        until(partial(scene.equal, name), scene.pipeline.tail)


@pytest.mark.proof
def test_a_key_that_the_target_cannot_take_pauses_its_index_and_names_the_row_where_no_log_does(
    make_scene: MakeScene,
) -> None:
    """A key may be so long that it fits the table's own index, and not with a chunk's number beside it."""
    key = "(SELECT left(string_agg(md5(i::text), ''), 2690) FROM generate_series(1, 100) i)"
    scene = make_scene(
        ["CREATE TABLE long (id text PRIMARY KEY, title text)", "CREATE TABLE short (id int PRIMARY KEY, title text)"],
        {"long": Followed("long"), "short": Followed("short")},
    )
    scene.at_once(
        "INSERT INTO long SELECT 'key ' || i, 'fits' FROM generate_series(1, 20) i",
        f"INSERT INTO long SELECT {key}, 'does not'",
        "INSERT INTO long VALUES ('after', 'fits as well')",
        "INSERT INTO short VALUES (1, 'goes on')",
    )

    reason = scene.paused("long")

    assert "ProgramLimitExceeded (54000), too long for the index long_chunks_" in reason
    assert "docs/operations.md" in reason
    assert "of the row c4ca4238a0b923820dcc" in reason
    scene.follows("short")
    assert "c4ca4238a0b923820dcc" not in scene.pipeline.log.read_text()
    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute("DELETE FROM long WHERE length(id) > 2000")
    scene.pipeline.start()
    scene.heals("long")
