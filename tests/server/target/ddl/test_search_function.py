"""The search function of an index: its words, its filters, its pages, and what applications may do with it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

import msgspec
import psycopg
import pytest
from psycopg import sql

from cdcsync.errors import UsageError
from cdcsync.model.spec import Distance
from cdcsync.postgres.sessions import connect
from cdcsync.target.ddl import search_function
from cdcsync.target.ddl.building import build_hnsw, build_search
from cdcsync.target.search import Mode, Plan, count_words, search
from cdcsync.target.settling import Settling
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, live_index, make_spec, register
from tests.support.searching import SHELF, filled, find
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
async def articles(target: Database) -> AsyncIterator[LiveIndex]:
    async with live_index(target, make_spec()) as index:
        yield index


# -- words ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("what does E-716 mean?", ["1", "3"]),  # words are alternatives, the rare one first
        ("password", ["4", "2", "5"]),
        ('"password policy"', ["4"]),  # a phrase is a condition
        ('"policy password"', []),
        ('printer "reset a forgotten"', ["2"]),
        ("password -policy", ["2"]),  # so is a word after a dash
        ('password -"password policy"', ["2", "5"]),
        ("-policy", []),  # which finds nothing by itself
        ("the of and", []),  # nor do stop words
        ("", []),
        (" \n", []),
        ("hums OR policy", ["3", "4", "5"]),
        ("it's a printer's", ["3", "2", "1"]),
        ("\\ ' : & | ! ( ) <-> printer:*", ["3", "2", "1"]),
    ],
)
async def test_words_are_alternatives_and_phrases_and_dashes_are_conditions(
    articles: LiveIndex, query: str, found: list[str]
) -> None:
    await filled(articles, SHELF)
    assert await find(articles.connection, query, mode="text") == found


async def test_an_excluded_word_is_in_nothing_that_is_found_by_vector_either(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    await articles.embed()
    found = await find(articles.connection, "printer -password", embedding="[1,1,1]")
    assert sorted(found) == ["1", "3"]
    assert len(await find(articles.connection, "-password", embedding="[1,1,1]")) == 2


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
async def test_a_blank_query_finds_nothing_and_needs_no_embedding(articles: LiveIndex, mode: str) -> None:
    await filled(articles, SHELF)
    assert await find(articles.connection, " \n", mode=mode) == []


async def test_blanks_around_a_query_are_no_words_of_it(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    query = "password " * (search_function.SYNTAX_WORDS - 1) + "-policy"
    assert await find(articles.connection, f" {query}\n", mode="text") == ["2"]
    assert await find(articles.connection, f"hums {query}", mode="text") != ["2"]


async def test_a_long_text_is_no_query_and_quotes_in_it_are_punctuation(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    pasted = 'He said "no such phrase" and then -policy ' + " ".join(f"word{n}" for n in range(5_000)) + " hums"
    assert await find(articles.connection, pasted, mode="text") == [
        "3",
        "4",
        "5",
    ]  # hums; policy, which is not excluded


@pytest.mark.parametrize("separators", [(", ", ": "), (",", ":")], ids=["with blanks", "minified"])
@pytest.mark.parametrize("rows", [8, 2_000])
async def test_json_is_a_long_text_with_blanks_and_without(
    articles: LiveIndex, separators: tuple[str, str], rows: int
) -> None:
    await filled(articles, SHELF)
    pasted = [{"printer": "hums", "no such phrase": "-policy", "quantity": n} for n in range(rows)]
    query = json.dumps(pasted, separators=separators)
    found = await find(articles.connection, query, mode="text")
    assert sorted(found) == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("run", ["a_", "~/"])
async def test_a_long_run_without_blanks_is_read_in_parts(articles: LiveIndex, run: str) -> None:
    await filled(articles, SHELF)
    text = run * 40_000 + " hums"
    hits = await search(articles.connection, SCHEMA, articles.spec, text=text, vector=None)  # has its own deadline
    assert [hit.key["id"] for hit in hits] == [3]


@pytest.mark.parametrize("word", ["0123456789abcdef" * 30, "https://host/" + "0aA-b_c9/" * 40])
async def test_a_token_or_an_address_of_hundreds_of_characters_is_one_word(articles: LiveIndex, word: str) -> None:
    await filled(articles, ["another token", f"the token {word}", "https://host/0aA-b_c9/"])
    for query in (word, f'"{word}"', f'token "{word}"'):
        assert (await find(articles.connection, query, mode="text"))[0] == "2"
    assert "2" not in await find(articles.connection, f"token -{word}", mode="text")


async def test_words_that_are_in_no_chunk_do_not_take_the_places_of_those_that_are(articles: LiveIndex) -> None:
    await filled(articles, [*SHELF, *["the printer prints"] * 20])
    pasted = " ".join(f"aa{n}" for n in range(200)) + " printer"
    assert len(await find(articles.connection, pasted, mode="text", k=50)) == 23


async def test_a_word_of_a_single_chunk_is_found_beside_many_that_are_in_none(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    asked = " ".join(f"aa{n}" for n in range(20)) + " hums"
    assert await find(articles.connection, asked, mode="text") == ["3"]


async def test_a_word_that_is_newer_than_the_counts_is_found(articles: LiveIndex) -> None:
    await filled(articles, ["the printer prints"] * 20)
    await articles.apply(changes(document("99", "the printer says E-716", carried=("1",))))
    assert (await find(articles.connection, "printer aa bb cc E-716", mode="text"))[0] == "99"


# -- words that are in many chunks, few of which a condition leaves -------------------------------------------------


@pytest.fixture
async def divided(target: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[LiveIndex]:
    """The rarest word is in more chunks than are looked at word by word, all of tenant 1: `alpha`.

    Tenant 2 has documents 501 to 700, each in three chunks with `beta`.
    """
    monkeypatch.setattr(search_function, "BUDGET", 200)
    monkeypatch.setattr(search_function, "VISITS", 300)
    monkeypatch.setattr(search_function, "SAMPLED", 1_500)
    async with live_index(target, make_spec()) as index:
        for ids, tenant, chunk_no, content, numbers in (
            ("n", 1, "0", "'alpha one two three four five six seven eight page '", "1, 500"),
            ("501 + n / 3", 2, "n % 3", "'beta text '", "0, 599"),
            ("1000 + n", 3, "0", "'other things '", "1, 400"),
        ):
            await index.connection.execute(
                "INSERT INTO cdcsync.articles_chunks"
                " (id, tenant, chunk_no, content, content_hash, document_hash, commit_lsn)"
                f" SELECT {ids}, {tenant}, {chunk_no}, {content} || n, '', '', '0/1'"
                f" FROM generate_series({numbers}) AS n".encode()
            )
        await count_words(index.connection, SCHEMA, index.spec)
        await index.connection.execute("ANALYZE cdcsync.articles_chunks")
        yield index
        await index.connection.execute("RESET ROLE")


OF_TENANT_2 = {str(id_) for id_ in range(501, 701)}


@pytest.mark.parametrize(
    ("query", "wanted", "before", "found"),
    [
        ("alpha beta", {"tenant": 2}, "", OF_TENANT_2),
        (
            "alpha beta",
            {"tenant": 2},
            "UPDATE cdcsync.articles_chunks SET tenant = 2 WHERE id = 7",
            OF_TENANT_2 | {"7"},
        ),
        ("alpha beta", {"id": {"gt": 500}}, "", OF_TENANT_2),
        ('alpha "beta text"', {}, "", OF_TENANT_2),
        ("alpha beta -page", {}, "", OF_TENANT_2),
        ('alpha beta -"alpha one"', {}, "", OF_TENANT_2),
        (
            "alpha beta",
            {},
            "CREATE POLICY own ON cdcsync.articles_chunks USING (tenant = 2);"
            " ALTER TABLE cdcsync.articles_chunks ENABLE ROW LEVEL SECURITY; SET ROLE pg_read_all_data",
            OF_TENANT_2,
        ),
    ],
    ids=["filter", "one row", "key", "phrase", "exclusion", "excluded phrase", "policy"],
)
async def test_every_chunk_with_any_of_the_words_is_found_though_a_condition_leaves_none_of_the_rarest(
    divided: LiveIndex, query: str, wanted: dict[str, Any], before: str, found: set[str]
) -> None:
    if before:
        await divided.connection.execute(before.encode())
    ask = partial(find, divided.connection, query, mode="text", filter=wanted, headline=None)
    assert len(set(await ask())) == 10
    pages = [id_ for skip in range(0, 300, 100) for id_ in await ask(k=100, skip=skip)]
    assert sorted(pages) == sorted(found)
    assert set(await ask(k=1_000)) == found


async def test_a_long_query_is_searched_in_few_statements_where_a_condition_leaves_nothing(divided: LiveIndex) -> None:
    plans: list[Plan] = []
    hits = await search(
        divided.connection,
        SCHEMA,
        divided.spec,
        text="alpha one two three four five six seven eight beta",
        vector=None,
        filter={"tenant": 2},
        plans=plans,
    )
    assert len(hits) == 10
    assert [one.leg for one in plans] == ["keyword leg"] * 3


# -- filters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"mode": "both"},
        {"k": 0},
        {"skip": -1},
        {"k": 900, "skip": 200},
        {"skip": 2**31 - 1},
        {"k": None},
        {"skip": None},
        {"vector_weight": -1.0},
        {"mode": "vector"},
    ],
)
async def test_an_argument_that_cannot_be_used_is_refused(articles: LiveIndex, arguments: dict[str, Any]) -> None:
    with pytest.raises(psycopg.errors.InvalidParameterValue) as refused:
        await find(articles.connection, "page", **arguments)
    assert refused.value.diag.message_hint


# -- hits -----------------------------------------------------------------------------------------------------------


async def test_a_hit_has_its_columns_places_score_and_headline(shelf: LiveIndex) -> None:
    cursor = await shelf.connection.execute(
        "SELECT * FROM cdcsync.articles_search('page', '[1,2,3]', 1, text_weight => 2) AS hit"
    )
    assert cursor.description is not None
    names = [column.name for column in cursor.description]
    carried = ["tenant", "state", "made", "carried_score", "code", "open", "extra"]
    own = ["chunk_no", "content", "score", "distance", "vector_rank", "text_rank", "text_score", "headline", "stale"]
    assert names == ["id", *carried, *own]
    hit = dict(zip(names, await cursor.fetchone() or (), strict=True))
    assert (hit["vector_rank"], hit["text_rank"], hit["stale"]) == (1, 1, False)
    assert hit["score"] == pytest.approx(3 / 61)
    assert "<b>page</b>" in hit["headline"]


async def test_each_document_is_found_once_unless_chunks_are_asked_for(articles: LiveIndex) -> None:
    await filled(articles, [["the first part", "a zebra", "a zebra and a zebra"], "another zebra at the zoo"])
    await articles.embed()
    for mode in ("text", "vector", "hybrid"):
        assert sorted(await find(articles.connection, "zebra", embedding="[1,1,1]", mode=mode)) == ["1", "2"]
    chunks = await find(articles.connection, "zebra", mode="text", per_document=False)
    assert sorted(chunks) == ["1", "1", "2"]


async def test_documents_are_found_past_the_many_chunks_of_one(articles: LiveIndex) -> None:
    await filled(articles, [[f"zebra zebra {n}" for n in range(1_500)], "one zebra among many other words of a page"])
    assert await find(articles.connection, "zebra", mode="text", k=2) == ["1", "2"]


@pytest.mark.parametrize("mode", ["vector", "hybrid"])
async def test_documents_are_found_past_rows_that_a_filter_excludes_though_hnsw_gives_up_among_them(
    articles: LiveIndex, mode: str
) -> None:
    connection = articles.connection
    texts = [[f"chunk {n}" for n in range(60)], *(f"other {n}" for n in range(400)), *(f"far {n}" for n in range(30))]
    await filled(articles, texts, [("1",), *[("2",)] * 400, *[("1",)] * 30])
    while await articles.embed(1_000):
        pass
    # One document is nearest by all of its chunks, then come rows of another tenant, and then the others of its own.
    await connection.execute(
        "UPDATE cdcsync.articles_vectors_1 AS v SET embedding = ('[1,0,' || 0.001 * c.id || ']')::public.vector"
        " FROM cdcsync.articles_chunks AS c WHERE c.chunk_id = v.chunk_id"
    )
    settling = Settling(connection, SCHEMA, articles.spec)
    await settling.settle(await settling.rested(1_000, rest_s=0))
    await build_hnsw(connection, SCHEMA, articles.spec)
    # In a large index the planner takes this plan by itself, and HNSW gives up after 20,000 vectors.
    await connection.execute("SET hnsw.max_scan_tuples = 100")
    for way in ("seqscan", "bitmapscan", "hashjoin", "mergejoin", "sort"):
        await connection.execute(f"SET enable_{way} = off".encode())
    ask = partial(find, connection, "nothing", embedding="[1,0,0]", mode=mode, k=10)
    assert await ask(filter={"tenant": 1}) == ["1", *(str(n) for n in range(402, 411))]


@pytest.mark.parametrize("mode", ["text", "vector", "hybrid"])
async def test_pages_continue_each_other_though_all_hits_are_equal(articles: LiveIndex, mode: str) -> None:
    await filled(articles, ["the same page"] * 45)
    await articles.embed()
    pages = [await find(articles.connection, "page", embedding="[1,1,1]", mode=mode, skip=n) for n in range(0, 50, 10)]
    assert [len(page) for page in pages] == [10, 10, 10, 10, 5]
    assert len({id_ for page in pages for id_ in page}) == 45


@pytest.mark.parametrize("built", [False, True])
async def test_a_stored_vector_of_zeros_is_found_by_words_alone(articles: LiveIndex, built: bool) -> None:
    await filled(articles, SHELF)
    await articles.embed()
    await articles.connection.execute(
        "UPDATE cdcsync.articles_vectors_1 SET embedding = '[0,0,0]' WHERE chunk_id ="
        " (SELECT chunk_id FROM cdcsync.articles_chunks WHERE id = 3)"
    )
    if built:
        settling = Settling(articles.connection, SCHEMA, articles.spec)
        await settling.settle(await settling.rested(100, rest_s=0))
        await build_hnsw(articles.connection, SCHEMA, articles.spec)
    ask = partial(search, articles.connection, SCHEMA, articles.spec, vector=(1.0, 1.0, 1.0))
    by_vector = await ask(text=None, mode="vector")
    assert sorted(hit.key["id"] for hit in by_vector) == [1, 2, 4, 5]
    (hums,) = [hit for hit in await ask(text="hums") if hit.key["id"] == 3]
    assert (hums.text_rank, hums.vector_rank, hums.distance, hums.stale) == (1, None, None, False)


async def test_a_query_without_a_direction_is_searched_by_words_alone_and_told(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    await articles.embed()
    warnings: list[str] = []
    ask = partial(search, articles.connection, SCHEMA, articles.spec, vector=(0.0, 0.0, 0.0), warnings=warnings)
    hits = await ask(text="hums")
    assert [(hit.key["id"], hit.vector_rank, hit.distance) for hit in hits] == [(3, None, None)]
    assert [one.endswith("It was searched by words alone.") for one in warnings] == [True]
    assert len(await ask(text="hums", mode="text")) == 1
    modes: tuple[tuple[str | None, Mode], ...] = (("hums", "vector"), (None, "vector"), (None, "hybrid"))
    for text, mode in modes:
        with pytest.raises(UsageError, match="all zeros") as refused:
            await ask(text=text, mode=mode)
        assert refused.value.hint == "Embed the query with the model of the index, three-numbers."


@pytest.mark.parametrize("distance", ["l2", "inner_product"])
async def test_zeros_are_a_place_like_any_other_where_nearness_is_not_an_angle(
    target: Database, distance: Distance
) -> None:
    async with live_index(target, make_spec(distance=distance)) as articles:
        await filled(articles, SHELF)
        await articles.embed()
        zeros = (0.0, 0.0, 0.0)
        hits = await search(articles.connection, SCHEMA, articles.spec, text=None, vector=zeros, mode="vector")
    assert len(hits) == 5
    assert all(hit.distance is not None for hit in hits)


# -- servers, roles and upgrades ------------------------------------------------------------------------------------


async def test_a_reader_searches_in_a_session_that_never_used_pgvector(articles: LiveIndex, target: Database) -> None:
    await filled(articles, SHELF)
    await articles.embed()
    role = f"reader_{target.name}"
    target.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    try:
        for grant in ("USAGE ON SCHEMA cdcsync", "SELECT ON ALL TABLES IN SCHEMA cdcsync"):
            target.execute(sql.SQL("GRANT " + grant + " TO {}").format(sql.Identifier(role)))
        with target.connect() as reader:
            reader.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            found = reader.execute("SELECT id FROM cdcsync.articles_search('E-716', '[1,1,1]', 1)").fetchall()
            assert found == [(1,)]
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                reader.execute("DELETE FROM cdcsync.articles_chunks")
    finally:
        target.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        target.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("state = 'live'", None),
        ("state = 'paused', paused_at = '2026-01-02'", "the index 'articles' is paused since 2026-01-02"),
        ("unfollowed_at = '2026-01-02'", "the index 'articles' is no longer followed since 2026-01-02"),
    ],
)
async def test_a_search_of_an_index_that_nothing_keeps_in_step_says_so_to_whoever_may_search(
    articles: LiveIndex, target: Database, change: str, said: str | None
) -> None:
    await filled(articles, SHELF)
    await articles.connection.execute("INSERT INTO cdcsync.pipelines (slot, publication) VALUES ('s', 'p')")
    await register(articles.connection, articles.spec, slot="s")
    await articles.connection.execute(f"UPDATE cdcsync.indexes SET {change}".encode())
    role = f"reader_{target.name}"
    grants = ("USAGE ON SCHEMA cdcsync", "SELECT ON cdcsync.articles_chunks, cdcsync.articles_words")
    target.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    told: list[tuple[str | None, str, str | None]] = []

    def note(one: psycopg.errors.Diagnostic) -> None:
        told.append((one.severity_nonlocalized, str(one.message_primary)[: len(said or "")], one.sqlstate))

    try:
        for grant in (*grants, "SELECT ON cdcsync.articles_vectors_1"):
            target.execute(sql.SQL("GRANT " + grant + " TO {}").format(sql.Identifier(role)))
        with target.connect() as reader:
            reader.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role)))
            reader.add_notice_handler(note)
            assert reader.execute("SELECT id FROM cdcsync.articles_search('hums')").fetchall() == [(3,)]
    finally:
        target.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        target.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))
    assert told == ([("INFO", said, "VG002")] if said else [])
    warnings: list[str] = []
    hits = await search(
        articles.connection, SCHEMA, articles.spec, text="hums", vector=None, warnings=warnings, plans=[]
    )
    assert [hit.key["id"] for hit in hits] == [3]
    assert [one.startswith(said or "") for one in warnings] == ([True] if said else [])


async def test_a_search_works_where_the_function_that_it_asks_was_dropped(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    await articles.connection.execute("DROP FUNCTION cdcsync.standing")
    cursor = await articles.connection.execute("SELECT id FROM cdcsync.articles_search('hums')")
    assert await cursor.fetchall() == [(3,)]


async def test_the_function_leaves_the_sessions_settings_alone(articles: LiveIndex) -> None:
    await filled(articles, SHELF)
    names = ("hnsw.ef_search", "hnsw.iterative_scan", "search_path", "work_mem", "client_min_messages")
    await articles.connection.execute("SELECT '[1]'::public.vector")
    before = [await (await articles.connection.execute(f"SHOW {name}".encode())).fetchone() for name in names]
    await find(articles.connection, "printer", embedding="[1,1,1]")
    assert before == [await (await articles.connection.execute(f"SHOW {name}".encode())).fetchone() for name in names]


async def test_hnsw_gin_and_the_filter_are_used_in_both_legs(target: Database) -> None:
    spec = make_spec(indexed=("tenant",))
    async with live_index(target, spec) as index:
        texts = [f"word{n} page{n % 100} of everything" for n in range(4_000)]
        await filled(index, texts, [(str(n % 50),) for n in range(4_000)])
        while await index.embed(1_000):
            pass
        settling = Settling(index.connection, SCHEMA, spec)
        await settling.settle((await settling.rested(4_000, rest_s=0))[:3_900])
        await build_search(index.connection, SCHEMA, spec)
        await build_hnsw(index.connection, SCHEMA, spec)
        await index.connection.execute("ANALYZE")

        async def plans(**arguments: Any) -> dict[str, str]:
            found: list[Plan] = []
            await search(
                index.connection, SCHEMA, spec, text="word77 page7", vector=(9.0, 5.0, 7.0), plans=found, **arguments
            )
            return {plan.leg: "\n".join(plan.lines) for plan in found}

        free = await plans()
        assert "articles_chunks_search" in free["keyword leg"]
        # Both tiers, each by its index: the order of what is settled, and of what is fresh.
        assert "Index Scan using articles_vectors_1_hnsw on articles_vectors_1_settled" in free["vector leg"]
        assert "on articles_vectors_1_fresh" in free["vector leg"]
        assert "Merge Append" in free["vector leg"]
        filtered = await plans(filter={"tenant": 7})
        assert "tenant = 7" in filtered["keyword leg"]
        assert "tenant = 7" in filtered["vector leg"]
        hits = await search(
            index.connection, SCHEMA, spec, text="everything word57", vector=None, filter={"tenant": 7}, k=70
        )
        assert hits[0].content == "word57 page57 of everything"
        assert len(hits) == 70  # all rows of the filter are ranked, though the other word is in every row
        named = await plans(where="tenant = 7")
        assert "tenant = 7" in named["keyword leg"]
        assert "tenant = 7" in named["vector leg"]


async def test_a_row_that_changed_a_thousand_times_hides_nothing_from_any_search(target: Database) -> None:
    async with live_index(target, make_spec()) as index:
        texts = [f"text {n} of many" for n in range(2_000)]
        await filled(index, texts)
        while await index.embed(1_000):
            pass
        await build_hnsw(index.connection, SCHEMA, index.spec)
        connection = await connect(target.dsn, "target")
        try:
            for _ in range(300):
                await connection.execute(
                    "UPDATE cdcsync.articles_vectors_1 SET embedding = embedding WHERE chunk_id = 7"
                )
            cursor = await connection.execute(
                "SELECT embedding::text FROM cdcsync.articles_vectors_1 WHERE chunk_id = 7"
            )
            row = await cursor.fetchone()
            assert row is not None
            vector = msgspec.json.decode(row[0], type=list[float])
            for mode in ("vector", "hybrid"):
                hits = await search(connection, SCHEMA, index.spec, text="text", vector=vector, mode=mode, k=10)
                assert len(hits) == 10
                assert hits[0].distance == pytest.approx(0, abs=1e-6)
        finally:
            await connection.close()
