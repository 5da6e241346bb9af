"""Listening on an address and serving an application there, as part of a program that has a life of its own.

Source: uvicorn, "Deployment" (programmatically); RFC 9112 (HTTP/1.1).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import importlib
import logging
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any, Literal

import anyio
import msgspec
import uvicorn
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from cdcsync.errors import SetupError

STOP_TIMEOUT_S = 1
"""How long answers that are being given may take when the program stops."""

MOST_HEAD = 65_536
"""Bytes of a request besides its body: its line, headers and trailers. They are kept before it is known who asks."""

MOST_PIPELINED = 32
"""Requests that a client may send ahead of their answers: each costs some kilobytes, and hardly any client does it."""

ACCEPTED_AT_ONCE = 8
"""Connections that the event loop accepts in one turn; between turns it continues with calls in progress."""


class Bounds(msgspec.Struct, frozen=True):
    """The limits of a server's clients.

    :ivar connections: connections at a time; further ones are closed at once.
    :ivar request_s: how long a connection may take for a request, from its first byte to the last of the answer, and
        for its first request. Of requests that were sent ahead, each one's time begins with the last answer's end. Then
        the client has this time once more to take what it was sent.
    """

    connections: int
    request_s: float


Parser = Literal["h11", "httptools"]
"""h11 is what comes with uvicorn. httptools, in C, takes a tenth of the time, which decides how much a storm costs."""

_PROTOCOLS: dict[Parser, str] = {"h11": "H11Protocol", "httptools": "HttpToolsProtocol"}


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    bounds: Bounds,
    setting: str = "worker.listen",
    parser: Parser = "h11",
    started: Callable[[int], None],
) -> None:
    """Serve until cancelled. Signals stay the caller's.

    :param port: 0 takes any free one.
    :param setting: what names the address in the configuration, for messages.
    :param parser: what reads requests.
    :param started: called once connections are accepted, with the port.
    :raises SetupError: the address cannot be listened on.
    """
    sockets = await _listen(host, port, setting, 2 * bounds.connections)
    config = uvicorn.Config(
        _SmallHeads(app),
        http=functools.partial(_bounded(parser), bounds=bounds),  # type: ignore[arg-type, misc]
        ws="none",
        lifespan="off",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        backlog=ACCEPTED_AT_ONCE,
        h11_max_incomplete_event_size=MOST_HEAD,
        timeout_graceful_shutdown=STOP_TIMEOUT_S,
    )

    def listening() -> None:
        for one in sockets:
            one.listen(2 * bounds.connections)  # how many may wait; asyncio has set it to those of a turn
        started(sockets[0].getsockname()[1])

    server = _Server(config, listening)
    try:
        await server.serve(sockets=sockets)
    finally:
        if server.started:
            with anyio.CancelScope(shield=True):
                await server.shutdown(sockets=sockets)
        for one in sockets:
            one.close()


@functools.cache
def _bounded(parser: Parser) -> type[Any]:
    """Return uvicorn's protocol with bounds."""
    protocol = getattr(importlib.import_module(f"uvicorn.protocols.http.{parser}_impl"), _PROTOCOLS[parser])
    heads = _RefusedHeads if parser == "h11" else _BoundedHeads
    return type("Bounded", (heads, _Bounded, protocol), {})


class _Bounded(asyncio.Protocol):
    """A connection that ends when it is one too many, or takes too long: someone may hold it open for nothing."""

    connections: set[Any]
    cycle: Any
    loop: asyncio.AbstractEventLoop
    transport: asyncio.Transport
    _deadline: asyncio.TimerHandle | None = None
    _answered = False
    """Nothing is to be done before the deadline but that the client takes the rest of an answer."""

    def __init__(self, *arguments: Any, bounds: Bounds, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._bounds = bounds

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room."""
        super().connection_made(transport)
        if len(self.connections) > self._bounds.connections:
            transport.abort()
        else:
            self._begin()

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        if self._deadline is None or self._answered:
            self._begin()
        super().data_received(data)

    def on_response_complete(self) -> None:
        """Begin with the next request if it is here already; otherwise the server knows how long to wait for it."""
        self._end()
        super().on_response_complete()  # type: ignore[misc]
        if not self.cycle.response_complete:
            self._begin()
        elif self.transport.get_write_buffer_size():  # closing the connection would wait for that without an end
            self._begin(answered=True)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._end()
        super().connection_lost(exc)

    def _begin(self, *, answered: bool = False) -> None:
        self._end()
        self._answered = answered
        self._deadline = self.loop.call_later(self._bounds.request_s, self._late)

    def _end(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _late(self) -> None:
        self._deadline = None
        if not self._answered or self.transport.get_write_buffer_size():
            self.transport.abort()


class _SmallHeads:
    """Answers with 431 if a request has too many bytes before its body, in however many parts they came.

    The protocols below refuse those that go on and on; what came whole in one part has passed them.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] == "http" and _head_bytes(scope) > MOST_HEAD:
            await Response(status_code=431, headers={"connection": "close"})(scope, receive, send)
        else:
            await self._app(scope, receive, send)


def _head_bytes(scope: Scope) -> int:
    """Return the bytes of a request's line and headers, with one space where more may stand."""
    line = f"{scope['method']} {'?' if scope['query_string'] else ''} HTTP/1.1\r\n"
    named = sum(len(name) + len(value) + len(": \r\n") for name, value in scope["headers"])
    return len(line) + len(scope["raw_path"]) + len(scope["query_string"]) + named + len("\r\n")


class _RefusedHeads(asyncio.Protocol):
    """A connection of h11, which has a bound of its own, and whose reason for a refusal is told."""

    transport: asyncio.Transport

    def send_400_response(self, msg: str) -> None:
        """Refuse a request."""
        if getattr(sys.exception(), "error_status_hint", None) == 431:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        else:
            super().send_400_response(msg)  # type: ignore[misc]


class _BoundedHeads(asyncio.Protocol):
    """A connection that ends when a request has too many bytes besides its body, or too many are sent ahead.

    httptools keeps a header until it has all of it, however long it is. h11 has a bound of its own, and reads one
    request after the other.
    """

    cycle: Any
    pipeline: deque[Any]
    transport: asyncio.Transport
    _head = 0
    """Bytes of the request that is being read, without its body and without those that came along with the last."""

    def data_received(self, data: bytes) -> None:
        """Take a part of a request."""
        self._head += len(data)
        super().data_received(data)
        if self._head <= MOST_HEAD:
            return
        if self.cycle is None or self.cycle.response_complete:
            self.transport.write(_TOO_LARGE)
            self.transport.close()
        else:
            self.transport.abort()

    def on_message_begin(self) -> None:
        """Begin with a request."""
        self._head = 0
        super().on_message_begin()  # type: ignore[misc]

    def on_body(self, body: bytes) -> None:
        """Take a part of a body, which others bound."""
        self._head -= len(body)
        super().on_body(body)  # type: ignore[misc]

    def on_message_complete(self) -> None:
        """End a request."""
        self._head = 0
        super().on_message_complete()  # type: ignore[misc]

    def on_headers_complete(self) -> None:
        """Answer a request, or put it behind those before it."""
        super().on_headers_complete()  # type: ignore[misc]
        if len(self.pipeline) > MOST_PIPELINED:
            self.transport.abort()
            raise BufferError("too many requests are sent ahead")  # so that the parser reads no further


_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"


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


async def _listen(host: str, port: int, setting: str, backlog: int) -> list[socket.socket]:
    """Return listening sockets for all addresses of a host, of which those that this machine lacks are left out."""
    where = f"{setting} {f'[{host}]' if ':' in host else host}:{port}"
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
            sockets.append(_bound(family, kind, protocol, address, backlog))
        except OSError as error:
            failures.append(error)
        if sockets and port == 0:
            break  # each address would get a port of its own
    if any(failure.errno not in _LACKING for failure in failures) or not sockets:
        for one in sockets:
            one.close()
        raise _refused(failures, setting, where)
    return sockets


_LACKING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""Errors of binding to an address that the machine lacks: `localhost` is two, and not every container has IPv6."""


def _bound(family: int, kind: int, protocol: int, address: tuple[str | int, ...], backlog: int) -> socket.socket:
    one = socket.socket(family, kind, protocol)
    try:
        # Connections of the last process may still be in TIME_WAIT; a listener in the way is an error all the same.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        one.bind(address)
        one.listen(backlog)
        one.setblocking(False)
    except OSError:
        one.close()
        raise
    return one


def _refused(failures: Iterable[OSError], setting: str, where: str) -> SetupError:
    worst = min(failures, key=lambda failure: failure.errno in _LACKING)
    match worst.errno:
        case errno.EADDRINUSE:
            problem, hint = (
                "another process listens there",
                f"stop it, or give {setting} another port; 0 is any free one",
            )
        case errno.EACCES | errno.EPERM:
            problem, hint = "the system forbids it", f"give {setting} a port from 1024 on"
        case errno.EADDRNOTAVAIL | errno.EAFNOSUPPORT:
            problem, hint = (
                "this machine has no such address",
                f'give {setting} one of its own, or "0.0.0.0" for all',
            )
        case _:
            problem, hint = worst.strerror or str(worst), f"give {setting} another address"
    return SetupError(f"cannot listen: {problem}", where=where, hint=hint)
