"""Two generations of an index beside each other: recall of each, and how much of what one finds the other finds too.

    chunks at random ─► the nearest others, by each generation's own vectors ─► overlap
    judged questions ─► each generation's answers ─► measures with intervals, and their difference

Stored vectors stand for queries, as in `flows/evaluate`. Where two models agree on what is near a text, searches will
change little; where they do not, only judged questions tell which of them is right.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import cast

import msgspec
import psycopg
from psycopg import sql

from cdcsync.errors import UsageError
from cdcsync.flows.evaluate.gates import Verdict
from cdcsync.flows.evaluate.recall import evaluate
from cdcsync.flows.evaluate.sampling import sample_vectors
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.target import evaluations
from cdcsync.target.ddl.names import Names, vector_schema
from cdcsync.target.search import nearest_statement, tune

EF_SEARCH = 200
"""How far HNSW looks for the neighbours that are compared: recall is measured apart, and should not count here."""

SEPARATOR = "\x1f"
"""Between the values of a key, where they are compared as one text."""

Key = tuple[str, ...]

QUERIES = 100
"""Chunks whose neighbours are compared: the mean overlap is good to some hundredths."""


class Quality(msgspec.Struct, frozen=True):
    """The measurements of two generations.

    :ivar k: how many of the nearest are looked at.
    :ivar recall: of each generation by its number, None where it has too few vectors to tell.
    :ivar overlap: mean share of the k nearest chunks of the one that are among those of the other, or of the nearest
        documents if they have other chunks; None without any.
    """

    k: int
    queries: int
    recall: dict[int, float | None]
    overlap: float | None

    def judge(self, generation: int, floors: Mapping[str, float]) -> list[Verdict]:
        """Return the verdict of each gate on a generation; what could not be measured does not pass.

        :param floors: the least value of `recall` and `overlap`; see `parse_floors`.
        """
        found = {"recall": self.recall.get(generation), "overlap": self.overlap}
        return [
            Verdict(False, f"{name} could not be measured, and {least:g} is asked for")
            if (value := found[name]) is None
            else Verdict(value >= least, f"{name} {value:.3f}, at least {least:g}")
            for name, least in floors.items()
        ]


def parse_floors(texts: Sequence[str]) -> tuple[dict[str, float], list[str]]:
    """Return the gates on recall and overlap, and the others as they are.

    :raises UsageError: the value of one is not a share.
    """
    own: dict[str, float] = {}
    others = []
    for text in texts:
        name, _, value = (part.strip() for part in text.partition("="))
        if name not in ("recall", "overlap"):
            others.append(text)
            continue
        try:
            own[name] = float(value)
        except ValueError:
            own[name] = -1.0
        if not 0 <= own[name] <= 1:
            raise UsageError(f"{text!r} is not a minimum", where="--min", hint=f"write it as {name}=0.95")
    return own, others


async def compare(
    connection: Connection, schema: str, one: IndexSpec, other: IndexSpec, *, k: int = 10, queries: int = QUERIES
) -> Quality:
    """Measure two generations of an index, and store the recall of each; reads only, but for that.

    :raises TargetUnavailable: the target does not answer now.
    """
    recall: dict[int, float | None] = {}
    for spec in (one, other):
        if await _enough(connection, schema, spec):
            found = await evaluate(connection, schema, spec, queries=queries, k=k)
            recall[spec.generation] = found.measured[0].recall
            with speaking_of("target", where=f"index {spec.name}"):
                await evaluations.store(connection, schema, found)
        else:
            recall[spec.generation] = None
    with speaking_of("target", where=f"index {one.name}"):
        shares = await _overlaps(connection, schema, (one, other), k, queries)
    return Quality(k, len(shares), recall, round(sum(shares) / len(shares), 6) if shares else None)


async def _enough(connection: Connection, schema: str, spec: IndexSpec) -> bool:
    vectors = Names(schema, spec.relations).vectors(spec.generation)
    with speaking_of("target", where=f"index {spec.name}"):
        cursor = await connection.execute(sql.SQL("SELECT FROM {} OFFSET 1 LIMIT 1").format(vectors))
        return await cursor.fetchone() is not None


async def _overlaps(
    connection: Connection, schema: str, specs: tuple[IndexSpec, IndexSpec], k: int, queries: int
) -> list[float]:
    """Return for each of some chunks which share of its neighbours both generations agree on."""
    extension = await vector_schema(connection)
    if specs[0].relations != specs[1].relations:
        return await _document_overlaps(connection, schema, extension, specs, k, queries)
    names = Names(schema, specs[0].relations)
    drawn = await sample_vectors(connection, names, extension, specs[0], queries)
    cursor = await connection.execute(
        sql.SQL("SELECT chunk_id, embedding::text FROM {} WHERE chunk_id = ANY(%s)").format(
            names.vectors(specs[1].generation)
        ),
        [[chunk for chunk, _ in drawn]],
    )
    others = dict(cast(list[tuple[int, str]], await cursor.fetchall()))
    sample = [(chunk, vector, others[chunk]) for chunk, vector in drawn if chunk in others]
    statements = [nearest_statement(schema, extension, spec, None) for spec in specs]
    shares = []
    for chunk, *vectors in sample:
        near = [await _nearest(connection, *of, k, chunk) for of in zip(statements, vectors, strict=True)]
        if near[0]:
            shares.append(len(near[0] & near[1]) / len(near[0]))
    return shares


async def _document_overlaps(
    connection: Connection, schema: str, extension: str, specs: tuple[IndexSpec, IndexSpec], k: int, queries: int
) -> list[float]:
    """Return for each of some documents which share of the nearest others both generations agree on.

    Their chunks are not the same: the first one of a document stands for it.
    """
    names = Names(schema, specs[0].relations)
    drawn = await sample_vectors(connection, names, extension, specs[0], queries)
    documents = set(await _documents(connection, schema, specs[0], [chunk for chunk, _ in drawn]))
    firsts = [await _first_vectors(connection, schema, spec, documents) for spec in specs]
    statements = [nearest_statement(schema, extension, spec, None) for spec in specs]
    shares = []
    for own in firsts[0].keys() & firsts[1].keys():
        near = []
        for spec, statement, vectors in zip(specs, statements, firsts, strict=True):
            chunks = await _nearest_chunks(connection, statement, vectors[own], EF_SEARCH)
            found = dict.fromkeys(await _documents(connection, schema, spec, chunks))
            near.append(set([one for one in found if one != own][:k]))
        if near[0]:
            shares.append(len(near[0] & near[1]) / len(near[0]))
    return shares


async def _documents(connection: Connection, schema: str, spec: IndexSpec, chunks: Sequence[int]) -> list[Key]:
    """Return the keys of the documents that chunks are of, in the order of these."""
    cursor = psycopg.AsyncRawCursor(connection)
    await cursor.execute(
        sql.SQL(
            "SELECT {} FROM unnest($1::bigint[]) WITH ORDINALITY AS n (chunk_id, place) JOIN {} AS c USING (chunk_id)"
            " ORDER BY n.place"
        ).format(_key(spec), Names(schema, spec.relations).chunks),
        [list(chunks)],
    )
    return [tuple(key) for (key,) in await cursor.fetchall()]


async def _first_vectors(
    connection: Connection, schema: str, spec: IndexSpec, documents: Collection[Key]
) -> dict[Key, str]:
    """Return the vector of the first chunk of each of these documents."""
    names = Names(schema, spec.relations)
    cursor = psycopg.AsyncRawCursor(connection)
    await cursor.execute(
        sql.SQL(
            "SELECT {key}, v.embedding::text FROM {chunks} AS c JOIN {vectors} AS v USING (chunk_id)"
            " WHERE c.chunk_no = 0 AND array_to_string({key}, $2) = ANY($1::text[])"
        ).format(key=_key(spec), chunks=names.chunks, vectors=names.vectors(spec.generation)),
        [[SEPARATOR.join(one) for one in documents], SEPARATOR],
    )
    return {tuple(key): vector for key, vector in await cursor.fetchall()}


def _key(spec: IndexSpec) -> sql.Composed:
    """Return the key of a chunk `c` as an array of texts."""
    # By the output functions of the types: a cast to text may be a function of a type's owner.
    columns = [sql.SQL("pg_catalog.concat({})").format(sql.Identifier("c", column)) for column in spec.shape.key]
    return sql.SQL("ARRAY[{}]").format(sql.SQL(", ").join(columns))


async def _nearest(connection: Connection, statement: sql.Composed, vector: str, k: int, own: int) -> set[int]:
    """Return the k chunks nearest to a vector, without its own."""
    found = await _nearest_chunks(connection, statement, vector, k + 1)
    return set([id_ for id_ in found if id_ != own][:k])


async def _nearest_chunks(connection: Connection, statement: sql.Composed, vector: str, count: int) -> list[int]:
    """Return the chunks nearest to a vector, the nearest first."""
    raw = psycopg.AsyncRawCursor(connection)
    async with connection.transaction(force_rollback=True):
        await connection.execute("SET TRANSACTION READ ONLY")
        await tune(connection, EF_SEARCH, filtered=False)
        await raw.execute(statement, [vector, count], prepare=False)
        found = cast(Sequence[tuple[int, float]], await raw.fetchall())
    return [id_ for id_, _ in found]
