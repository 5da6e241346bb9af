"""Who calls: tokens of a file, their claims, ends and revocation; and a file that changes while the server runs."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from cdcsync.config.serving import Serve, Tenant
from cdcsync.errors import SetupError, UsageError
from cdcsync.serve.identity import (
    PREFIX,
    REFUSED,
    Authenticator,
    Principal,
    new_token,
    read_tokens,
    revoke_tokens,
)
from cdcsync.serve.problems import Problem

pytestmark = pytest.mark.anyio

TENANT = Tenant(column="tenant")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tokens.json"


def authenticator(path: Path, **settings: Any) -> Authenticator:
    return Authenticator(Serve(tokens_file=str(path), **settings))


def expire(path: Path) -> None:
    content = json.loads(path.read_text())
    content["tokens"][0]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
    path.write_text(json.dumps(content))


def replace(path: Path, content: str | None) -> None:
    path.unlink()
    if content is not None:
        path.write_text(content)


async def test_a_token_is_its_subject_with_what_it_claims(path: Path) -> None:
    token = new_token(path, "ana", {"tenant": "t1", "team": "blue"}, 90)
    assert token.startswith(PREFIX)
    assert await authenticator(path, tenant=TENANT).principal(f"Bearer {token}") == Principal("ana", "t1")
    assert await authenticator(path).principal(f"bearer  {token} ") == Principal("ana")


def test_the_file_holds_hashes_for_its_owner_alone(path: Path) -> None:
    token = new_token(path, "ana", {}, None)
    assert token not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    assert [one.subject for one in read_tokens(path).tokens] == ["ana"]
    assert [one.name for one in path.parent.iterdir()] == ["tokens.json"]


def test_a_file_that_others_may_read_stays_so(path: Path) -> None:
    new_token(path, "ana", {}, None)
    path.chmod(0o644)
    new_token(path, "ben", {}, None)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Basic YTpi", "Bearer cdcsync_", "Bearer cdcsync_x", "Bearer \ud800", "x" * 10_000],
)
async def test_whoever_has_no_token_gets_one_answer(path: Path, authorization: str | None) -> None:
    new_token(path, "ana", {}, None)
    with pytest.raises(Problem) as refused:
        await authenticator(path).principal(authorization)
    assert refused.value is REFUSED


async def test_a_token_ends_at_its_time(path: Path) -> None:
    token = new_token(path, "ana", {}, 1)
    expire(path)
    with pytest.raises(Problem) as refused:
        await authenticator(path).principal(f"Bearer {token}")
    assert refused.value is REFUSED


async def test_a_change_of_the_file_is_noticed_at_the_next_call(path: Path) -> None:
    first = new_token(path, "ana", {}, None)
    made = authenticator(path)
    made.check()
    assert await made.principal(f"Bearer {first}") == Principal("ana")
    second = new_token(path, "ben", {}, None)
    assert await made.principal(f"Bearer {second}") == Principal("ben")
    assert revoke_tokens(path, "ana") == 1
    with pytest.raises(Problem):
        await made.principal(f"Bearer {first}")
    assert await made.principal(f"Bearer {second}") == Principal("ben")


@pytest.mark.parametrize("broken", ["{", '{"tokens": [{"sha256": 3}]}', '{"tokens": [], "extra": 1}', None])
async def test_a_file_that_cannot_be_read_lets_nobody_in(path: Path, broken: str | None) -> None:
    token = new_token(path, "ana", {}, None)
    made = authenticator(path)
    assert await made.principal(f"Bearer {token}") == Principal("ana")
    replace(path, broken)
    with pytest.raises(Problem):
        await made.principal(f"Bearer {token}")
    if broken is not None:
        with pytest.raises(SetupError):
            authenticator(path).check()


@pytest.mark.parametrize("claim", [{}, {"tenant": None}, {"tenant": True}, {"tenant": ["t1"]}, {"tenant": {"a": 1}}])
async def test_a_token_without_the_tenants_claim_is_not_allowed(path: Path, claim: dict[str, Any]) -> None:
    token = new_token(path, "ana", claim, None)
    with pytest.raises(Problem) as refused:
        await authenticator(path, tenant=TENANT).principal(f"Bearer {token}")
    assert refused.value.status == 403


async def test_a_number_is_a_claim_too(path: Path) -> None:
    token = new_token(path, "ana", {"tenant": 7}, None)
    assert await authenticator(path, tenant=TENANT).principal(f"Bearer {token}") == Principal("ana", "7")


async def test_anonymous_callers_are_let_in_where_the_configuration_says_so(path: Path) -> None:
    made = Authenticator(Serve(anonymous=True))
    made.check()
    assert await made.principal(None) == Principal("anonymous")
    with pytest.raises(Problem):
        await made.principal("Bearer cdcsync_x")


def test_a_server_that_nobody_could_call_does_not_start() -> None:
    with pytest.raises(SetupError, match="nobody could call"):
        Authenticator(Serve()).check()


def test_revoking_what_is_not_there_is_told(path: Path) -> None:
    new_token(path, "ana", {}, None)
    revoke_tokens(path, "ana")
    for subject in ("ben", "ana"):
        with pytest.raises(UsageError, match=f"no token of {subject}"):
            revoke_tokens(path, subject)
