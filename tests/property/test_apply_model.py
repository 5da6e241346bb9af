"""Apply against a model: whatever batches come, the index holds the model's documents, and nothing waits in vain."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from psycopg import sql

from cdcsync.documents.templates import hash_text
from cdcsync.model.changeset import BACKFILL, LIVE, ChangeSet, Document, Kept
from cdcsync.model.rows import Row
from cdcsync.target.ddl.relations import Names
from tests.support.indexes import (
    SCHEMA,
    LiveIndex,
    changes,
    document,
    kept,
    live_index,
    make_spec,
    vector_text,
)
from tests.support.servers import Server, fresh_database

pytestmark = pytest.mark.server

KEYS = ("1", "1.0", "1.00", "2", "3", "0.5")
"""The first three are one key to the server."""
TEXTS = ("a", "b", "c", "", "tab\t \\N \\ é\n")


class Write(msgspec.Struct, frozen=True):
    """What becomes of a key in a batch: another document, or (without chunks given) only other carried values."""

    carried: str | None
    texts: tuple[str, ...] | None
    lane: int


class Step(msgspec.Struct, frozen=True):
    """A batch, and how many texts are embedded after it; at most one text of each key is written."""

    truncated: bool
    deleted: frozenset[str]
    absent: frozenset[str]
    written: dict[str, Write]
    inline: frozenset[str]
    embedded: int


class Model(msgspec.Struct):
    """What the index is to hold: carried value, chunks and the key's own text, by what the server takes for a key."""

    documents: dict[float, tuple[str, str | None, tuple[str, ...]]]

    def turn(self, step: Step) -> ChangeSet:
        """Take the step and return it as what `prepare` would make of it."""
        if step.truncated:
            self.documents.clear()
        before = dict(self.documents)
        for key in step.deleted:
            self.documents.pop(float(key), None)
        for key in step.absent:
            if float(key) in self.documents and self.documents[float(key)][0] == key:
                del self.documents[float(key)]
        entries: list[Document | Kept] = []
        for key, write in step.written.items():
            stored = before.get(float(key))
            # Where a batch names a key twice, its order decides: such a document is written anew.
            twice = any(float(key) == float(other) for other in step.deleted | step.absent)
            if write.texts is None:
                if stored is None or twice:
                    continue
                entries.append(kept(key, write.carried))
                self.documents[float(key)] = (key, write.carried, stored[2])
            else:
                existed = stored is not None and not twice
                entries.append(document(key, *write.texts, carried=(write.carried,), existed=existed, lane=write.lane))
                self.documents.pop(float(key), None)
                if write.texts:
                    self.documents[float(key)] = (key, write.carried, write.texts)
        deleted = [] if step.truncated else sorted(step.deleted)
        absent = [] if step.truncated else sorted(step.absent)
        return changes(*entries, deleted=deleted, absent=absent, truncated=step.truncated, inline=sorted(step.inline))


def _once(written: dict[str, Write]) -> dict[str, Write]:
    """Keep one text of each key, as the source can only hold one."""
    return {key: written[key] for key in {float(key): key for key in written}.values()}


WRITES = st.builds(
    Write,
    carried=st.sampled_from((None, "0", "1.50", "1.5")),
    texts=st.none() | st.lists(st.sampled_from(TEXTS), max_size=3).map(tuple),
    lane=st.sampled_from((LIVE, BACKFILL)),
)
STEPS = st.lists(
    st.builds(
        Step,
        truncated=st.integers(0, 9).map(lambda number: number == 9),
        deleted=st.frozensets(st.sampled_from(KEYS), max_size=2),
        absent=st.frozensets(st.sampled_from(KEYS), max_size=2),
        written=st.dictionaries(st.sampled_from(KEYS), WRITES, max_size=4).map(_once),
        inline=st.frozensets(st.sampled_from(TEXTS), max_size=2),
        embedded=st.integers(0, 2),
    ),
    min_size=1,
    max_size=5,
)


class Bench:
    """One index on one connection, emptied for each example; its loop runs only while something is awaited."""

    def __init__(self, runner: asyncio.Runner, index: LiveIndex) -> None:
        self.index = index
        self.run = runner.run

    async def empty(self) -> None:
        names = Names(SCHEMA, self.index.spec.name)
        for table in (names.chunks, names.backlog, names.vectors(1)):
            await self.index.connection.execute(sql.SQL("DELETE FROM {}").format(table))

    async def documents(self) -> dict[float, tuple[str, str | None, tuple[str, ...]]]:
        """Return what the index holds, in the model's form."""
        found: dict[float, tuple[str, str | None, tuple[str, ...]]] = {}
        rows = await self.index.rows(
            "SELECT id::text, tenant::text, array_agg(content ORDER BY chunk_no),"
            " array_agg(chunk_no ORDER BY chunk_no) FROM {chunks} GROUP BY id::text, tenant::text"
        )
        for key, carried, texts, numbers in rows:
            assert numbers == list(range(len(texts)))
            assert float(key) not in found
            found[float(key)] = (key, carried, tuple(texts))
        return found


@pytest.fixture(scope="module")
def bench(server: Server) -> Iterator[Bench]:
    spec = make_spec(name="model", key={"id": "numeric"}, carried={"tenant": "numeric"}, search=None)
    with fresh_database(server) as database, asyncio.Runner() as runner:
        opening = live_index(database, spec)
        index = runner.run(opening.__aenter__())
        yield Bench(runner, index)
        runner.run(opening.__aexit__(None, None, None))


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(steps=STEPS)
def test_the_index_holds_the_models_documents_and_each_chunk_has_a_vector_or_waits(
    bench: Bench, steps: Sequence[Step]
) -> None:
    async def example() -> None:
        index = bench.index
        await bench.empty()
        model = Model({})
        for step in steps:
            await check_stored(index, model)
            batch = model.turn(step)
            await index.apply(batch)
            assert await bench.documents() == model.documents
            assert await index.faults() == []
            await check_vectors(index)
            before = await index.dump()
            await index.apply(batch)
            if makes_anew(batch):
                assert await bench.documents() == model.documents
                assert await index.faults() == []
            else:
                assert await index.dump() == before
            if step.embedded:
                await index.embed(step.embedded)
                assert await index.faults() == []
                await check_vectors(index)
        while await index.embed():
            pass
        assert await index.waiting() == []
        assert await index.faults() == []

    bench.run(example())


async def check_stored(index: LiveIndex, model: Model) -> None:
    """The look-up by key agrees with the model, whatever text the key has; of several texts of one it says nothing."""
    expected = {(f"{key:.3f}",): hash_text("\n".join(texts)) for key, (_, _, texts) in model.documents.items()}
    assert await index.writer.stored_hashes([(f"{float(key):.3f}",) for key in ("1", "2", "3", "0.5")]) == expected
    assert await index.writer.stored_hashes([("1",), ("1.0",)]) == {}


async def check_vectors(index: LiveIndex) -> None:
    """A vector is of the text that its hash names, current or not."""
    by_hash = {hash_text(text): vector_text(text) for text in TEXTS}
    for text_hash, embedding in await index.rows("SELECT content_hash, embedding::text FROM {vectors}"):
        assert embedding == by_hash[text_hash]


def makes_anew(batch: ChangeSet) -> bool:
    """Say whether documents are deleted and written in one batch: then their chunks get new ids each time."""
    deleted = {float(key[0]) for key in (*batch.deleted, *batch.absent)}
    return batch.truncated or any(float(one.key[0]) in deleted for one in batch.documents)


@settings(max_examples=30)
@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=30), unique=True, min_size=1, max_size=8
    )
)
def test_any_text_arrives_as_it_is(bench: Bench, texts: Sequence[str]) -> None:
    async def example() -> None:
        index = bench.index
        await bench.empty()
        no_carried: Row = (None,)
        await index.apply(changes(*[document(str(at), text, carried=no_carried) for at, text in enumerate(texts)]))
        found = await index.rows("SELECT id::int, content FROM {chunks} ORDER BY 1")
        assert found == list(enumerate(texts))

    bench.run(example())
