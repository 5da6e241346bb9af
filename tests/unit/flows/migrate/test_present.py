"""Which generation is the other one."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from cdcsync.errors import SetupError
from cdcsync.flows.migrate.present import other_generation
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation
from tests.support.indexes import make_spec

SPEC = make_spec()


def entry(generation: int) -> Entry:
    return Entry(
        *("articles", "s", "public.articles", "public.articles_index", ("id",), (), "f", generation),
        *("m", 3, "vector", "cosine", "live", datetime.now(UTC)),
    )


GENERATIONS = [Generation.of(make_spec(generation=number), "ready") for number in (2, 5)]


@pytest.mark.parametrize(("live", "other"), [(2, 5), (5, 2)])
def test_the_other_generation_is_the_one_that_is_not_live(live: int, other: int) -> None:
    assert other_generation(entry(live), GENERATIONS).generation == other


@pytest.mark.parametrize("generations", [[], GENERATIONS[:1]])
def test_without_another_generation_the_way_to_begin_one_is_told(generations: list[Generation]) -> None:
    with pytest.raises(SetupError, match="only one generation of vectors, 2") as refused:
        other_generation(entry(2), generations)
    assert refused.value.hint == "begin a migration with: cdcsync migrate articles start"
