"""What commands ask of a worker on the same machine, and do without if it does not answer."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import anyio
import anyio.abc
import msgspec
import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from cdcsync.cli.beside import embedded_by_worker, questions_by_worker, remembered_by_worker
from cdcsync.config import Config, parse
from cdcsync.errors import EmbedderUnavailable
from cdcsync.status import Event, Headline, WorkerStatus, as_waiting, with_headlines, with_problems
from cdcsync.worker import http as endpoints
from tests.support.configs import configuration
from tests.support.endpoints import View, serving
from tests.support.indexes import make_spec
from tests.support.statuses import STATUS

pytestmark = pytest.mark.anyio

SPEC = make_spec()


def config_of(port: int, host: str = "127.0.0.1") -> Config:
    text = configuration("dbname=nowhere").replace("127.0.0.1:0", f"{host}:{port}")
    return parse(text, {}, where="the test's configuration")


async def embed(name: str, text: str) -> tuple[str, list[float]]:
    if text == "refused":
        raise EmbedderUnavailable("busy")
    return SPEC.model, [float(len(text)), 0.5]


async def test_a_worker_embeds_a_query_for_an_index_of_its_model() -> None:
    async with serving(View(), app=endpoints.make_app(View(), embed=embed)) as client:
        config = config_of(client.port)
        assert await embedded_by_worker(config, "fake", SPEC.model, "four") == [4.0, 0.5]
        assert await embedded_by_worker(config, "fake", "another model", "four") is None
        assert await embedded_by_worker(config, "fake", SPEC.model, "refused") is None
        everywhere = config_of(client.port, "0.0.0.0")
        assert await embedded_by_worker(everywhere, "fake", SPEC.model, "four") == [4.0, 0.5]


async def test_questions_are_embedded_by_a_worker_that_embeds_all_of_them() -> None:
    async with serving(View(), app=endpoints.make_app(View(), embed=embed)) as client:
        config = config_of(client.port)
        vectors = await questions_by_worker(config, SPEC, {"q1": "one", "q2": "three"})
        assert vectors == {"q1": [3.0, 0.5], "q2": [5.0, 0.5]}
        assert await questions_by_worker(config, SPEC, {"q1": "one", "q2": "refused"}) is None


async def test_without_a_worker_that_answers_there_is_no_vector_and_nothing_remembered() -> None:
    for port in (0, 1):  # any free port, which nobody knows; and one where nobody listens
        assert await embedded_by_worker(config_of(port), "fake", SPEC.model, "four") is None
        assert await remembered_by_worker(config_of(port), STATUS) == STATUS


async def test_a_status_has_what_the_worker_that_runs_remembers() -> None:
    async with serving(View()) as client:
        found = await remembered_by_worker(config_of(client.port), STATUS)
        assert found.page == f"http://127.0.0.1:{client.port}/"
        other = msgspec.structs.replace(STATUS, worker=WorkerStatus("other:1", True, None))
        assert await remembered_by_worker(config_of(client.port), other) == other
        stopped = msgspec.structs.replace(STATUS, worker=WorkerStatus("host:42", False, None))
        assert await remembered_by_worker(config_of(client.port), stopped) == stopped


async def test_a_worker_that_waits_says_why_also_while_it_holds_no_lock() -> None:
    why = "the set-up waits: the source does not answer"
    stopped = msgspec.structs.replace(
        STATUS, worker=WorkerStatus("host:41", False, None), problems=["no worker runs for slot s: start `cdcsync run`"]
    )
    told = as_waiting(stopped, "host:42", why)

    async def answer(request: Request) -> Response:
        return Response(msgspec.json.encode(told), media_type="application/json")

    app: Any = Starlette(routes=[Route("/status", answer)])
    async with serving(View(), app=app) as client:
        found = await remembered_by_worker(config_of(client.port), stopped)
        assert found.worker == WorkerStatus("host:42", False, None, why)
        assert found.problems == [why]
        assert with_headlines(found, 60).headline == Headline(why, "bad")
        assert found.page is not None
        by_another = msgspec.structs.replace(STATUS, worker=WorkerStatus("other:1", True, None))
        assert await remembered_by_worker(config_of(client.port), by_another) == by_another


async def test_what_only_the_worker_knows_of_an_index_is_among_the_problems() -> None:
    told = with_problems(msgspec.structs.replace(STATUS, problems=["the worker's own"]), {"articles": "it waits"})

    async def answer(request: Request) -> Response:
        return Response(msgspec.json.encode(told), media_type="application/json")

    app: Any = Starlette(routes=[Route("/status", answer)])
    async with serving(View(), app=app) as client:
        found = await remembered_by_worker(config_of(client.port), STATUS)
    assert found.problems == ["index articles: it waits"]
    assert found.indexes["articles"].problem == "it waits"


ODD_ANSWERS = [
    *(b"not JSON", b"{}", b"[1, 2]", b'{"model": "\x80", "vector": [1]}', b'{"slot": "\x80"}'),
    b'{"unknown": ' + b"[" * 100_000,
]


@pytest.mark.parametrize("content", ODD_ANSWERS, ids=lambda content: repr(content)[:32])
async def test_an_answer_of_something_else_on_that_port_is_no_answer(content: bytes) -> None:
    async def answer(request: Request) -> Response:
        return Response(content, media_type="application/json")

    app: Any = Starlette(routes=[Route("/{path}", answer, methods=["GET", "POST"])])
    async with serving(View(), app=app) as client:
        assert await embedded_by_worker(config_of(client.port), "fake", SPEC.model, "four") is None
        assert await remembered_by_worker(config_of(client.port), STATUS) == STATUS


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999\r\n\r\n{}",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nffffffffffffffffffff\r\n{}",
        b"HTTP/1.1 200 OK\r\nContent-Length: \xff\r\n\r\n{}",
        b"\xff\xfe",
    ],
)
async def test_a_program_on_that_port_that_speaks_no_http_as_we_do_is_no_answer(answer: bytes) -> None:
    async def speak(stream: anyio.abc.SocketStream) -> None:
        async with stream:
            await stream.receive()
            await stream.send(answer)

    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")
    port = listener.extra(anyio.abc.SocketAttribute.local_port)
    async with listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, speak)
        assert await embedded_by_worker(config_of(port), "fake", SPEC.model, "four") is None
        assert await remembered_by_worker(config_of(port), STATUS) == STATUS
        tasks.cancel_scope.cancel()


async def test_events_of_the_worker_are_shown_and_indexes_that_it_does_not_know_stay_as_they_are() -> None:
    event = Event("it was paused", "bad", datetime.now(UTC))
    told = msgspec.structs.replace(STATUS, events=[event], indexes={})

    async def answer(request: Request) -> Response:
        return Response(msgspec.json.encode(told), media_type="application/json")

    app: Any = Starlette(routes=[Route("/status", answer)])
    async with serving(View(), app=app) as client:
        found = await remembered_by_worker(config_of(client.port), STATUS)
    assert (found.events, found.indexes) == ([event], STATUS.indexes)
