"""A row that changes all the time, in an index of many: searches find as much as before, by every way in."""

from __future__ import annotations

import re
from collections.abc import Callable

import anyio
import numpy as np
import psycopg
import pytest

import cdcsync
from cdcsync.target.search import Mode
from tests import ROOT
from tests.support.configs import Section, configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline

pytestmark = [pytest.mark.server, pytest.mark.timeout(180)]

ROWS, UPDATES, DIMENSIONS = 5_000, 1_000, 32
QUERIES = 25
K = 10

TITLE = "'text ' || n || ' of ' || n % 97 || ' and ' || n % 89 || ' and ' || n % 83"


@pytest.fixture
def churned(database: Database, make_pipeline: Callable[[str], Pipeline]) -> Pipeline:
    """An index in which one row was updated again and again."""
    index: Section = {"search": "english", "columns": ["tenant"]}
    embedders: dict[str, Section] = {"fake": {"type": "hash", "dimensions": DIMENSIONS}}
    pipeline = make_pipeline(configuration(database.dsn, embedders=embedders, indexes={"articles": index}))
    pipeline.source.execute("CREATE TABLE articles (id int PRIMARY KEY, tenant int, title text)")
    pipeline.source.execute(
        f"INSERT INTO articles SELECT n, n % 7, {TITLE} FROM generate_series(1, {ROWS}) AS n".encode()
    )
    pipeline.start()
    pipeline.live()
    for number in range(UPDATES):
        pipeline.source.execute("UPDATE articles SET title = %s WHERE id = 42", [f"text {number} of the same row"])
    pipeline.in_step()
    return pipeline


@pytest.mark.proof
def test_a_row_that_was_updated_a_thousand_times_hides_nothing(churned: Pipeline) -> None:
    settled = "cdcsync.articles_vectors_1_settled"
    # What the worker spares the graph, as the row stays fresh while it changes: here each change reaches it.
    for _ in range(UPDATES):
        churned.target.execute(f"UPDATE {settled} SET embedding = embedding WHERE chunk_id = 43".encode())
    vectors = dict(churned.target.execute("SELECT id, embedding::text FROM public.articles_index").fetchall())
    assert len(vectors) == ROWS
    matrix = {id_: np.array([float(one) for one in text[1:-1].split(",")]) for id_, text in vectors.items()}
    ids = np.array(list(matrix))
    everything = np.array(list(matrix.values()))
    chosen = [42, 43, *np.random.default_rng(3).choice(ids, QUERIES - 2, replace=False)]

    def nearest(vector: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        """Return the distance of the last of the nearest."""
        lengths = np.linalg.norm(everything, axis=1) * np.linalg.norm(vector)
        return float(np.sort(1 - everything @ vector / lengths)[K - 1])

    def recall(found: list[float], vector: np.ndarray[tuple[int], np.dtype[np.float64]]) -> float:
        assert len(found) == K
        return sum(one <= nearest(vector) + 1e-6 for one in found) / K

    statement = the_readmes_own_sql()
    by_sql = []
    with psycopg.connect(churned.config.target.dsn, autocommit=True) as session:
        session.execute("SET hnsw.iterative_scan = relaxed_order")
        for id_ in chosen:
            rows = session.execute(statement.encode(), {"vector": vectors[id_]}).fetchall()
            by_sql.append(recall([row[-1] for row in rows], matrix[id_]))
    assert np.mean(by_sql) >= 0.95

    async def by_mode(mode: Mode) -> list[float]:
        recalls = []
        async with cdcsync.Index.open(churned.config, "articles") as index:
            for id_ in chosen:
                hits = await index.search("text of the same row", vector=matrix[id_].tolist(), mode=mode, k=K)
                assert len(hits) == K
                if mode == "vector":
                    recalls.append(recall([hit.distance or 0.0 for hit in hits], matrix[id_]))
        return recalls

    assert np.mean(anyio.run(by_mode, "vector")) >= 0.95
    for mode in ("text", "hybrid"):
        anyio.run(by_mode, mode)


def the_readmes_own_sql() -> str:
    """Return the statement that README has for the view, without its condition, and with the distance."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    (statement,) = re.findall(r"^SELECT id, content FROM articles_index .*;$", page, re.MULTILINE)
    assert "SET hnsw.iterative_scan = relaxed_order;" in page
    assert statement.endswith("WHERE tenant = 1 ORDER BY embedding <=> $1 LIMIT 10;")
    order = "embedding <=> %(vector)s::vector"
    return f"SELECT id, content, {order} FROM articles_index ORDER BY {order} LIMIT 10"
