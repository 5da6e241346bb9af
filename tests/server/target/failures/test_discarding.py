"""Texts that an operator discards: a chunk without a vector that everybody knows the reason of."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from cdcsync.documents.templates import hash_text
from cdcsync.errors import SetupError
from cdcsync.flows.audit.soundness import Soundness, examine_chunks
from cdcsync.flows.migrate.switch import _require_complete
from cdcsync.model.changeset import ChangeSet
from cdcsync.status import counting
from cdcsync.status.counting import count_index
from cdcsync.target.backlog import BacklogCounts
from cdcsync.target.ddl.names import DISCARDED_ATTEMPTS, MAX_ATTEMPTS
from cdcsync.target.failures.listing import Failures
from cdcsync.target.filling import Filling
from cdcsync.target.generations import Generations
from cdcsync.target.registry import Registry
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    begin_generations,
    changes,
    document,
    kept,
    live_index,
    two_generations,
)
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

TEXTS = {"1": "good", "2": "fine", "3": "poison", "4": "venom"}


def failures(index: LiveIndex) -> Failures:
    return Failures(index.connection, SCHEMA, index.spec)


async def stored(index: LiveIndex, generation: int, *texts: str) -> None:
    """Have a generation have vectors of these texts, of which none waits there."""
    await index.rows(
        f"WITH gone AS (DELETE FROM {{backlog}} WHERE generation = {generation} AND chunk_id IN"
        " (SELECT chunk_id FROM {chunks} WHERE content = ANY(%s)))"
        f" INSERT INTO cdcsync.articles_vectors_{generation}_fresh (chunk_id, content_hash, embedding)"
        " SELECT chunk_id, content_hash, '[1,2,3]'::public.vector FROM {chunks} WHERE content = ANY(%s) RETURNING 1",
        *[list(texts)] * 2,
    )


@pytest.fixture
async def index(database: Database) -> AsyncIterator[LiveIndex]:
    """An index of two generations, in each of which two texts of four were refused and then discarded."""
    async with live_index(database, two_generations()) as live:
        await begin_generations(live)
        await live.apply(changes(*(document(*one) for one in TEXTS.items()), inline=["good", "fine"]))
        await stored(live, 2, "good", "fine")
        await live.rows(f"UPDATE {{backlog}} SET attempts = {MAX_ATTEMPTS}, error = 'refused' RETURNING 1")
        assert len(await failures(live).some(10)) == 4
        assert await failures(live).discard() == 4
        yield live


async def test_a_discarded_text_is_nobodys_work_and_on_no_list(index: LiveIndex) -> None:
    assert await index.backlog.window(10) == []
    assert not await index.backlog.due()
    assert await index.backlog.still_waiting([hash_text("poison")]) == set()
    assert await index.backlog.counts() == BacklogCounts(0, 0, 0)
    assert await failures(index).some(10) == []
    assert await failures(index).retry_texts() == 0
    assert await failures(index).discard() == 0


async def test_an_audit_and_a_fill_know_why_a_discarded_text_has_no_vector(index: LiveIndex) -> None:
    assert await Filling(index.connection, SCHEMA, index.spec.others[0], index.spec).lacking() == 0
    await Generations(SCHEMA).stamp(index.connection, "articles", 2, "ready_at")
    assert await examine_chunks(index.connection, SCHEMA, index.spec, -1, 100) == Soundness({}, 0, 0, None, 4)


async def test_whoever_waits_for_vectors_does_not_wait_for_discarded_ones(index: LiveIndex) -> None:
    await index.rows("UPDATE cdcsync.pipelines SET checkpoint = '0/1000' RETURNING 1")
    assert await index.rows("SELECT cdcsync.wait_for('articles', '0/900', '0 s', vectors => true)") == [(True,)]


@pytest.mark.parametrize("estimated", [False, True])
async def test_a_generation_whose_texts_were_discarded_finds_less_and_says_how_to_get_them_back(
    index: LiveIndex, monkeypatch: pytest.MonkeyPatch, estimated: bool
) -> None:
    monkeypatch.setattr(counting, "COUNT_UP_TO", 3 if estimated else 100)
    await stored(index, 1, "poison", "venom")
    assert (await count_index(index.connection, index.names, 2)).estimated == estimated
    entry = await Registry(SCHEMA).find(index.connection, "articles")
    assert entry is not None

    with pytest.raises(SetupError) as refused:
        await _require_complete(index.connection, SCHEMA, entry, 2)

    assert "lacks the vectors of 2 of 4 chunks (0 failed, 0 wait, 2 discarded)" in str(refused.value)
    assert refused.value.hint is not None
    assert refused.value.hint.startswith("try them again: cdcsync failures articles retry --discarded; --yes")


@pytest.mark.parametrize("estimated", [False, True])
async def test_discarded_texts_are_counted_apart_from_those_that_wait_or_failed(
    index: LiveIndex, monkeypatch: pytest.MonkeyPatch, estimated: bool
) -> None:
    monkeypatch.setattr(counting, "COUNT_UP_TO", 1 if estimated else 100)
    await index.apply(changes(document("5", "new"), document("6", "bad")))
    await index.backlog.postpone([hash_text("bad")], "refused", delay_s=0, final=True)
    await index.connection.execute("ANALYZE cdcsync.articles_backlog")
    counts = await count_index(index.connection, index.names, 1)
    waiting = 5 if estimated else 1  # estimates are of all generations
    assert (counts.backlog, counts.backlog_live, counts.failed, counts.discarded) == (waiting, 1, 1, 2)


@pytest.mark.parametrize(
    ("change", "left", "waits"),
    [
        (changes(document("3", "antidote", existed=True)), ["venom"], ["antidote"]),
        (changes(kept("3", "9")), ["poison", "venom"], []),
        (changes(deleted=["3"]), ["venom"], []),
        (changes(truncated=True), [], []),
    ],
    ids=["another text", "another column", "deleted", "truncated"],
)
async def test_a_text_is_discarded_until_it_changes(
    index: LiveIndex, change: ChangeSet, left: list[str], waits: list[str]
) -> None:
    await index.apply(change)
    discarded = await index.rows(
        "SELECT content FROM {backlog} JOIN {chunks} USING (chunk_id) WHERE generation = 1 AND attempts >= %s"
        " ORDER BY chunk_id",
        DISCARDED_ATTEMPTS,
    )
    assert [row[0] for row in discarded] == left
    assert [one.text for one in await index.backlog.window(10)] == waits
    assert await index.embed() == len(waits)


async def test_discarded_texts_are_listed_and_tried_again_if_someone_asks_for_them(index: LiveIndex) -> None:
    found = await failures(index).some(10, discarded=True)
    assert [(one.key, one.generation, one.attempts, one.next_attempt_at, one.discarded) for one in found] == [
        ({"id": key}, generation, MAX_ATTEMPTS, None, True) for key in ("3", "4") for generation in (1, 2)
    ]
    assert await failures(index).retry_texts(discarded=True) == 4
    assert [one.text for one in await index.backlog.window(10)] == ["poison", "venom"]


async def test_an_equal_text_that_is_refused_elsewhere_does_not_list_a_discarded_one_again(index: LiveIndex) -> None:
    await index.apply(changes(document("5", "poison")))
    await index.backlog.postpone([hash_text("poison")], "refused", delay_s=0, final=True)
    assert [one.key for one in await failures(index).some(10) if one.generation == 1] == [{"id": "5"}]


async def test_an_equal_text_that_is_embedded_elsewhere_gives_a_discarded_one_its_vector(index: LiveIndex) -> None:
    await index.apply(changes(document("5", "poison")))
    assert await index.embed() == 2
    assert (await count_index(index.connection, index.names, 1)).discarded == 1


async def test_texts_are_discarded_while_the_tables_of_another_generation_are_yet_to_be_made(index: LiveIndex) -> None:
    await index.rows(f"UPDATE {{backlog}} SET attempts = {MAX_ATTEMPTS} WHERE generation = 1 RETURNING 1")
    await index.connection.execute("DROP TABLE cdcsync.articles_vectors_2_fresh CASCADE")
    assert await failures(index).discard() == 2


async def test_a_text_that_an_earlier_version_tried_more_often_has_failed(index: LiveIndex) -> None:
    await index.apply(changes(document("5", "bad")))
    await index.rows(
        f"UPDATE {{backlog}} SET attempts = {MAX_ATTEMPTS + 3}, error = 'refused' WHERE attempts = 0 RETURNING 1"
    )
    assert [one.key for one in await failures(index).some(10)] == [{"id": "5"}] * 2
    assert await failures(index).discard() == 2
