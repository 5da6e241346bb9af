"""How far the audit of an index is, and when the index was last proven equal."""

from __future__ import annotations

import pytest

from cdcsync.postgres.sessions import Connection
from cdcsync.target.audits import START, Audits, Place
from tests.support import relations
from tests.support.indexes import SCHEMA

pytestmark = [pytest.mark.server, pytest.mark.anyio]

AUDITS = Audits(SCHEMA)


@pytest.fixture
async def registered(connection: Connection) -> Connection:
    """A session on a target that has two indexes."""
    return await relations.registered(connection, "articles", "notes")


async def test_an_index_that_was_never_audited_has_no_audit(registered: Connection) -> None:
    assert await AUDITS.read(registered, "articles") is None
    assert await AUDITS.all(registered) == {}


async def test_a_comparison_is_continued_at_the_place_where_it_was_left(registered: Connection) -> None:
    await AUDITS.begin(registered, "articles")
    places = (Place("rows", ("eu", "7")), Place("orphans", None), Place("chunks", ("4711",)))
    found = None
    for place in places:
        await AUDITS.advance(registered, "articles", place, documents=10, differences=0, undecided=0)
        found = await AUDITS.read(registered, "articles")
        assert found is not None
        assert found.place == place
    assert found is not None
    assert (found.documents, found.finished_at, found.proven_at, found.found_at) == (30, None, None, None)
    assert set(await AUDITS.all(registered)) == {"articles"}


async def test_an_index_is_proven_equal_by_a_whole_comparison_that_finds_nothing(registered: Connection) -> None:
    await AUDITS.begin(registered, "articles")
    await AUDITS.finish(registered, "articles")
    equal = await AUDITS.read(registered, "articles")
    assert equal is not None
    assert equal.finished_at == equal.proven_at is not None

    await AUDITS.begin(registered, "articles")
    begun = await AUDITS.read(registered, "articles")
    assert begun is not None
    assert (begun.place, begun.documents, begun.finished_at, begun.proven_at) == (START, 0, None, equal.proven_at)
    await AUDITS.advance(registered, "articles", Place("orphans", None), documents=10, differences=2, undecided=1)
    await AUDITS.advance(registered, "articles", Place("chunks", None), documents=0, differences=1, undecided=1)
    await AUDITS.finish(registered, "articles")
    differs = await AUDITS.read(registered, "articles")
    assert differs is not None
    assert (differs.differences, differs.proven_at) == (3, equal.proven_at)
    assert differs.finished_at is not None
    assert differs.found_at is not None


@pytest.mark.parametrize("differs", [True, False])
async def test_a_finding_from_before_the_clock_went_back_does_not_outlive_a_proof_nor_a_proof_a_finding(
    registered: Connection, differs: bool
) -> None:
    await AUDITS.begin(registered, "articles")
    await registered.execute(
        "UPDATE cdcsync.audits SET proven_at = now() + interval '1 hour', found_at = now() + interval '1 hour'"
    )
    await AUDITS.advance(
        registered, "articles", Place("chunks", None), documents=1, differences=int(differs), undecided=0
    )
    await AUDITS.finish(registered, "articles")
    audit = await AUDITS.read(registered, "articles")
    assert audit is not None
    assert (audit.proven_at is None, audit.found_at is None) == (differs, not differs)


async def test_what_a_proof_leaves_out_is_kept_while_the_next_comparison_goes_on(registered: Connection) -> None:
    await AUDITS.begin(registered, "articles")
    await AUDITS.advance(registered, "articles", Place("chunks", None), documents=10, differences=0, undecided=2)
    await AUDITS.finish(registered, "articles")
    await AUDITS.begin(registered, "articles")
    begun = await AUDITS.read(registered, "articles")
    assert begun is not None
    assert (begun.undecided, begun.proven_without) == (0, 2)
    await AUDITS.finish(registered, "articles")
    ended = await AUDITS.read(registered, "articles")
    assert ended is not None
    assert ended.proven_without == 0
