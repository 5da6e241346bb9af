"""A server within another program: its ports, its end, and how much it takes."""

from __future__ import annotations

import http.client
import logging
import signal
import socket
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress

import anyio
import pytest
from starlette.types import Receive, Scope, Send

from cdcsync.errors import SetupError
from cdcsync.http.listening import MOST_HEAD, Bounds, Parser, serve
from cdcsync.worker import http as endpoints
from tests.support.endpoints import Answer, Client, View, serving, unexpected

pytestmark = pytest.mark.anyio


async def test_port_zero_takes_a_free_port_and_tells_it(view: View) -> None:
    async with serving(view) as one, serving(view) as other:
        assert 0 not in (one.port, other.port)
        assert one.port != other.port
        assert (await other.ask("/livez")).code == 200


async def test_localhost_is_served_on_every_address_it_has(view: View) -> None:
    async with serving(view, "localhost") as client:
        assert (await client.ask("/livez")).code == 200


async def test_a_port_in_use_is_named_with_its_setting(view: View) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SetupError, match="another process listens there") as refused:
            await serve(endpoints.make_app(view), "127.0.0.1", port, bounds=endpoints.BOUNDS, started=unexpected)
    assert refused.value.where == f"worker.listen 127.0.0.1:{port}"
    assert "worker.listen" in str(refused.value.hint)


@pytest.mark.parametrize(
    ("host", "problem"),
    [
        ("192.0.2.1", "this machine has no such address"),  # reserved for documentation
        ("no..name", "the host name is not known here"),
    ],
)
async def test_an_address_of_others_cannot_be_listened_on(view: View, host: str, problem: str) -> None:
    with pytest.raises(SetupError, match=problem) as refused:
        await serve(endpoints.make_app(view), host, 9477, bounds=endpoints.BOUNDS, started=unexpected)
    assert refused.value.where == f"worker.listen {host}:9477"


async def test_cancelled_it_frees_the_port_even_of_idle_connections(view: View) -> None:
    async with serving(view) as client:
        idle = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
        await anyio.to_thread.run_sync(idle.request, "GET", "/livez")
        await anyio.to_thread.run_sync(lambda: idle.getresponse().read())
    with idle.sock as left:
        assert await anyio.to_thread.run_sync(left.recv, 1) == b""
    async with serving(view, port=client.port) as again:
        assert (await again.ask("/livez")).code == 200


async def test_stopped_in_the_middle_of_an_answer_it_says_so(view: View, caplog: pytest.LogCaptureFixture) -> None:
    view.answering = anyio.Event()
    answers: list[Answer] = []

    async with anyio.create_task_group() as tasks, serving(view) as client:

        async def ask() -> None:
            answers.append(await client.ask("/status"))

        tasks.start_soon(ask)
        await view.reading.wait()
    assert [(answer.code, answer.body) for answer in answers] == [(503, b"the worker is stopping\n")]
    assert [record for record in caplog.records if record.exc_info] == []


async def test_signals_stay_the_programs_own(view: View) -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    async with serving(view):
        assert [signal.getsignal(number) for number in numbers] == before


async def test_requests_are_not_logged(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        await client.ask("/livez")
    assert [record for record in caplog.records if record.name.startswith("uvicorn")] == []


async def closed_by_the_server(stream: anyio.abc.SocketStream) -> None:
    with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)), anyio.fail_after(60):
        await stream.receive()


async def test_connections_beyond_the_limit_are_refused_and_the_others_are_served(
    view: View,
) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(serving(view, bounds=Bounds(connections=3, request_s=10)))
        idle = [await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", client.port)) for _ in range(3)]
        async with await anyio.connect_tcp("127.0.0.1", client.port) as one_too_many:
            await closed_by_the_server(one_too_many)
        await idle[0].send(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await idle[0].receive()).startswith(b"HTTP/1.1 200")


async def test_a_connection_that_sends_no_request_in_time_is_closed(view: View) -> None:
    async with serving(view, bounds=Bounds(connections=64, request_s=0.05)) as client:
        for begun in (b"", b"GET /livez HTTP/1.1\r\n"):
            async with await anyio.connect_tcp("127.0.0.1", client.port) as stream:
                if begun:
                    await stream.send(begun)
                await closed_by_the_server(stream)


@pytest.fixture(params=["h11", "httptools"])
def parser(request: pytest.FixtureRequest) -> Parser:
    named: Parser = request.param
    return named


GET = b"GET /large HTTP/1.1\r\nhost: localhost\r\n\r\n"
LARGE = b"a" * 8_000_000  # more than both systems' buffers of a connection


async def large_or_small(scope: Scope, receive: Receive, send: Send) -> None:
    body = LARGE if scope["path"] == "/large" else b"small"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@contextmanager
def deaf(port: int, requests: bytes) -> Iterator[socket.socket]:
    """Send requests and take nothing; a stream of anyio would read on."""
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        connection.sendall(requests)
        yield connection


async def is_answered(port: int) -> bool:
    async with await anyio.connect_tcp("127.0.0.1", port) as stream:
        try:
            await stream.send(b"GET /small HTTP/1.1\r\nhost: localhost\r\n\r\n")
            return (await stream.receive()).startswith(b"HTTP/1.1 200")
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            return False


@pytest.mark.parametrize(
    "requests",
    [GET, GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), 3 * GET],
    ids=["one", "the last", "several sent ahead"],
)
async def test_a_client_that_does_not_take_its_answers_gives_its_place_back(
    view: View, parser: Parser, requests: bytes
) -> None:
    bounds = Bounds(connections=1, request_s=0.3)
    async with serving(view, app=large_or_small, bounds=bounds, parser=parser) as client:
        with deaf(client.port, requests), anyio.fail_after(60):
            while not await is_answered(client.port):  # noqa: ASYNC110 - only a new connection tells
                await anyio.sleep(0.01)


async def test_requests_that_are_sent_ahead_are_answered_in_order(view: View, parser: Parser) -> None:
    small = GET.replace(b"large", b"small")
    last = small.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n")
    read = bytearray()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(serving(view, app=large_or_small, parser=parser))
        stream = await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", client.port))
        await stream.send(GET + 3 * small + last)
        with anyio.fail_after(60), suppress(anyio.EndOfStream):
            while True:
                read += await stream.receive(1_000_000)
    answers = read.split(b"HTTP/1.1 200 OK\r\n")[1:]
    assert [len(one.partition(b"\r\n\r\n")[2]) for one in answers] == [len(LARGE), 5, 5, 5, 5]


async def closed_while_it_sends(stream: anyio.abc.SocketStream, part: bytes) -> None:
    with anyio.fail_after(60), suppress(anyio.BrokenResourceError):
        for _ in range(1_000):
            await stream.send(part)
        pytest.fail("the server takes everything")


@pytest.mark.parametrize(
    "begun",
    [
        b"GET /small HTTP/1.1\r\nhost: localhost\r\nx: ",
        b"GET /",
        b"",
        b"POST /small HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n1\r\na\r\n0\r\nx: ",
    ],
    ids=["a header", "the path", "between requests", "a trailer"],
)
async def test_a_request_whose_head_does_not_end_is_refused(view: View, parser: Parser, begun: bytes) -> None:
    filling = b"a" if begun else b"\r\n"
    async with serving(view, app=large_or_small, bounds=Bounds(connections=8, request_s=60), parser=parser) as client:
        async with await anyio.connect_tcp("127.0.0.1", client.port) as stream:
            await stream.send(begun)
            await closed_while_it_sends(stream, filling * 32_768)
        assert (await client.ask("/small")).code == 200


@pytest.mark.parametrize("part", [1_000_000, 40_000, 5_000])
@pytest.mark.parametrize(("too_many", "status"), [(0, b"200"), (1, b"431"), (4_464, b"431")])
async def test_a_head_has_one_limit_in_however_many_parts_it_comes(
    view: View, parser: Parser, part: int, too_many: int, status: bytes
) -> None:
    begun = b"GET /small?x=1 HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: "
    request = begun + (MOST_HEAD + too_many - len(begun) - 4) * b"a" + b"\r\n\r\n"
    answer = bytearray()
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(serving(view, app=large_or_small, parser=parser))
        stream = await stack.enter_async_context(await anyio.connect_tcp("127.0.0.1", client.port))
        for at in range(0, len(request), part):
            await stream.send(request[at : at + part])
        with anyio.fail_after(60), suppress(anyio.EndOfStream):
            while True:
                answer += await stream.receive()
    assert answer.split(b" ", 2)[:2] == [b"HTTP/1.1", status]


async def test_a_client_that_sends_very_many_requests_ahead_is_refused(view: View) -> None:
    async with serving(view, app=large_or_small, parser="httptools") as client:
        async with await anyio.connect_tcp("127.0.0.1", client.port) as stream:
            await closed_while_it_sends(stream, 32 * GET)
        assert (await client.ask("/small")).code == 200
