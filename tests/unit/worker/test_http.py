"""The endpoints over real connections, and the server's life inside another program."""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import logging
import re
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from cdcsync.errors import EmbedderUnavailable, SetupError, TargetUnavailable
from cdcsync.http.listening import Bounds, serve
from cdcsync.metrics import Metrics
from cdcsync.status import BackfillStatus, IndexStatus, SlotStatus, Status, WorkerStatus
from cdcsync.target.evaluations import Recall
from cdcsync.worker import http as endpoints
from cdcsync.worker.history import History

pytestmark = pytest.mark.anyio

PATHS = ("/livez", "/readyz", "/metrics", "/status", "/history", "/")
PAGE = (Path(endpoints.__file__).parent / "page.html").read_text()

STATUS = Status(
    version=1,
    read_at=datetime(2026, 5, 4, 12, 0, tzinfo=UTC),
    pipeline="cdcsync",
    publication="cdcsync",
    checkpoint="0/1A2B",
    lag_bytes=0,
    lag_seconds=0.0,
    caught_up=True,
    slot=None,
    worker=WorkerStatus("host:42", True, None),
    indexes={"articles": IndexStatus("live", None, "public.articles", "public.articles_index")},
    problems=[],
)


class View:
    """A worker as the endpoints see it, with its answers laid open."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.standby = False
        self.turning = True
        self.reasons: list[str] = []
        self.loading: list[str] = []
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
) -> AsyncIterator[Client]:
    """Serve a view for the length of the block."""
    bound: list[int] = []
    listening = anyio.Event()

    def started(actual: int) -> None:
        bound.append(actual)
        listening.set()

    async def run() -> None:
        await serve(app or endpoints.make_app(view), host, port, bounds=bounds, started=started)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        await listening.wait()
        try:
            yield Client(bound[0])
        finally:
            tasks.cancel_scope.cancel()


def unexpected(port: int) -> None:
    pytest.fail(f"listens on port {port}")


@pytest.fixture
async def view() -> View:
    return View()


@pytest.fixture
async def client(view: View) -> AsyncIterator[Client]:
    async with serving(view) as client:
        yield client


# -- endpoints --------------------------------------------------------------------------------------------------


async def test_a_stuck_event_loop_is_not_alive(view: View, client: Client) -> None:
    alive = await client.ask("/livez")
    view.turning = False
    stuck = await client.ask("/livez")
    assert (alive.code, alive.body) == (200, b"ok\n")
    assert (stuck.code, stuck.body) == (503, b"the event loop is stuck\n")


async def test_readiness_tells_its_reasons(view: View, client: Client) -> None:
    ready = await client.ask("/readyz")
    view.reasons = ["standby", "embedder e: down"]
    not_ready = await client.ask("/readyz")
    assert (ready.code, ready.json()) == (200, {"ready": True, "reasons": []})
    assert (not_ready.code, not_ready.json()) == (503, {"ready": False, "reasons": ["standby", "embedder e: down"]})


async def test_a_standby_is_ready_for_those_who_ask_so(view: View, client: Client) -> None:
    view.standby = True
    view.reasons = ["standby: another worker holds the pipeline"]
    strict, lenient = await client.ask("/readyz"), await client.ask("/readyz?standby=ok")
    assert (strict.code, strict.json()["ready"]) == (503, False)
    assert (lenient.code, lenient.json()) == (200, {"ready": True, "reasons": view.reasons})
    view.standby = False
    view.reasons = ["the replication stream is not connected"]
    assert (await client.ask("/readyz?standby=ok")).code == 503


async def test_those_who_ask_for_loaded_indexes_wait_for_them(view: View, client: Client) -> None:
    view.loading = ["index a is building, not live"]
    assert (await client.ask("/readyz")).code == 200
    for query in ("loaded=1", "standby=ok&loaded=1"):
        asked = await client.ask(f"/readyz?{query}")
        assert (asked.code, asked.json()) == (503, {"ready": False, "reasons": view.loading})
    view.loading = []
    assert (await client.ask("/readyz?loaded=1")).code == 200


async def test_metrics_are_prometheus_text_unless_openmetrics_is_asked_for(view: View, client: Client) -> None:
    view.metrics.transactions.inc(3)
    plain = await client.ask("/metrics")
    fancy = await client.ask("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert plain.headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert fancy.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
    assert b"cdcsync_transactions_total 3.0\n" in plain.body
    assert fancy.body.endswith(b"# EOF\n")


async def test_the_status_is_the_views_as_json(client: Client) -> None:
    answer = await client.ask("/status")
    assert (answer.code, answer.headers["Content-Type"]) == (200, "application/json")
    assert msgspec.json.decode(answer.body, type=Status) == STATUS


async def test_a_status_that_cannot_be_read_is_told_with_its_remedy(view: View, client: Client) -> None:
    view.failure = TargetUnavailable("connection refused", where="target", hint="start it")
    answer = await client.ask("/status")
    assert answer.code == 503
    assert answer.json() == {"error": "connection refused", "where": "target", "hint": "start it"}


async def test_a_status_that_takes_too_long_is_given_up(
    view: View, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "STATUS_TIMEOUT_S", 0.01)
    view.answering = anyio.Event()
    answer = await client.ask("/status")
    assert answer.code == 503
    assert answer.json()["error"] == "the status could not be read in time"


async def test_all_who_ask_at_once_share_a_reading(view: View) -> None:
    view.answering = anyio.Event()
    app = endpoints.make_app(view)
    arrived = 0
    answers: list[Answer] = []

    async def counted(scope: Scope, receive: Receive, send: Send) -> None:
        nonlocal arrived
        arrived += 1
        if arrived == 5:
            view.answering.set()
        await app(scope, receive, send)

    async with serving(view, app=counted) as client, anyio.create_task_group() as tasks:

        async def ask() -> None:
            answers.append(await client.ask("/status"))

        for _ in range(5):
            tasks.start_soon(ask)
    assert [answer.code for answer in answers] == [200] * 5
    assert view.readings == 1


async def test_a_failed_reading_is_not_kept(view: View, client: Client) -> None:
    view.failure = TargetUnavailable("connection refused")
    assert (await client.ask("/status")).code == 503
    view.failure = None
    assert (await client.ask("/status")).code == 200


async def test_a_bug_is_logged_and_not_shown(view: View, client: Client, caplog: pytest.LogCaptureFixture) -> None:
    view.failure = ValueError("secret")
    answer = await client.ask("/status")
    assert (answer.code, answer.body) == (500, b"Internal Server Error")
    assert "ValueError: secret" in caplog.text
    assert answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
async def test_nothing_can_be_changed(client: Client, path: str, method: str) -> None:
    answer = await client.ask(path, method)
    assert answer.code == 405
    assert {one.strip() for one in answer.headers["Allow"].split(",")} == {"GET", "HEAD"}


@pytest.mark.parametrize("path", PATHS)
async def test_head_is_get_without_a_body(client: Client, path: str) -> None:
    head = await client.ask(path, "HEAD")
    assert (head.code, head.body) == (200, b"")
    assert head.headers["Content-Type"] == (await client.ask(path)).headers["Content-Type"]


@pytest.mark.parametrize("path", [*PATHS, "/nothing", "/status/"])
async def test_every_answer_has_the_security_headers(client: Client, path: str) -> None:
    answer = await client.ask(path)
    assert answer.code == (200 if path in PATHS else 404)
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["X-Frame-Options"] == "DENY"
    assert answer.headers["Referrer-Policy"] == "no-referrer"
    assert answer.headers["Cache-Control"] == "no-store"
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    assert "Server" not in answer.headers


# -- page -------------------------------------------------------------------------------------------------------


async def test_the_policy_allows_the_pages_own_blocks_and_nothing_else(client: Client) -> None:
    answer = await client.ask("/")
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    policy = dict(part.split(" ", 1) for part in answer.headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        (block,) = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>".encode(), answer.body, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(block).digest()).decode()
        assert policy[f"{tag}-src"] == f"'sha256-{digest}'"
    assert policy["connect-src"] == "'self'"
    assert "unsafe" not in str(policy)


def test_the_page_needs_nothing_from_elsewhere() -> None:
    # Style attributes and handlers in the markup would be refused by the policy.
    assert not re.search(r"<[^>]+\s(?:src|style|on\w+)=", PAGE)
    assert not re.search(r"@import|url\(", PAGE)
    links = re.findall(r'href="([^"]*)"', PAGE)
    assert [link for link in links if not link.startswith("data:")] == ["status", "status", "metrics", "readyz"]


@pytest.mark.parametrize(
    ("name", "struct"),
    [
        ("status", Status),
        ("slot", SlotStatus),
        ("index", IndexStatus),
        ("recall", Recall),
        ("backfill", BackfillStatus),
    ],
)
def test_the_page_reads_only_fields_that_there_are(name: str, struct: type[msgspec.Struct]) -> None:
    script = PAGE.partition("<script>")[2]
    read = set(re.findall(rf"(?<![\w.\"]){name}\??\.([a-z]\w*)\b(?!\()", script))
    assert read
    assert read <= {*struct.__struct_fields__, *({"error", "where", "hint"} if struct is Status else ())}


def test_the_page_reads_only_counters_that_there_are() -> None:
    read = set(re.findall(r'counter\("(\w+)"\)', PAGE))
    assert read
    assert read <= {family.name.removeprefix("cdcsync_") for family in Metrics().registry.collect()}


# -- server -----------------------------------------------------------------------------------------------------


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


# -- limits -----------------------------------------------------------------------------------------------------


async def closed_by_the_server(stream: anyio.abc.SocketStream) -> None:
    with pytest.raises((anyio.EndOfStream, anyio.BrokenResourceError)), anyio.fail_after(30):
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


async def test_scrapers_that_come_together_are_given_one_exposition(
    view: View, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "METRICS_GOOD_S", 3_600.0)
    before = await client.ask("/metrics")
    view.metrics.transactions.inc()
    assert (await client.ask("/metrics")).body == before.body
    openmetrics = await client.ask("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert b"cdcsync_transactions_total 1.0" in openmetrics.body


@pytest.mark.parametrize(
    ("host", "code"),
    [
        ("127.0.0.1:9477", 200),
        ("localhost", 200),
        ("LocalHost.:80", 200),
        ("[::1]:9477", 200),
        ("10.0.0.7", 200),
        ("status.example.org", 200),
        ("evil.example", 403),
        ("localhost.evil.example:9477", 403),
        ("[::1", 403),
        ("", 403),
    ],
)
async def test_a_name_that_leads_a_browser_here_by_dns_reads_nothing(view: View, host: str, code: int) -> None:
    async with serving(view, app=endpoints.make_app(view, hosts=["Status.example.org"])) as client:

        def ask(path: str) -> int:
            connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
            try:
                connection.request("GET", path, headers={"Host": host})
                answer = connection.getresponse()
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                return answer.status
            finally:
                connection.close()

        for path in ("/status", "/metrics", "/", "/livez"):
            assert await anyio.to_thread.run_sync(ask, path) == code, path


# -- queries --------------------------------------------------------------------------------------------------------


async def test_a_query_is_embedded_for_programs_on_this_machine_alone(view: View) -> None:
    async def embed(name: str, text: str) -> tuple[str, list[float]]:
        if name != "minilm":
            raise EmbedderUnavailable("there is no such embedder")
        return "model", [float(len(text)), 0.5]

    query = b'{"embedder": "minilm", "text": "four"}'
    async with serving(view, app=endpoints.make_app(view, embed=embed)) as client:

        def post(content: bytes, headers: dict[str, str]) -> tuple[int, bytes]:
            connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=30)
            try:
                connection.request("POST", "/embed", content, {"Content-Type": "application/json"} | headers)
                answer = connection.getresponse()
                return answer.status, answer.read()
            finally:
                connection.close()

        async def asked(content: bytes = query, **headers: str) -> tuple[int, bytes]:
            return await anyio.to_thread.run_sync(
                post, content, {name.replace("_", "-"): value for name, value in headers.items()}
            )

        assert await asked() == (200, b'{"model":"model","vector":[4.0,0.5]}')
        assert (await asked(Host="localhost:1"))[0] == 200
        assert (await asked(Host="evil.example"))[0] == 403  # a name by which a browser was led here
        assert (await asked(Origin="http://evil.example"))[0] == 403
        assert (await asked(Content_Type="text/plain"))[0] == 403
        assert (await asked(b"\xff"))[0] == 400
        assert (await asked(query.replace(b"minilm", b"other")))[0] == 503
    async with serving(view) as client:
        assert (await client.ask("/embed", "POST")).code == 404
