"""Apply: what is in the index after a batch, and what was not written."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

import anyio
import msgspec
import psycopg
import pytest

from cdcsync.documents.templates import hash_text
from cdcsync.model.changeset import BACKFILL, LIVE, Document, Kept
from cdcsync.model.rows import Row
from cdcsync.postgres.queries import BY_INDEX
from cdcsync.postgres.sessions import Connection
from cdcsync.target import stage
from cdcsync.target.apply import IndexWriter
from tests.support.indexes import (
    LiveIndex,
    OpenIndex,
    Waits,
    changes,
    document,
    kept,
    make_spec,
    until_blocked,
    vector_text,
)

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(params=["few rows", "many rows"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have each test see both ways in which a batch is written: what is few is none, for the second."""
    if request.param == "many rows":
        monkeypatch.setattr(stage, "FEW_ROWS", 0)


async def versions(index: LiveIndex) -> dict[str, str]:
    """Return which transaction wrote each document's first chunk last."""
    return dict(await index.rows("SELECT id::text, xmin::text FROM {chunks} WHERE chunk_no = 0"))


# -- documents -------------------------------------------------------------------------------------------------------


async def test_a_document_is_stored_chunk_by_chunk_and_waits_for_its_vectors(index: LiveIndex) -> None:
    applied = await index.apply(changes(document("7", "one", "two", carried=("3",), lsn=0x1_0000_00FF)))

    assert (applied.chunks, applied.deleted, applied.reused, applied.inline, applied.queued) == (2, 0, 0, 0, 2)
    assert await index.rows(
        "SELECT id, tenant, chunk_no, content, content_hash, document_hash, commit_lsn::text FROM {chunks} ORDER BY 3"
    ) == [
        (7, 3, 0, "one", hash_text("one"), hash_text("one\ntwo"), "1/FF"),
        (7, 3, 1, "two", hash_text("two"), hash_text("one\ntwo"), "1/FF"),
    ]
    assert await index.waiting() == [Waits("one", LIVE, 0), Waits("two", LIVE, 0)]
    assert await index.faults() == []


async def test_a_shorter_document_loses_its_last_chunks_with_vectors_and_backlog(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b", "c"), inline=["a", "b"]))

    applied = await index.apply(changes(document("1", "a", existed=True)))

    assert applied.deleted == 2
    assert await index.texts() == {("1",): ["a"]}
    assert await index.embedded() == {"a": [vector_text("a")]}
    assert await index.waiting() == []
    assert await index.faults() == []


async def test_a_longer_document_gets_more_chunks_and_keeps_the_ones_it_had(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    before = await index.rows("SELECT chunk_id FROM {chunks}")

    await index.apply(changes(document("1", "a", "b", existed=True)))

    assert await index.texts() == {("1",): ["a", "b"]}
    assert await index.rows("SELECT chunk_id FROM {chunks} WHERE chunk_no = 0") == before
    assert await index.faults() == []


async def test_a_chunk_that_somebody_deleted_comes_back_with_its_document(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b"), document("2", "c")))
    await index.rows("DELETE FROM {chunks} WHERE id = 1 AND chunk_no = 1 RETURNING chunk_id")

    await index.apply(
        changes(document("1", "x", "y", existed=True), document("2", "z", existed=True), document("3", "w"))
    )

    assert await index.texts() == {("1",): ["x", "y"], ("2",): ["z"], ("3",): ["w"]}
    assert {"x", "y", "z", "w"} <= {one.text for one in await index.waiting()}


async def test_a_document_without_text_has_no_chunks(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b"), document("2")))
    assert await index.texts() == {("1",): ["a", "b"]}

    await index.apply(changes(document("1", existed=True)))

    assert await index.texts() == {}
    assert await index.faults() == []


async def test_a_deleted_document_goes_whole_and_an_unknown_key_is_no_matter(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b"), document("2", "a"), inline=["a"]))

    applied = await index.apply(changes(deleted=["1", "99"]))

    assert applied.deleted == 2
    assert await index.texts() == {("2",): ["a"]}
    assert await index.embedded() == {"a": [vector_text("a")]}
    assert await index.faults() == []


async def test_an_empty_change_set_changes_nothing(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    before = await index.dump()
    applied = await index.apply(changes())
    assert (applied.chunks, applied.deleted, applied.queued) == (0, 0, 0)
    assert await index.dump() == before


async def test_what_is_rolled_back_leaves_no_trace_in_the_next_apply(index: LiveIndex) -> None:
    async with index.connection.transaction(force_rollback=True):
        await index.writer.apply(changes(document("1", "lost")))
    await index.apply(changes(document("2", "found")))
    assert await index.texts() == {("2",): ["found"]}
    assert await index.waiting() == [Waits("found", LIVE, 0)]


async def test_more_rows_than_a_copy_block_holds_all_arrive(index: LiveIndex) -> None:
    text = "é" * 10_000
    await index.apply(changes(*[document(str(number), text, f"{number}") for number in range(100)]))
    assert await index.rows("SELECT count(*), min(content), count(DISTINCT id) FROM {chunks} WHERE chunk_no = 0") == [
        (100, text, 100)
    ]


async def test_the_same_batch_again_changes_nothing(index: LiveIndex) -> None:
    await index.apply(
        changes(document("1", "a", "b", "c"), document("2", "b"), document("3", "gone"), inline=["a", "gone"])
    )
    batch = changes(
        document("1", "a", "x", existed=True),
        document("4", "gone", "y"),
        document("5"),
        kept("2", "9"),
        deleted=["3"],
        inline=["y"],
    )
    await index.apply(batch)
    before = await index.dump()

    await index.apply(batch)

    assert await index.dump() == before
    assert await index.faults() == []


# -- carried columns -------------------------------------------------------------------------------------------------


async def test_only_rows_whose_carried_values_differ_are_written(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), document("3", "c", "d")))
    before = await versions(index)

    await index.apply(changes(kept("1", "1"), kept("2", "2"), kept("3", None)))

    after = await versions(index)
    assert await index.carried() == {("1",): ("1",), ("2",): ("2",), ("3",): (None,)}
    assert after["1"] == before["1"]
    assert after["2"] != before["2"]
    assert await index.rows("SELECT id, chunk_no, tenant, commit_lsn::text FROM {chunks} ORDER BY 1, 2") == [
        (1, 0, 1, "0/10"),
        (2, 0, 2, "0/10"),
        (3, 0, None, "0/10"),
        (3, 1, None, "0/10"),
    ]


async def test_a_change_of_carried_columns_touches_neither_vectors_nor_backlog(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a"]))
    before = (
        await index.rows("SELECT *, xmin::text FROM {vectors}"),
        await index.rows("SELECT *, xmin::text FROM {backlog}"),
    )

    await index.apply(changes(kept("1", "5"), kept("2", "5")))

    assert before == (
        await index.rows("SELECT *, xmin::text FROM {vectors}"),
        await index.rows("SELECT *, xmin::text FROM {backlog}"),
    )


@pytest.mark.parametrize(
    ("change", "inline"),
    [
        (kept("1", "5"), []),
        (document("1", "x", "b", lsn=0x200, existed=True), ["x"]),
        (document("1", "x", "a", "b", "c", lsn=0x200, existed=True), ["x", "a", "c"]),
        (document("1", "b", lsn=0x200, existed=True), []),
        (document("1", "b", "b", lsn=0x200, existed=True), []),
        (document("1", "b", lsn=0x200, existed=False), []),
    ],
    ids=["carried", "another chunk", "further back", "further ahead", "twice", "thought new"],
)
async def test_a_text_that_waits_keeps_the_position_and_the_time_since_which_its_document_has_it(
    index: LiveIndex, change: Document | Kept, inline: list[str]
) -> None:
    await index.apply(changes(document("1", "a", "b")))
    await a_change_leaves_it_to_b(index, change, inline)


@pytest.mark.parametrize("existed", [True, False], ids=["known", "thought new"])
@pytest.mark.parametrize("texts", [("b",), ("x", "b"), ("b", "x")], ids=["written anew", "further back", "longer"])
async def test_the_only_text_of_a_document_keeps_them_too(
    index: LiveIndex, texts: tuple[str, ...], existed: bool
) -> None:
    await index.apply(changes(document("1", "b")))
    await a_change_leaves_it_to_b(index, document("1", *texts, lsn=0x200, existed=existed), [])


async def test_the_text_of_a_row_whose_key_is_written_in_another_way_keeps_them_too(open_index: OpenIndex) -> None:
    index = await open_index(key={"id": "numeric"})
    await index.apply(changes(document("1.0", "b")))
    await a_change_leaves_it_to_b(index, document("1.00", "b", lsn=0x200), [], deleted=["1.0"])


async def a_change_leaves_it_to_b(
    index: LiveIndex, change: Document | Kept, inline: list[str], deleted: Sequence[str] = ()
) -> None:
    await index.rows("UPDATE {chunks} SET applied_at = '2020-01-01' RETURNING 1")

    await index.apply(changes(change, deleted=deleted, inline=inline))

    waiting = "SELECT DISTINCT commit_lsn::text, applied_at < now() FROM {chunks} JOIN {backlog} USING (chunk_id)"
    assert await index.rows(waiting + " WHERE content = 'b'") == [("0/10", True)]


async def test_a_document_kept_that_the_index_does_not_hold_is_no_matter(index: LiveIndex) -> None:
    await index.apply(changes(kept("1", "5")))
    assert await index.texts() == {}


async def test_an_index_without_carried_columns_keeps_its_rows_as_they_are(open_index: OpenIndex) -> None:
    index = await open_index(carried={})
    await index.apply(changes(document("1", "a", carried=())))
    before = await versions(index)
    await index.apply(changes(kept("1")))
    assert await versions(index) == before


async def test_changes_of_carried_columns_stay_hot_where_there_is_room(open_index: OpenIndex) -> None:
    """With keyword search and an index on another column, as users have them."""
    index = await open_index(carried={"tenant": "integer", "author": "text"}, indexed=("author",))
    await index.apply(
        changes(*[document(str(number), f"word {number}", carried=("1", "me")) for number in range(1_000)])
    )

    await index.apply(changes(*[kept(str(number), "2", "me") for number in range(0, 1_000, 20)]))

    await index.connection.execute("SELECT pg_stat_force_next_flush()")
    assert await index.rows(
        "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'articles_chunks'"
    ) == [(50, 50)]


ZOO: dict[str, tuple[str, str, str | None]] = {
    # type: a value, another one, and an image of the first that its `=` takes for equal
    "bigint": ("-9223372036854775808", "0", None),
    "boolean": ("t", "f", None),
    "character(5)": ("ab   ", "abc  ", None),
    "character varying(10)": ("", " ", None),
    "text": ("tab\t, newline\n, \\, \\N, \\., \r and 'quote'", "\\N", None),
    "numeric(12,4)": ("1.5000", "1.5001", None),
    "numeric": ("1.5", "2", "1.50"),
    "double precision": ("0.1", "NaN", None),
    "real": ("0", "3.4028235e+38", "-0"),
    "money": ("$1,234.50", "-$1.00", None),
    "bytea": ("\\xdeadbeef00", "\\x", None),
    "date": ("2024-02-29", "infinity", None),
    "timestamp(3) without time zone": ("2024-02-29 12:00:00.123", "0044-03-15 00:00:00 BC", None),
    "timestamp with time zone": ("2024-02-29 12:00:00+00", "-infinity", None),
    "time with time zone": ("12:00:00+02", "12:00:00-02", None),
    "interval": ("1 mon", "-00:00:01", "30 days"),
    "uuid": ("a0eebc99-9c0b-4ef8-bb6d-6bb9bd380a11", "00000000-0000-0000-0000-000000000000", None),
    "json": ('{"a": 1, "a": 2,\n "b": "\\u00e9"}', "null", None),
    "jsonb": ('{"a": [1, 2.50], "b": null}', "[]", None),
    "jsonpath": ('$."a"', '$."b"', None),
    "point": ("(1,2)", "(1,2.5)", None),
    "polygon": ("((0,0),(1,1),(2,0))", "((0,0),(1,1),(2,1))", None),
    "inet": ("10.0.0.1/8", "::1", None),
    "bit(3)": ("101", "000", None),
    "bit varying": ("", "1", None),
    "integer[]": ("{1,NULL,3}", "[0:1]={1,2}", None),
    "text[]": ('{"a,b","\\"c\\\\",NULL,"NULL",""}', "{}", None),
    "int4range": ("[1,5)", "empty", None),
    "int4multirange": ("{[1,2),[5,9)}", "{}", None),
    "tsvector": ("'a':1 'b':2", "", None),
    "oid": ("4294967295", "0", None),
    "pg_lsn": ("FFFFFFFF/FFFFFFFF", "0/0", None),
    "name": ("a b", "", None),
    'cdcsync."Mood"': ("it's fine", "sad", None),
    "cdcsync.pair": ('(1,"two, three")', "(,)", None),
    "cdcsync.email": ("a@b.c", "d@e.f", None),
    "public.citext": ("Ab", "cd", "aB"),
    "public.hstore": ('"a"=>"1", "b"=>NULL', "", None),
    "public.vector(3)": ("[1,2,3]", "[1,2,4]", None),
    "xml": ("<a>\n  <b/></a>", "text", None),
}


def prepare_zoo(target: Database) -> dict[str, tuple[str, str, str | None]]:
    """Create the zoo's own types and return those kinds that this server has."""
    with target.connect() as connection:
        connection.execute("CREATE SCHEMA cdcsync")
        connection.execute("CREATE TYPE cdcsync.\"Mood\" AS ENUM ('it''s fine', 'sad')")
        connection.execute("CREATE TYPE cdcsync.pair AS (first int, second text)")
        connection.execute("CREATE DOMAIN cdcsync.email AS text CHECK (VALUE LIKE '%@%')")
        available = {row[0] for row in connection.execute("SELECT name FROM pg_available_extensions").fetchall()}
        zoo = dict(ZOO)
        for extension in ("citext", "hstore"):
            if extension in available:
                connection.execute(f"CREATE EXTENSION IF NOT EXISTS {extension}")
            else:
                del zoo[f"public.{extension}"]
        try:
            connection.execute("SELECT '<a/>'::xml")
        except psycopg.errors.FeatureNotSupported:
            del zoo["xml"]
    return zoo


async def test_values_of_every_type_arrive_as_the_source_rendered_them(target: Database, open_index: OpenIndex) -> None:
    zoo = prepare_zoo(target)
    index = await open_index(carried={f"c{at}": type_ for at, type_ in enumerate(zoo)})
    first: Row = tuple(value for value, _, _ in zoo.values())
    second: Row = tuple(value for _, value, _ in zoo.values())
    nothing: Row = (None,) * len(zoo)

    await index.apply(changes(document("1", "a", carried=first), document("2", "b", carried=nothing)))
    # json and jsonb render as text in their own way; all others' casts to text are their output functions.
    rendered = await index.rows(
        "SELECT " + ", ".join(f"pg_catalog.concat(c{at})" for at in range(len(zoo))) + " FROM {chunks} ORDER BY id"
    )
    assert dict(zip(zoo, rendered[0], strict=True)) == dict(zip(zoo, first, strict=True))
    assert (await index.carried())[("2",)] == nothing

    before = await versions(index)
    await index.apply(changes(kept("1", *first), kept("2", *nothing)))
    assert await versions(index) == before

    for at, type_ in enumerate(zoo):
        changed = (*first[:at], second[at], *first[at + 1 :])
        await index.apply(changes(kept("1", *changed)))
        found = await index.rows(f"SELECT pg_catalog.concat(c{at}) FROM {{chunks}} WHERE id = 1")
        assert (type_, found) == (type_, [(second[at],)])
        await index.apply(changes(kept("1", *first)))


async def test_equal_values_of_another_image_are_written(target: Database, open_index: OpenIndex) -> None:
    zoo = {type_: images for type_, images in prepare_zoo(target).items() if images[2] is not None}
    index = await open_index(carried={f"c{at}": type_ for at, type_ in enumerate(zoo)})
    images: Row = tuple(image for _, _, image in zoo.values())

    await index.apply(changes(document("1", "a", carried=tuple(value for value, _, _ in zoo.values()))))
    await index.apply(changes(kept("1", *images)))

    assert len(zoo) >= 3
    assert (await index.carried())[("1",)] == images


# -- text ------------------------------------------------------------------------------------------------------------

AWKWARD = (
    "",
    " ",
    "\\N",
    "\\.",
    "\\",
    "a\\nb",
    "tab\there",
    "line\nbreak",
    "carriage\r\nreturn",
    "\x01\x08\x0b\x0c\x1b\x7f",
    "quote ' and \" and %s and {braces}",
    "日本語 🦜 e\u0301 \ufeff \u2028 \U0010ffff",
)


async def test_text_of_any_kind_arrives_as_it_is_in_key_column_and_chunk(open_index: OpenIndex) -> None:
    index = await open_index(key={"id": "text"}, carried={"note": "text"})

    await index.apply(changes(*[document(text, text, carried=(text,)) for text in AWKWARD]))

    assert await index.rows("SELECT id, note, content FROM {chunks} ORDER BY chunk_id") == [
        (text, text, text) for text in AWKWARD
    ]
    assert await index.writer.stored_hashes([(text,) for text in AWKWARD]) == {
        (text,): hash_text(text) for text in AWKWARD
    }
    await index.apply(changes(deleted=list(AWKWARD)))
    assert await index.texts() == {}


async def test_columns_may_have_any_names(open_index: OpenIndex) -> None:
    """Also those that the stage uses for itself."""
    key = {"k1": "bigint", "key %": "text", 'a "b" {c}': "text"}
    index = await open_index(key=key, carried={"k0": "text", "c1": "integer", "lane": "text", "100 %s": "text"})
    carried = ("zero", "1", "two", "three")

    await index.apply(changes(document(("1", "x", "y"), "a", carried=carried)))
    await index.apply(changes(kept(("1", "x", "y"), *carried[:3], "four")))

    assert await index.writer.stored_hashes([("1", "x", "y")]) == {("1", "x", "y"): hash_text("a")}
    assert await index.carried() == {("1", "x", "y"): ("zero", "1", "two", "four")}
    await index.apply(changes(deleted=[("1", "x", "y")]))
    assert await index.texts() == {}


# -- keys ------------------------------------------------------------------------------------------------------------


async def test_a_small_batch_after_large_ones_reads_no_table_as_a_whole(index: LiveIndex) -> None:
    for first in range(0, 3_600, 900):
        await index.apply(changes(*[document(str(key), f"text {key}") for key in range(first, first + 900)]))
    while await index.embed(1_000):
        pass
    await index.connection.execute("ANALYZE")
    scanned = (
        "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname IN"
        " ('articles_chunks', 'articles_vectors_1_fresh') ORDER BY 1"
    )
    # Its temporary tables are emptied once more than a thousand rows went through them.
    await index.apply(changes(*[document(str(key), f"new {key}", existed=True) for key in range(900)]))
    await index.connection.execute("SELECT pg_stat_force_next_flush()")
    before = await index.rows(scanned)
    await index.apply(changes(document("1", "b", existed=True), kept("2", "5"), deleted=["3"], inline=["b"]))
    await index.apply(changes(document("1", "c", existed=True)))
    await index.connection.execute("SELECT pg_stat_force_next_flush()")
    assert await index.rows(scanned) == before


async def test_no_plan_of_an_empty_index_is_kept_while_the_index_grows(index: LiveIndex) -> None:
    every_statement = [
        changes(document("1", "a"), document("2", "a", "b"), inline=["a"]),
        changes(document("1", "b", existed=True), document("2", "c", existed=True), kept("3", "5"), deleted=["4"]),
    ]
    await index.connection.execute("VACUUM ANALYZE")
    # With the planner free to read a small table as a whole.
    await index.connection.execute(BY_INDEX.replace("off", "on"))
    for one in (*every_statement, *every_statement):
        await index.apply(one)
    texts = {str(key): f"text {key}" for key in range(10, 20_010)}
    loaded = changes(*[document(key, text) for key, text in texts.items()], inline=list(texts.values()))
    await index.apply(msgspec.structs.replace(loaded, new=True))
    await index.connection.execute("SELECT pg_stat_force_next_flush()")
    read = (
        "SELECT (SELECT sum(idx_tup_read) FROM pg_stat_user_indexes) + (SELECT sum(seq_tup_read) FROM"
        " pg_stat_user_tables WHERE schemaname = 'cdcsync')"
    )
    before = await index.rows(read)
    for one in every_statement:
        await index.apply(one)
    await index.connection.execute("SELECT pg_stat_force_next_flush()")
    assert (await index.rows(read))[0][0] - before[0][0] < 200


@pytest.mark.parametrize("truncated", [False, True])
async def test_the_hashes_after_an_apply_are_known_before_it(index: LiveIndex, truncated: bool) -> None:
    keys = [(str(key),) for key in range(1, 8)]
    await index.apply(changes(*(document(str(key), "a") for key in range(1, 6))))
    before = await index.writer.stored_hashes(keys)
    batch = changes(
        document("1", "b", existed=True),
        document("2", existed=True),
        document("6", "c", "d"),
        *([] if truncated else [kept("5", "7")]),
        deleted=[] if truncated else ["3", "7"],
        absent=[] if truncated else ["4"],
        truncated=truncated,
    )
    after = batch.hashes_after(before)
    await index.apply(batch)
    assert after == await index.writer.stored_hashes(keys)


# -- vectors ---------------------------------------------------------------------------------------------------------


async def test_a_moved_key_takes_its_vector_along(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a", "b"), inline=["a", "b"]))

    applied = await index.apply(changes(document("2", "a", "b"), deleted=["1"]))

    assert (applied.reused, applied.queued) == (2, 0)
    assert await index.texts() == {("2",): ["a", "b"]}
    assert await index.embedded() == {"a": [vector_text("a")], "b": [vector_text("b")]}
    assert await index.waiting() == []
    assert await index.faults() == []


async def test_a_moved_key_without_a_vector_goes_on_waiting_for_it(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a")))
    applied = await index.apply(changes(document("2", "a"), deleted=["1"]))
    assert (applied.reused, applied.queued) == (0, 1)
    assert await index.waiting() == [Waits("a", LIVE, 0)]
    assert await index.faults() == []


async def test_two_documents_may_swap_their_keys(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a", "b"]))
    applied = await index.apply(changes(document("1", "b", existed=True), document("2", "a", existed=True)))
    assert await index.texts() == {("1",): ["b"], ("2",): ["a"]}
    assert applied.queued == 0
    assert await index.embedded() == {"a": [vector_text("a")], "b": [vector_text("b")]}
    assert await index.faults() == []


async def test_a_text_that_is_there_already_costs_no_embedding(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    assert await index.writer.known_vectors([hash_text("a"), hash_text("b")]) == {hash_text("a")}

    applied = await index.apply(changes(document("2", "b", "a"), document("3", "a")))

    assert (applied.reused, applied.queued) == (2, 1)
    assert await index.embedded() == {"a": [vector_text("a")] * 3}
    assert await index.waiting() == [Waits("b", LIVE, 0)]
    assert await index.faults() == []


async def test_the_old_vector_stays_until_the_new_one_comes(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await index.apply(changes(document("1", "b", existed=True)))

    assert await index.rows("SELECT content, stale, embedding::text FROM public.articles_index") == [
        ("b", True, vector_text("a"))
    ]
    assert await index.embed() == 1
    assert await index.rows("SELECT content, stale, embedding::text FROM public.articles_index") == [
        ("b", False, vector_text("b"))
    ]


async def test_a_text_that_comes_back_before_it_was_embedded_leaves_the_backlog(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), inline=["a"]))
    await index.apply(changes(document("1", "b", existed=True)))
    assert await index.waiting() == [Waits("b", LIVE, 0)]

    applied = await index.apply(changes(document("1", "a", existed=True)))

    assert applied.queued == 0
    assert await index.waiting() == []
    assert await index.embedded() == {"a": [vector_text("a")]}
    assert await index.faults() == []


async def test_vectors_that_come_with_the_batch_serve_every_chunk_of_their_text(index: LiveIndex) -> None:
    applied = await index.apply(
        changes(document("1", "a", "b"), document("2", "a"), document("3", "a", "a"), inline=["a", "unused"])
    )
    assert (applied.inline, applied.queued) == (4, 1)
    assert await index.embedded() == {"a": [vector_text("a")] * 4}
    assert await index.faults() == []


async def test_what_a_backfill_brings_waits_behind_what_is_live(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "old", lane=BACKFILL), document("2", "both", lane=BACKFILL)))
    await index.apply(changes(document("3", "new"), document("4", "both")))
    assert await index.waiting() == [
        Waits("new", LIVE, 0),
        Waits("both", LIVE, 0),
        Waits("old", BACKFILL, 0),
        Waits("both", BACKFILL, 0),
    ]


# -- truncation ------------------------------------------------------------------------------------------------------


async def test_a_truncated_index_holds_what_came_after(index: LiveIndex) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a"]))
    await index.apply(changes(document("1", "c"), document("3", "a"), truncated=True))
    assert await index.texts() == {("1",): ["c"], ("3",): ["a"]}
    assert await index.faults() == []


async def test_truncation_gives_way_to_readers_and_deletes_row_by_row(
    index: LiveIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a"]))
    reader = await connect_target()
    async with reader.transaction():
        await reader.execute("SELECT FROM public.articles_index")
        await index.apply(changes(document("3", "c"), truncated=True))
        assert await index.texts() == {("3",): ["c"]}
        assert await index.faults() == []
    # The transaction's own settings go with it.
    assert await index.rows("SHOW statement_timeout") == [("0",)]


async def test_one_time_limit_holds_for_all_locks_of_a_truncation(
    index: LiveIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """A reader of two of the tables may hold one that truncation waits for, and wait for one that truncation holds."""
    await index.apply(changes(document("1", "a"), document("2", "b"), inline=["a"]))
    reader, watching = await connect_target(), await connect_target()

    async def truncate() -> None:
        await index.apply(changes(truncated=True))

    async with anyio.create_task_group() as tasks, reader.transaction():
        await reader.execute("SELECT FROM cdcsync.articles_vectors_1_settled")
        tasks.start_soon(truncate)
        await until_blocked(watching, index.connection)
        cursor = await watching.execute(
            "SELECT query FROM pg_stat_activity WHERE pid = %s", [index.connection.info.backend_pid]
        )
        (waiting,) = await cursor.fetchone() or ("",)
        await reader.execute("SELECT FROM cdcsync.articles_backlog")
    assert all(f"articles_{table}" in waiting for table in ("backlog", "chunks", "vectors_1_fresh"))
    assert waiting.startswith("LOCK TABLE")
    assert await index.dump() == ([], [], [])


async def test_truncation_and_an_embed_loop_in_the_middle_of_storing_do_not_wait_in_a_circle(
    index: LiveIndex, connect_target: Callable[[], Awaitable[Connection]]
) -> None:
    """The embed loop locks backlog, then vectors; truncation has to give up before the server breaks the circle."""
    await index.apply(changes(document("1", "a"), document("2", "b")))
    embedding = await connect_target()
    watching = await connect_target()

    async def truncate() -> None:
        await index.apply(changes(truncated=True))

    async with anyio.create_task_group() as tasks, embedding.transaction():
        await embedding.execute("SELECT FROM cdcsync.articles_backlog FOR UPDATE")
        tasks.start_soon(truncate)
        await until_blocked(watching, index.connection)
        await embedding.execute(
            "INSERT INTO cdcsync.articles_vectors_1 SELECT chunk_id, content_hash, '[1,1,1]'::public.vector"
            " FROM cdcsync.articles_chunks"
        )
        await embedding.execute("DELETE FROM cdcsync.articles_backlog")
    assert await index.dump() == ([], [], [])


# -- several indexes -------------------------------------------------------------------------------------------------


async def test_two_indexes_share_a_session(index: LiveIndex, open_index: OpenIndex) -> None:
    other = await open_index(name="notes", key={"id": "text"}, carried={})
    writer = IndexWriter(index.connection, "cdcsync", make_spec(name="notes", key={"id": "text"}, carried={}))
    await writer.open()
    async with index.connection.transaction():
        await index.writer.apply(changes(document("1", "a")))
        await writer.apply(changes(document("x", "b", carried=())))
    assert await index.texts() == {("1",): ["a"]}
    assert await other.texts() == {("x",): ["b"]}
