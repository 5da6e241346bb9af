"""Identifies callers: bearer tokens of a file, and signed tokens (JWT) by the keys of an identity provider.

The file holds hashes only, so a copy of it lets nobody in. A token is looked up by its hash: the time that takes says
nothing about any other token. The file is read again when it changes; a change that cannot be read leaves nobody in
by mistake.

Source: RFC 6750 (bearer tokens), RFC 7519 (JWT), RFC 7517 (JWKS).
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import os
import secrets
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import anyio
import anyio.to_thread
import httpx2
import jwt
import msgspec
import structlog

from cdcsync.config.redaction import redact_url
from cdcsync.config.serving import Serve
from cdcsync.errors import SetupError, UsageError
from cdcsync.malformed import MALFORMED
from cdcsync.postgres.texts import is_text
from cdcsync.process.files import real, replace_file
from cdcsync.serve.problems import AGAIN, Problem

log = structlog.get_logger()

PREFIX = "cdcsync_"
"""Tokens begin with it, so that scanners of repositories can find one that leaked."""

Algorithm = Literal["RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512", "EdDSA"]
ALGORITHMS: tuple[str, ...] = get_args(Algorithm)
"""Asymmetric ones alone: with a symmetric algorithm the published key would be the secret."""

LEEWAY_S = 30
"""How far the clocks of the identity provider and of this machine may differ."""

KEYS_GOOD_S = 600.0
KEYS_AGAIN_S = 10.0
"""Keys are fetched again after ten minutes, or for an unknown key, and never more often than every ten seconds."""

KEYS_WITHIN_S = 5.0
KEYS_BYTES = 256 * 1024
"""A set of keys that takes longer, or is larger, is not read: callers wait for it, and it is decoded on the event loop.
The sets of large providers have some ten thousand bytes."""


class Principal(msgspec.Struct, frozen=True):
    """A caller.

    :ivar subject: who it is, for the record.
    :ivar tenant: the value of the bound column; None where no column is bound.
    """

    subject: str
    tenant: str | None = None

    @property
    def account(self) -> str:
        """The account that limits are counted by."""
        return f"tenant {self.tenant}" if self.tenant is not None else f"subject {self.subject}"


class StoredToken(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A token as the file has it."""

    sha256: str
    subject: str
    claims: dict[str, Any] = {}
    expires: Annotated[datetime, msgspec.Meta(tz=True)] | None = None
    revoked: bool = False


class TokenFile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The file of tokens."""

    tokens: list[StoredToken] = []


def read_tokens(path: Path) -> TokenFile:
    """Read a file of tokens; a missing one has none.

    :raises SetupError: it cannot be read.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=TokenFile)
    except FileNotFoundError:
        return TokenFile()
    except (OSError, *MALFORMED) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise SetupError(f"the tokens cannot be read: {reason}", where=str(path), hint="restore the file") from error


def new_token(path: Path, subject: str, claims: Mapping[str, Any], days: int | None) -> str:
    """Add a token to a file and return it: it is not kept anywhere else.

    :raises UsageError: the subject is empty, or could not be told apart in a list.
    :raises SetupError: the file cannot be read or written.
    """
    if not subject.strip() or not subject.isprintable():
        raise UsageError(
            "the subject is empty or holds control characters", where="SUBJECT", hint="name who the token is for"
        )
    token = PREFIX + secrets.token_urlsafe(32)
    expires = datetime.now(UTC) + timedelta(days=days) if days is not None else None
    with _changing(path) as tokens:
        tokens.append(StoredToken(_digest(token), subject, dict(claims), expires))
    return token


def revoke_tokens(path: Path, subject: str) -> int:
    """Revoke all tokens of a subject; returns how many.

    :raises UsageError: there is none.
    :raises SetupError: the file cannot be read or written.
    """
    with _changing(path) as tokens:
        concerned = [at for at, one in enumerate(tokens) if one.subject == subject and not one.revoked]
        if not concerned:
            raise UsageError(f"there is no token of {subject}", where=str(path), hint="`cdcsync token list` shows them")
        for at in concerned:
            tokens[at] = msgspec.structs.replace(tokens[at], revoked=True)
    return len(concerned)


@contextlib.contextmanager
def _changing(path: Path) -> Iterator[list[StoredToken]]:
    """Give the tokens of a file to the body, and write them as it leaves them, unless it raises.

    Who else would change the file waits from before it is read until it is replaced. The lock is on the directory: the
    file is another one afterwards, and a file for the lock would need an owner and a mode that suit all who change this
    one. All of it concerns the file that the path leads to, which a server may know by another path.

    :raises SetupError: the file cannot be locked, read or written.
    """
    path = real(path)
    with contextlib.ExitStack() as held:
        try:
            directory = os.open(path.parent, os.O_RDONLY)
            held.callback(os.close, directory)
            fcntl.flock(directory, fcntl.LOCK_EX)
        except OSError as error:
            raise SetupError(
                f"the tokens cannot be locked: {error.strerror}",
                where=str(path.parent),
                hint="create the directory, and run this as a user who may read and write it",
            ) from error
        tokens = read_tokens(path).tokens
        yield tokens
        _write(path, TokenFile(tokens))


def _write(path: Path, content: TokenFile) -> None:
    """Replace the file in one step. A new file is readable only by its owner; an existing one keeps its mode."""
    try:
        replace_file(path, msgspec.json.format(msgspec.json.encode(content), indent=2) + b"\n", mode=0o600)
    except OSError as error:
        raise SetupError(
            f"the tokens cannot be written: {error.strerror}",
            where=str(path),
            hint="run this as a user who may write to its directory, on a disk that is not full",
        ) from error


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def not_signed_in() -> Problem:
    """Return the answer to a caller who is not known: the same for every reason, so that it tells nothing of others.

    A new one for each call: an exception holds the frames that it passed, and with them the call, for as long as it
    lives.
    """
    return Problem(401, "Not signed in", "the token is unknown, expired or revoked", "send Authorization: Bearer TOKEN")


NEVER_LOOKED = (0, 0, 0)
"""The stamp of a file of tokens that has not been read, or could not be."""

TOKEN_VARIABLE = "CDCSYNC_TOKEN"  # a name # noqa: S105 # nosec B105
"""The environment variable that holds the caller's token where MCP speaks over standard input and output."""


def not_signed_in_over_stdio() -> Problem:
    """Return the answer where there is no header to send."""
    return Problem(
        401,
        "Not signed in",
        "the token is missing, unknown, expired or revoked",
        f"set {TOKEN_VARIABLE} in the environment of the program that starts `cdcsync serve --stdio`",
    )


class Authenticator:
    """Says who calls, from the `Authorization` header.

    :ivar refused: returns the answer to a caller who is not known.
    """

    def __init__(self, serve: Serve) -> None:
        self._serve = serve
        self.refused = not_signed_in
        self._file = Path(serve.tokens_file) if serve.tokens_file is not None else None
        self._stamp: tuple[int, int, int] | None = NEVER_LOOKED
        """The file as it was read last; None if there was none."""
        self._fault: str | None = None
        """The last attempt's fault, which is logged once: every call tries again."""
        self._tokens: dict[str, StoredToken] = {}
        self._keys = _Keys(serve.jwks) if serve.jwks is not None else None

    def check(self) -> None:
        """Read the tokens now, so that a wrong file is noticed at the start.

        :raises SetupError: they cannot be read, or nobody could ever call.
        """
        if self._file is None and self._keys is None and not self._serve.anonymous:
            raise SetupError(
                "nobody could call: there are neither tokens nor keys",
                where="serve",
                hint="set serve.tokens_file and run `cdcsync token new`, or serve.jwks, or serve.anonymous on loopback",
            )
        if self._file is not None:
            read_tokens(self._file)

    async def principal(self, authorization: str | None) -> Principal:
        """Return the caller.

        :raises Problem: 401 if it is not known, 403 if it lacks the claim that a tenant needs.
        """
        if authorization is None:
            if self._serve.anonymous:
                return Principal("anonymous")
            raise self.refused()
        scheme, _, token = authorization.partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise self.refused()
        subject, claims = await self._claims(token.strip())
        tenant = self._serve.tenant
        if tenant.column is None:
            return self._storable(Principal(subject))
        value = claims.get(tenant.claim)
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise Problem(403, "Not allowed", f"the token does not claim {tenant.claim}", "ask for a token that does")
        return self._storable(Principal(subject, str(value)))

    def _storable(self, who: Principal) -> Principal:
        """Return a caller whom the record and the tenant's column can name; a JSON string can hold what no text can."""
        if not is_text(who.subject) or not is_text(who.tenant or ""):
            raise self.refused()
        return who

    async def _claims(self, token: str) -> tuple[str, Mapping[str, Any]]:
        if token.startswith(PREFIX) or self._keys is None:
            return self._stored_claims(token)
        try:
            key = await self._keys.key_of(token)
            claims = jwt.decode(
                token,
                key,
                algorithms=list(ALGORITHMS),
                issuer=self._serve.issuer,
                audience=self._serve.audience,
                leeway=LEEWAY_S,
                options={"require": ["exp", "iss", "aud", "sub"]},
            )
        except (jwt.PyJWTError, UnicodeEncodeError):
            raise self.refused() from None
        return str(claims["sub"]), claims

    def _stored_claims(self, token: str) -> tuple[str, Mapping[str, Any]]:
        self._reread()
        digest = _digest(token)
        stored = self._tokens.get(digest)
        if stored is None or not hmac.compare_digest(stored.sha256, digest) or stored.revoked:
            raise self.refused()
        if stored.expires is not None and stored.expires <= datetime.now(UTC):
            raise self.refused()
        return stored.subject, stored.claims

    def _reread(self) -> None:
        if self._file is None:
            return
        try:
            found = self._file.stat()
            stamp = (found.st_mtime_ns, found.st_size, found.st_ino)
        except OSError:
            stamp = None
        if stamp == self._stamp:
            return
        try:
            self._tokens = {one.sha256: one for one in read_tokens(self._file).tokens}
        except SetupError as error:
            # The stamp does not tell when it can be read again: a mode, or a directory's, is changed and not the file.
            self._tokens, self._stamp = {}, NEVER_LOOKED
            if error.message != self._fault:
                log.error("tokens_unreadable", error=error.message, where=error.where)
            self._fault = error.message
        else:
            self._stamp, self._fault = stamp, None


class PublishedKey(msgspec.Struct, frozen=True, omit_defaults=True):
    """A public key that could have signed a token.

    A key of another form or use, and one whose algorithm is not ours, is not decoded.

    Source: RFC 7517, section 4; RFC 7518, section 6.
    """

    kty: Literal["RSA", "EC", "OKP"]
    kid: str | None = None
    use: Literal["sig"] | None = None
    alg: Algorithm | None = None
    crv: str | None = None
    x: str | None = None
    y: str | None = None
    n: str | None = None
    e: str | None = None


class KeySet(msgspec.Struct, frozen=True):
    """A set of keys, each still to be decoded."""

    keys: list[msgspec.Raw]


def decode_keys(content: bytes) -> dict[str | None, jwt.PyJWK]:
    """Return the keys of a set by their names, without those that cannot be used.

    :raises msgspec.MsgspecError: this is not a set of keys.
    :raises RecursionError: it is nested too deeply to be one.
    :raises jwt.PyJWKSetError: none of its keys can be used.
    """
    keys = {}
    for one in msgspec.json.decode(content, type=KeySet).keys:
        with contextlib.suppress(*MALFORMED, jwt.PyJWTError):
            published = msgspec.json.decode(one, type=PublishedKey)
            keys[published.kid] = jwt.PyJWK(msgspec.to_builtins(published))
    if not keys:
        raise jwt.PyJWKSetError("none of its keys can be used")
    return keys


class _Keys:
    """The public keys of an identity provider, fetched when they are needed and kept for a while."""

    def __init__(self, place: str) -> None:
        self._place = place
        self._keys: dict[str | None, jwt.PyJWK] = {}
        self._read_at = self._tried_at = float("-inf")
        self._reading = anyio.Lock()

    async def key_of(self, token: str) -> jwt.PyJWK:
        """Return the key that a token names.

        A call whose key is known does not wait while another one has the keys fetched.

        :raises jwt.PyJWTError: it names none that is published.
        :raises Problem: 503, the keys cannot be fetched.
        """
        name = jwt.get_unverified_header(token).get("kid")
        if self._due(name) and not (name in self._keys and self._reading.locked()):
            async with self._reading:
                if self._due(name):
                    await self._read()
        if name in self._keys:
            return self._keys[name]
        if not self._keys:
            raise Problem(503, "Signed tokens cannot be checked", "the keys cannot be read", AGAIN, retry_after_s=5)
        raise jwt.InvalidKeyError("unknown key")

    def _due(self, name: str | None) -> bool:
        """Say whether to fetch the keys before a token is checked by the one of this name."""
        now = anyio.current_time()
        outdated = name not in self._keys or now - self._read_at > KEYS_GOOD_S
        return outdated and now - self._tried_at > KEYS_AGAIN_S

    async def _read(self) -> None:
        """Fetch the keys. The last ones are good for longer than an outage of the provider."""
        try:
            with anyio.fail_after(KEYS_WITHIN_S):
                content = await self._fetch()
            if len(content) > KEYS_BYTES:
                raise jwt.PyJWKSetError(f"it has more than {KEYS_BYTES} bytes")
            self._keys = decode_keys(content)
            self._read_at = anyio.current_time()
        except Exception as error:  # callers with known keys are answered despite any fault of a provider
            log.error("keys_unreadable", where=redact_url(self._place), error=type(error).__name__)
        self._tried_at = anyio.current_time()

    async def _fetch(self) -> bytes:
        """Return what is published. Of a set that is too large, only as much is read as shows that."""
        if not self._place.startswith("https://"):
            return await anyio.to_thread.run_sync(self._head, abandon_on_cancel=True)
        content = bytearray()
        # The bytes are counted as they arrive, so they must not be compressed.
        plain = {"Accept-Encoding": "identity"}
        async with (
            httpx2.AsyncClient(timeout=None, follow_redirects=False, headers=plain) as client,
            client.stream("GET", self._place) as answer,
        ):
            answer.raise_for_status()
            async for part in answer.aiter_raw():
                content += part
                if len(content) > KEYS_BYTES:
                    break
        return bytes(content)

    def _head(self) -> bytes:
        with Path(self._place).open("rb") as file:
            return file.read(KEYS_BYTES + 1)
