"""What is told of source tables: whether they can be followed, hold what is asked of them, and name their rows."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.preflight.findings import Finding
from tests.support.clusters import OTHER_VERSIONS
from tests.support.preflight import ARTICLES, SLOT, Role, configured, examined, follow, the_error
from tests.support.servers import Database

pytestmark = pytest.mark.server


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("article", "public.articles"),
        ('sales.\\"orders\\"', 'sales."Orders"'),
        ("notes", "old.notes"),
        ("entirely_different", None),
    ],
)
async def test_a_missing_table_is_told_with_the_one_that_was_meant(
    database: Database, asked: str, meant: str | None
) -> None:
    database.execute(f'{ARTICLES}; CREATE SCHEMA sales; CREATE TABLE sales."Orders" (); CREATE SCHEMA old')
    database.execute("CREATE TABLE old.notes ()")
    error = the_error(await examined(configured(database.dsn, lost=f'table = "{asked}"')))
    assert error.where == "indexes.lost.table"
    assert ("did you mean" in str(error.hint)) is (meant is not None)
    assert meant is None or error.hint == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("create", "sign"),
    [
        ("CREATE VIEW t AS SELECT 1 AS id", "is a view"),
        ("CREATE MATERIALIZED VIEW t AS SELECT 1 AS id", "is a materialised view"),
        ("CREATE UNLOGGED TABLE t (id int PRIMARY KEY)", "ALTER TABLE public.t SET LOGGED"),
        ("CREATE TABLE t (id int PRIMARY KEY); CREATE TABLE u () INHERITS (t)", "inherit"),
        (
            "CREATE FOREIGN DATA WRAPPER w; CREATE SERVER s FOREIGN DATA WRAPPER w;"
            " CREATE FOREIGN TABLE t (id int) SERVER s",
            "is a foreign table",
        ),
    ],
)
async def test_a_relation_that_cannot_be_published_is_refused(database: Database, create: str, sign: str) -> None:
    database.execute(create)
    error = the_error(await examined(configured(database.dsn, t='table = "t"\ntext = "{id}"')))
    assert error.where == "indexes.t.table"
    assert sign in f"{error.message} {error.hint}"


async def test_a_system_table_is_refused(database: Database) -> None:
    error = the_error(await examined(configured(database.dsn, t='table = "pg_catalog.pg_class"\ntext = "{relname}"')))
    assert "belongs to the system" in error.message


@pytest.mark.parametrize(
    ("lines", "where", "hint"),
    [
        ('columns = ["tennant"]', "columns", 'did you mean "tenant"?'),
        ('text = "{zzz}"', "text", "its columns are id, tenant, title, body, stale"),
        ('columns = ["id"]', "columns", 'remove "id" from indexes.articles.columns'),
        ('indexed = ["tenant"]', "indexed", 'add "tenant" to indexes.articles.columns'),
        ('columns = ["tenant"]\nindexed = ["tenat"]', "indexed", 'did you mean "tenant"?'),
        ('columns = ["stale"]', "columns", "RENAME COLUMN stale"),
    ],
)
async def test_a_column_that_does_not_fit_is_told_with_its_key_and_fix(
    database: Database, lines: str, where: str, hint: str
) -> None:
    database.execute(f"{ARTICLES}; ALTER TABLE articles ADD stale bool")
    error = the_error(await examined(configured(database.dsn, articles=lines)))
    assert error.where == f"indexes.articles.{where}"
    assert hint in str(error.hint)


async def test_a_key_column_named_like_one_of_ours_is_refused(database: Database) -> None:
    database.execute("CREATE TABLE parts (chunk_no int PRIMARY KEY, body text)")
    error = the_error(await examined(configured(database.dsn, parts='table = "parts"\ntext = "{body}"')))
    assert error.where == "public.parts"
    assert "RENAME COLUMN chunk_no" in str(error.hint)


@pytest.mark.parametrize(
    ("create", "fix"),
    [
        ("CREATE TABLE t (id int)", "ADD PRIMARY KEY"),
        ("CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY NOTHING", "REPLICA IDENTITY DEFAULT"),
        ("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE)", "USING INDEX"),
        (
            "CREATE TABLE t (id int PRIMARY KEY, n int NOT NULL); CREATE UNIQUE INDEX u ON t (n);"
            " ALTER TABLE t REPLICA IDENTITY USING INDEX u; DROP INDEX u",
            "REPLICA IDENTITY DEFAULT",
        ),
        *(
            (
                "CREATE EXTENSION citext; CREATE DOMAIN folded AS citext;"
                f" CREATE TABLE t (n int NOT NULL, id {type_} NOT NULL);"
                " CREATE UNIQUE INDEX u ON t (n, id text_ops); ALTER TABLE t REPLICA IDENTITY USING INDEX u",
                "CREATE UNIQUE INDEX CONCURRENTLY ON public.t (n, id), without an operator class",
            )
            for type_ in ("citext", "folded")
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id);"
            " CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9);"
            " ALTER TABLE low REPLICA IDENTITY NOTHING",
            "ALTER TABLE public.low REPLICA IDENTITY DEFAULT",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id);"
            " CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9);"
            " ALTER TABLE t REPLICA IDENTITY FULL",
            "ALTER TABLE public.t REPLICA IDENTITY DEFAULT, or ALTER TABLE public.low REPLICA IDENTITY FULL",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id);"
            " CREATE UNLOGGED TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9)",
            "ALTER TABLE public.t DETACH PARTITION public.low",
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id);"
            " CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9) PARTITION BY RANGE (id);"
            " CREATE UNLOGGED TABLE lowest PARTITION OF low DEFAULT",
            "ALTER TABLE public.low DETACH PARTITION public.lowest",
        ),
    ],
    ids=[
        *("no key", "nothing", "deferrable", "dropped index", "citext by text_ops", "domain by text_ops"),
        *("blind partition", "partly full", "unlogged partition", "unlogged partition of a partition"),
    ],
)
async def test_a_table_whose_changes_do_not_name_their_row_is_refused(
    database: Database, create: str, fix: str
) -> None:
    database.execute(create)
    error = the_error(await examined(configured(database.dsn, t='table = "t"\ntext = "{id}"')))
    assert error.where == "public.t"
    assert fix in str(error.hint)


@pytest.mark.parametrize(
    ("create", "key"),
    [
        ("CREATE TABLE t (a int, id int PRIMARY KEY)", ("id",)),
        ("CREATE TABLE t (id int, a int, PRIMARY KEY (id) INCLUDE (a))", ("id",)),
        ("CREATE TABLE t (id int PRIMARY KEY); ALTER TABLE t REPLICA IDENTITY FULL", ("id",)),
        (
            "CREATE TABLE t (a int NOT NULL, id int NOT NULL, UNIQUE (id, a));"
            " ALTER TABLE t REPLICA IDENTITY USING INDEX t_id_a_key",
            ("id", "a"),
        ),
        (
            "CREATE EXTENSION citext; CREATE DOMAIN folded AS citext; CREATE TYPE mood AS ENUM ('a');"
            " CREATE TABLE t (id text NOT NULL, v varchar(9) NOT NULL, c char(2) NOT NULL, m mood NOT NULL, n int[] NOT"
            " NULL, f folded NOT NULL, r int4range NOT NULL, u uuid NOT NULL, x int); CREATE UNIQUE INDEX u ON t"
            ' (id text_pattern_ops, v COLLATE "C", c bpchar_pattern_ops, m, n, f, r, u) INCLUDE (x);'
            " ALTER TABLE t REPLICA IDENTITY USING INDEX u",
            ("id", "v", "c", "m", "n", "f", "r", "u"),
        ),
        (
            "CREATE TABLE t (id int PRIMARY KEY) PARTITION BY RANGE (id);"
            " CREATE TABLE low PARTITION OF t FOR VALUES FROM (0) TO (9) PARTITION BY RANGE (id);"
            " CREATE TABLE lowest PARTITION OF low FOR VALUES FROM (0) TO (1)",
            ("id",),
        ),
    ],
    ids=["primary", "including", "full", "identity index", "types of all kinds", "partitioned"],
)
async def test_a_table_whose_changes_name_their_row_has_that_as_its_key(
    database: Database, create: str, key: tuple[str, ...]
) -> None:
    database.execute(create)
    report = await examined(configured(database.dsn, t='table = "t"\ntext = "{id}"'))
    assert report.errors == []
    assert report.specs[0].shape.key == key


@pytest.mark.parametrize(
    ("prepare", "message", "fix"),
    [
        (
            "CREATE SCHEMA hidden; ALTER TABLE articles SET SCHEMA hidden; GRANT SELECT ON hidden.articles TO {role}",
            "may not use the schema hidden",
            "GRANT USAGE ON SCHEMA hidden TO {role}",
        ),
        (
            "GRANT SELECT (id) ON articles TO {role}",
            "may not read title, body",
            "GRANT SELECT ON public.articles TO {role}",
        ),
        (
            "GRANT SELECT ON articles TO {role}; ALTER TABLE articles ENABLE ROW LEVEL SECURITY",
            "row-level security would hide rows",
            "ALTER ROLE {role} BYPASSRLS",
        ),
    ],
    ids=["schema", "columns", "rows"],
)
async def test_what_the_role_may_not_read_is_told_with_the_grant_that_lets_it(
    lone_database: Database, role: Role, prepare: str, message: str, fix: str
) -> None:
    lone_database.execute(f"{ARTICLES}; {prepare.format(role=role.name)}")
    place = "hidden" if "hidden" in prepare else "public"
    lone_database.execute(f"CREATE PUBLICATION cdcsync FOR TABLE {place}.articles")
    config = configured(role.dsn, lone_database.dsn, articles=f'table = "{place}.articles"')
    error = the_error(await examined(config))
    assert error.where == f"{place}.articles"
    assert message in error.message
    assert error.hint == fix.format(role=role.name)
    lone_database.execute(error.hint)
    assert (await examined(config)).errors == []


async def test_of_many_tables_each_that_the_role_may_not_read_is_named_in_its_grant(
    lone_database: Database, role: Role
) -> None:
    for schema in ("one", "two"):
        lone_database.execute(
            f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.items (id int PRIMARY KEY, title text, status text);"
            f" GRANT USAGE ON SCHEMA {schema} TO {role.name}; GRANT SELECT (id, title) ON {schema}.items TO {role.name}"
        )
    lone_database.execute("CREATE PUBLICATION cdcsync FOR TABLE one.items, two.items")
    items = """tables = ["*.items"]\ntext = "{title}"\nwhere = "status <> 'spam'\""""
    config = configured(role.dsn, lone_database.dsn, items=items)

    hints = {str(one.hint) for one in (await examined(config)).errors}

    assert hints == {f"GRANT SELECT ON {schema}.items TO {role.name}" for schema in ("one", "two")}
    for hint in hints:
        lone_database.execute(hint)
    assert (await examined(config)).errors == []


async def test_a_column_of_many_tables_that_is_named_like_one_of_ours_is_refused_with_what_sql_can_do(
    database: Database,
) -> None:
    for schema in ("one", "two"):
        database.execute(
            f"CREATE SCHEMA {schema}; CREATE TABLE {schema}.items (id int PRIMARY KEY, title text, stale text)"
        )
    items = 'tables = ["*.items"]\ntext = "{title}"\ncolumns = ["stale"]'
    error = the_error(await examined(configured(database.dsn, items=items)))
    assert str(error.hint).startswith("ALTER TABLE one.items RENAME COLUMN stale TO … and so for each table")


async def test_grants_on_the_columns_that_are_used_are_enough(lone_database: Database, role: Role) -> None:
    lone_database.execute(f"{ARTICLES}; CREATE PUBLICATION cdcsync FOR TABLE articles")
    lone_database.execute(f"GRANT SELECT (id, title, body) ON articles TO {role.name}")
    assert (await examined(configured(role.dsn, lone_database.dsn))).errors == []


async def test_a_template_that_cannot_be_read_is_told(database: Database) -> None:
    database.execute(ARTICLES)
    error = the_error(await examined(configured(database.dsn, articles='text = "no column"')))
    assert error.where == "indexes.articles.text"


async def test_a_deferrable_key_is_refused_under_a_full_identity_too(database: Database) -> None:
    """`UPDATE t SET id = id + 1` sends 1→2 and then 2→3: whoever takes changes by key would lose a row."""
    database.execute("CREATE TABLE t (id int PRIMARY KEY DEFERRABLE); ALTER TABLE t REPLICA IDENTITY FULL")
    (error,) = (await examined(configured(database.dsn, t='table = "t"\ntext = "{id}"'))).errors
    assert "deferrable" in error.message


UNIQUE = "CREATE TABLE t (a int NOT NULL, b text NOT NULL, c int, body text); CREATE UNIQUE INDEX u ON t (a, b)"
WITHOUT = "CREATE TABLE t (a int NOT NULL, b text NOT NULL, body text); ALTER TABLE t REPLICA IDENTITY FULL"
NAMED_KEY = 'table = "t"\ntext = "{body}"\nkey = ["a", "b"]'


@pytest.mark.parametrize(
    ("create", "why", "fix"),
    [
        (
            UNIQUE,
            "the replica identity of public.t is nothing: UPDATE and DELETE do not send the key (a, b)",
            "ALTER TABLE public.t REPLICA IDENTITY USING INDEX u, or ALTER TABLE public.t REPLICA IDENTITY FULL",
        ),
        (
            WITHOUT,
            "(a, b) is not known to identify a row of public.t",
            "CREATE UNIQUE INDEX CONCURRENTLY ON public.t (a, b)",
        ),
        (
            f"{WITHOUT}; ALTER TABLE t ALTER b DROP NOT NULL; CREATE UNIQUE INDEX ON t (a, b)",
            "b of public.t may be NULL",
            "ALTER TABLE public.t ALTER COLUMN b SET NOT NULL",
        ),
        (f"{WITHOUT}; ALTER TABLE t ADD UNIQUE (a, b) DEFERRABLE", "is not known to identify", "CREATE UNIQUE INDEX"),
        (
            f"{WITHOUT}; CREATE UNIQUE INDEX ON t (a, b) WHERE a > 0; CREATE UNIQUE INDEX ON t (a, b, lower(body));"
            " CREATE UNIQUE INDEX ON t (a, b, body); CREATE INDEX ON t (a, b)",
            "is not known to identify",
            "CREATE UNIQUE INDEX CONCURRENTLY",
        ),
        (
            "CREATE EXTENSION citext; CREATE TABLE t (a int NOT NULL, b citext NOT NULL, body text);"
            " CREATE UNIQUE INDEX ON t (a, b text_ops); ALTER TABLE t REPLICA IDENTITY FULL",
            "is not known to identify a row",
            "CREATE UNIQUE INDEX CONCURRENTLY",
        ),
        (
            "CREATE TABLE t (a int PRIMARY KEY, b text NOT NULL, body text); CREATE UNIQUE INDEX ON t (b, a)",
            "the replica identity of public.t is (a): UPDATE and DELETE do not send the key (b, a)",
            "REPLICA IDENTITY FULL",
        ),
        (
            f"{WITHOUT}; CREATE UNIQUE INDEX ON t (a); ALTER TABLE t RENAME b TO bb",
            "public.t has no column b",
            'did you mean "bb"?',
        ),
        (
            "CREATE TABLE t (a int NOT NULL, b int NOT NULL, body text, UNIQUE (a, b)) PARTITION BY LIST (a);"
            " CREATE TABLE one PARTITION OF t FOR VALUES IN (1); ALTER TABLE t REPLICA IDENTITY FULL",
            "replica identities of partitions do not cover the key (a, b): public.one",
            "ALTER TABLE public.one REPLICA IDENTITY FULL",
        ),
    ],
)
async def test_a_named_key_that_the_table_does_not_prove_is_refused(
    database: Database, create: str, why: str, fix: str
) -> None:
    database.execute(create)
    errors = [
        one for one in (await examined(configured(database.dsn, t=NAMED_KEY))).errors if "fail" not in one.message
    ]
    assert len(errors) == 1, errors
    assert why in errors[0].message
    assert fix in str(errors[0].hint)


COLUMNS = {
    "carried": ('text = "{body}"\ncolumns = ["label"]', "t", "label"),
    "in the text": ('text = "{body} {label}"', "t", "label"),
    "around chunks": ('text = "{body}"\nchunk_text = "{label} {chunk}"', "t", "label"),
    "in the key": ('text = "{body}"\nkey = ["label"]', "t", "label"),
    "of a related row": (
        'text = "{body} {notes}"\nrelated.notes = { table = "notes", on = { of = "a" }, text = "{note}" }',
        "notes",
        "note",
    ),
}


@pytest.mark.parametrize("read", COLUMNS)
async def test_a_column_that_an_index_has_read_is_told_as_dropped_or_renamed_and_not_as_misspelled(
    database: Database, read: str
) -> None:
    lines, table, column = COLUMNS[read]
    database.execute("CREATE TABLE t (a int PRIMARY KEY, body text, label int NOT NULL UNIQUE, lable text)")
    database.execute("CREATE TABLE notes (of int PRIMARY KEY, note text, notes text)")
    database.execute("ALTER TABLE t REPLICA IDENTITY FULL; ALTER TABLE notes REPLICA IDENTITY FULL")
    config = configured(database.dsn, slot=SLOT, t=f'table = "t"\n{lines}')
    await follow(database, config)

    async def told() -> Finding:
        report = await examined(config)
        (found,) = [one for one in report.findings if f"has no column {column}" in one.message]
        return found

    database.execute(f"ALTER TABLE {table} RENAME {column} TO tag")
    renamed = await told()
    assert f"has no column {column}: it is called tag now" in renamed.message
    assert str(renamed.hint).startswith(f"ALTER TABLE public.{table} RENAME COLUMN tag TO {column}, or name tag in ")
    database.execute(f"ALTER TABLE {table} DROP tag")
    assert str((await told()).hint).startswith("add the column again, or take it out of indexes.t.")


KINDS = (
    "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE DOMAIN felt AS mood;"
    " CREATE DOMAIN deep AS felt CHECK (VALUE::text <> 'b');"
    " CREATE DOMAIN many AS mood[]; CREATE TYPE pair AS (m mood, n int); CREATE DOMAIN two AS pair;"
)


@pytest.mark.parametrize("kind", ["felt", "deep"])
@pytest.mark.parametrize(
    ("key", "lines"),
    [
        ("id {} PRIMARY KEY", 'table = "t"\ntext = "{{body}}"'),
        ("n int, id {}, PRIMARY KEY (n, id)", 'table = "t"\ntext = "{{body}}"'),
        ("n int PRIMARY KEY, id {} NOT NULL UNIQUE", 'table = "t"\ntext = "{{body}}"\nkey = ["id"]'),
    ],
)
async def test_a_key_of_a_domain_over_an_enum_is_refused_until_it_is_the_enum(
    database: Database, kind: str, key: str, lines: str
) -> None:
    """PostgreSQL finds no = for such values; of a domain over anything else it does."""
    database.execute(f"{KINDS} CREATE TABLE t ({key.format(kind)}, body text); ALTER TABLE t REPLICA IDENTITY FULL")
    settings = configured(database.dsn, t=lines.format())
    (error,) = (await examined(settings)).errors
    assert f"id of public.t is of public.{kind}, a domain over an enum" in error.message

    database.execute(str(error.hint).partition(";")[0])

    assert (await examined(settings)).errors == []


@pytest.mark.parametrize("kind", ["mood", "many", "two", "mood[]", "pair"])
async def test_other_keys_made_of_an_enum_are_fine(database: Database, kind: str) -> None:
    database.execute(f"{KINDS} CREATE TABLE t (id {kind} PRIMARY KEY, body text)")
    assert (await examined(configured(database.dsn, t='table = "t"\ntext = "{body}"'))).errors == []


NOT_VALID = (
    "CREATE TABLE t (a int NOT NULL, b text, body text); INSERT INTO t VALUES (1, NULL, 'a');"
    " CREATE UNIQUE INDEX u ON t (a, b); ALTER TABLE t ADD CONSTRAINT b_known NOT NULL b NOT VALID"
)


@pytest.mark.parametrize(
    ("identity", "lines"),
    [("FULL", NAMED_KEY), ("USING INDEX u", NAMED_KEY), ("USING INDEX u", 'table = "t"\ntext = "{body}"')],
    ids=["named", "named, by an index", "the identity's"],
)
async def test_a_key_of_which_older_rows_may_be_null_is_refused_until_none_is(
    database: Database, identity: str, lines: str
) -> None:
    """From PostgreSQL 18 on, NOT NULL may be NOT VALID: the catalog calls the column NOT NULL all the same."""
    with database.connect() as session:
        if session.info.server_version < 180000:
            pytest.skip("before PostgreSQL 18, NOT NULL is never NOT VALID")
    database.execute(f"{NOT_VALID}; ALTER TABLE t REPLICA IDENTITY {identity}")
    config = configured(database.dsn, t=lines)
    error = the_error(await examined(config))
    assert "b of public.t may be NULL" in error.message
    database.execute("DELETE FROM t WHERE b IS NULL")
    database.execute(str(error.hint))
    assert (await examined(config)).errors == []


KEYLESS_PARTS = (
    "CREATE TABLE t (a int NOT NULL, b int NOT NULL, body text) PARTITION BY LIST (a);"
    " CREATE TABLE one PARTITION OF t FOR VALUES IN (1)"
)


@pytest.mark.proof_from(6)
@pytest.mark.parametrize("alternative", [0, -1], ids=["first", "last"])
@pytest.mark.parametrize(
    "create",
    [
        f"{KEYLESS_PARTS}; ALTER TABLE t REPLICA IDENTITY FULL",
        f"{KEYLESS_PARTS}; CREATE UNIQUE INDEX ON t (a, b); ALTER TABLE t REPLICA IDENTITY FULL",
        f"{KEYLESS_PARTS}; CREATE UNIQUE INDEX u ON t (a, b); ALTER TABLE t REPLICA IDENTITY USING INDEX u",
        f"{KEYLESS_PARTS}; CREATE UNIQUE INDEX u ON t (a, b); ALTER TABLE t REPLICA IDENTITY FULL;"
        " ALTER TABLE one REPLICA IDENTITY USING INDEX one_a_b_idx",
        f"{KEYLESS_PARTS}; ALTER TABLE t ADD PRIMARY KEY (a, b); ALTER TABLE t REPLICA IDENTITY FULL",
        f"{KEYLESS_PARTS}; ALTER TABLE t ADD PRIMARY KEY (a, b); ALTER TABLE one REPLICA IDENTITY NOTHING",
        f"{KEYLESS_PARTS}; ALTER TABLE t ADD PRIMARY KEY (a, b); ALTER TABLE t REPLICA IDENTITY FULL;"
        " ALTER TABLE one REPLICA IDENTITY NOTHING",
        f"{KEYLESS_PARTS}; CREATE UNIQUE INDEX u ON t (a, b)",
    ],
    ids=[
        *("nothing proves the key", "a unique index", "an identity index", "the partition by an index"),
        *("a primary key", "nothing of the partition", "FULL and nothing of the partition", "no identity"),
    ],
)
async def test_the_remedies_for_a_partitioned_table_that_is_published_make_it_fit(
    database: Database, create: str, alternative: int
) -> None:
    """Each is typed as it is printed, until nothing more is said."""
    database.execute(f"{create}; CREATE PUBLICATION cdcsync FOR TABLE t WITH (publish_via_partition_root = true)")
    for _ in range(4):
        for error in (await examined(configured(database.dsn, t=NAMED_KEY))).errors:
            database.execute(str(error.hint).split(", and so on")[0].split(", or ")[alternative])
    assert (await examined(configured(database.dsn, t=NAMED_KEY))).errors == []


@pytest.mark.parametrize(
    ("create", "key"),
    [
        (f"{UNIQUE}; ALTER TABLE t REPLICA IDENTITY FULL", ("a", "b")),
        (f"{UNIQUE}; ALTER TABLE t REPLICA IDENTITY USING INDEX u", ("a", "b")),
        (f"{UNIQUE.replace('(a, b)', '(b, a)')}; ALTER TABLE t REPLICA IDENTITY FULL", ("b", "a")),
        (f"{UNIQUE.replace('(a, b)', '(b)')}; ALTER TABLE t REPLICA IDENTITY FULL", ("b", "a")),
        ("CREATE TABLE t (a int, b text, body text, PRIMARY KEY (b, a))", ("b", "a")),
        (
            "CREATE TABLE t (id int PRIMARY KEY, a int NOT NULL, b text NOT NULL, body text, UNIQUE (a, b));"
            " ALTER TABLE t REPLICA IDENTITY FULL",
            ("a", "b"),
        ),
    ],
)
async def test_a_named_key_that_a_unique_index_proves_is_the_key(
    database: Database, create: str, key: tuple[str, ...]
) -> None:
    database.execute(create)
    report = await examined(configured(database.dsn, t=NAMED_KEY))
    assert report.errors == []
    assert report.specs[0].shape.key == key


@pytest.mark.proof_from(2)
@pytest.mark.parametrize(
    ("column", "index", "told"),
    [("folded", "", False), ("folded", 'COLLATE "C"', True), ('"C"', "COLLATE folded", False), ('"C"', "", False)],
)
async def test_an_identity_by_another_collation_is_refused_where_the_columns_takes_more_for_equal(
    make_cluster: Callable[..., Cluster], database: Database, column: str, index: str, told: bool
) -> None:
    if not OTHER_VERSIONS[15].exists():  # the one with ICU
        pytest.skip("PostgreSQL 15 is not installed")
    source = make_cluster(bin_dir=OTHER_VERSIONS[15])
    with psycopg.connect(source.dsn(), autocommit=True) as session:
        for statement in (
            "CREATE COLLATION folded (provider = icu, locale = 'und-u-ks-level2', deterministic = false)",
            f"CREATE TABLE t (id text COLLATE {column} NOT NULL)",
            f"CREATE UNIQUE INDEX u ON t (id {index})",
            "ALTER TABLE t REPLICA IDENTITY USING INDEX u",
        ):
            session.execute(statement.encode())
    report = await examined(configured(source.dsn(), database.dsn, t='table = "t"\ntext = "{id}"'))
    assert ["compares (id) in another way" in one.message for one in report.errors] == [True] * told


async def test_a_table_without_a_primary_key_is_told_which_unique_index_could_serve(database: Database) -> None:
    database.execute(UNIQUE)
    error = the_error(await examined(configured(database.dsn, t='table = "t"\ntext = "{body}"')))
    full = 'ALTER TABLE public.t REPLICA IDENTITY FULL with key = ["a", "b"] for the index'
    assert f"REPLICA IDENTITY USING INDEX u, or {full}" in str(error.hint)
