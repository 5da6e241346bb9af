"""A worker as its HTTP endpoints see it, and clients of them."""

from __future__ import annotations

import http.client
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
import pytest
from starlette.types import ASGIApp

from cdcsync.http.listening import Bounds, Parser, serve
from cdcsync.metrics import Metrics
from cdcsync.status import Status
from cdcsync.worker import http as endpoints
from cdcsync.worker.history import History
from tests.support.statuses import STATUS


class View:
    """A worker as the endpoints see it, with its answers laid open."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.standby = False
        self.turning = True
        self.reasons: list[str] = []
        self.loading: list[str] = []
        self.last: Status | None = None
        self.failure: Exception | None = None
        self.readings = 0
        self.reading = anyio.Event()
        self.answering = anyio.Event()
        self.answering.set()

    def alive(self) -> bool:
        return self.turning

    def not_loaded(self) -> list[str]:
        return self.loading

    def not_ready(self) -> list[str]:
        return self.reasons

    def history(self) -> History:
        return History(10, [])

    async def status(self) -> Status:
        self.readings += 1
        self.reading.set()
        await self.answering.wait()
        if self.failure is not None:
            raise self.failure
        self.last = STATUS
        return STATUS


class Answer(msgspec.Struct, frozen=True):
    code: int
    headers: http.client.HTTPMessage
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Client:
    def __init__(self, port: int) -> None:
        self.port = port

    async def ask(self, path: str, method: str = "GET", **headers: str) -> Answer:
        return await anyio.to_thread.run_sync(self._ask, path, method, headers)

    def _ask(self, path: str, method: str, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        finally:
            connection.close()


@asynccontextmanager
async def serving(
    view: View,
    host: str = "127.0.0.1",
    port: int = 0,
    *,
    app: ASGIApp | None = None,
    bounds: Bounds = endpoints.BOUNDS,
    parser: Parser = "h11",
) -> AsyncIterator[Client]:
    """Serve a view for the length of the block."""
    bound: list[int] = []
    listening = anyio.Event()

    def started(actual: int) -> None:
        bound.append(actual)
        listening.set()

    async def run() -> None:
        await serve(app or endpoints.make_app(view), host, port, bounds=bounds, parser=parser, started=started)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await listening.wait()
        try:
            yield Client(bound[0])
        finally:
            tasks.cancel_scope.cancel()


def unexpected(port: int) -> None:
    pytest.fail(f"listens on port {port}")
