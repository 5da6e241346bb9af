"""Who calls: tokens of a file, their claims, ends and revocation, and a file that changes while the server runs.

And the keys of signed tokens, from a provider that answers oddly or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import gzip
import json
import os
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import anyio
import httpx2
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from structlog.testing import capture_logs

from cdcsync.config.serving import Serve, Tenant
from cdcsync.errors import SetupError, UsageError
from cdcsync.serve import identity
from cdcsync.serve.identity import (
    KEYS_AGAIN_S,
    KEYS_BYTES,
    KEYS_GOOD_S,
    PREFIX,
    Authenticator,
    Principal,
    _Keys,
    new_token,
    not_signed_in,
    not_signed_in_over_stdio,
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
        path.write_text(content, errors="surrogateescape")


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


CHANGES: dict[str, Callable[[Path, str], object]] = {
    "new": lambda path, subject: new_token(path, f"{subject} again", {}, None),
    "revoke": revoke_tokens,
}


@pytest.mark.parametrize("first", CHANGES)
@pytest.mark.parametrize("second", CHANGES)
def test_changes_at_the_same_time_are_all_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch, first: str, second: str
) -> None:
    """The second change begins once the first has read the file; before that is replaced, it waits or is over."""
    for subject in ("ana", "ben"):
        new_token(path, subject, {}, None)
    waits_or_over = threading.Event()
    write, flock = identity._write, fcntl.flock

    def meanwhile() -> None:
        try:
            CHANGES[second](path, "ben")
        finally:
            waits_or_over.set()

    def locking(descriptor: int, operation: int) -> None:
        waits_or_over.set()
        flock(descriptor, operation)

    other = threading.Thread(target=meanwhile)

    def writing(*what: Any) -> None:
        monkeypatch.setattr(identity, "_write", write)
        monkeypatch.setattr(fcntl, "flock", locking)
        other.start()
        assert waits_or_over.wait(60)
        write(*what)

    monkeypatch.setattr(identity, "_write", writing)
    CHANGES[first](path, "ana")
    other.join()
    found = {one.subject: one.revoked for one in read_tokens(path).tokens}
    expected = {"ana": first == "revoke", "ben": second == "revoke"}
    added = {f"{who} again": False for who, change in (("ana", first), ("ben", second)) if change == "new"}
    assert found == expected | added
    assert [one.name for one in path.parent.iterdir()] == ["tokens.json"]


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_whose_directory_cannot_be_locked_is_left_as_it_is(
    path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path, str], object]
) -> None:
    new_token(path, "ana", {}, None)
    before = path.read_bytes()

    def refused(*_: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refused)
    for place in (path, path.parent / "missing" / "tokens.json"):
        with pytest.raises(SetupError, match="the tokens cannot be locked") as failed:
            change(place, "ana")
        assert failed.value.where == str(place.parent)
        assert failed.value.hint
    assert path.read_bytes() == before


def test_the_file_that_a_link_leads_to_is_changed_and_the_link_stays(path: Path) -> None:
    """A server may name the file by its real path, or a volume have it."""
    volume = path.parent / "volume" / "real.json"
    volume.parent.mkdir()
    path.symlink_to(volume)
    new_token(path, "ana", {}, None)
    assert revoke_tokens(path, "ana") == 1
    assert path.is_symlink()
    assert [one.revoked for one in read_tokens(volume).tokens] == [True]
    assert [one.name for one in volume.parent.iterdir()] == ["real.json"]


def test_those_who_name_a_file_by_different_paths_wait_for_each_other(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path.parent / "volume").mkdir()
    path.symlink_to(path.parent / "volume" / "real.json")
    locked: list[int] = []
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, _: locked.append(os.fstat(descriptor).st_ino))
    for named in (path, path.parent / "volume" / "real.json"):
        new_token(named, "ana", {}, None)
    assert locked == 2 * [(path.parent / "volume").stat().st_ino]


@pytest.mark.parametrize(
    "authorization",
    [None, "", "Bearer", "Bearer ", "Basic YTpi", "Bearer cdcsync_", "Bearer cdcsync_x", "Bearer \ud800", "x" * 10_000],
)
async def test_whoever_has_no_token_gets_one_answer(path: Path, authorization: str | None) -> None:
    new_token(path, "ana", {}, None)
    with pytest.raises(Problem) as refused:
        await authenticator(path).principal(authorization)
    assert refused.value.body == not_signed_in().body


async def test_nothing_of_a_refused_call_is_kept(path: Path) -> None:
    made = authenticator(path)

    class Body:
        """What a call holds."""

    async def call() -> weakref.ref[Body]:
        body = Body()
        with contextlib.suppress(Problem):
            await made.principal("Bearer nope")
        return weakref.ref(body)

    bodies = [await call() for _ in range(20)]
    gc.collect()
    assert not [one for one in bodies if one() is not None]


async def test_a_token_ends_at_its_time(path: Path) -> None:
    token = new_token(path, "ana", {}, 1)
    expire(path)
    with pytest.raises(Problem) as refused:
        await authenticator(path).principal(f"Bearer {token}")
    assert refused.value.body == not_signed_in().body


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


NO_UTF_8 = os.fsdecode(b"\x80")
"""What becomes a byte that is no UTF-8 by itself, once it is written with `surrogateescape`."""

BROKEN = [
    *("{", '{"tokens": [{"sha256": 3}]}', '{"tokens": [], "extra": 1}', None),
    *(f'{{"tokens": [{{"sha256": "{NO_UTF_8}"}}]}}', '{"tokens": [{"claims": {"a": ' + "[" * 100_000),
]


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: ascii(broken)[:32])
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


async def test_a_file_that_could_not_be_read_is_read_as_soon_as_it_can_be(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may read a file changes without the file: by `chown`, or by the mode of its directory."""
    token = new_token(path, "ana", {}, None)
    made = authenticator(path)
    read = Path.read_bytes

    def refused(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with capture_logs() as logs:
        for _ in range(2):
            monkeypatch.setattr(Path, "read_bytes", refused)
            for _ in range(3):
                with pytest.raises(Problem):
                    await made.principal(f"Bearer {token}")
            monkeypatch.setattr(Path, "read_bytes", read)
            assert await made.principal(f"Bearer {token}") == Principal("ana")
            path.touch()  # noqa: ASYNC240
    assert [entry["event"] for entry in logs] == 2 * ["tokens_unreadable"]  # once for each time that it could not be


async def test_tokens_of_a_file_that_is_deleted_before_the_first_call_let_nobody_in(path: Path) -> None:
    token = new_token(path, "ana", {}, None)
    made = authenticator(path)
    made.check()
    replace(path, None)
    with pytest.raises(Problem):
        await made.principal(f"Bearer {token}")


def test_a_time_without_an_offset_is_refused_when_the_file_is_read(path: Path) -> None:
    new_token(path, "ana", {}, 1)
    content = json.loads(path.read_text())
    content["tokens"][0]["expires"] = "2027-01-01T00:00:00"
    path.write_text(json.dumps(content))
    with pytest.raises(SetupError, match="timezone"):
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


@pytest.mark.parametrize(("subject", "tenant"), [("bo\0b", "t1"), ("bob", "t\0")])
async def test_a_caller_whom_no_text_can_name_is_not_known(path: Path, subject: str, tenant: str) -> None:
    token = new_token(path, "bob", {"tenant": tenant}, None)
    content = json.loads(path.read_bytes())  # noqa: ASYNC240
    content["tokens"][0]["subject"] = subject
    replace(path, json.dumps(content))
    with pytest.raises(Problem) as refused:
        await authenticator(path, tenant=TENANT).principal(f"Bearer {token}")
    assert refused.value.body == not_signed_in().body


@pytest.mark.parametrize("subject", ["", " ", "bo\0b", "bo\udcffb", "bo\nb", "bo\x1b[2Jb"])
def test_no_token_is_made_for_a_subject_that_a_list_could_not_show(path: Path, subject: str) -> None:
    with pytest.raises(UsageError, match="the subject is empty or holds control characters"):
        new_token(path, subject, {}, None)
    assert not path.exists()


async def test_a_caller_without_a_header_to_send_is_told_of_the_environment(path: Path) -> None:
    made = authenticator(path)
    made.refused = not_signed_in_over_stdio
    for authorization in (None, "Bearer cdcsync_x"):
        with pytest.raises(Problem) as refused:
            await made.principal(authorization)
        assert refused.value.body == not_signed_in_over_stdio().body


async def test_anonymous_callers_are_let_in_where_the_configuration_says_so(path: Path) -> None:
    made = Authenticator(Serve(anonymous=True))
    made.check()
    assert await made.principal(None) == Principal("anonymous")
    with pytest.raises(Problem):
        await made.principal("Bearer cdcsync_x")


PLACE = "https://id.example/keys"
SIGNED: dict[str, Any] = {"issuer": "us", "audience": "search"}


class IdentityProvider:
    """A key of an identity provider, and the provider that publishes it; a fetch waits for `answers`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        self.published = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())) | {"kid": "one"}
        claims = {"sub": "ana", "iss": "us", "aud": "search", "exp": datetime.now(UTC) + timedelta(days=1)}
        self.token, self.unknown = (
            jwt.encode(claims, key, algorithm="ES256", headers={"kid": kid}) for kid in ("one", "two")
        )
        self.fetches = 0
        self.up = True
        self.respond: Callable[[], httpx2.Response] = self.publish
        self.answers = anyio.Event()
        self.asked = anyio.Event()
        self.now = 1_000.0
        transport = httpx2.MockTransport(self._answer)
        client = httpx2.AsyncClient
        monkeypatch.setattr(httpx2, "AsyncClient", lambda **options: client(transport=transport, **options))
        monkeypatch.setattr(anyio, "current_time", lambda: self.now)
        self.keys = _Keys(PLACE)

    async def _answer(self, request: httpx2.Request) -> httpx2.Response:
        self.fetches += 1
        self.asked.set()
        await self.answers.wait()
        if not self.up:
            raise httpx2.ConnectTimeout("no answer", request=request)
        return self.respond()

    def publish(self, *others: str) -> httpx2.Response:
        """Answer with the key, and others after it."""
        return answered(
            f'{{"keys": [{", ".join([json.dumps(self.published), *others])}]}}'.encode(errors="surrogateescape")
        )


def answered(content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> httpx2.Response:
    """Return an answer whose content is read as it arrives."""

    async def parts() -> AsyncIterator[bytes]:
        yield content

    return httpx2.Response(status, headers=headers, content=parts())


def dripping() -> httpx2.Response:
    """Return an answer that begins and never ends."""

    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        await anyio.sleep_forever()

    return httpx2.Response(200, content=parts())


def failing(exception: Exception) -> httpx2.Response:
    raise exception


@pytest.fixture
async def provider(monkeypatch: pytest.MonkeyPatch) -> IdentityProvider:
    return IdentityProvider(monkeypatch)


async def test_a_provider_that_is_away_is_asked_again_after_a_while_and_not_by_each_call(
    provider: IdentityProvider,
) -> None:
    provider.answers.set()
    await provider.keys.key_of(provider.token)
    provider.up = False
    provider.now += KEYS_GOOD_S + 1
    for _ in range(3):
        await provider.keys.key_of(provider.token)
    assert provider.fetches == 2
    provider.now += KEYS_AGAIN_S + 1
    await provider.keys.key_of(provider.token)
    assert provider.fetches == 3


async def test_without_any_key_callers_are_told_to_come_back_and_the_provider_is_not_asked_for_each(
    provider: IdentityProvider,
) -> None:
    provider.answers.set()
    provider.up = False
    for _ in range(3):
        with pytest.raises(Problem) as refused:
            await provider.keys.key_of(provider.token)
        assert (refused.value.status, refused.value.retry_after_s) == (503, 5)
    assert provider.fetches == 1


async def test_a_caller_whose_key_is_known_does_not_wait_while_somebody_else_s_is_looked_for(
    provider: IdentityProvider,
) -> None:
    provider.answers.set()
    await provider.keys.key_of(provider.token)
    provider.answers, provider.asked = anyio.Event(), anyio.Event()
    provider.now += KEYS_GOOD_S + 1

    async def looked_for() -> None:
        with pytest.raises(jwt.PyJWTError):
            await provider.keys.key_of(provider.unknown)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(looked_for)
        await provider.asked.wait()
        await provider.keys.key_of(provider.token)
        provider.answers.set()
    assert provider.fetches == 2


SET = b'{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo", "kid": "one"}]}'
"""A set that can be read. Once it is, tokens of the provider's key are refused.

Source: RFC 8037, appendix A.2.
"""

ODD_ANSWERS: dict[str, Callable[[], httpx2.Response]] = {
    **{
        repr(content[:24]): partial(answered, content)
        for content in (
            *(b"", b"<html>", b"{", b"\xff", b"[]", b"null", b'"maintenance"', b"7", b"9" * 5_000, b"[" * 100_000),
            *(b"{}", b'{"keys": null}', b'{"keys": {}}', b'{"keys": []}', b'{"keys": [null, 3, "x", [], {}]}'),
            SET.replace(b"one", b"\\ud800"),
            b'{"keys": [{"kty": "oct", "k": "c2VjcmV0", "kid": "one"}]}',
            b'{"keys": [' + b"[" * 100_000,
        )
    },
    "too large": partial(answered, SET + b" " * KEYS_BYTES),
    "compressed": partial(answered, gzip.compress(SET), headers={"Content-Encoding": "gzip"}),
    "elsewhere": partial(answered, SET, 302, {"Location": "https://elsewhere.example/keys"}),
    "broken": partial(answered, SET, 500),
    "without end": dripping,
    "not an address": partial(failing, httpx2.InvalidURL("what")),
}


@pytest.mark.parametrize("odd", ODD_ANSWERS)
async def test_an_answer_that_is_not_a_set_of_keys_is_as_if_there_were_none(
    provider: IdentityProvider, path: Path, monkeypatch: pytest.MonkeyPatch, odd: str
) -> None:
    """Callers whose key is known, and those with tokens of the file, are answered; the provider is asked once."""
    provider.answers.set()
    kept = new_token(path, "ben", {}, None)
    early, late = (authenticator(path, jwks=PLACE, **SIGNED) for _ in range(2))
    assert await early.principal(f"Bearer {provider.token}") == Principal("ana")
    monkeypatch.setattr(identity, "KEYS_WITHIN_S", 0.1)
    provider.respond = ODD_ANSWERS[odd]
    provider.now += KEYS_GOOD_S + 1
    for _ in range(2):
        assert await early.principal(f"Bearer {provider.token}") == Principal("ana")
        with pytest.raises(Problem) as stranger:
            await early.principal(f"Bearer {provider.unknown}")
        assert stranger.value.status == 401
    assert provider.fetches == 2
    for _ in range(2):
        with pytest.raises(Problem) as unchecked:
            await late.principal(f"Bearer {provider.token}")
        assert unchecked.value.status == 503
    assert provider.fetches == 3
    assert [await one.principal(f"Bearer {kept}") for one in (early, late)] == [Principal("ben")] * 2


ODD_KEYS = [
    *("null", "3", '"x"', "[]", "{}", '{"kty": "RSA"}', '{"kty": "oct", "k": "c2VjcmV0", "kid": "one"}'),
    *('{KEY, "kid": ["one"]}', '{KEY, "kid": {}}', '{KEY, "kid": 3}', '{KEY, "kty": ["EC"]}', '{KEY, "kty": "XY"}'),
    *('{KEY, "alg": ["ES256"]}', '{KEY, "alg": "none"}', '{KEY, "alg": "RSA-OAEP"}', '{KEY, "alg": "RS256"}'),
    *('{KEY, "use": "enc"}', '{KEY, "use": ["sig"]}', '{KEY, "crv": "P-000"}', '{KEY, "y": null}', '{KEY, "x": ""}'),
    f'{{KEY, "kid": "{NO_UTF_8}"}}',
    *(f'{{KEY, "x": {"9" * 5_000}}}', f'{{KEY, "x": "{"_" * 100_000}"}}'),
]
"""Keys that cannot be used. KEY is what the provider's key has."""


@pytest.mark.parametrize("odd", ODD_KEYS, ids=lambda odd: ascii(odd)[:32])
async def test_a_key_that_cannot_be_used_takes_none_away_from_the_others(provider: IdentityProvider, odd: str) -> None:
    provider.respond = partial(provider.publish, odd.replace("KEY", json.dumps(provider.published)[1:-1]))
    provider.answers.set()
    key = await provider.keys.key_of(provider.token)
    assert jwt.decode(provider.token, key, algorithms=["ES256"], **SIGNED)["sub"] == "ana"


async def test_a_file_of_keys_that_cannot_be_read_holds_nobody_up(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, provider: IdentityProvider
) -> None:
    monkeypatch.setattr(identity, "KEYS_WITHIN_S", 0.1)
    kept = new_token(path, "ben", {}, None)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(SET + b" " * KEYS_BYTES)
    places = [tmp_path / "pipe", tmp_path / "large", tmp_path, tmp_path / "missing", f"file://{tmp_path}", "a\0b"]
    try:
        for place in places:
            made = authenticator(path, jwks=str(place), **SIGNED)
            with pytest.raises(Problem) as unchecked:
                await made.principal(f"Bearer {provider.token}")
            assert unchecked.value.status == 503
            assert await made.principal(f"Bearer {kept}") == Principal("ben")
    finally:
        os.close(os.open(tmp_path / "pipe", os.O_RDWR))  # lets go of the thread that opens it


def test_a_server_that_nobody_could_call_does_not_start() -> None:
    with pytest.raises(SetupError, match="nobody could call"):
        Authenticator(Serve()).check()


def test_revoking_what_is_not_there_is_told(path: Path) -> None:
    new_token(path, "ana", {}, None)
    revoke_tokens(path, "ana")
    for subject in ("ben", "ana"):
        with pytest.raises(UsageError, match=f"no token of {subject}"):
            revoke_tokens(path, subject)
