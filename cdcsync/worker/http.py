"""The worker's HTTP endpoints: probes, metrics, the status and its page. They read; nothing here changes anything.

    /livez     200 while the event loop turns, else 503: restart the process
    /readyz    200 while the worker does its work, else 503, with the reasons as JSON; `?standby=ok` counts a standby
               as ready, which lets an orchestrator replace workers one by one; `?loaded=1` asks that loads are done
    /metrics   for Prometheus, in the text format or OpenMetrics, as the client asks
    /status    the status as JSON (docs/status.md); 503 with the error when the target does not answer
    /history   rates of the last hour as JSON, for the page
    /embed     POST: the vector of a query, for commands on this machine
    /          a page that shows /status and /metrics, every second

There is no login: the address in `worker.listen` decides who may see table names and counts. What a browser could
be tricked into is shut off by headers: the page loads nothing from elsewhere and runs no script but its own, whose hash
is in the policy.

Source: Kubernetes API health endpoints; Prometheus, "Exposition formats"; Content Security Policy Level 3.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import Protocol

import anyio
import msgspec
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

from cdcsync.config.values import is_loopback
from cdcsync.errors import CdcsyncError
from cdcsync.http.headers import Secured, security_headers
from cdcsync.http.listening import Bounds
from cdcsync.malformed import MALFORMED
from cdcsync.metrics import Metrics
from cdcsync.status import Status
from cdcsync.worker.history import History

STATUS_TIMEOUT_S = 5.0
"""A status takes milliseconds. A client that polls should hear that it takes longer, not wait for it."""

READING_SHARE = 0.1
"""How much of the time the servers may be read for /status, however many ask: a reading is good for as long as it takes
to keep to that."""

METRICS_GOOD_S = 0.2
"""How long an exposition is reused for all clients: writing it takes milliseconds for which the stream would wait."""

BOUNDS = Bounds(connections=64, request_s=10.0)
"""Far more connections than a scraper, two probes and a few browsers open, and far from the limit of descriptors.
/status takes half of this time at most."""

_PAGE = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


HEADERS = {
    **security_headers(_PAGE),
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
"""On every answer. Everything here is out of date at once, so nothing is stored."""


class WorkerView(Protocol):
    """The part of a worker that the endpoints need."""

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

    def history(self) -> History:
        """Return the rates of the last hour."""
        ...

    @property
    def last(self) -> Status | None:
        """The status as it was last read, for whomever."""
        ...

    async def status(self) -> Status:
        """Read the status.

        :raises CdcsyncError: it cannot be read now.
        """
        ...


class _Readings:
    """Reads the status once for all clients that ask at about the same time."""

    def __init__(self, view: WorkerView) -> None:
        self._view = view
        self._turn = anyio.Lock()
        self._read_at = float("-inf")
        self._good_until = float("-inf")

    async def latest(self) -> Status:
        """Return a status that was read just now.

        :raises CdcsyncError: it cannot be read now.
        :raises TimeoutError: it takes too long.
        """
        asked = anyio.current_time()
        with anyio.fail_after(STATUS_TIMEOUT_S):
            async with self._turn:
                started = anyio.current_time()
                # A status read while this request waited is as good as one that it would read itself, unless the worker
                # stands by since and has forgotten it.
                if self._view.last is None or (asked > self._read_at and started >= self._good_until):
                    await self._view.status()
                    self._read_at = anyio.current_time()
                    self._good_until = self._read_at + (self._read_at - started) * (1 - READING_SHARE) / READING_SHARE
                # The worker reads for itself, too: what this shows is never older than what /readyz goes by.
                assert self._view.last is not None
                return self._view.last


EmbedQuery = Callable[[str, str], Awaitable[tuple[str, list[float]]]]
"""Makes the vector of a query with the embedder of a name; returns the model's identity and the vector."""

MAX_QUERY_BYTES = 1_000_000
"""The most bytes of a request to embed a query."""


class _Query(msgspec.Struct, frozen=True):
    embedder: str
    text: str


def make_app(view: WorkerView, *, embed: EmbedQuery | None = None, hosts: Sequence[str] | None = None) -> Starlette:
    """Return the application that shows one worker.

    :param embed: also answer POST /embed by it, to programs on this machine.
    :param hosts: names that requests over loopback may ask for, besides localhost and addresses; None for any.
    """
    readings = _Readings(view)

    async def livez(_: Request) -> Response:
        alive = view.alive()
        return PlainTextResponse("ok\n" if alive else "the event loop is stuck\n", 200 if alive else 503)

    async def not_loaded() -> list[str]:
        if view.standby:  # nobody else reads there
            try:
                await readings.latest()
            except (CdcsyncError, TimeoutError):
                return ["the indexes cannot be looked at now: see /status"]
        return view.not_loaded()

    async def readyz(request: Request) -> Response:
        loading = await not_loaded() if request.query_params.get("loaded") == "1" else []
        reasons = view.not_ready()
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
            return _json(await readings.latest(), 200)
        except CdcsyncError as error:
            return _json({"error": error.message, "where": error.where, "hint": error.hint}, 503)
        except TimeoutError:
            hint = "the target, or the network between, is slow: see the worker's log"
            return _json({"error": "the status could not be read in time", "where": None, "hint": hint}, 503)

    async def history(_: Request) -> Response:
        return _json(view.history(), 200)

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
        except MALFORMED:
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
        "/history": history,
        "/": page,
    }
    routes = [Route(path, endpoint, methods=["GET"]) for path, endpoint in endpoints.items()]
    if embed is not None:
        routes.append(Route("/embed", embedded, methods=["POST"]))
    stopping = PlainTextResponse("the worker is stopping\n", 503)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Secured, headers=HEADERS, stopping=stopping, hosts=hosts)],
        exception_handlers={Exception: _broken},
    )
    app.router.redirect_slashes = False
    return app


def _is_local(request: Request) -> bool:
    """Whether a program on this machine asks: no page in a browser, no name that leads here by DNS, no proxy.

    A proxy passes on who asked, or speaks HTTP/1.0 as nginx long did: one that does neither cannot be told apart.
    """
    host = (request.url.hostname or "").strip("[]")
    peer = request.client.host if request.client is not None else ""
    headers = request.headers
    return (
        is_loopback(peer)
        and is_loopback(host)
        and headers.get("content-type") == "application/json"
        and request.scope["http_version"] != "1.0"
        and not any(
            name in ("origin", "via", "forwarded", "x-real-ip") or name.startswith("x-forwarded-") for name in headers
        )
    )


def _json(content: object, code: int) -> Response:
    return Response(msgspec.json.encode(content), code, media_type="application/json")


async def _broken(_: Request, __: Exception) -> Response:
    # The middleware is not around this answer. The server logs the exception.
    return PlainTextResponse("Internal Server Error", 500, headers=HEADERS)
