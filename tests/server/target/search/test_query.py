"""Search: both legs and their fusion, conditions, and that the HNSW index serves it."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pytest

from cdcsync.config import Index, QualifiedName
from cdcsync.documents.chunks import Chunk
from cdcsync.documents.documents import Documents
from cdcsync.documents.templates import Template, hash_text
from cdcsync.errors import UsageError
from cdcsync.model.changeset import ChangeSet, Document
from cdcsync.model.rows import Shape
from cdcsync.model.spec import Distance, IndexSpec
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.apply import IndexWriter
from cdcsync.target.ddl.building import build_hnsw
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.search import Hit, Mode, check_condition, search

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

SCHEMA = "cdcsync"
Vector = tuple[float, float, float]
EAST, NORTH, UP = (1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)


class Doc(msgspec.Struct, frozen=True):
    """A document of one chunk; without a vector it is in the backlog."""

    id: int
    text: str
    vector: Vector | None
    tenant: int = 1


def make_spec(*, text_search: str | None = "english", tenant_type: str = "integer") -> IndexSpec:
    text = "{title}"
    return IndexSpec(
        name="articles",
        config=Index(
            table="public.articles",
            text=text,
            embedder="e",
            view="public.articles_index",
            columns=("tenant %",),
            search=text_search,
        ),
        shape=Shape("articles", QualifiedName("public", "articles"), ("id",), ("tenant %",), ("title",)),
        documents=Documents(Template.parse(text)),
        source_key_types=("bigint",),
        key_types=("bigint",),
        carried_types=(tenant_type,),
        model="three-directions",
        dimensions=3,
        distance="cosine",
        fingerprint="f",
    )


@asynccontextmanager
async def indexed(
    database: Database, docs: Sequence[Doc], spec: IndexSpec | None = None, *, hnsw: bool = False
) -> AsyncIterator[tuple[Connection, IndexSpec]]:
    """Make an index that holds the documents; the session is a new one, as a user's would be."""
    spec = spec or make_spec()
    writing = await connect(database.dsn, "target")
    try:
        await create_shared(writing, SCHEMA)
        await create_index_relations(writing, SCHEMA, spec)
        writer = IndexWriter(writing, SCHEMA, spec)
        await writer.open()
        hashes = [hash_text(doc.text) for doc in docs]
        documents = [
            Document((str(doc.id),), (str(doc.tenant),), hash_, [Chunk(0, doc.text, hash_)], 1, 0, False)
            for doc, hash_ in zip(docs, hashes, strict=True)
        ]
        vectors = {hash_text(doc.text): np.array(doc.vector, np.float32) for doc in docs if doc.vector is not None}
        async with writing.transaction():
            await writer.apply(ChangeSet(False, [], [], documents, vectors))
        if hnsw:
            await build_hnsw(writing, SCHEMA, spec)
            await writing.execute("ANALYZE")
    finally:
        await writing.close()
    connection = await connect(database.dsn, "target")
    try:
        yield connection, spec
    finally:
        await connection.close()


def ids(hits: Sequence[Hit]) -> list[int]:
    return [hit.key["id"] for hit in hits]


COMPASS = (
    Doc(1, "the sun rises in the east", EAST),
    Doc(2, "polar bears live far up north", NORTH, tenant=2),
    Doc(3, "balloons go up", UP, tenant=2),
)


def spiral(count: int) -> list[Doc]:
    """Return documents whose vectors turn from east to north, a different angle each."""
    angles = [at / count * math.pi / 2 for at in range(count)]
    return [
        Doc(at, f"document number {at}", (math.cos(angle), math.sin(angle), 0.0), tenant=at % 100)
        for at, angle in enumerate(angles)
    ]


async def test_the_nearest_vector_comes_first(database: Database) -> None:
    async with indexed(database, COMPASS) as (connection, spec):
        hits = await search(connection, SCHEMA, spec, text="", vector=(0.1, 0.9, 0.3), mode="vector")

    assert ids(hits) == [2, 3, 1]
    assert hits[0].carried == {"tenant %": 2}
    assert hits[0].content == "polar bears live far up north"
    assert hits[0].distance == pytest.approx(1 - 0.9 / math.sqrt(0.91))
    assert [hit.text_rank for hit in hits] == [None, None, None]


@pytest.mark.proof_from(3)
@pytest.mark.parametrize("vector_type", ["vector", "halfvec"])
@pytest.mark.parametrize("distance", ["cosine", "l2", "inner_product"])
async def test_every_distance_and_type_of_vector_is_served_by_its_index(
    database: Database, vector_type: Literal["vector", "halfvec"], distance: Distance
) -> None:
    plain = make_spec()
    config = msgspec.structs.replace(plain.config, vector_type=vector_type)
    chosen = msgspec.structs.replace(plain, config=config, distance=distance)
    async with indexed(database, spiral(3_000), chosen, hnsw=True) as (connection, spec):
        hits = await search(connection, SCHEMA, spec, text="", vector=NORTH, mode="vector", k=1)
        assert await scans(connection, "articles_vectors_1_hnsw") == 1
    assert ids(hits)[0] in range(2_900, 3_000)  # to halfvec the last ones are all the same


async def test_keywords_find_what_has_no_vector_yet_and_say_so(database: Database) -> None:
    docs = [*COMPASS, Doc(4, "the northern lights", None)]
    async with indexed(database, docs) as (connection, spec):
        hits = await search(connection, SCHEMA, spec, text="northern light", vector=None, mode="text")

    assert ids(hits) == [4]
    assert hits[0].stale
    assert hits[0].distance is None
    assert hits[0].text_rank is not None


async def test_what_both_legs_find_comes_before_what_one_finds(database: Database) -> None:
    docs = [
        Doc(1, "nothing in common", EAST),
        Doc(2, "zebra crossing", (0.9, 0.1, 0.0)),
        Doc(3, "zebra zebra zebra", (-1.0, 0.0, 0.0)),
        *(Doc(4 + at, f"far away {at}", (-0.5, -0.5, at / 100)) for at in range(300)),
    ]
    async with indexed(database, docs) as (connection, spec):
        by_vector = await search(connection, SCHEMA, spec, text="zebra", vector=EAST, mode="vector", k=1)
        by_text = await search(connection, SCHEMA, spec, text="zebra", vector=EAST, mode="text", k=1)
        both = await search(connection, SCHEMA, spec, text="zebra", vector=EAST, k=3)

    assert ids(by_vector) == [1]
    assert ids(by_text) == [3]
    assert ids(both) == [2, 1, 3]
    assert both[0].score == pytest.approx(1 / 62 + 1 / 62)
    assert not any(hit.stale for hit in both)


async def test_a_hybrid_search_makes_do_with_the_leg_there_is(database: Database) -> None:
    async with indexed(database, COMPASS) as (connection, spec):
        without_vector = await search(connection, SCHEMA, spec, text="sunrise OR bears", vector=None)
    assert ids(without_vector) == [2]


async def test_an_index_without_keyword_search_is_searched_by_vector_alone(database: Database) -> None:
    async with indexed(database, COMPASS, make_spec(text_search=None)) as (connection, spec):
        hits = await search(connection, SCHEMA, spec, text="balloons", vector=EAST, k=1)
        assert ids(hits) == [1]
        with pytest.raises(UsageError, match="no keyword search") as refused:
            await search(connection, SCHEMA, spec, text="balloons", vector=EAST, mode="text")
        assert "search =" in (refused.value.hint or "")
        with pytest.raises(UsageError, match="the query has no vector, and the index has no keyword search"):
            await search(connection, SCHEMA, spec, text="balloons", vector=None)


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
async def test_a_condition_limits_every_leg(database: Database, mode: Mode) -> None:
    async with indexed(database, COMPASS) as (connection, spec):
        hits = await search(
            connection,
            SCHEMA,
            spec,
            text="bears OR balloons",
            vector=NORTH,
            mode=mode,
            where='"tenant %" % 3 = 2 AND id <> 3',
        )
    assert ids(hits) == [2]


@pytest.mark.parametrize(
    "where",
    [
        "'{a,b}'::text[] @> '{a}' AND 'x{1}' LIKE '{}x{1}%' IS FALSE",
        "content <> 'a--b' AND content <> 'a;b' AND content <> '/*'",
        "true -- and no more",
        "content = 'a' /* the first */ OR false",
        """content ~ '^a$' AND 5 % 3 = 2 AND ';)' <> E'\\'('""",
        "content NOT IN ('$cdcsync_search$', '$body$', '$$', '$_cdcsync_search$')",
    ],
)
async def test_a_condition_may_hold_what_else_has_a_meaning_to_us(database: Database, where: str) -> None:
    async with indexed(database, [Doc(1, "a", EAST)]) as (connection, spec):
        await check_condition(connection, SCHEMA, spec, where)
        hits = await search(connection, SCHEMA, spec, text=None, vector=EAST, where=where)
    assert ids(hits) == [1]


@pytest.mark.parametrize("more", [{"where": "true"}, {"plans": []}], ids=["a condition", "plans"])
async def test_a_session_that_only_reads_is_told_what_it_cannot_make_for_itself(
    database: Database, more: dict[str, Any]
) -> None:
    async with indexed(database, [Doc(1, "a", EAST)]) as (connection, spec):
        await connection.execute("SET default_transaction_read_only = on")
        with pytest.raises(UsageError, match="makes a function for its session"):
            await search(connection, SCHEMA, spec, text=None, vector=EAST, **more)
        assert ids(await search(connection, SCHEMA, spec, text=None, vector=EAST, filter={"id": 1})) == [1]


async def test_a_condition_cannot_end_the_function_that_holds_it(database: Database) -> None:
    """Whatever it is quoted in, there the condition may hold what ends that, and statements behind it."""
    database.execute("CREATE TABLE kept (a int)")
    tag = "$cdcsync_search$"
    where = f"'{tag} SET check_function_bodies = off; DROP TABLE public.kept; SELECT {tag}' <> ''"
    async with indexed(database, [Doc(1, "a", EAST)]) as (connection, spec):
        hits = await search(connection, SCHEMA, spec, text=None, vector=EAST, where=where)
    assert ids(hits) == [1]
    assert database.execute("SELECT count(*) FROM kept") == [(0,)]


async def test_a_condition_finds_the_operators_of_extensions(database: Database) -> None:
    """An empty search path would take citext's `=` for that of text, and find nothing."""
    database.execute("CREATE EXTENSION citext")
    spec = msgspec.structs.replace(make_spec(tenant_type="public.citext"))
    async with indexed(database, [Doc(1, "a", EAST)], spec) as (connection, spec):
        await connection.execute("UPDATE cdcsync.articles_chunks SET \"tenant %\" = 'ACME'")
        hits = await search(connection, SCHEMA, spec, text=None, vector=EAST, where="\"tenant %\" = 'acme'")
        path = await (await connection.execute("SHOW search_path")).fetchone()
    assert ids(hits) == [1]
    assert path == ('""',)


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ("tenant =", "syntax error"),
        ("nosuch = 1", "nosuch"),
        ("id = 'x'", "invalid input syntax"),
        ("true; DROP TABLE x", "syntax error"),
        ("true); DROP TABLE x; SELECT (true", "multiple commands"),
        ("id = 1) OR (true", "syntax error"),
        ("id = 1 THEN false WHEN true", "syntax error"),
        ("true /* ", "unterminated"),
        ("id = $1", "no parameters"),
        ("id, true", "must be type boolean"),
        ("count(*) > 1", "aggregate"),
        ("", "empty"),
        ("nextval('public.counter') > 0", "read-only"),
    ],
)
async def test_a_wrong_condition_is_a_usage_error_that_names_it(database: Database, where: str, problem: str) -> None:
    database.execute("CREATE SEQUENCE counter")
    async with indexed(database, COMPASS) as (connection, spec):
        with pytest.raises(UsageError, match=problem) as refused:
            await search(connection, SCHEMA, spec, text="up", vector=NORTH, where=where)
        assert refused.value.where is not None
        assert refused.value.where.startswith("--where")
        assert refused.value.hint
        # The session goes on to be of use.
        assert await search(connection, SCHEMA, spec, text="up", vector=NORTH, k=1)
    assert database.execute("SELECT is_called FROM counter") == [(False,)]


async def test_the_columns_that_a_wrong_condition_lists_are_what_sql_takes(database: Database) -> None:
    async with indexed(database, COMPASS) as (connection, spec):
        with pytest.raises(UsageError) as refused:
            await search(connection, SCHEMA, spec, text="up", vector=NORTH, where="nosuch = 1")
    assert (refused.value.hint or "").endswith('the index has the columns id, "tenant %"')


@pytest.mark.parametrize("vector", [(1, 0, 0, 0), ()])
async def test_a_vector_of_another_model_is_refused_before_the_server_sees_it(
    database: Database, vector: Sequence[float]
) -> None:
    async with indexed(database, COMPASS) as (connection, spec):
        with pytest.raises(UsageError, match=f"{len(vector)} dimensions, the index has 3") as refused:
            await search(connection, SCHEMA, spec, text="up", vector=vector)
    assert "three-directions" in (refused.value.hint or "")


@pytest.mark.parametrize("k", [0, 1001])
async def test_a_number_of_hits_that_cannot_be_returned_is_refused(database: Database, k: int) -> None:
    async with indexed(database, COMPASS) as (connection, spec):
        with pytest.raises(UsageError, match=f"cannot return {k} hits"):
            await search(connection, SCHEMA, spec, text="up", vector=NORTH, k=k)


async def test_a_search_by_vector_needs_one(database: Database) -> None:
    async with indexed(database, COMPASS) as (connection, spec):
        with pytest.raises(UsageError, match="needs the query's vector"):
            await search(connection, SCHEMA, spec, text="up", vector=None, mode="vector")


async def test_dates_that_python_cannot_hold_come_as_text(database: Database) -> None:
    spec = make_spec(tenant_type="timestamp with time zone")
    async with indexed(database, [], spec) as (connection, spec):
        await connection.execute(
            "INSERT INTO cdcsync.articles_chunks"
            ' (id, "tenant %", chunk_no, content, content_hash, document_hash, commit_lsn)'
            " VALUES (1, 'infinity', 0, 'always', '', '', '0/1')"
        )
        hits = await search(connection, SCHEMA, spec, text="always", vector=None)
    assert [hit.carried for hit in hits] == [{"tenant %": "infinity"}]


async def scans(connection: Connection, index: str) -> int:
    """Return how often an index was scanned, this session's own scans included."""
    await connection.execute("SELECT pg_stat_force_next_flush()")
    cursor = await connection.execute("SELECT idx_scan FROM pg_stat_user_indexes WHERE indexrelname = %s", [index])
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])


async def test_searches_of_a_few_thousand_rows_scan_the_hnsw_index(database: Database) -> None:
    async with indexed(database, spiral(3_000), hnsw=True) as (connection, spec):
        assert await scans(connection, "articles_vectors_1_hnsw") == 0
        hits = await search(connection, SCHEMA, spec, text="", vector=EAST, mode="vector", k=3)
        assert await scans(connection, "articles_vectors_1_hnsw") == 1
        await search(connection, SCHEMA, spec, text="number", vector=EAST)
        assert await scans(connection, "articles_vectors_1_hnsw") == 2
        # The view, as users query it.
        await connection.execute(
            "SELECT id FROM public.articles_index ORDER BY embedding OPERATOR(public.<=>) '[1,0,0]' LIMIT 3"
        )
        assert await scans(connection, "articles_vectors_1_hnsw") == 3
    assert ids(hits) == [0, 1, 2]


async def test_hnsw_returns_as_many_hits_as_were_asked_for(database: Database) -> None:
    """By default it would look at 40 candidates and return no more."""
    async with indexed(database, spiral(3_000), hnsw=True) as (connection, spec):
        await connection.execute("SET enable_seqscan = off; SET enable_sort = off")
        hits = await search(connection, SCHEMA, spec, text="", vector=EAST, mode="vector", k=300)
        assert await scans(connection, "articles_vectors_1_hnsw") == 1
    assert len(hits) == 300


async def test_a_selective_condition_still_fills_the_list(database: Database) -> None:
    """Of the first hundred candidates only one passes: without an iterative scan that would be the only hit."""
    async with indexed(database, spiral(3_000), hnsw=True) as (connection, spec):
        await connection.execute("SET enable_seqscan = off; SET enable_sort = off")
        hits = await search(connection, SCHEMA, spec, text="", vector=EAST, mode="vector", k=10, where='"tenant %" = 7')
    assert ids(hits) == [7 + 100 * at for at in range(10)]


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
@pytest.mark.parametrize("k", [10, 50])
async def test_pages_of_one_size_continue_each_other_to_the_last_hit(database: Database, mode: Mode, k: int) -> None:
    """The legs disagree about every document, so that how deep they look decides the order of the fused hits."""
    most = 650
    docs = [
        msgspec.structs.replace(doc, text="note " * (1 + at * 37 % most // 8) + f"pad{at} " * (at % 7))
        for at, doc in enumerate(spiral(most))
    ]
    async with indexed(database, docs, hnsw=True) as (connection, spec):
        walked: list[Hit] = []
        for skip in range(0, most, k):
            page = await search(connection, SCHEMA, spec, text="note", vector=EAST, mode=mode, k=k, skip=skip)
            assert len(page) == min(k, most - skip)
            walked += page
        whole = await search(connection, SCHEMA, spec, text="note", vector=EAST, mode=mode, k=200)
    assert sorted(ids(walked)) == [doc.id for doc in docs]
    assert ids(walked)[:200] == ids(whole)
    assert [hit.score for hit in walked] == sorted((hit.score for hit in walked), reverse=True)
