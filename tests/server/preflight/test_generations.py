"""The vectors that an index has beside those that the configuration asks for."""

from __future__ import annotations

from typing import Any

import pytest

from cdcsync.preflight import Report, build_embedders, examine
from tests.support.preflight import ARTICLES, SLOT, configured, examined, lay_out, stored_spec, warnings
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def with_other_vectors(database: Database, **changes: Any) -> Report:
    """Return the examination of an index that is stored with such vectors, which nobody configured."""
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(**changes), slot=SLOT)
    config = configured(database.dsn, slot=SLOT, articles='search = ""')
    return await examine(config, build_embedders(config, []))


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
    report = await with_other_vectors(database, **changes)
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
    report = await with_other_vectors(database, **changes)
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


@pytest.mark.parametrize("broken", ['where = "lost = 1"', 'text = "{lost}"'])
async def test_other_vectors_are_a_warning_whatever_else_is_wrong(database: Database, broken: str) -> None:
    database.execute(ARTICLES)
    await lay_out(database, stored_spec(model="other"), slot=SLOT)
    report = await examined(configured(database.dsn, slot=SLOT, articles=f'{broken}\nsearch = ""'))
    assert not any("are of other" in error.message for error in report.errors)
    assert any("are of other" in warning.message for warning in warnings(report))
    assert report.errors
