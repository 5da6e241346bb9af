"""An index as callers of the server may see it: searches and documents under their claims."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import anyio
import msgspec
import psycopg
import structlog
from psycopg import sql

from cdcsync.config.serving import Serve
from cdcsync.embedders import Vectors
from cdcsync.errors import (
    EmbedderLoading,
    EmbedderSetupError,
    EmbedError,
    ModelChanged,
    NotReached,
    SetupError,
    TargetUnavailable,
    TextRejected,
)
from cdcsync.index import SWITCHES, Index, Resources
from cdcsync.lsn import Lsn
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.postgres.texts import is_text
from cdcsync.serve.budget import shortened
from cdcsync.serve.exposure import exposure
from cdcsync.serve.identity import Principal
from cdcsync.serve.messages import Answer, ColumnInfo, Document, Found, IndexInfo, SearchRequest
from cdcsync.serve.problems import Problem, without_rows
from cdcsync.serve.visibility import Visibility
from cdcsync.target.ddl.filters import Column, read_columns, read_value
from cdcsync.target.ddl.names import Names
from cdcsync.target.ddl.serving import require_schemas
from cdcsync.target.freshness import Freshness, read_freshness
from cdcsync.target.search import Hit, check_text, load_values, value_in_path, written_value

log = structlog.get_logger()

T = TypeVar("T")

FRESHNESS_S = 0.2
"""How long a session tells a position in the WAL again: its index holds what it held, and lag is told to the second."""

EXAMPLES = 3
"""Values of each column that `list_indexes` shows, so that an agent sees how they are written."""

EXAMPLE_CHARACTERS = 100
"""How much of a value is enough for that."""

EXAMPLES_LOCK_MS = 100
EXAMPLES_MS = 500
"""How long examples may wait for a lock on an index's chunks, and be looked for: the list goes without them then."""

DOCUMENT_BYTES = 8 * 2**20
"""How much text of a document one call may read: each of those at the same time holds it in memory a few times over."""

UNDEFINED_TABLE = "42P01"

ALTERED = (UNDEFINED_TABLE, "42703")
"""The SQLSTATEs of a statement about relations and columns that the index had a moment ago."""

TOO_LATE = ("55P03", "57014")
"""The SQLSTATEs of a lock that was waited for too long, and of a statement that took too long."""


class _Known(msgspec.Struct, frozen=True):
    """What an index is made of."""

    spec: IndexSpec
    columns: Mapping[str, Column]


class Offered(Index):
    """An index, as callers of the server may see it."""

    _for_json = True

    def __init__(self, resources: Resources, name: str, *, owner: bool = False) -> None:
        super().__init__(resources, name, owner=owner)
        self.serve = resources.config.serve
        self.visible = Visibility(self.serve)
        self._known: _Known | None = None
        self._fresh = WeakKeyDictionary[Connection, dict[tuple[str, int], tuple[float, Freshness]]]()
        """By session, as each may be with another server, and by generation: how fresh it was at some time."""
        self._fault: str | None = None
        """Why it could not be listed the last time."""

    async def reach(self, request: SearchRequest) -> None:
        """Wait until the index holds what a search asks for. Do so before `answer` if it names a position.

        :raises Problem: the request cannot be answered, or not yet.
        :raises CdcsyncError: the target cannot answer it now.
        """
        _refuse_costly(request, self.serve)
        assert request.after_lsn is not None
        try:
            reached = await self.wait_for(request.after_lsn, timeout_s=self.serve.deadline_s / 2)
        except SetupError as error:
            raise await self._unreached(error) from error
        if not reached:
            raise await self._unreached(None)

    async def answer(self, who: Principal, request: SearchRequest) -> Answer:
        """Search for a caller.

        :raises Problem: the request cannot be answered.
        :raises CdcsyncError: the target or the model cannot answer it now.
        """
        _refuse_costly(request, self.serve)
        known = await self._facts()
        if request.vector is not None and len(request.vector) != _dimensions(known.spec, request.generation):
            self._stored = None  # a generation may have become live, or be new
            known = await self._facts()
            dimensions = _dimensions(known.spec, request.generation)
            if dimensions not in (None, len(request.vector)):
                raise Problem(
                    422,
                    "The call cannot be answered",
                    f"the vector has {len(request.vector)} dimensions, the index has {dimensions}",
                    "POST /v1/embed makes vectors of the index's model",
                )
        who = await self._held(who, known)
        try:
            hits = await self.search(
                request.query,
                k=request.k,
                mode=request.mode,
                filter=self.visible.filter(who, known.spec, request.filter),
                per_document=request.per_document,
                skip=request.skip,
                vector=request.vector,
                headline="" if request.headline else None,
                settings=self.visible.settings(who),
                timeout_s=self.serve.deadline_s,
                generation=request.generation,
                after_lsn=request.after_lsn,
                wait_s=self.serve.deadline_s / 4,
            )
        except NotReached:  # the session that was to answer is with a server that is behind
            raise await self._unreached(None) from None
        except SetupError as error:
            if request.after_lsn is None:
                raise
            raise await self._unreached(error) from error
        found = [self._found(hit) for hit in hits]
        fresh, warning = hits._freshness or Freshness(), hits.warning
        if fresh.warning is not None and fresh.warning not in (warning or ""):  # the search may have said so itself
            warning = "; ".join(filter(None, [warning, fresh.warning]))
        return Answer(self.name, found, fresh.lsn, fresh.lag_s, warning, generation=hits.generation)

    async def _unreached(self, error: SetupError | None) -> Exception:
        """Return what to say of an index that does not hold a position: why no position is known, if that is so.

        :param error: what was raised instead of an answer; an exception raised in SQL may be that of `wait_for`.
        """
        if error is not None and not isinstance(error.__cause__, psycopg.errors.RaiseException):
            return error
        why = (await self._as_it_is(self._fresh_now)).warning
        if why is not None:
            return Problem(503, "Not yet", why, "call without after_lsn, or again once the index follows its source")
        return error or Problem(
            503, "Not yet", "the index has not reached after_lsn", "call again, or without it", retry_after_s=1
        )

    async def embed_queries(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Return the vectors of queries, and the generation of the index's vectors that they can be compared with.

        Each is a call of the model, as the query of a search is: no caller keeps the model from others with many.

        :raises UsageError: one of these holds a character that no text can hold.
        :raises EmbedderUnavailable: the model is away.
        :raises TextRejected: the model refuses one of these texts.
        """
        for text in texts:
            check_text(text, "texts", hint="send a list of texts")
        spec = await self._live()
        return await self._resources.models.embedder(spec).embed_each(texts), spec.generation

    def _without_model(self, what: str, error: EmbedError | EmbedderSetupError) -> str:
        """Return the warning of a search that does without a model. Why is the operator's matter: it may name hosts."""
        if isinstance(error, TextRejected):
            return f"{what}: the model refuses this query"
        log.warning("model_away", index=self.name, error=str(error), fix=error.hint)
        match error:
            case EmbedderLoading():
                return f"{what}: the model is being loaded"
            case EmbedderSetupError():
                return f"{what}: the server cannot use the model"
        return f"{what}: the model is away"

    async def document(
        self, who: Principal, key: Sequence[str] | Mapping[str, Any], *, cut_bytes: int | None = None
    ) -> Document:
        """Return a document by its key, as texts in the order of the key's columns, or by their names as a hit has it.

        A bound column in the key has the caller's value, and is not among them.

        :param cut_bytes: read no further chunk once the ones before it take so much text; `left_out` counts the others.
        :raises Problem: 404, there is none, or the caller may not see it; 403, the index does not have the tenants;
            422, it is too large for one answer and not to be cut.
        """
        missing = Problem(
            404, "No such document", "the index has no document of this key", "give the key of a hit of a search"
        )
        most = DOCUMENT_BYTES if cut_bytes is None else min(cut_bytes, DOCUMENT_BYTES)
        document = await self._as_it_is(lambda: self._document(who, key, missing, most))
        if document.left_out and cut_bytes is None:
            raise Problem(
                422,
                "The document is too large",
                f"it has more than {DOCUMENT_BYTES // 2**20} MiB of text",
                "search the index for the passages that you need",
            )
        return document

    async def _document(
        self, who: Principal, key: Sequence[str] | Mapping[str, Any], missing: Problem, most: int
    ) -> Document:
        async with self._session(who) as (connection, known, who):
            spec = known.spec
            mine = self.visible.condition(who, spec, known.columns)
            names = self.visible.shown(spec.shape.key)
            if isinstance(key, Mapping):
                given, fix = key, "give a value for each, none of them null"
            else:
                given = {one: value_in_path(known.columns[one], text) for one, text in zip(names, key, strict=False)}
                fix = "give a value for each, in this order, separated by commas"
            values_of = {name: written_value(known.columns[name], given[name]) for name in names if name in given}
            texts = {name: text for name, text in values_of.items() if text is not None}
            if len(key) != len(names) or set(texts) != set(names):
                raise Problem(422, "The key is incomplete", f"the key has the columns {', '.join(names)}", fix)
            if not all(map(is_text, texts.values())):
                raise missing
            conditions = [known.columns[name].equals(name, sql.Literal(texts[name])) for name in names]
            shown = self.visible.shown(spec.shape.key + spec.shape.carried)
            statement = sql.SQL(
                "SELECT {columns}, content, cdcsync_chunks FROM ("
                "SELECT {columns}, content, chunk_no, count(*) OVER () AS cdcsync_chunks,"
                " sum(octet_length(content)) OVER (ORDER BY chunk_no) - octet_length(content) AS cdcsync_before"
                " FROM {chunks} WHERE {mine}) AS document WHERE cdcsync_before < {most} ORDER BY chunk_no"
            ).format(
                columns=sql.SQL(", ").join(map(sql.Identifier, shown)),
                chunks=Names(self.schema, spec.relations).chunks,
                mine=sql.SQL(" AND ").join([*conditions, mine]),
                most=most,
            )
            cursor = connection.cursor()
            load_values(cursor, for_json=True)
            try:
                async with connection.transaction():
                    await cursor.execute(statement)
            except psycopg.Error:
                # A text that is not a value of the key's type is not a key.
                read = [await read_value(connection, known.columns[name], texts[name]) for name in names]
                if None in read:
                    raise missing from None
                raise
            rows = await cursor.fetchall()
        if not rows:
            raise missing
        values = dict(zip(shown, rows[0], strict=False))
        chunks, left_out = [row[-2] for row in rows], rows[0][-1] - len(rows)
        mark = hashlib.sha256("\0".join(map(str, [left_out, *values.values(), *chunks])).encode()).hexdigest()
        return Document(
            self.name,
            {name: values[name] for name in spec.shape.key if name in values},
            {name: values[name] for name in spec.shape.carried if name in values},
            chunks,
            f'"{mark[:24]}"',
            left_out=left_out,
        )

    async def info(self, who: Principal, *, examples: bool = True) -> IndexInfo:
        """Return what a filter can say of the index, and how fresh it is; of one that cannot be read, its state alone.

        :param examples: look for examples of values.
        :raises TargetUnavailable: the target does not answer now.
        """
        try:
            info = await self._info(who, examples=examples)
        except SetupError as error:
            if str(error) != self._fault:
                shown = without_rows(error)
                log.warning("index_not_searchable", index=self.name, error=str(shown), fix=shown.hint)
            self._fault, self._stored = str(error), None
            state = "gone" if error.sqlstate in (None, UNDEFINED_TABLE) else "unreadable"
            keywords = self._config.search is not None
            return IndexInfo(self.name, str(self._config.table_name), [], [], keywords, state, None, None)
        self._fault = None
        return info

    async def _info(self, who: Principal, *, examples: bool) -> IndexInfo:
        fresh = await self._as_it_is(self._fresh_now)
        values = await self._as_it_is(lambda: self._examples(who)) if examples else {}
        known = await self._facts()
        spec = known.spec
        types = dict(zip(spec.shape.key + spec.shape.carried, spec.key_types + spec.carried_types, strict=True))
        key, columns = (
            [ColumnInfo(one, types[one], values.get(one, [])) for one in self.visible.shown(names)]
            for names in (spec.shape.key, spec.shape.carried)
        )
        return IndexInfo(
            self.name,
            str(spec.config.table_name),
            key,
            columns,
            spec.config.search is not None,
            fresh.state,
            fresh.lsn,
            fresh.lag_s,
            fresh.warning,
        )

    async def _fresh_now(self) -> Freshness:
        async def now(connection: Connection) -> Freshness:
            spec = (await self._read_facts(connection)).spec
            await self._refuse_switched(connection, spec)
            return await self._freshness(connection, spec, None)

        return await self._with_connection(now)

    def _found(self, hit: Hit) -> Found:
        key, columns = (
            {name: values[name] for name in self.visible.shown(values)} for values in (hit.key, hit.carried)
        )
        return Found(
            key,
            columns,
            hit.content,
            hit.score,
            hit.chunk_no,
            hit.distance,
            hit.vector_rank,
            hit.text_rank,
            hit.stale,
            hit.headline,
        )

    # -- the target -----------------------------------------------------------------------------------------------

    @property
    def schema(self) -> str:
        """The schema of our tables."""
        return self._resources.config.target.schema

    @asynccontextmanager
    async def _session(self, who: Principal) -> AsyncIterator[tuple[Connection, _Known, Principal]]:
        """Lend a session for reading as the caller, what the index is made of now, and the caller as `_held` has it.

        :raises Problem: the caller's claim is no value of the bound column.
        :raises ModelChanged: the index is not made of what it was; see `_as_it_is`.
        """
        known = await self._facts()
        who = await self._held(who, known)
        async with self._resources.pool.connection() as connection:
            with speaking_of("target", where=f"index {self.name}"):
                async with connection.transaction():
                    for name, value in self.visible.settings(who).items():
                        await connection.execute("SELECT pg_catalog.set_config(%s, %s, true)", [name, value])
                    await self._refuse_switched(connection, known.spec)
                    yield connection, known, who

    async def _held(self, who: Principal, known: _Known) -> Principal:
        """Return a caller with the tenant as the index writes it, so that all that compares it finds the same rows.

        :raises Problem: the caller's claim is no value of the bound column.
        """
        column = self.visible.bound(known.columns)
        if column is None:  # nothing is bound, or the index is refused for want of the column
            return who
        with speaking_of("target", where=f"index {self.name}"):
            return await self.visible.held_to(who, self.name, column, self._resources.pool.connection)

    async def _facts(self) -> _Known:
        """Return what the index is made of, as far as it is known; whoever reads the index sees that it still is."""
        known = self._known
        if known is not None and known.spec is self._stored and anyio.current_time() <= self._stored_until:
            return known
        return await self._with_connection(self._read_facts)

    async def _read_facts(self, connection: Connection) -> _Known:
        spec = await self._spec(connection)
        known = self._known
        if known is None or known.spec is not spec:
            self._known = known = _Known(spec, await read_columns(connection, spec))
        return known

    async def _as_it_is(self, read: Callable[[], Awaitable[T]]) -> T:
        """Read, and again whenever the index turns out to be made of something else than it was, as searches do."""
        for _ in range(SWITCHES - 1):
            try:
                return await read()
            except SetupError as error:
                if not isinstance(error, ModelChanged) and error.sqlstate not in ALTERED:
                    raise
                self._stored = None
        return await read()

    async def _freshness(self, connection: Connection, spec: IndexSpec, position: Lsn | None) -> Freshness:
        told = self._fresh.setdefault(connection, {})
        place, now = (spec.name, spec.generation), anyio.current_time()
        read_at, fresh = told.get(place, (-inf, Freshness()))
        behind = position is not None and (fresh.lsn is None or Lsn.parse(fresh.lsn) < position)
        if behind or now - read_at > FRESHNESS_S:
            fresh = await read_freshness(connection, self.schema, spec)
            told[place] = now, fresh
        return fresh

    async def require_schemas(self) -> None:
        """See that the server's role may use what searches of the index name.

        :raises TargetUnavailable, SetupError: it may not, or the target does not answer.
        """

        async def see(connection: Connection) -> None:
            await require_schemas(connection, self.schema, await self._spec(connection))

        await self._with_connection(see)

    async def load(self) -> None:
        """Load the index's model.

        :raises EmbedderUnavailable, EmbedderSetupError: it cannot be loaded.
        """
        await self._resources.models.embedder(await self._live()).open()

    async def load_reranker(self) -> None:
        """Load the index's reranker, if it has one.

        :raises EmbedderUnavailable, EmbedderSetupError: it cannot be loaded.
        """
        await self._resources.models.open_reranker(self._config.reranker)

    async def exposure(self) -> list[str]:
        """Return what leads this server past its callers' tenants; see `exposure`. Nothing if no column is bound.

        :raises TargetUnavailable, SetupError: the target does not answer, or lacks the index.
        """
        if self.serve.tenant.column is None:
            return []
        if self.serve.role is None:
            return ["serve.role is not set"]
        known = await self._facts()
        column = self.visible.bound(known.columns)
        if column is None:
            return [f"the index has no column {self.serve.tenant.column}"]
        async with self._resources.pool.connection() as connection:
            with speaking_of("target", where=f"index {self.name}"):
                return await exposure(connection, self.schema, known.spec, self.serve, column)

    async def _examples(self, who: Principal) -> dict[str, list[Any]]:
        """Return a few values of each column, out of the first rows: those that a filter takes as they are.

        There are none if the caller may see none, and of chunks that cannot be read soon: one index that somebody has
        locked keeps nobody from the others.
        """
        if not self.visible.divides((await self._facts()).spec):
            return {}
        try:
            async with self._session(who) as (connection, known, who):
                spec = known.spec
                names = [*spec.shape.key, *spec.shape.carried]
                cursor = connection.cursor()
                load_values(cursor, for_json=True)
                await connection.execute(
                    f"SET LOCAL lock_timeout = {EXAMPLES_LOCK_MS}; SET LOCAL statement_timeout = {EXAMPLES_MS}"
                )
                await cursor.execute(
                    sql.SQL("SELECT {} FROM {} WHERE {} LIMIT 20").format(
                        sql.SQL(", ").join(map(sql.Identifier, names)),
                        Names(self.schema, spec.relations).chunks,
                        self.visible.condition(who, spec, known.columns),
                    )
                )
                rows = await cursor.fetchall()
        except Problem:
            return {}
        except TargetUnavailable as error:
            if error.sqlstate not in TOO_LATE:
                raise
            return {}
        comparable = {name for name, column in known.columns.items() if column.takes_values}
        seen: dict[str, list[Any]] = {name: [] for name in names}
        for row in rows:
            for name, value in zip(names, row, strict=True):
                if name not in comparable or value is None:
                    continue
                if value not in seen[name] and len(seen[name]) < EXAMPLES:
                    seen[name].append(value)
        return {name: [shortened(value, EXAMPLE_CHARACTERS) for value in values] for name, values in seen.items()}


def _dimensions(spec: IndexSpec, generation: int | None) -> int | None:
    """Return the dimensions of a generation's vectors, by default of the live one; None if there is no such one."""
    return next((one.dimensions for one in spec.searchable if generation in (None, one.generation)), None)


def _refuse_costly(request: SearchRequest, serve: Serve) -> None:
    """Refuse a request that costs too much or holds no text, before anything is spent on it."""
    if not 1 <= request.k <= serve.max_k:
        wrong, fix = "k is out of range", f"ask for 1 to {serve.max_k} hits, and use skip for more"
    elif not 0 <= request.skip <= 1_000:
        wrong, fix = "skip is out of range", "skip 0 to 1000 hits"
    elif len(request.query) > serve.max_query_characters:
        wrong, fix = "the query is too long", f"use at most {serve.max_query_characters} characters"
    else:
        check_text(request.query, "query", hint="send the query as a text")
        return
    raise Problem(422, "The call cannot be answered", wrong, fix)
