"""`wait_for` with vectors against a model: it is true where no text committed before its position lacks its vector."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from cdcsync.model.changeset import BACKFILL, LIVE, ChangeSet, Document, Kept
from cdcsync.target.ddl.relations import Names
from cdcsync.target.keys import discard_vectors
from cdcsync.target.pipelines import Pipelines
from tests.support.indexes import SCHEMA, LiveIndex, changes, document, kept, live_index, make_spec, register
from tests.support.servers import Server, fresh_database

pytestmark = pytest.mark.server

TEXTS = ("a", "b", "c", "d")
APART = 0x10
"""Between the commits of two batches."""


class Write(msgspec.Struct, frozen=True):
    """What becomes of a key in a batch: another document, none, or (without texts given) other carried values."""

    texts: tuple[str, ...] | None
    lane: int


class Step(msgspec.Struct, frozen=True):
    """A batch, the texts whose vectors come with it, how many are embedded after it, and whose are made again."""

    written: dict[str, Write]
    inline: frozenset[str]
    embedded: int
    discarded: frozenset[str]


class Model(msgspec.Struct):
    """Since when the source has had the texts of each document."""

    documents: dict[str, dict[str, int]] = msgspec.field(default_factory=dict)

    def turn(self, step: Step, lsn: int) -> ChangeSet:
        """Take the step and return it as what `prepare` would make of it."""
        entries = list[Document | Kept]()
        deleted = list[str]()
        for key, write in step.written.items():
            before = self.documents.get(key)
            if write.texts is None:
                if before is not None:
                    entries.append(kept(key, str(lsn)))
            elif write.texts:
                since = 0 if write.lane == BACKFILL else lsn
                made = document(key, *write.texts, existed=before is not None, lane=write.lane, lsn=lsn)
                entries.append(msgspec.structs.replace(made, since=since))
                self.documents[key] = {one: min(since, (before or {}).get(one, since)) for one in write.texts}
            else:
                deleted.append(key)
                self.documents.pop(key, None)
        return changes(*entries, deleted=deleted, inline=sorted(step.inline))


STEPS = st.lists(
    st.builds(
        Step,
        written=st.dictionaries(
            st.sampled_from(("1", "2", "3")),
            st.builds(
                Write,
                texts=st.none() | st.lists(st.sampled_from(TEXTS), max_size=4).map(tuple),
                lane=st.sampled_from((LIVE, LIVE, LIVE, BACKFILL)),
            ),
            max_size=3,
        ),
        inline=st.frozensets(st.sampled_from(TEXTS), max_size=1),
        embedded=st.integers(0, 2),
        discarded=st.frozensets(st.sampled_from(("1", "2")), max_size=1),
    ),
    min_size=2,
    max_size=6,
)


@pytest.fixture(scope="module")
def live(server: Server) -> Iterator[tuple[asyncio.Runner, LiveIndex]]:
    with fresh_database(server) as database, asyncio.Runner() as runner:
        opening = live_index(database, make_spec(search=None))
        index = runner.run(opening.__aenter__())
        runner.run(follow(index))
        yield runner, index
        runner.run(opening.__aexit__(None, None, None))


async def follow(index: LiveIndex) -> None:
    """Register the index in a pipeline that is far ahead."""
    await Pipelines(SCHEMA, "s").ensure(index.connection, "p")
    await register(index.connection, index.spec, slot="s")
    await index.connection.execute("UPDATE cdcsync.pipelines SET checkpoint = '1/0'")


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_waiting_with_vectors_ends_where_no_text_from_before_lacks_its_vector(
    live: tuple[asyncio.Runner, LiveIndex], steps: Sequence[Step]
) -> None:
    runner, index = live

    async def example() -> None:
        names = Names(SCHEMA, index.spec.name)
        for table in (names.chunks, names.backlog, names.vectors(1)):
            await index.connection.execute(sql.SQL("DELETE FROM {}").format(table))
        model = Model()
        for at, step in enumerate(steps, start=1):
            await index.apply(model.turn(step, at * APART))
            await check(index, model, at)
            if step.embedded:
                await index.embed(step.embedded)
                await check(index, model, at)
            if step.discarded:
                async with index.connection.transaction():
                    await discard_vectors(index.connection, SCHEMA, index.spec, [(key,) for key in step.discarded])
                await check(index, model, at)

    runner.run(example())


async def check(index: LiveIndex, model: Model, batches: int) -> None:
    """Compare what `wait_for` says of positions behind each of so many commits."""
    lacking = await index.rows(
        "SELECT c.id::text, c.content FROM {chunks} AS c WHERE NOT EXISTS (SELECT FROM {vectors} AS v"
        " WHERE v.chunk_id = c.chunk_id AND v.content_hash = c.content_hash)"
    )
    since = [model.documents[key][text] for key, text in lacking]
    positions = [at * APART + 1 for at in range(batches + 1)]
    answers = await index.rows(
        "SELECT cdcsync.wait_for('articles', '0/0'::pg_lsn + at, '0', vectors => true)"
        " FROM unnest(%s::int[]) WITH ORDINALITY AS t(at, place) ORDER BY place",
        positions,
    )
    assert [answer for (answer,) in answers] == [not any(one < at for one in since) for at in positions]
