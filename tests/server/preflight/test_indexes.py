"""What is told of single indexes: their models, their types in the target, and those that exist already."""

from __future__ import annotations

import pytest

from cdcsync.config import HashEmbedder
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.preflight import examine
from tests.support.preflight import (
    ARTICLES,
    SLOT,
    configured,
    examined,
    lay_out,
    stored_spec,
    the_error,
    warnings,
)
from tests.support.servers import Database

pytestmark = pytest.mark.server


@pytest.mark.parametrize(
    ("dimensions", "lines", "fix"),
    [
        (2_000, "", None),
        (2_001, "", 'set indexes.articles.vector_type = "halfvec"'),
        (4_000, 'vector_type = "halfvec"', None),
        (4_001, 'vector_type = "halfvec"', "name an embedder that makes at most 4,000 dimensions"),
        (4_001, "", "name an embedder that makes at most 4,000 dimensions"),
    ],
)
async def test_vectors_too_long_for_the_index_are_refused(
    database: Database, dimensions: int, lines: str, fix: str | None
) -> None:
    database.execute(ARTICLES)
    report = await examined(configured(database.dsn, dimensions=dimensions, articles=lines))
    assert [finding.hint for finding in report.errors] == ([fix] if fix else [])
    if fix is None:
        database.execute(f"CREATE TABLE v (v {report.specs[0].vector_type})")
        database.execute(f"CREATE INDEX ON v USING hnsw (v {report.specs[0].config.vector_type}_cosine_ops)")


async def test_an_index_that_exists_keeps_its_generation_and_its_types(database: Database) -> None:
    database.execute(f"{ARTICLES}; CREATE TYPE mood AS ENUM ('calm'); ALTER TABLE articles ADD mood mood")
    await lay_out(database, stored_spec(carried={"mood": "text"}, generation=3), slot=SLOT)
    report = await examined(
        configured(database.dsn, slot=SLOT, articles='columns = ["mood", "tenant"]\ntext = "{body}"\nsearch = ""')
    )
    assert report.errors == []
    assert warnings(report) == []
    assert report.specs[0].generation == 3
    assert report.specs[0].carried_types == ("text", "integer")


async def test_an_index_with_another_key_is_refused(database: Database) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(key={"tenant": "integer"}), slot=SLOT)
    error = the_error(await examined(configured(database.dsn, slot=SLOT, articles='search = ""')))
    assert (error.where, "exists with the key (tenant)" in error.message) == ("public.articles", True)
    assert error.hint


async def test_an_index_of_another_table_is_refused(database: Database) -> None:
    database.execute(f"{ARTICLES}; ALTER TABLE articles RENAME TO papers")
    await lay_out(database, stored_spec(), slot=SLOT)
    error = the_error(await examined(configured(database.dsn, slot=SLOT, articles='table = "papers"\nsearch = ""')))
    assert (error.where, "is of public.articles" in error.message) == ("indexes.articles.table", True)


async def test_an_index_that_another_pipeline_keeps_is_refused(database: Database) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(), slot=SLOT)
    error = the_error(await examined(configured(database.dsn, slot="preflight_other", articles='search = ""')))
    assert f'set source.slot = "{SLOT}"' in str(error.hint)


async def test_an_index_that_exists_is_compared_even_without_its_embedder(database: Database) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(), slot=SLOT)
    report = await examine(configured(database.dsn, slot="preflight_other", articles='search = ""'), {})
    assert "is kept by the pipeline of slot" in the_error(report).message
    assert report.specs == []


async def test_chunks_that_the_model_does_not_read_are_refused(database: Database) -> None:
    database.execute(ARTICLES)
    short = Hashing("hash", HashEmbedder(dimensions=16))
    short.max_input_tokens = 24
    error = the_error(await examine(configured(database.dsn), {"hash": short}))
    assert error.where == "indexes.articles.chunking.overlap_tokens"
    assert "the model reads 24 tokens" in str(error.hint)
