"""What browsers are told and which hosts are answered."""

from __future__ import annotations

import base64
import hashlib
import http.client
import re

import anyio
import pytest
from starlette.datastructures import Headers

from cdcsync.http.headers import of_known_origin
from cdcsync.worker import http as endpoints
from tests.support.endpoints import Client, View, serving

pytestmark = pytest.mark.anyio


PATHS = ("/livez", "/readyz", "/metrics", "/status", "/history", "/")


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


@pytest.mark.parametrize(
    ("origin", "known"),
    [
        (None, True),
        ("http://search.example.org:9478", True),
        ("http://search.example.org", False),
        ("http://127.0.0.1:3000", True),
        ("http://[::1]:3000", True),
        ("http://10.0.0.7:3000", False),
        ("https://app.example.org", True),
        ("https://app.example.org.elsewhere.example", False),
        ("null", False),
        ("http://[", False),
        ("", False),
    ],
)
def test_origins_of_this_server_this_machine_and_the_configuration_are_known(origin: str | None, known: bool) -> None:
    sent = {"host": "search.example.org:9478"} | ({} if origin is None else {"origin": origin})
    assert of_known_origin(Headers(sent), ["https://app.example.org"]) is known
    assert of_known_origin(Headers(sent), ["*"])
