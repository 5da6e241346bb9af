"""What is told of single indexes: their models, their types in the target, and those that exist already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from cdcsync.config import HashEmbedder
from cdcsync.embedders import Kind, Vectors
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.errors import EmbedderUnavailable
from cdcsync.model.spec import IndexSpec
from cdcsync.preflight import Finding, build_embedders, examine, examine_embedders
from tests.support.indexes import make_spec
from tests.support.preflight import ARTICLES, configured, examined, lay_out, the_error, warnings
from tests.support.servers import Database

pytestmark = pytest.mark.server

SLOT = "preflight_stored"
MODEL = Hashing("hash", HashEmbedder(dimensions=16))
"""The embedder of `configured`."""


def stored_spec(**changes: Any) -> IndexSpec:
    """Return the index of `configured` as an earlier worker made it, but for `changes`."""
    settings: dict[str, Any] = {name: changes[name] for name in ("key", "carried", "vector_type") if name in changes}
    spec = make_spec(**({"search": None, "carried": {}} | settings))
    facts = {"model": MODEL.identity, "dimensions": MODEL.dimensions} | changes
    return msgspec.structs.replace(spec, **{name: fact for name, fact in facts.items() if name not in settings})


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


async def test_types_that_the_target_lacks_become_text_with_a_warning(make_database: Callable[[], Database]) -> None:
    source, target = make_database(), make_database()
    create = "CREATE TYPE mood AS ENUM ('calm', 'cross'); CREATE TYPE same AS ENUM ('a'); CREATE DOMAIN known AS int"
    source.execute(f"{create}; CREATE TYPE pair AS (a int, b int); ALTER TYPE same ADD VALUE 'b'")
    source.execute("CREATE DOMAIN label AS varchar(9); CREATE DOMAIN tag AS label NOT NULL")
    source.execute(
        "CREATE TABLE t (id tag PRIMARY KEY, mood mood, same same, pair pair, known known, many mood[],"
        " price numeric(8,2), at timestamptz(3), place vector(3), body text)"
    )
    target.execute(f"{create}; DROP TYPE mood")
    columns = ["mood", "same", "pair", "known", "many", "price", "at", "place"]
    report = await examined(
        configured(source.dsn, target.dsn, t=f'table = "t"\ntext = "{{body}}"\ncolumns = {columns}')
    )
    assert report.errors == []
    (spec,) = report.specs
    assert dict(zip(columns, spec.carried_types, strict=True)) == {
        "mood": "text",
        "same": "text",
        "pair": "text",
        "known": "integer",
        "many": "text",
        "price": "numeric(8,2)",
        "at": "timestamp(3) with time zone",
        "place": "public.vector(3)",
    }
    assert (spec.source_key_types, spec.key_types) == (("character varying(9)",), ("character varying(9)",))
    told = "\n".join(finding.message for finding in warnings(report))
    assert [line.partition(" is carried as text")[0] for line in told.splitlines()] == [
        "the column mood",
        "the column same",
        "the column pair",
        "the column many",
    ]
    assert "public.same lacks 'b'" in told
    assert "public.pair does not exist" in told


async def test_another_type_of_the_same_name_is_not_taken_for_the_columns(
    make_database: Callable[[], Database],
) -> None:
    source, target = make_database(), make_database()
    source.execute("CREATE TABLE t (id int PRIMARY KEY, place vector(3), body text)")
    target.execute("CREATE SCHEMA tools; ALTER EXTENSION vector SET SCHEMA tools; CREATE TYPE vector AS (x float)")
    report = await examined(configured(source.dsn, target.dsn, t='table = "t"\ntext = "{body}"\ncolumns = ["place"]'))
    assert report.errors == []
    assert report.specs[0].carried_types == ("text",)


async def test_in_one_database_every_type_is_kept(database: Database) -> None:
    database.execute("CREATE TYPE mood AS ENUM ('calm'); CREATE TABLE t (id int PRIMARY KEY, mood mood, body text)")
    report = await examined(configured(database.dsn, t='table = "t"\ntext = "{body}"\ncolumns = ["mood"]'))
    assert report.specs[0].carried_types == ("public.mood",)
    assert warnings(report) == []


async def test_a_b_tree_on_what_cannot_be_sorted_is_refused(database: Database) -> None:
    database.execute(f"{ARTICLES}; ALTER TABLE articles ADD facts json, ADD spot point")
    columns = 'columns = ["facts", "spot", "tenant"]\nindexed = ["facts", "spot", "tenant", "id"]'
    report = await examined(configured(database.dsn, articles=columns))
    assert [finding.hint for finding in report.errors] == [
        'remove "facts" from indexes.articles.indexed',
        'remove "spot" from indexes.articles.indexed',
    ]


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


async def test_a_column_that_grew_in_the_source_is_warned_of_and_followed(database: Database) -> None:
    database.execute(f"{ARTICLES}; ALTER TABLE articles ALTER tenant TYPE bigint")
    await lay_out(database, stored_spec(carried={"tenant": "integer"}), slot=SLOT)
    config = configured(database.dsn, slot=SLOT, articles='columns = ["tenant"]\nsearch = ""')
    report = await examined(config)
    (warning,) = warnings(report)
    assert "tenant is bigint in the source and integer in the existing index" in warning.message
    assert report.specs[0].carried_types == ("bigint",)
    await lay_out(database, report.specs[0])
    assert warnings(await examined(config)) == []


@pytest.mark.parametrize(
    ("changes", "sign"),
    [
        ({"model": "other", "dimensions": 32}, "are of other (32 dimensions)"),
        ({"model": "other"}, "are of other (16 dimensions)"),
    ],
    ids=["dimensions", "model"],
)
async def test_an_index_whose_vectors_nobody_can_make_is_paused_and_told_to_migrate(
    database: Database, changes: dict[str, Any], sign: str
) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(**changes), slot=SLOT)
    config = configured(database.dsn, slot=SLOT, articles='search = ""')
    report = await examine(config, build_embedders(config, []))
    assert (report.errors, report.specs) == ([], [])
    pause = report.broken["articles"]
    assert sign in pause.reason
    assert "cdcsync migrate articles start" in str(pause.remedy)
    (warning,) = warnings(report)
    assert warning.where == "indexes.articles.embedder"
    assert "the index articles is paused" in warning.message


@pytest.mark.parametrize(
    ("changes", "sign"),
    [({"vector_type": "halfvec"}, "16 dimensions, halfvec, cosine"), ({"distance": "l2"}, "16 dimensions, vector, l2")],
    ids=["vector type", "distance"],
)
async def test_an_index_keeps_the_vectors_that_it_has_until_a_migration(
    database: Database, changes: dict[str, Any], sign: str
) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(**changes), slot=SLOT)
    config = configured(database.dsn, slot=SLOT, articles='search = ""')
    report = await examine(config, build_embedders(config, []))
    assert (report.errors, report.broken) == ([], {})
    (spec,) = report.specs
    assert {"vector_type": spec.config.vector_type, "distance": spec.distance}.items() >= changes.items()
    (warning,) = warnings(report)
    assert sign in warning.message
    assert "cdcsync migrate articles start" in str(warning.hint)


async def test_other_vectors_excuse_nothing_else_that_is_wrong(database: Database) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(model="other"), slot=SLOT)
    report = await examined(configured(database.dsn, slot=SLOT, articles='text = "{lost}"\nsearch = ""'))
    assert any("lost" in error.message for error in report.errors)


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


async def test_an_embedder_that_cannot_be_made_does_not_hide_the_others(database: Database, tmp_path: Path) -> None:
    database.execute(ARTICLES)
    broken = f'[embedders.broken]\ntype = "sentence-transformers"\nmodel = "{tmp_path / "nothing"}"'
    config = configured(database.dsn, embedders=broken, articles="", broken='embedder = "broken"')
    report = await examined(config)
    assert the_error(report) == report.findings[0]
    assert [spec.name for spec in report.specs] == ["articles"]
    findings: list[Finding] = []
    assert list(build_embedders(config, findings)) == ["hash"]


class Failing(Hashing):
    """An embedder that does not do what it says."""

    def __init__(self, fault: Exception | None) -> None:
        super().__init__("failing", HashEmbedder(dimensions=16))
        self.fault = fault
        self.open_now = False

    async def open(self) -> None:
        self.open_now = True
        if self.fault is not None:
            raise self.fault

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        return np.ones((len(texts), 15), dtype=np.float32)

    async def aclose(self) -> None:
        self.open_now = False


async def test_a_deep_check_loads_each_model_and_looks_at_a_vector() -> None:
    unreachable = Failing(EmbedderUnavailable("the provider is away", hint="wait"))
    wrong = Failing(None)
    sound = Hashing("sound", HashEmbedder(dimensions=16))
    findings = await examine_embedders({"away": unreachable, "wrong": wrong, "sound": sound})
    assert [(finding.level, finding.where) for finding in findings] == [
        ("error", "embedders.away"),
        ("error", "embedders.wrong"),
        ("ok", "embedders.sound"),
    ]
    assert "(1, 15)" in findings[1].message
    assert not unreachable.open_now
    assert not wrong.open_now
