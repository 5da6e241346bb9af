"""A single index: what the configuration and the model say of it, what is stored of it already, and its `IndexSpec`.

Source: pgvector's README (HNSW).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import msgspec

from cdcsync.config import Index, QualifiedName
from cdcsync.config.names import quote
from cdcsync.documents.chunks import make_chunker
from cdcsync.documents.documents import Documents, make_documents
from cdcsync.documents.related import TableFacts
from cdcsync.embedders.protocol import Distance, Embedder
from cdcsync.errors import ConfigError
from cdcsync.model.conditions import Where
from cdcsync.model.rows import Shape
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.target import TargetFacts
from cdcsync.preflight.types import choose_types, sortable
from cdcsync.source.columns import Column
from cdcsync.source.fingerprints import Fingerprint, collations_of
from cdcsync.source.relations import Table
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation

MAX_HNSW_DIMENSIONS = {"vector": 2_000, "halfvec": 4_000}
"""The most dimensions of an HNSW index, by the column's type: pgvector keeps an element on one page."""

FINGERPRINT_DIGITS = 32
"""128 bits in hexadecimal, as for the hashes of documents."""


class WantedVectors(msgspec.Struct, frozen=True):
    """The vectors that the configuration asks for, where the index has others."""

    index: Index
    """The section as it was written."""
    embedder: Embedder
    distance: Distance

    @property
    def made_by(self) -> tuple[object, ...]:
        """The facts that decide which vectors these are; see `Generation.made_by`."""
        return self.embedder.identity, self.embedder.dimensions, self.index.vector_type, self.distance

    def is_met_by(self, one: Generation) -> bool:
        """Say whether a generation is what the configuration asks for."""
        return one.made_by == self.made_by and one.built_like(self.index.hnsw)


TEXT_TYPES = ("text", "character")
"""Types whose values are text without a conversion, which a generated column must not need."""


class Plan(msgspec.Struct):
    """The facts known about one index so far; for each that stays None a finding says why."""

    name: str
    index: Index
    documents: Documents | None = None
    embedder: Embedder | None = None
    fingerprint: str | None = None
    table: Table | None = None
    where: Where | None = None
    facts: dict[QualifiedName, TableFacts] = {}
    """Of the tables of an index that has several, as statements need them."""
    computed: dict[str, Column] = {}
    """The columns that are made of related rows, with the types of their values."""
    oids: dict[QualifiedName, int] = {}
    """The OIDs of related tables."""
    members: dict[QualifiedName, str | None] = {}
    """The tables of an index over many equal ones, each with the publication's condition on its rows."""
    left_out: dict[QualifiedName, Finding] = {}
    """Tables that an index over many continues without, and why."""
    findings: list[Finding] = []
    """The findings about this index alone."""
    seen: Fingerprint | None = None
    """The index's fingerprint when it was examined; None if its table is missing, or the index does not exist."""
    unfit: bool = False
    """Whether the catalog tells that the table is not fit for the index, so that the watch sees when it is."""
    locked: bool = False
    """Whether somebody held a table of it locked, so that it could not be examined."""
    generations: list[Generation] = []
    """The index's other generations of vectors, besides the live one."""
    wanted: WantedVectors | None = None
    """The vectors that the configuration asks for, where the index has others; `index` and `embedder` are then what it
    has, if the configuration has an embedder for that."""
    search: str | None = None
    """The `search` of the column of words that the index has, which the configuration's waits for to be made again."""
    cutter: str | None = None
    """The embedder whose tokens the stored chunks are measured in, if they are as they would be cut now."""
    in_use: frozenset[str] = frozenset()
    """The conditions that the index goes by already: a row that one of them fails for is no reason to refuse it."""
    unlike: list[Finding] = []
    """Where the index has other vectors than the configuration asks for, so that it waits for a migration."""

    @property
    def others(self) -> list[Generation]:
        """The generations of vectors that the index keeps besides the live one."""
        return [one for one in self.generations if one.state != "dropping"]

    @property
    def reasons(self) -> dict[str, str]:
        """Why tables are left out, by their names."""
        return {str(name): why.with_fix for name, why in self.left_out.items()}


def make_plan(name: str, index: Index, embedder: Embedder | None, findings: list[Finding]) -> Plan:
    """Check what the configuration says alone, without a server."""
    plan = Plan(name, index, embedder=embedder)
    documents = ""
    where = f"indexes.{name}"
    try:
        plan.documents = make_documents(index, where=where)
        documents = plan.documents.fingerprint
    except ConfigError as error:
        plan.documents = None
        findings.append(Finding.of(error, where))
    if embedder is None:
        return plan
    findings += model_faults(name, index, embedder)
    where = f"indexes.{name}.chunking"
    try:
        chunker = make_chunker(index.chunking, embedder.tokenizer_json, embedder.max_input_tokens, where=where)
    except ConfigError as error:
        findings.append(Finding.of(error, where))
        return plan
    if plan.documents is not None:
        plan.fingerprint = fingerprint(documents, chunker.fingerprint)
    return plan


def fingerprint(documents: str, chunker: str) -> str:
    """Return what identifies how an index's documents and chunks are made."""
    return hashlib.sha256(f"{documents}\0{chunker}".encode()).hexdigest()[:FINGERPRINT_DIGITS]


def distance_of(index: Index, embedder: Embedder) -> Distance:
    """Return the configured distance, or the one that the model was made for."""
    return embedder.distance if index.distance == "auto" else index.distance


def model_faults(name: str, index: Index, embedder: Embedder) -> Iterator[Finding]:
    """Say whether the model's vectors can be indexed."""
    most, halved = MAX_HNSW_DIMENSIONS[index.vector_type], MAX_HNSW_DIMENSIONS["halfvec"]
    if embedder.dimensions > most:
        yield Finding.error(
            f"indexes.{name}.vector_type",
            f"an HNSW index of type {index.vector_type} holds at most {most:,} dimensions,"
            f" and {index.embedder} makes {embedder.dimensions:,}",
            f'set indexes.{name}.vector_type = "halfvec"'
            if embedder.dimensions <= halved
            else f"name an embedder that makes at most {halved:,} dimensions",
        )

    if index.hnsw.quantise == "binary" and distance_of(index, embedder) == "l2":
        yield Finding.error(
            f"indexes.{name}.hnsw.quantise",
            "the signs of components say nothing about the lengths of vectors, which the distance l2 compares",
            f'set indexes.{name}.distance = "cosine", or leave hnsw.quantise out',
        )


def stored_faults(name: str, index: Index, stored: Entry, slot: str) -> Iterator[Finding]:
    """Say where the configuration is of another index than the one that exists under this name."""
    where = f"indexes.{name}"
    table = str(index.table_name)
    if stored.source_table != table:
        yield Finding.error(
            f"{where}.table",
            f"the index exists and is of {stored.source_table}, not of {table}",
            f"configure this one as [indexes.OTHER], with a view of its own, and leave {where} as it was",
        )
    if stored.slot != slot:
        yield Finding.error(
            where,
            f"the index exists and is kept by the pipeline of slot {stored.slot}, not of {slot}",
            f'set source.slot = "{stored.slot}", or name another schema with target.schema for this pipeline',
        )


def vector_faults(plan: Plan, stored: Entry) -> Iterator[Finding]:
    """Say where the configuration asks for other vectors than the index has; only a migration exchanges them.

    Nothing is embedded again without being asked: the index would be empty meanwhile, and the bill a surprise.
    """
    name, index, embedder = plan.name, plan.index, plan.embedder
    where = f"indexes.{name}"
    migrate = f"to exchange the vectors without an interruption of searches: cdcsync migrate {name} start"
    if stored.state != "live":
        drop = f"stop the worker and its standbys, cdcsync drop {name}, and start the worker again"
        migrate = f"if it was never loaded: {drop}; otherwise, {migrate}"
    if stored.vector_type != index.vector_type:
        yield Finding.error(
            f"{where}.vector_type",
            f"the vectors of index {name} are of type {stored.vector_type}, and the configuration says"
            f" {index.vector_type}",
            f'{migrate}; to keep them: {where}.vector_type = "{stored.vector_type}"',
        )
    if embedder is None:
        return
    if (stored.model, stored.dimensions) != (embedder.identity, embedder.dimensions):
        yield Finding.error(
            f"{where}.embedder",
            f"the vectors of index {name} are of {stored.model} ({stored.dimensions} dimensions), and the embedder"
            f" {index.embedder} is {embedder.identity} ({embedder.dimensions} dimensions)",
            f"{migrate}; to keep them: name an embedder that is {stored.model}",
        )
    distance = distance_of(index, embedder)
    if stored.distance != distance:
        yield Finding.error(
            f"{where}.distance",
            f"the vectors of index {name} are indexed for the distance {stored.distance}, and the configuration says"
            f" {distance}",
            f'{migrate}; to keep them: {where}.distance = "{stored.distance}"',
        )


def key_faults(name: str, stored: Entry, table: Table) -> Iterator[Finding]:
    """Say whether the table's key is the one that the existing index has."""
    if table.key and stored.key != table.key and stored.source_table == str(table.name):
        now, then = (", ".join(map(quote, key)) for key in (table.key, stored.key))
        yield Finding.error(
            str(table.name),
            f"its key is ({now}), and the index {name} exists with the key ({then})",
            f"restore the old key, or load a new index: configure it as [indexes.OTHER] and not as [indexes.{name}]",
        )


async def make_spec(
    connection: Connection,
    schema: str,
    plan: Plan,
    target: TargetFacts,
    row_filter: str | None,
    findings: list[Finding],
    *,
    shared: bool,
) -> IndexSpec | None:
    """Return the index as it is to be; None when the plan has a hole, whose reason is noted already.

    :param schema: that of our own tables, where an existing index tells which types it has.
    :param shared: whether source and target are one database.
    """
    table, documents, embedder, index = plan.table, plan.documents, plan.embedder, plan.index
    if table is None or documents is None or embedder is None or plan.fingerprint is None:
        return None
    columns = (*table.key, *index.columns)
    known = table.columns | plan.computed
    if not table.key or not all(column in known for column in columns):
        return None
    if index.where and plan.where is None:
        return None
    deciding = plan.where.deciding if plan.where is not None else ()
    stored = target.stored.get(plan.name)
    paused = stored is not None and stored.state == "paused"
    stem = None if stored is None else stored.stem
    columns_known = [known[column] for column in columns]
    types = await choose_types(
        connection, schema, plan.name, columns_known, findings, stem=stem, paused=paused, shared=shared
    )
    indexed = {types[column] for column in index.indexed if column in types}
    unsorted = {one for one in indexed if not await sortable(connection, one)}
    findings += [
        Finding.error(
            f"indexes.{plan.name}.indexed",
            f"{quote(column)} is of type {types[column]}, which a b-tree cannot sort",
            f'remove "{column}" from indexes.{plan.name}.indexed',
        )
        for column in index.indexed
        if types.get(column) in unsorted
    ]
    if index.search_column is not None and not types.get(index.search_column, "").startswith(TEXT_TYPES):
        found = types.get(index.search_column)
        findings.append(
            Finding.error(
                f"indexes.{plan.name}.search",
                f"{quote(index.search_column)} is " + (f"of type {found}" if found else "not a column of the index"),
                "name a column of text that is in columns, and holds a language in each row",
            )
        )
    shape = Shape(
        plan.name,
        table.name,
        table.key,
        index.columns,
        documents.columns,
        deciding=deciding,
        computed=documents.computed,
        joined=documents.joined,
        many=bool(index.tables),
        inheritable=table.inheritable,
    )
    wire_types = tuple(table.columns[one].wire_type for one in shape.own if one in table.columns)
    spec = IndexSpec(
        name=plan.name,
        config=msgspec.structs.replace(index, search=plan.search or index.search),
        shape=msgspec.structs.replace(shape, types=wire_types),
        documents=documents,
        source_key_types=tuple(table.columns[column].value_type for column in table.key),
        key_types=tuple(types[column] for column in table.key),
        carried_types=tuple(types[column] for column in index.columns),
        model=embedder.identity,
        dimensions=embedder.dimensions,
        distance=distance_of(index, embedder),
        fingerprint=plan.fingerprint,
        row_filter=row_filter,
        where=plan.where,
        generation=stored.generation if stored else target.dropped.get(plan.name, 0) + 1,
        table_oid=table.oid,
        collations=collations_of(table, (*shape.own, *(plan.where.columns if plan.where is not None else ()))),
        facts=plan.facts,
        members=plan.members,
        left_out=plan.reasons,
        oids=plan.oids,
        cutter=plan.cutter,
        stem=stem,
    )
    return msgspec.structs.replace(spec, others=tuple(one.spec(spec) for one in plan.others))
