"""The endpoints over real connections, and the server's life inside another program."""

from __future__ import annotations

import http.client
import re
from pathlib import Path

import anyio
import msgspec
import pytest
from starlette.types import Receive, Scope, Send

from cdcsync.errors import EmbedderUnavailable, TargetUnavailable
from cdcsync.metrics import Metrics
from cdcsync.status import BackfillStatus, IndexStatus, SlotStatus, Status
from cdcsync.target.evaluations import Recall
from cdcsync.worker import http as endpoints
from tests.support.endpoints import Answer, Client, View, serving
from tests.support.statuses import STATUS

pytestmark = pytest.mark.anyio

PATHS = ("/livez", "/readyz", "/metrics", "/status", "/history", "/")
PAGE = (Path(endpoints.__file__).parent / "page.html").read_text()


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


async def test_a_status_is_never_older_than_what_readiness_goes_by(
    view: View, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "READING_SHARE", 1e-9)  # a reading is good for long
    await client.ask("/status")
    view.last = msgspec.structs.replace(STATUS, problems=["seen by the worker itself"])
    assert (await client.ask("/status")).json()["problems"] == ["seen by the worker itself"]
    assert view.readings == 1


async def test_a_reading_that_the_worker_has_forgotten_is_made_again(
    view: View, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "READING_SHARE", 1e-9)  # a reading is good for long
    await client.ask("/status")
    view.standby, view.last = True, None  # overtaken meanwhile
    assert [(await client.ask(path)).code for path in ("/status", "/readyz?loaded=1")] == [200, 200]
    assert view.readings == 2


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


# -- page -------------------------------------------------------------------------------------------------------


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


# -- limits -----------------------------------------------------------------------------------------------------


async def test_scrapers_that_come_together_are_given_one_exposition(
    view: View, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(endpoints, "METRICS_GOOD_S", 3_600.0)
    before = await client.ask("/metrics")
    view.metrics.transactions.inc()
    assert (await client.ask("/metrics")).body == before.body
    openmetrics = await client.ask("/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert b"cdcsync_transactions_total 1.0" in openmetrics.body


# -- queries --------------------------------------------------------------------------------------------------------


async def test_a_query_is_embedded_for_programs_on_this_machine_alone(
    view: View, monkeypatch: pytest.MonkeyPatch
) -> None:
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
        for proxys in ("Via", "Forwarded", "X_Real_IP", "X_Forwarded_For", "X_Forwarded_Proto"):
            assert (await asked(query, **{proxys: "198.51.100.7"}))[0] == 403
        monkeypatch.setattr(http.client.HTTPConnection, "_http_vsn_str", "HTTP/1.0")  # as nginx asks what is behind it
        assert (await asked())[0] == 403
        monkeypatch.undo()
        assert (await asked(Content_Type="text/plain"))[0] == 403
        assert (await asked(b"\xff"))[0] == 400
        assert (await asked(query.replace(b"minilm", b"other")))[0] == 503
    async with serving(view) as client:
        assert (await client.ask("/embed", "POST")).code == 404
