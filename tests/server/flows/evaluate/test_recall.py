"""Evaluate: what recall is, what it is compared with, what it costs, and where its outcome can be seen."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import msgspec
import numpy as np
import pytest
from psycopg import conninfo, sql

from cdcsync.documents.templates import hash_text
from cdcsync.errors import SetupError, UsageError
from cdcsync.flows.evaluate import recall
from cdcsync.flows.evaluate.recall import Budget, evaluate
from cdcsync.flows.evaluate.sampling import sample_vectors
from cdcsync.model.spec import Distance
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import connect
from cdcsync.target import evaluations
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.rebuilding import Rebuild
from cdcsync.target.search import Plan, nearest_statement, search
from tests.support.exchanges import ConnectTarget, read_after_exchange
from tests.support.indexes import SCHEMA, changes, document
from tests.support.recalls import CROWD, SPARSE, counted, crowd, indexed

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


# -- recall ---------------------------------------------------------------------------------------------------------


async def test_looking_further_finds_more_and_all_where_the_whole_table_is_read(database: Database) -> None:
    async with indexed(database, crowd(), m=SPARSE) as (index, spec):
        found = await evaluate(index.connection, SCHEMA, spec, queries=40, ef_search=[12, 100, 1000])
    near, far, whole = found.measured
    # The planner expects that HNSW takes longer to look that far than it takes to compare the whole small table.
    assert [(one.ef_search, one.by_hnsw) for one in found.measured] == [(12, True), (100, True), (1000, False)]
    assert 0 < near.recall < far.recall < whole.recall == 1
    assert (found.queries, found.k) == (40, 10)
    assert min(near.mean_ms, far.mean_ms, found.exact_mean_ms) > 0


async def test_one_side_is_searched_by_hnsw_and_the_other_reads_the_whole_table(database: Database) -> None:
    async with indexed(database, crowd()) as (index, spec):
        scans, reads = await counted(index.connection)
        found = await evaluate(index.connection, SCHEMA, spec, queries=7, ef_search=[20, 40])
        assert [one.by_hnsw for one in found.measured] == [True, True]
        # Once more to see whether there are any, for those without a direction, and for what changed last.
        assert await counted(index.connection) == (scans + 2 * 7, reads + 7 + 3)

        statement = nearest_statement(SCHEMA, "public", spec, None)
        text = statement.as_string(index.connection).replace("$1", f"'{[0.5] * 16}'").replace("$2", "11")
        plans = []
        for setting in ("on", "off"):
            await index.connection.execute(sql.SQL("SET enable_indexscan = " + setting))
            cursor = await index.connection.execute(sql.SQL("EXPLAIN " + text))
            plans.append("\n".join(line for (line,) in await cursor.fetchall()))
        assert "Index Scan using articles_vectors_1_hnsw" in plans[0]
        assert "hnsw" not in plans[1]


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    ("distance", "vector_type"), [("cosine", "vector"), ("inner_product", "vector"), ("cosine", "halfvec")]
)
async def test_candidates_by_signs_are_compared_by_their_whole_vectors(
    database: Database, distance: Distance, vector_type: str
) -> None:
    vectors = np.random.default_rng(5).normal(size=(CROWD, 128))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).round(4)
    async with indexed(database, vectors, distance=distance, vector_type=vector_type, m=16, quantise="binary") as (
        index,
        spec,
    ):
        # Of so few rows the planner would compare all signs.
        await index.connection.execute("SET enable_seqscan = off; SET enable_sort = off")
        found = await evaluate(index.connection, SCHEMA, spec, queries=20, ef_search=[100])
        # Beside fresh vectors, which no graph holds.
        texts = [f"fresh {at}" for at in range(300)]
        documents = [document(str(10_000 + at), text, carried=("1",)) for at, text in enumerate(texts)]
        made = {
            hash_text(text): vector.astype(np.float32) + 0.001 for text, vector in zip(texts, vectors, strict=False)
        }
        await index.apply(msgspec.structs.replace(changes(*documents), vectors=made))
        both = await evaluate(index.connection, SCHEMA, spec, queries=20, ef_search=[100])
        seen: list[Plan] = []
        by_vector = partial(
            search, index.connection, SCHEMA, spec, text=None, vector=vectors[7].tolist(), mode="vector"
        )
        hits = await by_vector(k=3, plans=seen)
        filtered = await by_vector(k=200, filter={"tenant": 7})
    for one in (*found.measured, *both.measured):
        assert one.by_hnsw
        assert one.recall >= 0.9
    assert {hit.content for hit in hits[:2]} == {"text 7", "fresh 7"}
    assert any("Index Scan using articles_vectors_1_hnsw" in line for plan in seen for line in plan.lines)
    assert len(filtered) == 200
    assert {hit.carried["tenant"] for hit in filtered} == {7}


async def test_the_settled_tier_is_measured_by_itself_beside_both_tiers(database: Database) -> None:
    vectors = crowd()
    async with indexed(database, vectors, m=SPARSE) as (index, spec):
        (alone,) = (await evaluate(index.connection, SCHEMA, spec, queries=20, ef_search=[12])).measured
        assert alone.settled_recall == alone.recall < 0.9
        texts = [f"fresh {at}" for at in range(len(vectors))]
        documents = [document(str(10_000 + at), text, carried=("1",)) for at, text in enumerate(texts)]
        moved = (vectors + 0.001).astype(np.float32)
        made = {hash_text(text): vector for text, vector in zip(texts, moved, strict=True)}
        await index.apply(msgspec.structs.replace(changes(*documents), vectors=made))
        await index.connection.execute("ANALYZE")
        (both,) = (await evaluate(index.connection, SCHEMA, spec, queries=20, ef_search=[12])).measured
    assert both.settled_recall is not None
    assert both.settled_recall < 0.9
    # Half of what is nearest is fresh, and none of that is missed.
    assert both.recall > both.settled_recall
    assert both.settled_mean_ms is not None
    assert both.settled_mean_ms > 0


async def test_no_search_goes_by_hnsw_while_nothing_has_settled(database: Database) -> None:
    async with indexed(database, crowd(0)) as (index, spec):
        vectors = crowd()
        texts = [f"fresh {at}" for at in range(len(vectors))]
        documents = [document(str(at), text, carried=("1",)) for at, text in enumerate(texts)]
        made = {hash_text(text): vector.astype(np.float32) for text, vector in zip(texts, vectors, strict=True)}
        await index.apply(msgspec.structs.replace(changes(*documents), vectors=made))
        await index.connection.execute("ANALYZE; SET enable_seqscan = off")
        (one,) = (await evaluate(index.connection, SCHEMA, spec, queries=5)).measured
    assert (one.recall, one.by_hnsw, one.settled_recall) == (1.0, False, None)


@pytest.mark.proof_from(2)
@pytest.mark.parametrize("quantise", ["none", "binary"])
@pytest.mark.parametrize(("k", "where"), [(10, None), (3, "tenant = 3"), (100, None)])
async def test_what_is_measured_is_what_the_search_function_finds(
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    quantise: Literal["none", "binary"],
    k: int,
    where: str | None,
) -> None:
    vectors = crowd()
    async with indexed(database, vectors, m=SPARSE, quantise=quantise) as (index, spec):
        names = Names(SCHEMA, spec.name)
        sample = (await sample_vectors(index.connection, names, "public", spec, 400))[:12]

        async def drawn(*_: object) -> list[tuple[int, str]]:
            return sample

        monkeypatch.setattr(recall, "sample_vectors", drawn)
        await index.connection.execute("SET hnsw.ef_search = 1")
        (measured,) = (await evaluate(index.connection, SCHEMA, spec, k=k, where=where)).measured
        shares = []
        for own, text in sample:
            key = await fetch_value(
                index.connection, "SELECT id FROM cdcsync.articles_chunks WHERE chunk_id = %s", [own]
            )
            vector = [float(value) for value in text.strip("[]").split(",")]
            hits = await search(
                index.connection,
                SCHEMA,
                spec,
                text=None,
                vector=vector,
                k=k + 1,
                mode="vector",
                per_document=False,
                where=where,
            )
            found = {hit.key["id"] for hit in hits} - {key}
            near = np.argsort(-(vectors @ vector) / np.linalg.norm(vectors, axis=1), kind="stable")
            nearest = [at for at in near.tolist() if at != key and (where is None or at % 10 == 3)][:k]
            shares.append(len(found.intersection(nearest)) / k)
    assert measured.usual
    assert measured.recall == pytest.approx(sum(shares) / len(shares), abs=1e-5)
    if where is None and quantise == "none":
        assert measured.recall < 1  # else nothing would tell it from an exact search


async def test_searches_look_as_far_as_the_search_function_unless_told_otherwise(database: Database) -> None:
    async with indexed(database, crowd(300)) as (index, spec):
        await index.connection.execute("SET hnsw.ef_search = 77")
        (default,) = (await evaluate(index.connection, SCHEMA, spec, queries=2)).measured
        (many,) = (await evaluate(index.connection, SCHEMA, spec, queries=2, k=200)).measured
        told = (await evaluate(index.connection, SCHEMA, spec, queries=2, ef_search=[40, 100, 40])).measured
        cursor = await index.connection.execute("SHOW hnsw.ef_search")
        assert await cursor.fetchone() == ("77",)
    assert (default.ef_search, default.usual) == (100, True)
    assert (many.ef_search, many.usual) == (201, True)
    assert [(one.ef_search, one.usual) for one in told] == [(40, False), (100, True)]


@pytest.mark.parametrize(
    ("distance", "vector_type"), [("cosine", "vector"), ("l2", "vector"), ("inner_product", "halfvec")]
)
async def test_a_small_index_is_read_whole_and_misses_nothing(
    database: Database, distance: Distance, vector_type: str
) -> None:
    vectors = np.vstack([crowd(30), np.zeros((1, 16))])  # which has no distance from anything, by cosine
    async with indexed(database, vectors, distance=distance, vector_type=vector_type) as (index, spec):
        found = await evaluate(index.connection, SCHEMA, spec, k=50)
    (one,) = found.measured
    assert (one.recall, one.by_hnsw) == (1.0, False)
    assert (found.queries, found.undirected) == ((30, 1) if distance == "cosine" else (31, 0))


async def test_a_condition_is_met_by_all_that_is_compared(database: Database) -> None:
    async with indexed(database, crowd(400)) as (index, spec):
        found = await evaluate(index.connection, SCHEMA, spec, queries=20, k=30, where="tenant = 3 AND '{;--}' <> ''")
        assert found.measured[0].recall > 0.9
        with pytest.raises(UsageError, match="leaves nothing"):
            await evaluate(index.connection, SCHEMA, spec, queries=2, where="tenant = 99")
        with pytest.raises(UsageError, match="nosuch") as refused:
            await evaluate(index.connection, SCHEMA, spec, where="nosuch = 1")
        with pytest.raises(UsageError, match="syntax error"):
            await evaluate(index.connection, SCHEMA, spec, where="tenant = 3) OR (true")
    assert refused.value.where == "--where nosuch = 1"


# -- limits and refusals --------------------------------------------------------------------------------------------


async def test_a_search_that_takes_too_long_is_given_up_and_so_is_a_sample_that_does(database: Database) -> None:
    async with indexed(database, crowd(50)) as (index, spec):
        slow = "pg_sleep(0.05) IS NOT NULL"
        with pytest.raises(SetupError, match=r"longer than 0\.01 s") as refused:
            await evaluate(index.connection, SCHEMA, spec, where=slow, budget=Budget(statement_s=0.01))
        few = await evaluate(index.connection, SCHEMA, spec, budget=Budget(most_s=0, share=0.5))
        cursor = await index.connection.execute("SHOW statement_timeout")
        assert await cursor.fetchone() == ("0",)
    assert "cdcsync evaluate articles" in str(refused.value.hint)
    assert few.queries == 1


@pytest.mark.parametrize(
    ("arguments", "option"), [({"queries": 0}, "--queries"), ({"k": 1000}, "-k"), ({"ef_search": [0]}, "--ef-search")]
)
async def test_what_cannot_be_measured_is_a_wrong_argument(
    database: Database, arguments: dict[str, Any], option: str
) -> None:
    async with indexed(database, crowd(5)) as (index, spec):
        with pytest.raises(UsageError) as refused:
            await evaluate(index.connection, SCHEMA, spec, **arguments)
    assert refused.value.where == option


@pytest.mark.parametrize(
    ("state", "vectors", "hnsw", "problem"),
    [
        ("building", 5, False, "still being built"),
        ("live", 5, False, "has no HNSW index, and is live"),
        ("live", 0, True, "no vectors"),
    ],
)
async def test_an_index_with_nothing_to_compare_is_refused_with_the_reason(
    database: Database, state: str, vectors: int, hnsw: bool, problem: str
) -> None:
    async with indexed(database, crowd(vectors), state=state, hnsw=hnsw) as (index, spec):
        with pytest.raises(SetupError, match=problem) as refused:
            await evaluate(index.connection, SCHEMA, spec)
    assert "cdcsync status" in str(refused.value.hint)
    assert refused.value.exit_code == 2


async def test_a_single_vector_has_nothing_to_be_compared_with(database: Database) -> None:
    async with indexed(database, crowd(1)) as (index, spec):
        with pytest.raises(SetupError, match="too few vectors"):
            await evaluate(index.connection, SCHEMA, spec)


# -- what is stored -------------------------------------------------------------------------------------------------


async def test_where_nothing_can_be_written_it_is_measured_all_the_same(database: Database) -> None:
    async with indexed(database, crowd(60)) as (index, spec):
        reading = conninfo.make_conninfo(database.dsn, options="-c default_transaction_read_only=on")
        async with await connect(reading, "target") as connection:
            found = await evaluate(connection, SCHEMA, spec, queries=3)
            assert await evaluations.store(connection, SCHEMA, found) == "this server or session only reads"

        role = sql.Identifier(f"{database.name}_reader")
        admin = index.connection
        await admin.execute(sql.SQL("CREATE ROLE {}").format(role))
        try:
            await admin.execute(sql.SQL("GRANT USAGE ON SCHEMA cdcsync TO {}").format(role))
            await admin.execute(sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA cdcsync TO {}").format(role))
            async with await connect(database.dsn, "target") as connection:
                await connection.execute(sql.SQL("SET ROLE {}").format(role))
                found = await evaluate(connection, SCHEMA, spec, queries=3)
                note = await evaluations.store(connection, SCHEMA, found)
            assert note == "this role may not write cdcsync.evaluations"
        finally:
            await admin.execute(sql.SQL("DROP OWNED BY {}").format(role))
            await admin.execute(sql.SQL("DROP ROLE {}").format(role))

        await admin.execute("DROP TABLE cdcsync.evaluations")  # as an older version left it
        found = await evaluate(admin, SCHEMA, spec, queries=3)
        assert "a worker of this version creates it" in str(await evaluations.store(admin, SCHEMA, found))


async def test_a_measurement_that_waited_for_an_exchange_of_tiers_counts_each_vector_once(
    target: Database, connect_target: ConnectTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with indexed(target, crowd(40)) as (index, spec):
        made = {hash_text(text): np.zeros(16, np.float32) for text in ("zeros", "more zeros")}
        documents = [document(str(1_000 + at), text) for at, text in enumerate(("zeros", "more zeros"))]
        await index.apply(msgspec.structs.replace(changes(*documents), vectors=made))
        sample = await sample_vectors(index.connection, Names(SCHEMA, "articles"), "public", spec, 5)

        async def sampled(*_: object) -> list[tuple[int, str]]:
            return sample

        monkeypatch.setattr(recall, "sample_vectors", sampled)
        rebuild = Rebuild(await connect_target(), SCHEMA, index.spec)
        found = await read_after_exchange(
            monkeypatch, connect_target, rebuild, lambda connection: evaluate(connection, SCHEMA, spec, k=5)
        )
    assert found.undirected == 2
