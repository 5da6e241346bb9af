"""Searches and documents under a caller's claims.

The tenant of a caller is held twice: by a filter that is added to every statement here, and by row-level security in
the target (`target/ddl/policies`), for which each session names its tenant before it is used.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
from psycopg import sql

from cdcsync.config import Config
from cdcsync.embedders import make_embedder, require_model
from cdcsync.embedders.queries import QueryEmbedder
from cdcsync.errors import EmbedderSetupError, EmbedError
from cdcsync.lsn import Lsn
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.comparisons import comparisons
from cdcsync.postgres.pool import Pool
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, speaking_of
from cdcsync.serve.identity import Principal
from cdcsync.serve.problems import Problem
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.policies import SETTING
from cdcsync.target.search import Hit, Mode, search, stored_spec

STORED_S = 15.0
"""How long what is known of an index is taken for true: a migration to another model is followed within that."""

EXAMPLES = 3
"""Values of each column that `list_indexes` shows, so that an agent sees how they are written."""


class SearchRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A search. The query is words, which are alternatives; "quoted phrases" must occur, -words must not."""

    query: str
    k: int = 10
    mode: Mode = "hybrid"
    filter: dict[str, Any] = {}
    per_document: bool = True
    skip: int = 0
    after_lsn: str | None = None
    headline: bool = False


class Found(msgspec.Struct, frozen=True):
    """A hit; `vector_rank` and `text_rank` are its places among what each leg found."""

    key: dict[str, Any]
    columns: dict[str, Any]
    content: str
    score: float
    chunk_no: int
    distance: float | None = None
    vector_rank: int | None = None
    text_rank: int | None = None
    stale: bool = False
    headline: str | None = None


class Answer(msgspec.Struct, frozen=True):
    """The result of a search.

    :ivar as_of_lsn: the index holds everything that the source had committed up to here.
    :ivar lag_seconds: how long ago the index was last known to hold everything.
    :ivar warning: what the search had to do without.
    :ivar left_out: hits that were found and cut to keep the answer short.
    """

    index: str
    hits: list[Found]
    as_of_lsn: str | None
    lag_seconds: float | None
    warning: str | None = None
    left_out: int = 0


class Document(msgspec.Struct, frozen=True):
    """A document: its chunks in order."""

    index: str
    key: dict[str, Any]
    columns: dict[str, Any]
    chunks: list[str]
    etag: str
    left_out: int = 0


class ColumnInfo(msgspec.Struct, frozen=True):
    """A column that a filter can name."""

    name: str
    type: str
    examples: list[Any] = []


class IndexInfo(msgspec.Struct, frozen=True):
    """An index that can be searched."""

    name: str
    table: str
    key: list[ColumnInfo]
    columns: list[ColumnInfo]
    keywords: bool
    state: str
    as_of_lsn: str | None
    lag_seconds: float | None


class Reader:
    """The indexes that the server offers, over a pool of sessions. For any number of tasks."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._serve = config.serve
        self._schema = config.target.schema
        self._pool = Pool(
            config.serve.dsn or config.target.dsn,
            "target",
            size=config.serve.connections,
            application_name="cdcsync serve",
        )
        self._models: dict[str, QueryEmbedder] = {}
        self._stored: dict[str, tuple[float, IndexSpec]] = {}
        self.offered = tuple(config.serve.indexes or config.indexes)
        for name in self.offered:
            config.index_named(name)

    async def aclose(self) -> None:
        """Close sessions and models."""
        with anyio.CancelScope(shield=True):
            await self._pool.aclose()
            for model in self._models.values():
                await model.aclose()

    async def ping(self) -> None:
        """Ask the target anything.

        :raises TargetUnavailable, SetupError: it does not answer.
        """
        async with self._pool.connection() as connection:
            with speaking_of("target"):
                await fetch_value(connection, "SELECT 1")

    async def search(self, who: Principal, index: str, request: SearchRequest) -> Answer:
        """Search an index.

        :raises Problem: the request cannot be answered.
        :raises CdcsyncError: the target or the model cannot answer it now.
        """
        self._check(request)
        async with self._session(who) as connection:
            spec = await self._spec(connection, index)
        vector, warning = await self._vector(spec, request)
        async with self._session(who) as connection:
            if request.after_lsn is not None:
                await self._wait_for(connection, index, request.after_lsn)
            hits = await search(
                connection,
                self._schema,
                spec,
                text=request.query,
                vector=vector,
                k=request.k,
                mode="text" if warning else request.mode,
                filter=self._filter(who, spec, request.filter),
                per_document=request.per_document,
                skip=request.skip,
                headline="" if request.headline else None,
                timeout_s=self._serve.deadline_s,
            )
            lsn, lag = await self._freshness(connection, index)
        return Answer(index, [self._found(hit) for hit in hits], lsn, lag, warning)

    async def document(self, who: Principal, index: str, key: Sequence[str]) -> Document:
        """Return a document by its key, as texts in the order of the key's columns.

        :raises Problem: 404, there is none, or the caller may not see it.
        """
        missing = Problem(404, "No such document", "the index has no document of this key")
        if any("\0" in part for part in key):
            raise missing
        async with self._session(who) as connection:
            spec = await self._spec(connection, index)
            if len(key) != len(spec.shape.key):
                raise Problem(
                    422,
                    "The key is not whole",
                    f"the key has the columns {', '.join(spec.shape.key)}",
                    "give a value for each, in this order, separated by commas",
                )
            equal = await comparisons(connection, spec.key_types)
            conditions = [
                sql.SQL("{} {} {}::").format(sql.Identifier(name), one.equal, sql.Literal(value)) + sql.SQL(type_)
                for name, one, value, type_ in zip(spec.shape.key, equal, key, spec.key_types, strict=True)
            ]
            column = self._serve.tenant.column
            if column is not None and column in spec.shape.key + spec.shape.carried:
                conditions.append(
                    sql.SQL("{}::pg_catalog.text = {}").format(sql.Identifier(column), sql.Literal(who.tenant))
                )
            shown = [name for name in spec.shape.key + spec.shape.carried if not self._hidden(name)]
            statement = sql.SQL(
                "SELECT {}, content, encode(document_hash, 'hex'), commit_lsn::text FROM {} WHERE {} ORDER BY chunk_no"
            ).format(
                sql.SQL(", ").join(map(sql.Identifier, shown)),
                Names(self._schema, index).chunks,
                sql.SQL(" AND ").join(conditions),
            )
            with speaking_of("target", where=f"index {index}"):
                try:
                    cursor = await connection.execute(statement)
                except Exception as error:
                    if str(getattr(error, "sqlstate", "") or "").startswith("22"):
                        raise missing from None  # a text that is not a value of the key's type is not a key
                    raise
                rows = await cursor.fetchall()
        if not rows:
            raise missing
        values = dict(zip(shown, rows[0], strict=False))
        mark = hashlib.sha256("\0".join([*map(str, rows[0][-2:]), *map(str, values.values())]).encode()).hexdigest()
        return Document(
            index,
            {name: values[name] for name in spec.shape.key if name in values},
            {name: values[name] for name in spec.shape.carried if name in values},
            [row[len(shown)] for row in rows],
            f'"{mark[:24]}"',
        )

    async def list_indexes(self, who: Principal) -> list[IndexInfo]:
        """Return the indexes, what a filter can say of each, and how fresh they are."""
        listed = []
        async with self._session(who) as connection:
            for name in self.offered:
                spec = await self._spec(connection, name)
                lsn, lag = await self._freshness(connection, name)
                with speaking_of("target", where=f"index {name}"):
                    state = await fetch_value(
                        connection,
                        sql.SQL("SELECT state FROM {} WHERE name = %s").format(sql.Identifier(self._schema, "indexes")),
                        [name],
                    )
                    examples = await self._examples(connection, who, spec)
                types = dict(zip(spec.shape.key + spec.shape.carried, spec.key_types + spec.carried_types, strict=True))
                key, columns = (
                    [ColumnInfo(one, types[one], examples[one]) for one in names if not self._hidden(one)]
                    for names in (spec.shape.key, spec.shape.carried)
                )
                table = str(spec.config.table_name)
                keywords = spec.config.search is not None
                listed.append(IndexInfo(name, table, key, columns, keywords, str(state), lsn, lag))
        return listed

    async def embed(self, index: str, texts: Sequence[str]) -> list[list[float]]:
        """Return the vectors of queries by an index's model."""
        self._offered(index)
        vectors = await self._model(self._config.indexes[index].embedder).embed(texts)
        return [[float(value) for value in vector] for vector in vectors]

    # -- what a caller may see ------------------------------------------------------------------------------------

    def _hidden(self, column: str) -> bool:
        return column == self._serve.tenant.column

    def _filter(self, who: Principal, spec: IndexSpec, wanted: Mapping[str, Any]) -> dict[str, Any]:
        """Return the caller's filter with what its claims add.

        :raises Problem: it names the bound column, which the caller does not know of.
        """
        column = self._serve.tenant.column
        if column is None:
            return dict(wanted)
        if column in wanted:
            raise Problem(
                422,
                "The call cannot be answered",
                f"the filter names a column that the index does not have: {column}",
                "GET /v1/indexes lists the columns",
            )
        if column not in spec.shape.key + spec.shape.carried:
            raise Problem(403, "Not allowed", f"the index {spec.name} is not divided by tenants")
        return {**wanted, column: who.tenant}

    def _found(self, hit: Hit) -> Found:
        def shown(values: Mapping[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if not self._hidden(name)}

        return Found(
            shown(hit.key),
            shown(hit.carried),
            hit.content,
            hit.score,
            hit.chunk_no,
            hit.distance,
            hit.vector_rank,
            hit.text_rank,
            hit.stale,
            hit.headline,
        )

    @asynccontextmanager
    async def _session(self, who: Principal) -> AsyncIterator[Connection]:
        """Lend a session that is the caller's for the time of the block."""
        async with self._pool.connection() as connection:
            with speaking_of("target"):
                await connection.execute("SELECT set_config(%s, %s, false)", [SETTING, who.tenant or ""])
            yield connection

    # -- the index ------------------------------------------------------------------------------------------------

    def _offered(self, index: str) -> None:
        if index not in self.offered:
            raise Problem(
                404, "No such index", f"there is no index {index[:80]!r}", f"there are: {', '.join(self.offered)}"
            )

    async def _spec(self, connection: Connection, index: str) -> IndexSpec:
        self._offered(index)
        until, spec = self._stored.get(index, (0.0, None))
        if spec is None or anyio.current_time() > until:
            spec = await stored_spec(connection, self._schema, index, self._config.indexes[index])
            self._stored[index] = (anyio.current_time() + STORED_S, spec)
        return spec

    def _check(self, request: SearchRequest) -> None:
        """Refuse what costs too much, before anything is spent on it."""
        serve = self._serve
        wrong: str | None = None
        if not 1 <= request.k <= serve.max_k:
            wrong, fix = "k is out of range", f"ask for 1 to {serve.max_k} hits, and use skip for more"
        elif not 0 <= request.skip <= 1_000:
            wrong, fix = "skip is out of range", "skip 0 to 1000 hits"
        elif len(request.query) > serve.max_query_characters:
            wrong, fix = "the query is too long", f"use at most {serve.max_query_characters} characters"
        elif b"\\u0000" in msgspec.json.encode(request.filter, enc_hook=str):
            wrong, fix = "the filter holds characters that no text can hold", "leave out NUL"
        elif "\0" in request.query or any("\ud800" <= one <= "\udfff" for one in request.query):
            wrong, fix = "the query holds characters that no text can hold", "leave out NUL and lone surrogates"
        else:
            fix = ""
        if wrong is not None:
            raise Problem(422, "The call cannot be answered", wrong, fix)

    def _model(self, name: str) -> QueryEmbedder:
        if name not in self._models:
            embedder = make_embedder(name, self._config.embedders[name])
            self._models[name] = QueryEmbedder(embedder, timeout_s=self._serve.deadline_s / 2)
        return self._models[name]

    async def _vector(self, spec: IndexSpec, request: SearchRequest) -> tuple[Any, str | None]:
        """Return the query's vector, or None and what to tell the caller about it."""
        if request.mode == "text" or not request.query.strip():
            return None, None
        model = self._model(spec.config.embedder)
        try:
            require_model(model.embedder, spec.model)
            return await model.embed_one(request.query), None
        except EmbedderSetupError:
            raise
        except EmbedError as error:
            if request.mode == "vector" or spec.config.search is None:
                raise
            return None, f"searched by words alone: {error.message}"

    async def _wait_for(self, connection: Connection, index: str, lsn: str) -> None:
        try:
            position = Lsn.parse(lsn)
        except ValueError:
            raise Problem(422, "The call cannot be answered", "after_lsn is not an LSN", "such as 0/16B3748") from None
        statement = sql.SQL("SELECT {}(%s, %s::pg_lsn, %s * interval '1 s')").format(
            sql.Identifier(self._schema, "wait_for")
        )
        with speaking_of("target", where=f"index {index}"):
            reached = await fetch_value(connection, statement, [index, str(position), self._serve.deadline_s / 2])
        if not reached:
            raise Problem(
                503, "Not yet", "the index has not reached after_lsn", "call again, or without it", retry_after_s=1
            )

    async def _freshness(self, connection: Connection, index: str) -> tuple[str | None, float | None]:
        statement = sql.SQL(
            "SELECT p.checkpoint::text, extract(epoch FROM now() - greatest(p.commit_time, p.caught_up_at))::float8"
            " FROM {} i JOIN {} p USING (slot) WHERE i.name = %s"
        ).format(sql.Identifier(self._schema, "indexes"), sql.Identifier(self._schema, "pipelines"))
        with speaking_of("target", where=f"index {index}"):
            cursor = await connection.execute(statement, [index])
            row = await cursor.fetchone()
        if row is None:
            return None, None
        return row[0], None if row[1] is None else round(max(0.0, row[1]), 3)

    async def _examples(self, connection: Connection, who: Principal, spec: IndexSpec) -> dict[str, list[Any]]:
        """Return a few values of each column, out of the first rows."""
        names = [*spec.shape.key, *spec.shape.carried]
        condition: sql.Composable = sql.SQL("true")
        column = self._serve.tenant.column
        if column is not None:
            if column not in names:
                return {name: [] for name in names}
            condition = sql.SQL("{}::pg_catalog.text = {}").format(sql.Identifier(column), sql.Literal(who.tenant))
        cursor = await connection.execute(
            sql.SQL("SELECT {} FROM {} WHERE {} LIMIT 20").format(
                sql.SQL(", ").join(map(sql.Identifier, names)), Names(self._schema, spec.name).chunks, condition
            )
        )
        rows = await cursor.fetchall()
        seen: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows:
            for name, value in zip(names, row, strict=True):
                if value is not None and value not in seen[name] and len(seen[name]) < EXAMPLES:
                    seen[name].append(value)
        return seen
