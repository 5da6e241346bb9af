"""`cdcsync.Index`: an index, as an application searches it.

    async with Index.open(load_config("cdcsync.toml"), "tickets") as tickets:
        hits = await tickets.search("forgot my login", k=10, filter={"tenant": 3})

It needs no worker in the same process. It keeps a few connections to the target and the model open for all tasks of an
event loop; `cdcsync.sync.Index` is the same for threads.

The rules:

1. A search needs only the target. If a model or a reranker is away, or the reranker cannot be loaded, the search
   continues without it, and `Hits.warning` says so.
2. A connection that broke while nobody used it is replaced without anybody noticing: searches only read, so one is
   simply made again.
3. The target says what the index is made of (model, dimensions, generation). A search names the generation that its
   query was embedded for, so the query is never compared with vectors of another model; and it looks which generation
   is live, so an application follows a migration with its next search, without a restart. A query is embedded anew for
   a generation that became live meanwhile; a vector that the caller brought is refused.
4. A DSN may name several servers, and each session is with one of them. What is said of a search (that it waited for a
   position, how fresh it is) is of the session that answered it.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from typing import Self, TypeVar

import anyio
import msgspec
from psycopg import sql

from cdcsync.config import Config
from cdcsync.embedders import Vectors
from cdcsync.embedders.queries import QueryModels
from cdcsync.errors import (
    EmbedderSetupError,
    EmbedError,
    ModelChanged,
    NotReached,
    TargetUnavailable,
    UsageError,
)
from cdcsync.lsn import Lsn
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.pool import Pool
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.freshness import Freshness
from cdcsync.target.search import (
    NO_SETTINGS,
    TIMEOUT_S,
    Filter,
    Hit,
    Mode,
    check_arguments,
    check_opening,
    check_switch,
    check_text,
    check_wait,
    check_whole,
    search,
    served_now,
    stored_spec,
)
from cdcsync.target.waits import Waits
from cdcsync.tracing import Tracing

T = TypeVar("T")

CONNECTIONS = 4
"""Searches of one process at the same time: a search takes milliseconds, so more connections than this mostly wait."""

MODEL_TIMEOUT_S = 5.0
"""How long a query waits for its vector: a provider takes half a second, and nobody waits much longer for a search."""

STORED_S = 30.0
"""How long what is known of an index is taken for true."""


SWITCHES = 4
"""How often a search begins again because the index was switched to another generation just then: once, in practice."""

WAIT_S = 10.0
"""How long a search or `wait_for` waits for a position, unless told otherwise."""

REACH_AGAIN_S = 0.05
"""How soon a position is asked for again of another session, if the one that was to search is behind."""


_QUOTED = "write it in quotes"
_LISTED = 'give a list of texts, such as ["a question"]'


class _Altered(ModelChanged):
    """The index has other columns or relations than a moment ago, and the same vectors."""


class Hits(list[Hit]):
    """A list of `Hit`, the best first.

    :ivar warning: what the search had to do without (the model, the reranker), or that nothing keeps the index in step,
        for people; `None` if nothing.
    :ivar generation: the generation of vectors that was searched; see `cdcsync migrate`.
    """

    def __init__(
        self,
        hits: Sequence[Hit] = (),
        warning: str | None = None,
        *,
        generation: int | None = None,
        freshness: Freshness | None = None,
    ) -> None:
        super().__init__(hits)
        self.warning = warning
        self.generation = generation
        self._freshness = freshness
        """How fresh the index was before the search, which saw at least as much; None where nobody asked."""


class Resources:
    """Shared by the indexes of one application: connections and models."""

    def __init__(
        self,
        config: Config,
        *,
        connections: int,
        model_timeout_s: float,
        application_name: str,
        tracing: Tracing | None = None,
    ) -> None:
        self.config = config
        self.models = QueryModels(config, model_timeout_s)
        self.pool = Pool(config.target.dsn, "target", size=connections, application_name=application_name)
        self.waits = Waits(config.target.dsn, application_name=application_name)
        self.tracing = tracing or Tracing()

    async def aclose(self) -> None:
        """Close them."""
        with anyio.CancelScope(shield=True):
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self.pool.aclose)
                stack.push_async_callback(self.waits.aclose)
                stack.push_async_callback(self.models.aclose)


class Index:
    """An index of the configuration, searched by any number of tasks of one event loop.

    Use it in an `async with` block. It needs no worker in the same process. It keeps a few connections and the model
    open, so open it once, at the start of the application, and not for each request. Code that runs in several event
    loops, such as `asgiref`'s `async_to_sync`, uses `cdcsync.sync.Index`: this one refuses any loop but its first.
    """

    _for_json = False
    """Whether hits are written as JSON, which holds fewer kinds of values."""

    def __init__(self, resources: Resources, name: str, *, owner: bool) -> None:
        check_text(name, "INDEX", hint="give the name of an index of the configuration")
        self.name = name
        self._config = resources.config.index_named(name)
        self._resources = resources
        self._owner = owner
        self._stored: IndexSpec | None = None
        self._stored_until = 0.0

    @classmethod
    def open(
        cls,
        config: Config,
        name: str,
        *,
        connections: int = CONNECTIONS,
        model_timeout_s: float = MODEL_TIMEOUT_S,
        application_name: str = "cdcsync index",
    ) -> Self:
        """Return the index of this name. Entering it looks it up in the target and loads its model and its reranker.

        :param connections: the most searches at the same time.
        :param model_timeout_s: how long a query may wait for its vector before the search goes by words alone.
        :param application_name: the name of its sessions in the target.
        :raises UsageError: the configuration has no such index, or another argument cannot be used.
        :raises SetupError: on entering, if the target does not hold the index or its model cannot be used.
        """
        check_opening(
            config, connections=connections, model_timeout_s=model_timeout_s, application_name=application_name
        )
        resources = Resources(
            config, connections=int(connections), model_timeout_s=model_timeout_s, application_name=application_name
        )
        return cls(resources, name, owner=True)

    def beside(self, name: str) -> Self:
        """Return another index of the same configuration, which shares connections and models and ends with this one.

        :raises UsageError: the configuration has no such index.
        """
        return type(self)(self._resources, name, owner=False)

    async def __aenter__(self) -> Self:
        """Look the index up, and load its model and its reranker.

        :raises SetupError: the target does not hold it, or its model cannot be used as configured.
        :raises TargetUnavailable: the target does not answer now.
        :raises UsageError: it was used in another event loop, or before a fork.
        """
        self._resources.pool.refuse_strangers()  # before anything that would close what others use
        try:
            spec = await self._with_connection(self._spec)
            with suppress(EmbedError):  # searches go by words, and say so
                await self._resources.models.open_embedder(spec)
            with suppress(EmbedError, EmbedderSetupError):  # hits keep their order, and say so
                await self._resources.models.open_reranker(self._config.reranker)
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._owner:
            await self._resources.aclose()

    async def search(
        self,
        text: str | None,
        *,
        k: int = 10,
        mode: Mode = "hybrid",
        filter: Filter | None = None,
        per_document: bool = True,
        skip: int = 0,
        weights: tuple[float, float] = (1.0, 1.0),
        rerank: bool = True,
        vector: Sequence[float] | None = None,
        headline: str | None = None,
        settings: Mapping[str, str] = NO_SETTINGS,
        timeout_s: float = TIMEOUT_S,
        generation: int | None = None,
        after_lsn: str | None = None,
        wait_s: float = WAIT_S,
    ) -> Hits:
        """Return the `k` best hits for a text, the best first.

        In the text, words are alternatives, `"quoted phrases"` have to occur, and a `-word` must not occur. With a
        vector, `None` searches by that alone.

        If the model is away, or does not answer in time, a hybrid search goes by words alone and `Hits.warning` says
        so; the same if the provider refuses us, because a key has expired, say, or if the configuration does not have
        the model of the vectors that are live. A model that failed is left alone for five seconds. A reranker that is
        away or cannot be loaded is skipped with a warning, too.

        :param k: how many hits.
        :param mode: by nearness of meaning (`"vector"`), by words (`"text"`), or by both, fused by rank (`"hybrid"`).
        :param filter: values for key and carried columns, never SQL: `{"tenant": 3, "status": ["open", "new"],
            "created_at": {"gte": "2026-01-01"}, "closed_at": None}`. The operators are `eq`, `ne`, `in`, `lt`, `lte`,
            `gt`, `gte`, `like`, `contains`, `overlaps` and `null`. Values may be of any type that a hit's columns
            have. An array has all elements of a list by `{"tags": {"contains": ["a", "b"]}}` and any of them by
            `overlaps`, and jsonb contains a value by `{"extra": {"contains": {"a": 1}}}`. To the other operators arrays
            and JSON are texts: `"{a,b}"` and `'{"a": 1}'`, as a list means any of its values.
        :param per_document: return each document once, by its best chunk.
        :param skip: leave out this many of the first hits, for the next page; pages of the same `k` continue each
            other.
        :param weights: of vectors and of words, in a hybrid search.
        :param rerank: let the index's reranker, if it has one, order the best hits anew; `score` is then its.
        :param vector: the query's vector, if you have it already; the model is not asked then.
        :param headline: options of `ts_headline` for `Hit.headline`, `""` for the server's defaults; `None` makes no
            headlines.
        :param settings: PostgreSQL settings for this search alone, such as one that a row-level security policy reads.
        :param timeout_s: how long the server may take.
        :param generation: the generation of vectors to search, such as the one that `vector` was made for; `None` is
            the live one. `Hits.generation` says which one was searched.
        :param after_lsn: search once the index holds everything up to this position; see `wait_for`. It is the server
            which answers that does, so that this is right where `target.dsn` names several.
        :param wait_s: how long to wait for that.
        :raises UsageError: an argument cannot be used.
        :raises ModelChanged: another generation has become live, and `vector` came without its generation: embed again.
        :raises EmbedderUnavailable: the mode is `vector`, or the index has no keyword search, and the model is away.
        :raises TargetUnavailable: the target does not answer now; `NotReached`: it does not hold `after_lsn` in time.
        """
        if text is not None or vector is None:
            check_text(text, "text", hint=_QUOTED)
        check_arguments(
            texts={"text": text, "headline": headline},
            k=k,
            mode=mode,
            skip=skip,
            filter=filter,
            per_document=per_document,
            weights=weights,
            vector=vector,
            timeout_s=timeout_s,
            settings=settings,
        )
        if generation is not None:
            check_whole(generation, "generation", hint="give the number that Hits.generation has")
        check_wait(wait_s, "wait_s")
        position = None if after_lsn is None else _position(after_lsn, "search")
        reranked = rerank and text is not None and self._config.reranker
        reranker = self._resources.models.reranker(reranked) if reranked else None
        first, count = (skip, k) if reranker is None else (0, max(skip + k, reranker.candidates))
        schema, tracing = self._resources.config.target.schema, self._resources.tracing

        async def once() -> Hits:
            spec = await self._generation(generation)
            embedded: Sequence[float] | Vectors | None = vector
            warnings: list[str] = []
            by_words = mode == "text"
            if mode != "text" and vector is None and text is not None and text.strip():
                try:
                    model = self._resources.models.embedder(spec)
                    with tracing.span("cdcsync.embed_query", embedder=model.embedder.name):
                        embedded = await model.embed_one(text)
                except (EmbedError, EmbedderSetupError) as error:
                    if mode == "vector" or self._config.search is None:
                        raise
                    warnings.append(self._without_model("searched by words alone", error))
                    by_words = True

            async def ask(connection: Connection) -> Hits:
                if generation is None:
                    await self._refuse_switched(connection, spec)
                if position is not None and not await self._holds(connection, spec.name, position):
                    raise NotReached(
                        f"the index does not hold {position} yet", where=f"index {self.name}", hint="search again later"
                    )
                freshness = await self._freshness(connection, spec, position)
                found = await search(
                    connection,
                    schema,
                    spec,
                    text=text,
                    vector=None if mode == "text" else embedded,
                    k=count,
                    mode="text" if by_words else mode,
                    filter=filter,
                    per_document=per_document,
                    skip=first,
                    weights=weights,
                    headline=headline,
                    settings=settings,
                    timeout_s=timeout_s,
                    traceparent=tracing.traceparent(),
                    warnings=warnings,
                    for_json=self._for_json,
                )
                warning = "; ".join(dict.fromkeys(warnings)) or None
                return Hits(found, warning, generation=spec.generation, freshness=freshness)

            with tracing.span("cdcsync.statement", index=self.name):
                return await self._with_connection(ask)

        async def settled() -> Hits:
            unnamed = vector is not None and generation is None and mode != "text"
            return await self._after_switches(once, unnamed=unnamed)

        found = await (settled() if after_lsn is None else self._once_reached(settled, after_lsn, wait_s))
        if reranker is None or text is None:
            return found
        ranked = await self.rerank(text, found)
        return Hits(ranked[skip : skip + k], ranked.warning, generation=found.generation, freshness=found._freshness)

    async def _once_reached(self, ask: Callable[[], Awaitable[Hits]], lsn: str, wait_s: float) -> Hits:
        """Search once the session that answers holds everything up to a position.

        :raises NotReached: none did in time.
        """
        until, pause_s = anyio.current_time() + wait_s, 0.0
        while True:
            try:
                return await ask()
            except NotReached:
                left_s = until - anyio.current_time()
                if left_s <= 0:
                    raise
                await anyio.sleep(min(pause_s, left_s))
                await self.wait_for(lsn, timeout_s=left_s - pause_s)
                pause_s = REACH_AGAIN_S

    async def _freshness(self, connection: Connection, spec: IndexSpec, position: Lsn | None) -> Freshness | None:
        """Return how fresh the index is in a session; None where nobody is told. It holds `position` already."""
        return None

    async def _after_switches(self, once: Callable[[], Awaitable[Hits]], *, unnamed: bool) -> Hits:
        """Search, and again whenever another generation became live meanwhile.

        :param unnamed: the caller brought a vector without its generation, so nobody can embed its query again.
        :raises ModelChanged: another generation became live, and the vector may be of another model.
        """
        for _ in range(SWITCHES - 1):
            try:
                return await once()
            except _Altered:
                self._stored = None
            except ModelChanged as error:
                self._stored = None
                if unnamed:
                    raise ModelChanged(
                        f"the query's vector may be of another model: {error.message}",
                        where=error.where,
                        hint="embed the query again, or name the generation that its vector was made for",
                    ) from error
        return await once()

    async def rerank(self, text: str, hits: Sequence[Hit]) -> Hits:
        """Return hits ordered by the index's reranker, for hits that you have merged or filtered yourself.

        The first `candidates` get its scores and come first; the others keep their order behind them. If the reranker
        is away or cannot be loaded, all hits come back as they were, with a warning.

        :raises UsageError: the index has no reranker, or an argument cannot be used.
        """
        self._resources.pool.refuse_strangers()
        check_text(text, "rerank", hint=_QUOTED)
        given: object = hits
        if not isinstance(given, Sequence) or not all(isinstance(hit, Hit) for hit in given):
            raise UsageError("these are not hits", where="rerank", hint="give hits of searches")
        warning, generation = (hits.warning, hits.generation) if isinstance(hits, Hits) else (None, None)
        if self._config.reranker is None:
            raise UsageError(
                "the index has no reranker", where=f"index {self.name}", hint="name a [rerankers.NAME] section in it"
            )
        reranker = self._resources.models.reranker(self._config.reranker)
        best, others = hits[: reranker.candidates], hits[reranker.candidates :]
        if not best:
            return Hits(hits, warning, generation=generation)
        try:
            scores = await reranker.score(text, [hit.content for hit in best])
        except (EmbedError, EmbedderSetupError) as error:
            missing = self._without_model("not reranked", error)
            return Hits(hits, f"{warning}; {missing}" if warning else missing, generation=generation)
        scored = [msgspec.structs.replace(hit, score=float(score)) for hit, score in zip(best, scores, strict=True)]
        return Hits([*sorted(scored, key=lambda hit: -hit.score), *others], warning, generation=generation)

    def _without_model(self, what: str, error: EmbedError | EmbedderSetupError) -> str:
        """Return the warning of a search that does without a model; a server tells its callers less."""
        return f"{what}: {error}"

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Return the vectors of queries, `float32[n, dimensions]`, by the model of the generation that is live now.

        :raises UsageError: the argument is not a list of texts that PostgreSQL can hold, without NUL and lone
            surrogates; a text alone would be taken for its characters.
        :raises EmbedderUnavailable: the model is away.
        :raises TextRejected: the model refuses one of these texts.
        """
        listed = None if isinstance(texts, str) or not isinstance(texts, Iterable) else list(texts)
        if listed is None:
            raise UsageError("these are not texts", where="texts", hint=_LISTED)
        for text in listed:
            check_text(text, "texts", hint=_LISTED)
        return await self._resources.models.embedder(await self._live()).embed(listed)

    async def wait_for(self, lsn: str | None = None, *, timeout_s: float = WAIT_S, vectors: bool = False) -> bool:
        """Wait until the index holds everything that the source had committed up to an LSN; return whether it does.

        To read your own writes, take `SELECT pg_current_wal_insert_lsn()` on the source after the commit, keep it (in a
        session or a cookie), and wait for it before the search, or give it to `search` as `after_lsn`. Tasks that wait
        keep no connection from searches.

        :param lsn: `None` takes the source's position now.
        :param timeout_s: how long to wait before returning `False`.
        :param vectors: also wait until the texts up to there have their vectors.
        :raises UsageError: an argument cannot be used.
        :raises SetupError: the target does not hold the index, or it is paused or no longer followed.
        :raises SourceUnavailable: `lsn` is None and the source does not answer.
        """
        check_wait(timeout_s, "timeout_s")
        check_switch(vectors, "vectors")
        if lsn is None:
            lsn = await self.lsn()
        position = _position(lsn, "wait_for")

        async def reached(connection: Connection, within_s: float) -> bool:
            return await self._holds(connection, self.name, position, within_s, vectors=vectors)

        async def look() -> bool:
            return await self._with_connection(lambda connection: reached(connection, 0))

        return await self._resources.waits.wait(look, reached, timeout_s)

    async def _holds(
        self, connection: Connection, name: str, position: Lsn, within_s: float = 0, *, vectors: bool = False
    ) -> bool:
        """Say whether the index holds everything up to a position, within so many seconds.

        :param name: its own, or that of the one which stands beside it.
        """
        function = sql.Identifier(self._resources.config.target.schema, "wait_for")
        statement = sql.SQL("SELECT {}(%s, %s::pg_lsn, %s * interval '1 s', %s)").format(function)
        with speaking_of("target", where=f"index {self.name}"):
            return bool(await fetch_value(connection, statement, [name, str(position), within_s, vectors]))

    async def lsn(self) -> str:
        """Return the source's position now: everything that was committed before is below it.

        :raises SourceUnavailable, SetupError: the source cannot be asked.
        """
        async with await connect(
            self._resources.config.source.dsn, "source", application_name="cdcsync index"
        ) as source:
            with speaking_of("source"):
                return str(await fetch_value(source, "SELECT pg_current_wal_insert_lsn()::text"))

    async def _live(self) -> IndexSpec:
        """Return the index with the generation that is live now."""

        async def now(connection: Connection) -> IndexSpec:
            try:
                await self._refuse_switched(connection, await self._spec(connection))
            except ModelChanged:
                self._stored = None
            return await self._spec(connection)

        return await self._with_connection(now)

    async def _generation(self, generation: int | None) -> IndexSpec:
        """Return the index with one of its generations; None is the live one.

        :raises ModelChanged: there is no such generation any more.
        :raises UsageError: there never was one.
        """
        schema = self._resources.config.target.schema
        known = (await self._with_connection(self._spec)).searchable
        if generation is None:
            return known[0]
        if all(one.generation != generation for one in known):
            self._stored = None  # it may have come into being since
            known = (await self._with_connection(self._spec)).searchable
        for one in known:
            if one.generation == generation:
                return one
        now = await self._with_connection(lambda connection: served_now(connection, schema, self.name))
        last = max(0 if now is None else now.last_generation, *(one.generation for one in known))
        kind = ModelChanged if 1 <= generation <= last else UsageError
        raise kind(
            f"the index has no generation {generation} of vectors",
            where=f"index {self.name}",
            hint=f"generation {known[0].generation} is live, by {known[0].model}",
        )

    async def _refuse_switched(self, connection: Connection, spec: IndexSpec) -> None:
        """See that the index is what a spec says, and a query embedded for the generation that is live now.

        :raises ModelChanged: it is not.
        """
        now = await served_now(connection, self._resources.config.target.schema, self.name)
        if now is None or now.fits(spec):
            return
        if now.generation != spec.generation:
            raise ModelChanged(
                f"generation {now.generation} is live, not {spec.generation}", where=f"index {self.name}"
            )
        raise _Altered("it has other columns than a moment ago", where=f"index {self.name}")

    async def _spec(self, connection: Connection) -> IndexSpec:
        if self._stored is None or anyio.current_time() > self._stored_until:
            self._stored = await stored_spec(connection, self._resources.config.target.schema, self.name, self._config)
            self._stored_until = anyio.current_time() + STORED_S
        return self._stored

    async def _with_connection(self, ask: Callable[[Connection], Awaitable[T]]) -> T:
        """Ask the target; ask once more if the connection broke."""
        for last in (False, True):
            async with self._resources.pool.connection() as connection:
                try:
                    with speaking_of("target", where=f"index {self.name}"):
                        return await ask(connection)
                except TargetUnavailable:
                    if last or not connection.closed:
                        raise
        raise AssertionError


def _position(lsn: str, where: str) -> Lsn:
    """Read a position that a caller gives.

    :raises UsageError: it is none.
    """
    try:
        return Lsn.parse(lsn)
    except (ValueError, TypeError):
        wrong = repr(lsn)[:80]
        raise UsageError(f"{wrong} is not an LSN", where=where, hint="give it as pg_lsn prints it") from None
