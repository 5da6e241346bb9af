"""One call over HTTP or MCP: its caller, permission, deadline, work, timer, and row in the record.

HTTP and MCP differ in how they read a call and write its answer, and in nothing else.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

import anyio
import anyio.to_thread
import msgspec
import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from cdcsync import tracing
from cdcsync.config import Config
from cdcsync.errors import CdcsyncError, EmbedError, UsageError
from cdcsync.serve.budget import BYTES_PER_TOKEN, cut_answer, cut_document, tokens
from cdcsync.serve.calls import Recorder, query_hash
from cdcsync.serve.identity import Authenticator, Principal
from cdcsync.serve.limits import STRANGERS, Limits, Refused
from cdcsync.serve.messages import Answer, Document, IndexInfo, SearchRequest, Vectors
from cdcsync.serve.problems import Problem, problem_of, without_rows
from cdcsync.serve.reader import Reader
from cdcsync.target.calls import Call

log = structlog.get_logger()

T = TypeVar("T")

Tool = Literal["list_indexes", "search", "fetch", "embed", "mcp"]
"""The tools; `mcp` is a call of MCP that was refused before its body was read."""

BUCKETS_S = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

MAX_TEXTS = 64
"""Texts of one call of embed."""

_TRACE = re.compile(r"00-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")


class Metrics:
    """The tool server's metrics; label values come from closed sets."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.seconds = Histogram(
            "cdcsync_serve_call_seconds",
            "Time to answer a call, by tool and outcome (ok, wrong, refused, limited, failed).",
            ("tool", "outcome"),
            buckets=BUCKETS_S,
            registry=self.registry,
        )
        self.empty = Counter(
            "cdcsync_serve_empty_searches_total", "Searches that found nothing.", ("index",), registry=self.registry
        )
        self.dropped = Counter(
            "cdcsync_serve_dropped_records_total",
            "Calls that are not in the record: it could not keep up, or the target refused them.",
            registry=self.registry,
        )
        self.waiting = Gauge("cdcsync_serve_waiting_calls", "Calls that wait for their turn.", registry=self.registry)


class Caller(msgspec.Struct, frozen=True):
    """How a call came: its `Authorization` and `traceparent` headers."""

    authorization: str | None = None
    traceparent: str | None = None

    @property
    def trace_id(self) -> str | None:
        """The trace that the call is part of."""
        match = _TRACE.fullmatch(self.traceparent or "")
        return match[1] if match else None


class _Noted(msgspec.Struct):
    """The record's facts about a call, besides who and when."""

    index: str | None = None
    query: str | None = None
    filters: Sequence[str] = ()
    hits: int | None = None


class Service:
    """The tools. Enter it before the first call; leaving it closes sessions and stores the record.

    :param candid: callers are the operator's own, and are told what only an operator can change.
    """

    def __init__(self, config: Config, *, candid: bool = False) -> None:
        serve = config.serve
        self.serve = serve
        self._candid = candid
        self.metrics = Metrics()
        self.tracing = tracing.from_environment(os.environ)
        self.reader = Reader(config, self.tracing)
        self.authenticator = Authenticator(serve)
        self.limits = Limits(serve)
        self.metrics.waiting.set_function(lambda: self.limits.waiting)
        dsn = serve.dsn or config.target.dsn
        self.recorder = Recorder(dsn, config.target.schema, serve.audit_days, self.metrics.dropped)

    async def aclose(self) -> None:
        """Close sessions and models, and send the last spans."""
        with anyio.CancelScope(shield=True):
            await self.reader.aclose()
            await anyio.to_thread.run_sync(self.tracing.close)

    async def list_indexes(self, caller: Caller) -> list[IndexInfo]:
        """Return the indexes that can be searched.

        :raises Problem: the call is refused or failed; so do the other tools.
        """

        async def work(who: Principal) -> list[IndexInfo]:
            until = anyio.current_time() + self.serve.deadline_s / 4
            return [
                await index.info(who, examples=anyio.current_time() < until) for index in self.reader.indexes.values()
            ]

        return await self._call("list_indexes", caller, _Noted(), work)

    async def search(self, caller: Caller, index: str, request: SearchRequest, *, cut: bool = False) -> Answer:
        """Search an index.

        :param cut: keep the answer within `serve.answer_tokens`, as an agent needs it.
        """
        noted = _Noted(index, request.query, sorted(request.filter))

        async def reach() -> None:
            await self.reader.index(index).reach(request)

        async def work(who: Principal) -> Answer:
            answer = await self.reader.index(index).answer(who, request)
            noted.hits = len(answer.hits)
            if not answer.hits:
                self.metrics.empty.labels(index).inc()
            if cut:
                answer = cut_answer(answer, self.serve.answer_tokens)
            self.limits.spend(who.account, tokens(answer.hits))
            return answer

        waits = request.after_lsn is not None
        return await self._call("search", caller, noted, work, first=reach if waits else None)

    async def fetch(
        self, caller: Caller, index: str, key: Sequence[str] | Mapping[str, Any], *, cut: bool = False
    ) -> Document:
        """Return a document.

        :param key: texts in the order of the key's columns, or by their names values as a hit has them.
        """
        noted = _Noted(index)

        async def work(who: Principal) -> Document:
            budget = self.serve.answer_tokens
            cut_bytes = budget * BYTES_PER_TOKEN if cut else None
            document = await self.reader.index(index).document(who, key, cut_bytes=cut_bytes)
            noted.hits = 1
            if cut:
                document = cut_document(document, budget)
            self.limits.spend(who.account, tokens(document))
            return document

        return await self._call("fetch", caller, noted, work)

    async def embed(self, caller: Caller, index: str, texts: Sequence[str]) -> Vectors:
        """Return the vectors of queries, and the generation that they can be compared with.

        Each text counts as a call, because it costs the model as much as a search.
        """

        async def work(who: Principal) -> Vectors:
            limit = self.serve.max_query_characters
            if not 1 <= len(texts) <= MAX_TEXTS or any(len(one) > limit for one in texts):
                raise Problem(
                    422,
                    "The call cannot be answered",
                    "there are too few or too many texts, or one is too long",
                    f"send 1 to {MAX_TEXTS} texts of up to {limit} characters",
                )
            offered = self.reader.index(index)
            self.limits.count(who.account, len(texts) - 1)
            try:
                vectors, generation = await offered.embed_queries(texts)
            except (EmbedError, UsageError):
                self.limits.count(who.account, 1 - len(texts))  # nothing was embedded for it
                raise
            return Vectors([[float(value) for value in vector] for vector in vectors], generation)

        return await self._call("embed", caller, _Noted(index), work)

    async def unreadable(self, caller: Caller, tool: Tool, index: str | None, problem: Problem) -> Problem:
        """Count a call whose request cannot be read as a call; returns what to tell its caller."""

        async def work(_: Principal) -> None:
            raise problem

        try:
            await self._call(tool, caller, _Noted(index), work)
        except Problem as told:
            return told
        return problem

    async def shed(self, caller: Caller, tool: Tool, index: str | None) -> Problem | None:
        """Refuse a call by its headers alone; None lets it pass.

        Strangers are refused so, and callers many of whose calls are refused just now. Nothing else is spent on them,
        so that a storm of calls costs the callers of other tenants little. MCP's messages are counted as well, because
        not only those that call a tool cost something.
        """
        began, at = time.perf_counter(), datetime.now(UTC)
        who: Principal | None = None
        problem: Problem | None = None
        try:
            who = await self.authenticator.principal(caller.authorization)
        except Problem as refused:
            problem = refused
        account = STRANGERS if who is None else who.account
        if tool == "mcp":
            problem = problem or self.limits.message(account)
        if self.limits.crowded(account):
            problem = problem or self.limits.refusal(account)
        if problem is not None:
            await self._hold(problem, account)
            self._note(began, at, who, tool, caller, _Noted(index), problem.outcome)
        return problem

    async def _hold(self, problem: Problem, account: str) -> None:
        """Hold a refusal back until its turn."""
        await anyio.sleep(problem.held_s if isinstance(problem, Refused) else self.limits.held_s(account))

    async def _call(
        self,
        tool: Tool,
        caller: Caller,
        noted: _Noted,
        work: Callable[[Principal], Awaitable[T]],
        *,
        first: Callable[[], Awaitable[None]] | None = None,
    ) -> T:
        """Answer a call.

        :param first: what the call waits for before its turn, so that it keeps no other call from its own.
        """
        began, at = time.perf_counter(), datetime.now(UTC)
        who: Principal | None = None
        outcome = "failed"
        try:
            who = await self.authenticator.principal(caller.authorization)
            index = {} if noted.index not in self.reader.indexes else {"index": noted.index}
            with self.tracing.called(f"cdcsync.serve.{tool}", caller.traceparent, **index):
                with anyio.move_on_after(self.serve.deadline_s):
                    async with self.limits.admitted(who.account, first):
                        answer = await work(who)
                    outcome = "ok"
                    return answer
            raise Problem(
                504,
                "The call took too long",
                f"it was ended after {self.serve.deadline_s:g} s",
                "ask for less, or call again later",
                retry_after_s=1,
            )
        except Problem as problem:
            outcome = problem.outcome
            if who is None or isinstance(problem, Refused):
                await self._hold(problem, STRANGERS if who is None else who.account)
            raise
        except CdcsyncError as error:
            told = problem_of(error, candid=self._candid)
            outcome = told.outcome
            if told.status >= 500:
                shown = without_rows(error)
                log.warning("call_failed", tool=tool, error=str(shown), fix=shown.hint)
            raise told from error
        finally:
            self._note(began, at, who, tool, caller, noted, outcome)

    def _note(
        self,
        began: float,
        at: datetime,
        who: Principal | None,
        tool: Tool,
        caller: Caller,
        noted: _Noted,
        outcome: str,
    ) -> None:
        """Count a call and record it."""
        took_s = time.perf_counter() - began
        self.metrics.seconds.labels(tool, outcome).observe(took_s)
        if who is None:
            return
        query = noted.query
        self.recorder.record(
            Call(
                at,
                who.subject,
                who.tenant,
                tool,
                noted.index if noted.index in self.reader.indexes else None,
                outcome,
                noted.hits,
                None if query is None else query_hash(query),
                query if self.serve.audit_queries else None,
                list(noted.filters[:20]),
                took_s * 1000,
                caller.trace_id,
            )
        )


def caller_of(headers: Mapping[str, str]) -> Caller:
    """Return how a call came, from its headers."""
    return Caller(headers.get("authorization"), headers.get("traceparent"))
