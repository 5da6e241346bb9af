"""`cdcsync.Index` and its twin for threads: searches, a model that is away, connections that break, clean ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, cast

import anyio
import msgspec
import numpy as np
import psycopg
import pytest
from psycopg import conninfo, sql

import cdcsync
import cdcsync.sync
from cdcsync.config import SentenceTransformersReranker, Source, Target, TeiEmbedder, TeiReranker
from cdcsync.config.serving import Serve
from cdcsync.demo.cluster import Cluster
from cdcsync.embedders import make_embedder, queries
from cdcsync.embedders.reranking import CrossEncoderReranker
from cdcsync.errors import (
    EmbedderSetupError,
    EmbedderUnavailable,
    ModelChanged,
    NotReached,
    SetupError,
    SourceUnavailable,
    TargetUnavailable,
    UsageError,
)
from tests.support.indexes import LiveIndex, changes, document, until
from tests.support.searched import HASHING, Model, indexed, keys
from tests.support.servers import Database
from tests.support.serving import served

if TYPE_CHECKING:
    from tests.support.provider import FakeProvider

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"away": False, "refuses": False, "slow": False, "opened": 0, "asked": []}.items():
        monkeypatch.setattr(Model, name, value)


async def test_hits_are_typed_documents_the_best_first(database: Database) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        hits = await articles.search("cat dreams", k=2)
        assert hits.warning is None
        assert keys(hits) == [1, *keys(hits[1:])]
        assert len(hits) == 2  # documents, though two chunks of one are the nearest
        first = hits[0]
        assert (first.key, first.carried, first.content, first.stale) == (
            {"id": 1},
            {"tenant": 1},
            "a cat dreams",
            False,
        )
        assert first.distance is not None
        assert first.distance < 0.2
        chunks = await articles.search("cat", mode="vector", k=2, per_document=False)
        assert keys(chunks) == [1, 1]
        assert keys(await articles.search("dog house", mode="text")) == [2]


async def test_filters_are_values_and_a_wrong_one_names_the_column(database: Database) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        assert keys(await articles.search("dog house", filter={"tenant": 3})) == [3]
        assert set(keys(await articles.search("dog house", filter={"tenant": {"lt": 3}}))) == {1, 2}
        assert keys(await articles.search("cat night", weights=(0.0, 1.0), filter={"id": [1, 3], "tenant": 3})) == [3]
        with pytest.raises(UsageError, match="colour"):
            await articles.search("dog", filter={"colour": "red"})


async def test_numbers_of_numpy_count_hits(database: Database) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        everything = keys(await articles.search("dog house", k=3))
        k, skip = np.array([1, 2])
        assert keys(await articles.search("dog house", k=k, skip=skip)) == everything[2:3]


@pytest.mark.parametrize("texts", ["dog house", [None], [b"dog"], ["\ud800"], ["dog", "a\0"]])
async def test_only_a_list_of_texts_is_embedded_and_the_model_stays_for_others(database: Database, texts: Any) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        with pytest.raises(UsageError, match=r"not texts|not a text|no text can hold") as refused:
            await articles.embed(texts)
        assert refused.value.where == "texts"
        assert (await articles.embed(["dog house"])).shape == (1, 32)


async def test_pages_continue_each_other_and_embed_a_query_once(database: Database) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        whole = await articles.search("the night", k=3)
        pages = [await articles.search("the night", k=1, skip=skip) for skip in range(3)]
        assert [keys(page)[0] for page in pages] == keys(whole)
        assert Model.asked == ["the night"]
        vectors = await articles.embed(["one", "two"])
        assert np.array_equal(vectors, HASHING.vectors(["one", "two"]))


@pytest.mark.parametrize(("fault", "words"), [("away", "nobody is at home"), ("refuses", "401 the key has expired")])
async def test_while_the_model_is_away_words_are_searched_and_the_result_says_so(
    database: Database, monkeypatch: pytest.MonkeyPatch, fault: str, words: str
) -> None:
    monkeypatch.setattr(queries, "AWAY_S", 0.0)
    async with indexed(database) as (_, config):
        setattr(Model, fault, True)
        async with cdcsync.Index.open(config, "articles") as articles:
            hits = await articles.search("dog house")
            assert keys(hits) == [2]
            assert hits.warning == f"searched by words alone: {words}"
            with pytest.raises(EmbedderUnavailable, match=words):
                await articles.search("dog house", mode="vector")
            assert (await articles.search("dog house", mode="text")).warning is None
            setattr(Model, fault, False)
            assert (await articles.search("dog house")).warning is None
        assert Model.opened == 0


@pytest.mark.parametrize("code", [401, 403])
async def test_an_index_opens_while_its_provider_refuses_and_has_vectors_again_when_it_no_longer_does(
    database: Database, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """A server of text-embeddings-inference is asked at the start, by `/info`."""
    monkeypatch.setattr(queries, "AWAY_S", 0.0)
    from tests.support.provider import FakeProvider, status

    provider = FakeProvider(dimensions=32)
    provider.start()
    try:
        section = TeiEmbedder(base_url=provider.tei_url, model="hashing", dimensions=32)
        model = make_embedder("model", section).identity
        async with indexed(database) as (index, config):
            await index.connection.execute("UPDATE cdcsync.indexes SET model = %s", [model])
            config = msgspec.structs.replace(config, embedders={"model": section})
            provider.always = status(code, b'{"error": "the key has expired"}')
            async with cdcsync.Index.open(config, "articles") as articles:
                hits = await articles.search("dog house")
                assert keys(hits) == [2]
                assert str(hits.warning).startswith("searched by words alone: ")
                assert str(code) in str(hits.warning)
                with pytest.raises(EmbedderUnavailable):
                    await articles.search("dog house", mode="vector")
                provider.always = None
                assert (await articles.search("dog house")).warning is None
    finally:
        provider.stop()


async def test_a_model_that_does_not_answer_in_time_is_left_alone_for_a_while(database: Database) -> None:
    async with (
        indexed(database) as (_, config),
        cdcsync.Index.open(config, "articles", model_timeout_s=0.05) as articles,
    ):
        Model.slow = True
        hits = await articles.search("dog house")
        assert keys(hits) == [2]
        assert "did not answer within 0.05 s" in str(hits.warning)
        Model.slow = False
        assert (await articles.search("dog house")).warning == hits.warning
        assert Model.asked == []


async def test_an_index_without_keyword_search_needs_its_model(database: Database) -> None:
    async with indexed(database, search=None) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        assert keys(await articles.search("dog", k=1)) == [2]
        Model.away = True
        with pytest.raises(EmbedderUnavailable):
            await articles.search("cat")


async def test_without_the_model_that_the_index_was_made_with_words_are_searched_and_a_warning_says_so(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with indexed(database) as (_, config):
        monkeypatch.setattr(Model, "identity", "model:2")
        async with cdcsync.Index.open(config, "articles") as articles:
            told = "were made by python:model:1, this embedder is python:model:2"
            hits = await articles.search("dog")
            assert (keys(hits), told in str(hits.warning)) == ([2], True)
            with pytest.raises(EmbedderSetupError, match=told):
                await articles.search("cat", mode="vector")
            assert keys(await articles.search("dog", mode="text")) == [2]


async def test_what_is_not_there_is_told_when_it_is_opened(database: Database) -> None:
    async with indexed(database) as (index, config):
        with pytest.raises(UsageError, match="no index artikles"):
            cdcsync.Index.open(config, "artikles")
        await index.connection.execute("DELETE FROM cdcsync.indexes")
        with pytest.raises(SetupError, match="the target holds no such index"):
            async with cdcsync.Index.open(config, "articles"):
                pass
    assert Model.opened == 0
    away = msgspec.structs.replace(config, target=Target(dsn="postgresql://127.0.0.1:1/nowhere"))
    with pytest.raises(TargetUnavailable):
        async with cdcsync.Index.open(away, "articles"):
            pass


@pytest.mark.parametrize(
    ("statement", "told", "fix"),
    [
        (
            "DROP FUNCTION cdcsync.articles_search; DELETE FROM cdcsync.indexes",
            "the target holds no such index",
            "check target.dsn",
        ),
        ("DROP SCHEMA cdcsync CASCADE", "the target holds no such index", "check target.dsn"),
        ("DROP TABLE cdcsync.articles_vectors_1 CASCADE", 'vectors_1" does not exist', "puts back what is missing"),
        ("DROP FUNCTION cdcsync.articles_search", "has no search function", "creates it when it starts"),
    ],
    ids=["an index", "a pipeline", "a table", "a function"],
)
async def test_a_search_tells_an_index_that_was_dropped_from_one_that_lacks_something(
    database: Database, statement: str, told: str, fix: str
) -> None:
    async with indexed(database) as (index, config), cdcsync.Index.open(config, "articles") as articles:
        assert keys(await articles.search("dog house", k=1)) == [2]
        await index.connection.execute(statement)
        with pytest.raises(SetupError, match=told) as raised:
            await articles.search("dog house", k=1)
        assert fix in str(raised.value.hint)


async def test_a_connection_that_broke_is_replaced_unnoticed(database: Database) -> None:
    async with indexed(database) as (index, config), cdcsync.Index.open(config, "articles", connections=1) as articles:
        assert keys(await articles.search("dog house", mode="text")) == [2]
        cursor = await index.connection.execute(
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'cdcsync index'"
            " AND datname = current_database()"
        )
        assert await cursor.fetchone() == (1,)
        assert keys(await articles.search("dog house", mode="text")) == [2]


async def test_searches_at_the_same_time_share_few_connections_and_all_close(database: Database) -> None:
    async with indexed(database) as (index, config):

        async def open_connections() -> int:
            cursor = await index.connection.execute(
                "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'cdcsync index'"
                " AND datname = current_database()"
            )
            row = await cursor.fetchone()
            assert row is not None
            return int(row[0])

        async with cdcsync.Index.open(config, "articles", connections=2) as articles:
            found: list[list[object]] = []

            async def ask() -> None:
                found.append(keys(await articles.search("dog house", k=1)))

            async with anyio.create_task_group() as tasks:
                for _ in range(12):
                    tasks.start_soon(ask)
            assert found == [[2]] * 12
            assert 1 <= await open_connections() <= 2

        async def all_closed() -> bool:
            return await open_connections() == 0

        await until(all_closed)
        with pytest.raises(UsageError, match="closed"):
            await articles.search("dog", mode="text")


async def test_an_index_beside_another_shares_its_model_and_ends_with_it(database: Database) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        async with articles.beside("articles") as other:
            assert keys(await other.search("dog house", k=1)) == keys(await articles.search("dog house", k=1)) == [2]
            assert Model.asked == ["dog house"]
            assert Model.opened == 1
        assert keys(await articles.search("dog house", k=1)) == [2]


async def test_a_reranker_orders_the_best_hits_and_is_done_without_while_it_is_away(
    database: Database, provider: FakeProvider
) -> None:
    async with indexed(database) as (_, config):
        with_reranker = msgspec.structs.replace(
            config,
            rerankers={"fine": TeiReranker(base_url=provider.tei_url)},
            indexes={"articles": msgspec.structs.replace(config.indexes["articles"], reranker="fine")},
        )
        async with cdcsync.Index.open(with_reranker, "articles") as articles:
            # The reranker counts the words that query and text have in common, whatever their place by vector.
            hits = await articles.search("to the cat coast", k=2)
            assert [(hit.key["id"], hit.score) for hit in hits] == [(3, 3.0), (1, 1.0)]
            assert keys(await articles.search("to the cat coast", k=1, skip=1)) == [1]
            plain = await articles.search("to the cat coast", k=3, rerank=False)
            assert keys(await articles.rerank("dog", plain)) == [2, *[key for key in keys(plain) if key != 2]]
            asked = len(provider.requests)
            assert await articles.search("-unheard", mode="text") == []
            assert len(provider.requests) == asked

            provider.stop()
            away = await articles.search("to the cat coast", k=3)
            assert keys(away) == keys(plain)
            assert str(away.warning).startswith("not reranked: rerankers.fine: ")
        async with cdcsync.Index.open(config, "articles") as articles:
            with pytest.raises(UsageError, match="has no reranker"):
                await articles.rerank("cat", plain)


async def test_hits_keep_their_order_while_the_reranker_cannot_be_loaded_which_not_each_search_tries(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[object] = []

    def load(reranker: object) -> None:
        loads.append(reranker)
        raise EmbedderSetupError("no such model", where="rerankers.fine.model", hint="name another one")

    monkeypatch.setattr(CrossEncoderReranker, "_load", load)
    monkeypatch.setattr(queries, "AWAY_S", 3600.0)
    async with indexed(database) as (_, config):
        with_reranker = msgspec.structs.replace(
            config,
            rerankers={"fine": SentenceTransformersReranker(model="acme/jugde")},
            indexes={"articles": msgspec.structs.replace(config.indexes["articles"], reranker="fine")},
        )
        async with cdcsync.Index.open(with_reranker, "articles") as articles:
            plain = await articles.search("to the cat coast", k=3, rerank=False)
            for mode in ("hybrid", "text", "vector"):
                hits = await articles.search("to the cat coast", k=3, mode=cast("Any", mode))
                assert hits
                assert str(hits.warning).startswith("not reranked: rerankers.fine.model: no such model")
            assert keys(await articles.rerank("dog", plain)) == keys(plain)
    assert len(loads) == 1


async def test_wait_for_is_true_once_the_checkpoint_is_there_and_false_at_the_timeout(database: Database) -> None:
    async with indexed(database) as (index, config), cdcsync.Index.open(config, "articles") as articles:
        position = await articles.lsn()
        await index.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = '0/1'")
        assert await articles.wait_for(position, timeout_s=0.01) is False
        await index.connection.execute(
            sql.SQL("UPDATE cdcsync.pipelines SET checkpoint = {}").format(sql.Literal("FFFFFFFF/0"))
        )
        assert await articles.wait_for(position) is True
        assert await articles.wait_for() is True
        assert await articles.wait_for(vectors=True) is True
        await index.apply(changes(document("4", "a text that waits for its vector", carried=("4",))))
        await index.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = 'FFFFFFFF/0'")
        assert await articles.wait_for(position) is True
        assert await articles.wait_for("FFFFFFFF/0", timeout_s=0.01, vectors=True) is False
        with pytest.raises(UsageError, match="'nonsense' is not an LSN"):
            await articles.wait_for("nonsense")


async def two_servers(
    stack: AsyncExitStack, make_cluster: Callable[..., Cluster]
) -> tuple[cdcsync.Config, LiveIndex, LiveIndex]:
    """Return a configuration whose target is either of two servers, and the index on each; the second is behind."""
    made, ports, config = [], [], None
    for checkpoint in ("0/2000", "0/1000"):
        cluster = make_cluster()
        database = Database(cluster.dsn(), "postgres", cast("Any", None))
        with psycopg.connect(cluster.dsn(), autocommit=True) as admin:
            admin.execute("CREATE EXTENSION vector")
        index, config = await stack.enter_async_context(indexed(database))
        await index.connection.execute(f"UPDATE cdcsync.pipelines SET checkpoint = '{checkpoint}'".encode())
        made.append(index)
        ports.append(str(cluster.port))
    ahead, behind = made
    assert config is not None
    await ahead.apply(changes(document("4", "a whale sings", carried=("4",))))
    await ahead.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = '0/2000'")
    dsn = conninfo.make_conninfo(
        config.target.dsn, host="127.0.0.1,127.0.0.1", port=",".join(ports), load_balance_hosts="random"
    )
    return msgspec.structs.replace(config, target=Target(dsn=dsn)), ahead, behind


async def test_a_position_is_reached_by_the_server_that_answers(make_cluster: Callable[..., Cluster]) -> None:
    async with AsyncExitStack() as stack:
        config, _, behind = await two_servers(stack, make_cluster)
        found = set()
        for _ in range(12):  # each is with one of the two, as its only session is
            async with cdcsync.Index.open(config, "articles", connections=1) as articles:
                now = keys(await articles.search("whale", mode="text"))
                found.add(tuple(now))
                if now:
                    assert keys(await articles.search("whale", mode="text", after_lsn="0/2000", wait_s=0)) == [4]
                else:
                    with pytest.raises(NotReached, match="does not hold 0/2000 yet"):
                        await articles.search("whale", mode="text", after_lsn="0/2000", wait_s=0.1)
        assert found == {(4,), ()}

        # Who waits is answered by the session that has caught up meanwhile.
        async def catches_up() -> None:
            await anyio.sleep(0.2)
            await behind.apply(changes(document("4", "a whale sings", carried=("4",))))
            await behind.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = '0/2000'")

        async with (
            cdcsync.Index.open(config, "articles", connections=8) as articles,
            anyio.create_task_group() as tasks,
        ):
            tasks.start_soon(catches_up)

            async def search() -> None:
                assert keys(await articles.search("whale", mode="text", after_lsn="0/2000", wait_s=60)) == [4]

            for _ in range(8):
                tasks.start_soon(search)
            with pytest.raises(UsageError, match="search: 'here' is not an LSN"):
                await articles.search("whale", after_lsn="here")


@pytest.mark.proof
async def test_what_is_told_of_a_search_is_of_the_server_that_answered(
    make_cluster: Callable[..., Cluster],
) -> None:
    async with AsyncExitStack() as stack:
        config, _, _ = await two_servers(stack, make_cluster)
        config = msgspec.structs.replace(
            config, serve=Serve(listen="127.0.0.1:0", anonymous=True, audit_days=0, deadline_s=1.0)
        )
        client = await stack.enter_async_context(served(config))
        seen = set()

        async def search(after: str | None) -> None:
            body = {"query": "whale", "mode": "text", "after_lsn": after}
            answer = (await client.post("/v1/indexes/articles/search", json=body)).json()
            if "hits" in answer:
                seen.add((after, len(answer["hits"]), answer["as_of_lsn"]))
            else:
                assert answer["title"] in ("Not yet", "Too many calls")

        for after in (None, "0/2000"):
            for _ in range(4):
                async with anyio.create_task_group() as tasks:
                    for _ in range(8):
                        tasks.start_soon(search, after)
        assert seen <= {(None, 1, "0/2000"), (None, 0, "0/1000"), ("0/2000", 1, "0/2000")}
        assert ("0/2000", 1, "0/2000") in seen


async def test_a_generation_that_never_was_is_told_from_one_that_is_gone(database: Database) -> None:
    async with indexed(database) as (index, config), cdcsync.Index.open(config, "articles") as articles:
        await index.connection.execute("UPDATE cdcsync.indexes SET last_generation = 3")
        for generation, kind in (
            (0, UsageError),
            (-1, UsageError),
            (4, UsageError),
            (2, ModelChanged),
            (3, ModelChanged),
        ):
            with pytest.raises(kind, match=f"has no generation {generation} of vectors") as refused:
                await articles.search("cat", mode="text", generation=generation)
            assert type(refused.value) is kind
        assert keys(await articles.search("cat", mode="text", generation=1)) == [1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"work_memory": "4MB"}, "unrecognized configuration parameter"),
        ({"work_mem": "much"}, "invalid value for parameter"),
        ({"wal_level": "minimal"}, "cannot be changed"),
        ({"transaction_isolation": "serializable"}, "must be called before any query"),
        ({"transaction_deferrable": "on"}, "must be called before any query"),
        ({"transaction_read_only": "off"}, "must be set before any query"),
        ({"client_encoding": "klingon"}, "invalid value for parameter"),
        ({"client_encoding": "LATIN1"}, "can't encode"),
        ({"role": "nobody_of_that_name"}, "does not exist"),
        ({"": "1"}, "unrecognized configuration parameter"),
    ],
)
async def test_a_setting_that_the_server_refuses_is_the_callers_mistake(
    database: Database, settings: dict[str, str], told: str
) -> None:
    await refused_by_the_server(database, "settings", {"text": "cat €", "settings": settings}, told)


@pytest.mark.parametrize("text", ["cat", "nothing that is found"])
@pytest.mark.parametrize(
    ("headline", "told"),
    [
        ("bogus", "invalid parameter list"),
        ("StartSel='", "invalid parameter list"),
        ("MaxWords=x", "invalid input syntax for type integer"),
        ("MinWords=50, MaxWords=3", "must be less than"),
        ("Foo=1", "unrecognized headline parameter"),
    ],
)
async def test_options_of_headlines_that_the_server_refuses_are_the_callers_mistake(
    database: Database, headline: str, told: str, text: str
) -> None:
    await refused_by_the_server(database, "headline", {"text": text, "headline": headline}, told)


async def test_a_vector_of_numbers_that_the_server_cannot_hold_is_the_callers_mistake(database: Database) -> None:
    named = {"vector": [1e39] * 32, "mode": "vector"}
    await refused_by_the_server(database, "vector", named, "out of range")


@pytest.fixture
def latin(database: Database) -> Iterator[Database]:
    """A target that has no characters beyond Latin-1."""
    name = f"{database.name}_latin"
    identifier = sql.Identifier(name)
    with database.connect() as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0").format(identifier))
        made = Database(conninfo.make_conninfo(database.dsn, dbname=name), name, database.server)
        made.execute("CREATE EXTENSION vector")
        yield made
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("text", "日本"),
        ("filter", {"tenant": "日本"}),
        ("headline", "StartSel=日本"),
        ("settings", {"app.tenant": "日本"}),
    ],
)
async def test_characters_that_the_targets_encoding_lacks_are_the_callers_mistake(
    latin: Database, argument: str, value: Any
) -> None:
    await refused_by_the_server(latin, argument, {argument: value}, "has no equivalent")


async def refused_by_the_server(database: Database, argument: str, named: dict[str, Any], told: str) -> None:
    """See that a search ends in an error that names the argument, and that the index is searched as before."""
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        with pytest.raises(UsageError, match=told) as refused:
            await articles.search(**{"text": "cat", "mode": "text", **named})
        assert refused.value.where == argument
        assert refused.value.hint
        assert keys(await articles.search("cat", mode="text")) == [1]


async def test_an_index_that_is_being_built_says_so_with_each_search(database: Database) -> None:
    async with indexed(database) as (index, config), cdcsync.Index.open(config, "articles") as articles:
        assert (await articles.search("cat", mode="text")).warning is None
        await index.connection.execute("UPDATE cdcsync.indexes SET state = 'building'")
        found = await articles.search("cat", mode="text")
        assert keys(found) == [1]
        assert "is being built: a search may not find all of it" in (found.warning or "")


async def test_columns_that_an_index_no_longer_carries_are_not_asked_for(database: Database) -> None:
    async with indexed(database) as (index, config), cdcsync.Index.open(config, "articles") as articles:
        assert (await articles.search("cat", mode="text"))[0].carried == {"tenant": 1}
        await index.connection.execute("UPDATE cdcsync.indexes SET columns = '{}'")
        assert (await articles.search("cat", mode="text"))[0].carried == {}
        # A vector of the same model is as good as before.
        found = await articles.search("", mode="vector", vector=[1.0] * 32, k=1)
        assert found[0].carried == {}


@pytest.mark.parametrize("mode", ["hybrid", "vector", "text"])
@pytest.mark.parametrize("text", ["", " ", "\t\n", "\u3000", "\u00a0\x1c"])
async def test_a_blank_query_finds_nothing_and_asks_no_model(database: Database, text: str, mode: Any) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        assert (await articles.search(text, mode=mode), Model.asked) == ([], [])


async def test_a_blank_query_finds_nothing_in_an_index_without_keyword_search_either(database: Database) -> None:
    async with (
        indexed(database, search=None) as (_, config),
        cdcsync.Index.open(config, "articles") as articles,
    ):
        assert [await articles.search(" "), await articles.search(" ", mode="vector")] == [[], []]


async def test_a_vector_may_be_searched_by_without_a_text(database: Database) -> None:
    connections = cast(int, np.int64(2))
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles", connections=connections) as of:
        assert await of.search(None, mode="hybrid", vector=[1.0] * 32, k=1)
        assert await of.search(None, mode="vector", vector=[1.0] * 32, k=1)
        with pytest.raises(UsageError, match="None is not a text"):
            await of.search(None)


@pytest.mark.parametrize("lsn", ["nonsense", "", 5, b"0/1"])
async def test_only_none_asks_the_source_for_a_position(database: Database, lsn: Any) -> None:
    async with indexed(database) as (_, config):
        config = msgspec.structs.replace(config, source=Source(dsn="host=/nowhere"))
        async with cdcsync.Index.open(config, "articles") as articles:
            with pytest.raises(UsageError, match="is not an LSN"):
                await articles.wait_for(lsn)
            with pytest.raises(SourceUnavailable):
                await articles.wait_for(None)


@pytest.mark.parametrize(
    ("checkpoint", "insert_position", "holds"),
    [
        ("0/2000", "0/2018", True),
        ("0/1FF8", "0/2018", False),
        ("0/2000", "0/2020", False),
        ("0/2000", "0/2000", True),
        ("0/2000", "0/2008", False),
        # The first page of a segment has a longer header.
        ("0/2000000", "0/2000028", True),
        ("0/1FFFFF8", "0/2000028", False),
        ("0/2000000", "0/2000030", False),
        ("0/2000", "0/2028", False),
    ],
)
async def test_the_start_of_a_page_holds_no_more_than_the_end_of_the_page_before(
    database: Database, checkpoint: str, insert_position: str, holds: bool
) -> None:
    async with indexed(database) as (index, config), cdcsync.Index.open(config, "articles") as articles:
        await index.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = %s", [checkpoint])
        assert await articles.wait_for(insert_position, timeout_s=0.01) is holds


# -- for threads ----------------------------------------------------------------------------------------------------
