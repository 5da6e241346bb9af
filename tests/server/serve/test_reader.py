"""The indexes that a server offers: when they are ready, and what it says of those that are not as they should be."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import httpx2
import msgspec
import pytest
import structlog.testing
from psycopg import conninfo

from cdcsync.config import Config, SentenceTransformersReranker
from cdcsync.embedders.reranking import CrossEncoderReranker
from cdcsync.errors import EmbedderSetupError
from cdcsync.serve.exposure import UNHELD
from cdcsync.serve.reader import Reader
from cdcsync.tracing import Tracing
from tests.support.serving import Office, ask, served, with_tokens

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def reranked(tickets: Office, **settings: Any) -> Config:
    """Return a configuration of a server whose index has a reranker on this machine."""
    config = tickets.serving(anonymous=True, **settings)
    index = msgspec.structs.replace(config.indexes["tickets"], reranker="fine")
    section = SentenceTransformersReranker(model="acme/judge")
    return msgspec.structs.replace(config, rerankers={"fine": section}, indexes={"tickets": index})


async def ready(client: httpx2.AsyncClient) -> None:
    with anyio.fail_after(60):
        while (await client.get("/readyz")).status_code != 200:
            pass


async def test_a_server_is_ready_once_its_reranker_is_loaded_and_searches_do_without_it_until_then(
    tickets: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, let = threading.Event(), threading.Event()

    def load(reranker: CrossEncoderReranker) -> None:
        begun.set()
        assert let.wait(60)
        reranker._model = object()

    monkeypatch.setattr(CrossEncoderReranker, "_load", load)
    monkeypatch.setattr(CrossEncoderReranker, "_predict", lambda self, query, texts: [7.0] * len(texts))
    async with served(reranked(tickets, deadline_s=5.0)) as client:
        try:
            assert await anyio.to_thread.run_sync(begun.wait, 60)
            probed = await client.get("/readyz")
            meanwhile = await ask(client, "printer", mode="text")
        finally:
            let.set()
        await ready(client)
        hits = (await ask(client, "printer", mode="text")).json()["hits"]
    assert (probed.status_code, probed.json()["reasons"]) == (503, ["models are being loaded"])
    assert (meanwhile.status_code, meanwhile.json()["warning"]) == (200, "not reranked: the model is being loaded")
    assert meanwhile.json()["hits"]
    assert {hit["score"] for hit in hits} == {7.0}


async def test_a_reranker_that_cannot_be_loaded_is_logged_with_its_fix_and_searches_do_without_it(
    tickets: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: CrossEncoderReranker) -> None:
        raise EmbedderSetupError("no such model", where="rerankers.fine.model", hint="name another one")

    monkeypatch.setattr(CrossEncoderReranker, "_load", load)
    with structlog.testing.capture_logs() as logs:
        async with served(reranked(tickets)) as client:
            await ready(client)
            answers = [await ask(client, "printer", mode=mode) for mode in ("hybrid", "text", "vector")]
    assert [(one.status_code, one.json()["warning"]) for one in answers] == [
        (200, "not reranked: the server cannot use the model")
    ] * 3
    assert all(one.json()["hits"] for one in answers)
    told = [(one["index"], one["fix"]) for one in logs if one["event"] == "model_not_loaded"]
    assert told == [("tickets", "name another one")]


@pytest.mark.parametrize("logs_in_as", ["the role", "another role", "the owner", "the role, which is not set"])
async def test_a_server_that_row_level_security_does_not_concern_says_so(
    tickets: Office, tokens: Path, logs_in_as: str
) -> None:
    serve = with_tokens(tickets, tokens, role="somebody_else" if logs_in_as == "another role" else tickets.reader).serve
    if logs_in_as == "the owner":
        owner = conninfo.conninfo_to_dict(tickets.database.dsn)["user"]
        serve = msgspec.structs.replace(serve, dsn=tickets.database.dsn, role=owner)
    if logs_in_as == "the role, which is not set":
        serve = msgspec.structs.replace(serve, role=None)
    reader = Reader(msgspec.structs.replace(tickets.config, serve=serve), Tracing())
    with structlog.testing.capture_logs() as logs:
        await reader.load()
    await reader.aclose()
    told = [(line["index"], line["past"], line["fix"]) for line in logs if line["event"] == "tenants_not_held"]
    why = 'row-level security on "cdcsync"."tickets_chunks" does not apply to the role that serve.dsn logs in as'
    if logs_in_as == "the role, which is not set":
        why = "serve.role is not set"
    assert told == ([] if logs_in_as == "the role" else [("tickets", [why], UNHELD)])
