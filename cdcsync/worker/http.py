"""The worker's HTTP endpoints: probes, metrics, the status and its page. They read; nothing here changes anything.

    /livez     200 while the event loop turns, else 503: restart the process
    /readyz    200 while the worker does its work, else 503, with the reasons as JSON; `?standby=ok` counts a standby
               as ready, which lets an orchestrator replace workers one by one; `?loaded=1` asks that loads are done
    /metrics   for Prometheus, in the text format or OpenMetrics, as the client asks
    /status    the status as JSON (docs/status.md); 503 with the error when the target does not answer
    /embed     POST: the vector of a query, for commands on this machine
    /          a page that shows /status and /metrics, every second

There is no login: who may see table names and counts is decided by where `worker.listen` listens. What a browser could
be tricked into is shut off by headers: the page loads nothing from elsewhere and runs no script but its own, whose hash
is in the policy.

Source: Kubernetes API health endpoints; Prometheus, "Exposition formats"; Content Security Policy Level 3.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import errno
import hashlib
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Generator, Iterable
from importlib import resources
from typing import Protocol

import anyio
import msgspec
import uvicorn
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from cdcsync.errors import CdcsyncError, SetupError
from cdcsync.metrics import Metrics
from cdcsync.status import Status

STATUS_TIMEOUT_S = 5.0
"""A status takes milliseconds. A client that polls should hear that it takes longer, not wait for it."""

READING_SHARE = 0.1
"""How much of the time the servers may be read for /status, however many ask: a reading is good for as long as it takes
to keep to that."""

STOP_TIMEOUT_S = 1
"""How long answers that are being given may take when the worker stops; it has a batch to finish meanwhile."""

METRICS_GOOD_S = 0.2
"""How long an exposition is given to all who ask: writing it takes milliseconds that the stream would wait for."""

MOST_CONNECTIONS = 64
"""Connections at a time: far more than a scraper, two probes and a few browsers, and far from the limit of
descriptors."""

REQUEST_S = 10.0
"""How long a connection may take for a request, from its first byte to the last of the answer, and for its first
request; /status takes half of it at most."""

BACKLOG = 128
"""Connections that may wait to be accepted: far more than a scraper, two probes and a few browsers open."""

_PAGE = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


def inline_hashes(page: str, tag: str) -> str:
    """Return the policy's source expressions for a page's inline blocks of one kind."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


HEADERS = {
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {inline_hashes(_PAGE, 'script')};"
        f" style-src {inline_hashes(_PAGE, 'style')}; connect-src 'self';"
        " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every answer. Everything here is out of date at once, so nothing is stored."""


class WorkerView(Protocol):
    """What the endpoints need of a worker."""

    metrics: Metrics
    standby: bool

    def alive(self) -> bool:
        """Say whether the event loop turns."""
        ...

    def not_ready(self) -> list[str]:
        """Return why the worker is not doing its work just now; nothing when it is."""
        ...

    def not_loaded(self) -> list[str]:
        """Return which first loads have not come to their end; nothing when every index is whole."""
        ...

    async def status(self) -> Status:
        """Read the status.

        :raises CdcsyncError: it cannot be read now.
        """
        ...


class _Readings:
    """Reads the status once for all who ask at about the same time."""

    def __init__(self, view: WorkerView) -> None:
        self._view = view
        self._turn = anyio.Lock()
        self._body = b""
        self._read_at = float("-inf")
        self._good_until = float("-inf")

    async def latest(self) -> bytes:
        """Return a status as JSON that was read just now.

        :raises CdcsyncError: it cannot be read now.
        :raises TimeoutError: it takes too long.
        """
        asked = anyio.current_time()
        with anyio.fail_after(STATUS_TIMEOUT_S):
            async with self._turn:
                started = anyio.current_time()
                # What was read while this one waited for its turn is as good as what it would read itself.
                if asked > self._read_at and started >= self._good_until:
                    self._body = msgspec.json.encode(await self._view.status())
                    self._read_at = anyio.current_time()
                    self._good_until = self._read_at + (self._read_at - started) * (1 - READING_SHARE) / READING_SHARE
                return self._body


EmbedQuery = Callable[[str, str], Awaitable[tuple[str, list[float]]]]
"""Makes the vector of a query with the embedder of a name; returns the model's identity and the vector."""

MAX_QUERY_BYTES = 1_000_000
"""The most bytes of a request to embed a query."""


class _Query(msgspec.Struct, frozen=True):
    embedder: str
    text: str


def make_app(view: WorkerView, *, embed: EmbedQuery | None = None) -> Starlette:
    """Return the application that shows one worker.

    :param embed: also answer POST /embed by it, to programs on this machine.
    """
    readings = _Readings(view)

    async def livez(_: Request) -> Response:
        alive = view.alive()
        return PlainTextResponse("ok\n" if alive else "the event loop is stuck\n", 200 if alive else 503)

    async def readyz(request: Request) -> Response:
        reasons = view.not_ready()
        loading = view.not_loaded() if request.query_params.get("loaded") == "1" else []
        if view.standby and request.query_params.get("standby") == "ok":
            return _json({"ready": not loading, "reasons": reasons + loading}, 503 if loading else 200)
        reasons = reasons + loading
        return _json({"ready": not reasons, "reasons": reasons}, 503 if reasons else 200)

    exposed: dict[str, tuple[float, bytes]] = {}

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        now = anyio.current_time()
        made_at, body = exposed.get(content_type, (float("-inf"), b""))
        if now - made_at >= METRICS_GOOD_S:
            body = encode(view.metrics.registry)
            exposed[content_type] = now, body
        return Response(body, headers={"Content-Type": content_type})

    async def status(_: Request) -> Response:
        try:
            return Response(await readings.latest(), media_type="application/json")
        except CdcsyncError as error:
            return _json({"error": error.message, "where": error.where, "hint": error.hint}, 503)
        except TimeoutError:
            hint = "the target, or the network between, is slow: see the worker's log"
            return _json({"error": "the status could not be read in time", "where": None, "hint": hint}, 503)

    async def page(_: Request) -> Response:
        return HTMLResponse(_PAGE)

    async def embedded(request: Request) -> Response:
        if not _is_local(request):
            return _json({"error": "queries are embedded for programs on this machine alone"}, 403)
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_QUERY_BYTES:
                return _json({"error": "the query is too long"}, 413)
        try:
            query = msgspec.json.decode(body, type=_Query)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return _json({"error": "expected JSON with embedder and text"}, 400)
        assert embed is not None
        try:
            model, vector = await embed(query.embedder, query.text)
        except CdcsyncError as error:
            return _json({"error": error.message, "where": error.where, "hint": error.hint}, 503)
        return _json({"model": model, "vector": vector}, 200)

    endpoints: dict[str, Callable[[Request], Awaitable[Response]]] = {
        "/livez": livez,
        "/readyz": readyz,
        "/metrics": metrics,
        "/status": status,
        "/": page,
    }
    routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in endpoints.items()]
    if embed is not None:
        routes.append(Route("/embed", embedded, methods=["POST"]))
    app = Starlette(
        routes=routes,
        middleware=[Middleware(_Secured)],
        exception_handlers={Exception: _broken},
    )
    app.router.redirect_slashes = False
    return app


def _is_local(request: Request) -> bool:
    """Whether a program on this machine asks, and neither a page in a browser nor a name that leads here by DNS."""
    host = (request.url.hostname or "").strip("[]")
    peer = request.client.host if request.client is not None else ""
    try:
        local = ipaddress.ip_address(peer).is_loopback
        named = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
    headers = request.headers
    return local and named and headers.get("content-type") == "application/json" and "origin" not in headers


def _json(content: object, code: int) -> Response:
    return Response(msgspec.json.encode(content), code, media_type="application/json")


async def _broken(_: Request, __: Exception) -> Response:
    # The middleware is not around this answer. The server logs the exception.
    return PlainTextResponse("Internal Server Error", 500, headers=HEADERS)


class _Secured:
    """Puts our headers on every answer, those of errors too, and answers for a request that the stop cuts short."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def secured(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
                begun = True
            await send(message)

        try:
            await self._app(scope, receive, secured)
        except anyio.get_cancelled_exc_class():
            # The task is this request's own, and only the server cancels it, when it stops. Raised further, it would be
            # logged as a bug.
            if not begun:
                await PlainTextResponse("the worker is stopping\n", 503)(scope, receive, secured)


# -- server -----------------------------------------------------------------------------------------------------


async def serve(app: ASGIApp, host: str, port: int, *, started: Callable[[int], None]) -> None:
    """Serve until cancelled. Signals stay the worker's.

    :param port: 0 takes any free one.
    :param started: called once connections are accepted, with the port.
    :raises SetupError: the address cannot be listened on.
    """
    sockets = await _listen(host, port)
    config = uvicorn.Config(
        app,
        http=_Bounded,
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
    )
    server = _Server(config, lambda: started(sockets[0].getsockname()[1]))
    try:
        await server.serve(sockets=sockets)
    finally:
        if server.started:
            with anyio.CancelScope(shield=True):
                await server.shutdown(sockets=sockets)
        for one in sockets:
            one.close()


class _Bounded(H11Protocol):
    """A connection that ends when it is one too many, or takes too long: someone may hold it open for nothing."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room."""
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()
        else:
            self._begin()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self._deadline is None:
            self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Wait for the next request; how long, the server knows."""
        self._end()
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end()
        super().connection_lost(exc)

    def _begin(self) -> None:
        self._deadline = self.loop.call_later(REQUEST_S, self.transport.abort)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


class _Server(uvicorn.Server):
    """Uvicorn in a process that has a life of its own: no signal handlers, and a word when it accepts connections."""

    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Leave the signals alone."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept connections."""
        await super().startup(sockets)
        self._on_started()


async def _listen(host: str, port: int) -> list[socket.socket]:
    """Return listening sockets for all addresses of a host, of which those that this machine lacks are left out."""
    where = f"worker.listen {f'[{host}]' if ':' in host else host}:{port}"
    try:
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (socket.gaierror, UnicodeError) as error:  # the latter for what cannot be a name, such as an empty label
        raise SetupError(
            f"the host name is not known here: {error}",
            where=where,
            hint='name an address of this machine, or "0.0.0.0" for all of them',
        ) from error
    sockets: list[socket.socket] = []
    failures: list[OSError] = []
    for family, kind, protocol, _, address in found:
        try:
            sockets.append(_bound(family, kind, protocol, address))
        except OSError as error:
            failures.append(error)
        if sockets and port == 0:
            break  # each address would get a port of its own
    if any(failure.errno not in _LACKING for failure in failures) or not sockets:
        for one in sockets:
            one.close()
        raise _refused(failures, where)
    return sockets


_LACKING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What binding says when the machine has no such address: `localhost` is two, and not every container has IPv6."""


def _bound(family: int, kind: int, protocol: int, address: tuple[str | int, ...]) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        # Connections of the last process may still be in TIME_WAIT; a listener in the way is an error all the same.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        one.listen(BACKLOG)
        one.setblocking(False)
    except OSError:
        one.close()
        raise
    return one


def _refused(failures: Iterable[OSError], where: str) -> SetupError:
    worst = min(failures, key=lambda failure: failure.errno in _LACKING)
    match worst.errno:
        case errno.EADDRINUSE:
            problem, hint = (
                "another process listens there",
                "stop it, or give worker.listen another port; 0 is any free one",
            )
        case errno.EACCES | errno.EPERM:
            problem, hint = "the system forbids it", "give worker.listen a port from 1024 on"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            problem, hint = (
                "this machine has no such address",
                'give worker.listen one of its own, or "0.0.0.0" for all',
            )
        case _:
            problem, hint = worst.strerror or str(worst), "give worker.listen another address"
    return SetupError(f"cannot listen: {problem}", where=where, hint=hint)
