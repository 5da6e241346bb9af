"""Which edits of a table, its types or its publication show in an index's fingerprint, and what each asks for."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.config import QualifiedName
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import Catalog, read_catalog
from cdcsync.source.fingerprints import Difference, Fingerprint, difference, fingerprint_of
from tests.support.publications import PUBLICATIONS, P, T, lay_out

pytestmark = pytest.mark.server

COLUMNS = ("id", "title", "mood", "spot", "more", "days", "twice", "moods")
PARTITIONED = ("id", "at", "title")


NOTHING = {
    "a row changes": "UPDATE public.t SET title = 'b'; UPDATE public.p SET title = 'b'",
    "statistics are gathered": "ANALYZE",
    "an index is made": "CREATE INDEX ON public.t (title)",
    "another column is retyped in place": "ALTER TABLE public.t ALTER extra TYPE varchar",
    "another column comes": "ALTER TABLE public.t ADD COLUMN newer int",
    "a label is added": "ALTER TYPE public.mood ADD VALUE 'better' BEFORE 'sad'",
    "another table is made": "CREATE TABLE public.new (id int); DROP TABLE public.new",
    "another table is published": "ALTER PUBLICATION p ADD TABLE public.apart",
    "another column gets a default": "ALTER TABLE public.t ALTER extra SET DEFAULT 'x'",
    "the table is granted": "GRANT SELECT ON public.t TO PUBLIC",
}
REREAD = {
    "values change by USING and another type": "ALTER TABLE public.t ALTER title TYPE varchar(20) USING upper(title)",
    "a column is dropped and added": "ALTER TABLE public.t DROP title; ALTER TABLE public.t ADD title text",
    "two columns change places": """ALTER TABLE public.t ADD b2 text; ALTER TABLE public.t RENAME title TO old;
        ALTER TABLE public.t RENAME b2 TO title""",
    "the key is dropped and added": "ALTER TABLE public.t DROP id CASCADE;"
    " ALTER TABLE public.t ADD id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY",
    "a modifier changes without a rewrite": "ALTER TABLE public.t ALTER more TYPE varchar(30)",
    "a label is renamed": "ALTER TYPE public.mood RENAME VALUE 'sad' TO 'down'",
    "a composite type gets an attribute": "ALTER TYPE public.point3 ADD ATTRIBUTE w int",
    "a composite type inside another one gets an attribute": "ALTER TYPE public.inner_point ADD ATTRIBUTE z int",
    "a type is renamed": "ALTER TYPE public.mood RENAME TO temper",
    "a generated column has another expression": """ALTER TABLE public.t DROP twice;
        ALTER TABLE public.t ADD twice int GENERATED ALWAYS AS (id * 3) STORED""",
    "the table is made anew": "DROP TABLE public.t; CREATE TABLE public.t (id int PRIMARY KEY, title text)",
    "the table changes places with another one": """ALTER TABLE public.t RENAME TO away;
        CREATE TABLE public.t (LIKE public.away INCLUDING ALL)""",
}
COMPARED = {
    # The catalog tells that a column's entry was written, and not whether it had another name for a while.
    "a column without values gets a default": "ALTER TABLE public.t ALTER title SET DEFAULT 'x'",
    "a column is granted by itself": "GRANT SELECT (title) ON public.t TO PUBLIC",
    "two columns change places for a while": """ALTER TABLE public.t RENAME title TO old;
        ALTER TABLE public.t RENAME extra TO title; ALTER TABLE public.t RENAME title TO extra;
        ALTER TABLE public.t RENAME old TO title""",
    "a label has another name for a while": """ALTER TYPE public.mood RENAME VALUE 'sad' TO 'down';
        ALTER TYPE public.mood RENAME VALUE 'down' TO 'sad'""",
    "an attribute has another name": "ALTER TYPE public.inner_point RENAME ATTRIBUTE x TO abscissa",
    "values change by USING": "ALTER TABLE public.t ALTER title TYPE text USING upper(title)",
    "a column has another collation": 'ALTER TABLE public.t ALTER title TYPE text COLLATE "C"',
    "the table is rewritten": "VACUUM FULL public.t",
    "the table is truncated": "TRUNCATE public.t",
    "an edit of the publication changes nothing": "ALTER PUBLICATION p SET"
    " (publish = 'insert, update, delete, truncate')",
    "updates were not sent for a while": """ALTER PUBLICATION p SET (publish = 'insert');
        ALTER PUBLICATION p SET (publish = 'insert, update, delete, truncate')""",
    "the publication's owner changes": "ALTER PUBLICATION p OWNER TO CURRENT_USER; ALTER PUBLICATION p RENAME TO q;"
    " ALTER PUBLICATION q RENAME TO p",
    "updates were not sent for a while, in one transaction": """BEGIN; ALTER PUBLICATION p SET (publish = 'insert');
        ALTER PUBLICATION p SET (publish = 'insert, update, delete, truncate'); COMMIT""",
}
OUT_AND_BACK = {
    ("table", "dropped and added"): "ALTER PUBLICATION p DROP TABLE {t}; ALTER PUBLICATION p ADD TABLE {t}",
    ("table", "set anew"): "ALTER PUBLICATION p SET TABLE {rest}; ALTER PUBLICATION p SET TABLE {t}, {rest}",
    ("table", "made anew"): "DROP PUBLICATION p; {make}",
    ("table", "with a filter for a while"): "ALTER PUBLICATION p SET TABLE {t} WHERE (id > 5), {rest};"
    " ALTER PUBLICATION p SET TABLE {t}, {rest}",
    ("table", "with a column list for a while"): "ALTER PUBLICATION p SET TABLE {t} (id), {rest};"
    " ALTER PUBLICATION p SET TABLE {t}, {rest}",
    ("all", "made anew"): "DROP PUBLICATION p; {make}",
    ("all", "moved and moved back"): "ALTER TABLE {t} SET SCHEMA attic; ALTER TABLE attic.{bare} SET SCHEMA public",
    ("schema", "schema dropped and added"): "ALTER PUBLICATION p SET TABLES IN SCHEMA other;"
    " ALTER PUBLICATION p SET TABLES IN SCHEMA public",
    ("schema", "moved and moved back"): "ALTER TABLE {t} SET SCHEMA attic; ALTER TABLE attic.{bare} SET SCHEMA public",
    ("schema", "made anew"): "DROP PUBLICATION p; {make}",
}


async def taken(source: Connection, name: QualifiedName = T) -> tuple[Fingerprint, Catalog]:
    """Return the fingerprint as it comes back from our table, and what it is of."""
    catalog = await read_catalog(source, "p", [T, P])
    table = catalog.tables[name]
    fingerprint = fingerprint_of(catalog, table, COLUMNS if name == T else PARTITIONED)
    return msgspec.json.decode(msgspec.json.encode(fingerprint), type=Fingerprint), catalog


async def done(source: Connection, edit: str, name: QualifiedName = T, publication: str = "table") -> Difference:
    """Make an edit and return the difference that it makes."""
    await lay_out(source, publication)
    before, _ = await taken(source, name)
    for statement in edit.split(";"):
        await source.execute(statement)
    now, catalog = await taken(source, name)
    return difference(before, now, catalog.tables[name])


@pytest.mark.parametrize("edit", NOTHING.values(), ids=NOTHING)
async def test_what_leaves_the_values_of_the_index_alone_is_no_difference(source: Connection, edit: str) -> None:
    found = await done(source, edit)

    # Version 15 writes the entries of generated columns anew when any column changes its type.
    rewritten = source.info.server_version < 160000 and "ALTER extra TYPE" in edit
    assert found == Difference(compare="public.t was altered: column twice" if rewritten else None)


@pytest.mark.parametrize("edit", REREAD.values(), ids=REREAD)
async def test_what_may_change_values_without_a_row_event_has_the_table_read_again(
    source: Connection, edit: str
) -> None:
    assert (await done(source, edit)).reread


@pytest.mark.parametrize("edit", COMPARED.values(), ids=COMPARED)
async def test_what_may_have_kept_rows_from_being_sent_has_source_and_index_compared(
    source: Connection, edit: str
) -> None:
    found = await done(source, edit)
    assert found.compare
    assert not found.reread


EMPTIED = {
    "by itself": (T, "TRUNCATE public.t", True, False),
    "filled again": (T, "BEGIN; TRUNCATE public.t; INSERT INTO public.t VALUES (1, 'a'); COMMIT", True, False),
    "after a rewrite": (T, "VACUUM FULL public.t; TRUNCATE public.t", True, False),
    "and a column rewritten": (
        T,
        "BEGIN; TRUNCATE public.t; ALTER TABLE public.t ALTER title TYPE text USING upper(title); COMMIT",
        False,
        False,
    ),
    "and the publication edited": (
        T,
        "TRUNCATE public.t; ALTER PUBLICATION p SET (publish = 'insert, update, delete, truncate')",
        False,
        False,
    ),
    "with its partitions": (P, "TRUNCATE public.p", True, True),
    "a partition after all": (P, "TRUNCATE public.p; TRUNCATE public.p1", False, False),
}


@pytest.mark.parametrize(("name", "edit", "explains", "at_its_end"), EMPTIED.values(), ids=EMPTIED)
async def test_new_files_name_the_transaction_whose_truncate_may_have_made_them(
    source: Connection, name: QualifiedName, edit: str, explains: bool, at_its_end: bool
) -> None:
    found = await done(source, edit, name)

    assert found.compare
    assert [(one.table, one.at_its_end) for one in found.emptied] == [(name, at_its_end)] * explains
    for one in found.emptied:
        table = (await taken(source, name))[1].tables[name]
        assert one.by in (table.written_by, *(leaf.written_by for leaf in table.leaves))


RELATED = {
    "one of them": ("TRUNCATE public.p", [P]),
    "both at once": ("TRUNCATE public.p, public.t", [P, T]),
    "both, one after the other": ("TRUNCATE public.p; TRUNCATE public.t", [P, T]),
    "one, and the other rewritten": ("TRUNCATE public.p; VACUUM FULL public.t", [P, T]),
    "a partition of one, and the other": ("TRUNCATE public.p1; TRUNCATE public.t", [P, T]),
    "one, and the publication edited": ("TRUNCATE public.p; ALTER PUBLICATION p SET (publish = 'insert')", []),
    "one, and a partition attached": ("TRUNCATE public.p; CREATE TABLE public.p9 PARTITION OF public.p DEFAULT", []),
    "one, and its column rewritten": (
        "BEGIN; TRUNCATE public.p; ALTER TABLE public.p ALTER title TYPE text USING upper(title); COMMIT",
        [],
    ),
}


@pytest.mark.parametrize(("edit", "emptied"), RELATED.values(), ids=RELATED)
async def test_each_of_several_tables_has_to_be_explained_by_a_truncate(
    source: Connection, edit: str, emptied: list[QualifiedName]
) -> None:
    """Index over `t` to which `p` is related."""
    await lay_out(source)

    async def read() -> tuple[Fingerprint, Catalog]:
        catalog = await read_catalog(source, "p", [T, P])
        return fingerprint_of(catalog, catalog.tables[T], COLUMNS, None, {P: PARTITIONED}), catalog

    before, _ = await read()
    for statement in edit.split("; "):
        await source.execute(statement)
    now, catalog = await read()
    found = difference(before, now, catalog.tables[T], catalog.tables.values())

    assert found.compare or (found.reread and not emptied)
    assert {one.table for one in found.emptied} == set(emptied)


@pytest.mark.parametrize(
    "edit",
    [
        "ALTER TABLE public.t DROP CONSTRAINT t_pkey; ALTER TABLE public.t ALTER twice SET NOT NULL;"
        " ALTER TABLE public.t ADD PRIMARY KEY (twice)",
        "ALTER TABLE public.t ALTER id SET STATISTICS 7",
    ],
)
@pytest.mark.parametrize("of", [T, P], ids=["of itself", "of another"])
async def test_the_key_by_which_related_rows_are_ordered_counts(
    source: Connection, edit: str, of: QualifiedName
) -> None:
    await lay_out(source)

    async def read() -> tuple[Fingerprint, Catalog]:
        catalog = await read_catalog(source, "p", [T, P])
        return fingerprint_of(catalog, catalog.tables[of], ("title",), None, {T: ("title",)}), catalog

    before, _ = await read()
    for statement in edit.split("; "):
        await source.execute(statement)
    now, catalog = await read()

    assert difference(before, now, catalog.tables[of], [catalog.tables[T]]).compare


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "by an earlier version"])
async def test_a_function_of_a_condition_that_is_defined_again_has_source_and_index_compared(
    source: Connection, stored: bool
) -> None:
    await lay_out(source)
    condition = "public.wanted(title)"

    async def read() -> tuple[Fingerprint, Catalog]:
        await source.execute(
            "CREATE OR REPLACE FUNCTION public.wanted(s text) RETURNS boolean IMMUTABLE LANGUAGE sql AS"
            " $$ SELECT s <> 'spam' $$"
        )
        catalog = await read_catalog(source, "p", [T], expressions=[condition])
        return fingerprint_of(catalog, catalog.tables[T], ("title",), expressions=[condition]), catalog

    before, _ = await read()
    if not stored:
        before = msgspec.structs.replace(before, made_of=msgspec.structs.replace(before.made_of, functions_written={}))
    now, catalog = await read()
    found = difference(before, now, catalog.tables[T])

    assert found.compare == ("what its conditions call was defined again: public.wanted(text)" if stored else None)
    assert not found.called


async def test_a_type_of_a_condition_that_was_altered_back_has_sessions_opened_that_have_planned_nothing(
    source: Connection,
) -> None:
    await lay_out(source)
    condition = "title::public.level > 'low'"

    async def read() -> tuple[Fingerprint, Catalog]:
        catalog = await read_catalog(source, "p", [T], expressions=[condition])
        return fingerprint_of(catalog, catalog.tables[T], ("title",), expressions=[condition]), catalog

    await source.execute("CREATE TYPE public.level AS ENUM ('low', 'high')")
    before, _ = await read()
    for was, then in (("low", "other"), ("other", "low")):
        await source.execute(f"ALTER TYPE public.level RENAME VALUE '{was}' TO '{then}'")
    now, catalog = await read()
    found = difference(before, now, catalog.tables[T])

    assert found.compare == "what its conditions call was defined again: type public.level"
    assert found.called


ANEW = "ALTER TABLE public.t DROP CONSTRAINT t_pkey; ALTER TABLE public.t ADD PRIMARY KEY (id)"
KEYS = {
    "a primary key dropped and added": (("id",), "", ANEW, True),
    "a unique index dropped and made": (
        ("twice",),
        "CREATE UNIQUE INDEX u ON public.t (twice)",
        "DROP INDEX public.u; CREATE UNIQUE INDEX u ON public.t (twice)",
        True,
    ),
    "a unique index of part of the key dropped, another one is left": (
        ("id", "twice"),
        "CREATE UNIQUE INDEX u ON public.t (twice)",
        "DROP INDEX public.u",
        False,
    ),
    "another unique index took its place in one look": (
        ("twice",),
        "CREATE UNIQUE INDEX u ON public.t (twice)",
        "CREATE UNIQUE INDEX v ON public.t (twice); DROP INDEX public.u",
        True,
    ),
    "the older of two unique indexes dropped": (
        ("twice",),
        "CREATE UNIQUE INDEX u ON public.t (twice); CREATE UNIQUE INDEX v ON public.t (twice)",
        "DROP INDEX public.u",
        False,
    ),
    "another unique index made": (("id",), "", "CREATE UNIQUE INDEX u ON public.t (id)", False),
    "a primary key that is not the key": (("twice",), "CREATE UNIQUE INDEX u ON public.t (twice)", ANEW, False),
    "a constraint's index made anew beside the old one": (("id",), "", "REINDEX TABLE CONCURRENTLY public.t", False),
}


@pytest.mark.parametrize(("key", "made", "edit", "compared"), KEYS.values(), ids=KEYS)
async def test_a_key_that_may_not_have_been_unique_for_a_while_counts(
    source: Connection, key: tuple[str, ...], made: str, edit: str, compared: bool
) -> None:
    await lay_out(source)

    async def read() -> tuple[Fingerprint, Catalog]:
        catalog = await read_catalog(source, "p", [T])
        return fingerprint_of(catalog, catalog.tables[T].keyed_by(key), ("title",)), catalog

    for statement in filter(None, made.split("; ")):
        await source.execute(statement)
    before, _ = await read()
    for statement in edit.split("; "):
        await source.execute(statement)
    now, catalog = await read()

    assert bool(difference(before, now, catalog.tables[T])) == compared


@pytest.mark.parametrize(("publication", "edit"), OUT_AND_BACK, ids=map(": ".join, OUT_AND_BACK))
async def test_a_table_that_was_not_sent_for_a_while_is_noticed_by_any_kind_of_publication(
    source: Connection, publication: str, edit: str
) -> None:
    for name, rest in ((T, P), (P, T)):
        statements = OUT_AND_BACK[publication, edit].format(
            t=name, rest=rest, bare=name.name, make=PUBLICATIONS[publication]
        )
        assert (await done(source, statements, name, publication)).compare, name


async def test_a_table_that_was_unlogged_for_a_while_was_not_sent(source: Connection) -> None:
    edit = "ALTER TABLE public.t SET UNLOGGED; ALTER TABLE public.t SET LOGGED"

    assert (await done(source, edit, publication="all")).compare


@pytest.mark.parametrize(
    ("edit", "arrived", "left", "compared"),
    [
        ("CREATE TABLE public.p3 PARTITION OF public.p DEFAULT", ["p3"], False, False),
        (
            "ALTER TABLE public.p ATTACH PARTITION public.apart FOR VALUES FROM ('2030-01-01') TO ('2031-01-01')",
            ["apart"],
            False,
            False,
        ),
        ("ALTER TABLE public.p DETACH PARTITION public.p1", [], True, False),
        ("DROP TABLE public.p1", [], True, False),
        (
            "ALTER TABLE public.p DETACH PARTITION public.p1; ALTER TABLE public.p ATTACH PARTITION public.p1"
            " FOR VALUES FROM ('2025-01-01') TO ('2026-01-01')",
            ["p1"],
            True,
            False,
        ),
        ("TRUNCATE public.p1", [], False, True),
        ("ALTER TABLE public.p ALTER title TYPE text USING upper(title)", [], False, True),
        ("UPDATE public.p SET title = 'x'", [], False, False),
    ],
)
async def test_partitions_that_come_go_and_are_rewritten_ask_for_as_much_as_they_changed(
    source: Connection, edit: str, arrived: list[str], left: bool, compared: bool
) -> None:
    found = await done(source, edit, P)

    assert ([one.name.name for one in found.arrived], found.left, bool(found.compare)) == (arrived, left, compared)
    assert found.reread is None


@pytest.mark.parametrize(
    ("edit", "arrived", "left"),
    [
        ("UPDATE public.p SET title = 'x'", ["p3"], False),
        ("DROP TABLE public.p3", [], True),
        ("TRUNCATE public.p3", ["p3"], True),
    ],
)
async def test_a_partition_that_only_the_stream_has_told_of_is_read_if_it_is_there_and_left_if_it_may_have_lost_rows(
    source: Connection, edit: str, arrived: list[str], left: bool
) -> None:
    await lay_out(source)
    before, _ = await taken(source, P)
    await source.execute("CREATE TABLE public.p3 PARTITION OF public.p DEFAULT")
    _, catalog = await taken(source, P)
    oid = next(leaf.oid for leaf in catalog.tables[P].leaves if leaf.name.name == "p3")
    before.made_of.tables[str(P)].leaves[str(oid)] = (0, "")
    await source.execute(edit)
    now, catalog = await taken(source, P)

    found = difference(before, now, catalog.tables[P])

    assert ([one.name.name for one in found.arrived], found.left, found.compare) == (arrived, left, None)


async def test_an_index_that_an_earlier_version_made_is_compared_once(source: Connection) -> None:
    await lay_out(source)
    now, catalog = await taken(source)

    assert difference(None, now, catalog.tables[T]).compare
    assert not difference(now, now, catalog.tables[T])
