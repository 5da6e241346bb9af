"""The section of the tool server: nobody is let in by mistake."""

from __future__ import annotations

import pytest

from cdcsync.config.serving import Serve
from tests.unit.config.files import SECTIONS, problems, read

JWT = 'jwks = "https://id.example/keys"\nissuer = "https://id.example"\naudience = "search"\n'


def serve(lines: str) -> str:
    return f"[serve]\n{lines}{SECTIONS}"


def test_defaults_answer_on_loopback_and_need_a_token() -> None:
    found = read(serve("")).serve
    assert isinstance(found, Serve)
    assert found.listen_address == ("127.0.0.1", 9478)
    assert not found.anonymous


@pytest.mark.parametrize("lines", [JWT, "anonymous = true\n", 'listen = "[::1]:0"\nanonymous = true\n'])
def test_safe_settings_are_taken(lines: str) -> None:
    read(serve(lines))


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('jwks = "https://id.example/keys"\n', "serve.jwks: needs issuer and audience"),
        (JWT.replace("https://id.example/keys", "http://id.example/keys"), "serve.jwks: must be an https:// address"),
        ('listen = "0.0.0.0:80"\nanonymous = true\n', "serve.anonymous: is for loopback only"),
        ('anonymous = true\ntenant = { column = "tenant" }\n', "serve.anonymous: cannot be combined with a tenant"),
        ("tenant = {}\n", "serve.tenant.column: is required"),
        ('tenant = { claim = "tenant" }\n', "serve.tenant.column: is required"),
        ('listen = "nowhere"\n', "serve.listen: "),
        ("max_k = 0\n", "serve.max_k: "),
        ("deadline_s = 601\n", "serve.deadline_s: "),
        ("burst = 0\n", "serve.burst: "),
        ("color = 1\n", "serve.color: unknown key"),
    ],
)
def test_unsafe_and_wrong_settings_are_refused(lines: str, problem: str) -> None:
    assert problem in "\n".join(problems(serve(lines)))
