"""A provider behind HTTP: one request, with all that may go wrong put into four words.

    Refused         the provider says no to this request: too long, not allowed, or malformed
    Spoilt          it tried and gave nothing usable: 500, a cut connection, a time-out, HTML instead of JSON
    EmbedderUnavailable, EmbedderSetupError    it is away or overloaded; our key or its address is wrong

Whether a refused or spoilt request is the text's fault, the caller finds out by asking for something else. Spoilt
requests are tried `TRIES` times; being told to wait costs no try. Messages never hold the key, nor a text: providers
like to quote what they refuse.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

import anyio
import httpx2
import msgspec
import structlog

from cdcsync import __version__, config
from cdcsync.embedders.pacing import Breaker, Pace, retry_after_s
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable

log = structlog.get_logger()

TRIES = 3
"""Attempts at a request whose answers are spoilt: a restarting server or a connection that went stale mends itself."""

FIRST_RETRY_S = 0.5

CONNECT_TIMEOUT_S = 10.0
"""Longer than the slowest handshake across the world, shorter than a server at work may take to answer."""

PATIENCE_S = 90.0
"""A request waits no longer than this for a provider that asks for it; beyond it, the caller decides. Our own budgets
ask for less at a time: after a minute's worth was taken at once, 72 s."""

KEEP_IDLE_S = 30.0
"""Idle connections are closed before common servers and load balancers do so (60 s), in the middle of a request."""

REASON_CHARACTERS = 300
QUOTE_CHARACTERS = 12
"""A message that has this many characters in a row in common with a text may quote it, and is not repeated."""
SHORT_TEXT = 3
"""Texts of so few characters are in every message, and tell nothing."""


class Answer(msgspec.Struct, frozen=True):
    """What came back, whatever its status."""

    status: int
    headers: httpx2.Headers
    body: bytes


class Refused(Exception):
    """The provider says no to this request."""


class Spoilt(Exception):
    """The provider gave nothing usable, time and again."""


class Provider:
    """One provider: its address, key, connections, pace and breaker.

    :param where: the section that describes it, for messages.
    :param clock: the time in seconds.
    """

    def __init__(
        self,
        where: str,
        settings: config.OpenAIEmbedder | config.TeiEmbedder,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
        clock: Callable[[], float] = anyio.current_time,
    ) -> None:
        self.where = where
        self._settings = settings
        self._budgets = (requests_per_minute, tokens_per_minute)
        self._clock = clock
        self._url = settings.base_url.rstrip("/")
        self._client: httpx2.AsyncClient | None = None
        self._pace: Pace | None = None
        self.breaker = Breaker()

    @property
    def is_open(self) -> bool:
        """Whether `ask` may be called."""
        return self._client is not None

    def open(self) -> None:
        """Make the pool of connections; the first request opens one."""
        if self._client is not None:
            return
        self._key()
        connections = self._settings.concurrency
        self._client = httpx2.AsyncClient(
            headers={"user-agent": f"cdcsync/{__version__}", "accept": "application/json"},
            timeout=httpx2.Timeout(self._settings.timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
            limits=httpx2.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEP_IDLE_S
            ),
        )
        requests, tokens = self._budgets
        self._pace = Pace(self._clock(), requests_per_minute=requests, tokens_per_minute=tokens)

    async def aclose(self) -> None:
        """Close all connections."""
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def ask(
        self,
        path: str,
        body: bytes | None = None,
        *,
        texts: Sequence[str] = (),
        tokens: float = 0.0,
        at_most: int,
        tries: int = TRIES,
    ) -> bytes:
        """Return the answer to a request: GET without a body, POST with one.

        :param path: what comes after the base URL.
        :param texts: what messages must not repeat.
        :param tokens: how many tokens the request has, by estimate.
        :param at_most: how many bytes an answer can have.
        :raises EmbedderUnavailable: the provider is away, overloaded, or asks for more patience than there is.
        :raises EmbedderSetupError: the key, the address or the model's name is wrong.
        :raises Refused: the provider says no to this request.
        :raises Spoilt: it failed `tries` times.
        """
        failures = 0
        waits: list[float] = []
        while True:
            await self._admission(tokens)
            self.breaker.admit()
            try:
                problem = await self._attempt(path, body, at_most)
                if isinstance(problem, Answer):
                    answer = problem
                    if answer.status == httpx2.codes.OK:
                        self.breaker.succeeded()
                        return answer.body
                    problem = f"{answer.status} {_reason(answer.body, [*texts, self._key()])}".strip()
                    if answer.status in (429, 503):
                        self._wait(answer, problem, waits)
                        continue
                    self._raise_if_final(answer.status, problem)
                self.breaker.failed(self._clock(), random.random())  # noqa: S311 - spreads load, guards nothing
            finally:
                self.breaker.ended()
            failures += 1
            log.debug("provider_failed", where=self.where, failures=failures, error=problem)
            if failures >= tries:
                raise Spoilt(f"the provider fails: {problem}")
            await anyio.sleep(spread(FIRST_RETRY_S * 2 ** (failures - 1)))

    async def _admission(self, tokens: float) -> None:
        """Wait until a request may go, and note it."""
        assert self._pace is not None
        while True:
            now = self._clock()
            away = self.breaker.wait_s(now)
            if away > 0:
                raise EmbedderUnavailable(
                    "the provider failed several times in a row", where=self.where, retry_after_s=away
                )
            wait = self._pace.wait_s(now, tokens)
            if wait <= 0:
                self._pace.take(now, tokens)
                return
            if wait > PATIENCE_S:
                raise EmbedderUnavailable(
                    "the provider's or our own rate limit is reached", where=self.where, retry_after_s=wait
                )
            await anyio.sleep(wait)

    async def _attempt(self, path: str, body: bytes | None, at_most: int) -> Answer | str:
        """Send the request once; returns the answer, or what went wrong on the way."""
        assert self._pace is not None
        try:
            with anyio.fail_after(self._settings.timeout_s):
                answer = await self._send(path, body, at_most)
        except httpx2.ConnectError as error:
            self._failed_to_connect(str(error))
        except httpx2.ConnectTimeout:
            self._failed_to_connect("the connection timed out")
        except (TimeoutError, httpx2.TimeoutException):
            return f"no answer within {self._settings.timeout_s:g} s"
        except httpx2.HTTPError as error:
            return f"the connection broke: {str(error) or type(error).__name__}"
        if answer is None:
            return f"the answer is larger than {at_most} bytes"
        self._pace.heard(self._clock(), answer.headers)
        return answer

    async def _send(self, path: str, body: bytes | None, at_most: int) -> Answer | None:
        assert self._client is not None
        headers = {"content-type": "application/json"} if body is not None else {}
        if key := self._key():
            headers["authorization"] = f"Bearer {key}"
        method = "GET" if body is None else "POST"
        received = bytearray()
        async with self._client.stream(method, self._url + path, content=body, headers=headers) as response:
            async for part in response.aiter_bytes():
                received += part
                if len(received) > at_most:
                    return None
            return Answer(response.status_code, response.headers, bytes(received))

    def _failed_to_connect(self, problem: str) -> NoReturn:
        now = self._clock()
        self.breaker.failed(now, random.random())  # noqa: S311 - spreads load, guards nothing
        raise EmbedderUnavailable(
            f"the provider cannot be reached: {problem}",
            where=self.where,
            hint=f"see that {self._url} is up and can be reached from here",
        )

    def _wait(self, answer: Answer, reason: str, waits: list[float]) -> None:
        """Hold everybody back for as long as the provider asks, or ever longer when it does not say.

        :param waits: how long this request was told to wait before, in seconds; the new wait is added.
        """
        assert self._pace is not None
        if answer.status == 429:
            # Busy, but there.
            self.breaker.succeeded()
        asked = retry_after_s(answer.headers, datetime.now(UTC))
        wait = asked if asked is not None else spread(min(30.0, 2.0 ** len(waits)))
        waits.append(wait)
        self._pace.hold(self._clock(), wait)
        log.debug("provider_asks_to_wait", where=self.where, seconds=round(wait, 2), reason=reason)
        if "insufficient_quota" in reason or sum(waits) > PATIENCE_S:
            raise EmbedderUnavailable(
                f"the provider answers {reason}",
                where=self.where,
                hint="see that the account has credit and its limits fit the load",
                retry_after_s=wait,
            )

    def _raise_if_final(self, status: int, reason: str) -> None:
        """Raise what another attempt would meet again."""
        if status in (400, 413, 422):
            self.breaker.succeeded()
            raise Refused(f"the provider answers {reason}")
        if status in (401, 403):
            self.breaker.succeeded()
            raise EmbedderSetupError(
                f"the provider answers {reason}", where=self.where, hint="see that the key is right and may do this"
            )
        if 300 <= status < 400 or status in (404, 405):
            self.breaker.succeeded()
            raise EmbedderSetupError(
                f"the provider answers {reason}", where=self.where, hint="see that base_url and model are right"
            )

    def correct(self, tokens: float) -> None:
        """Note that a request had so many tokens more than was estimated, or fewer when negative."""
        if self._pace is not None:
            self._pace.correct(self._clock(), tokens)

    def _key(self) -> str:
        path = self._settings.api_key_file
        if not path:
            return self._settings.api_key
        try:
            key = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            problem = error.strerror if isinstance(error, OSError) else "it is not text"
            raise EmbedderSetupError(
                f"the key's file {path} cannot be read: {problem}",
                where=f"{self.where}.api_key_file",
                hint="check the path, and the permissions of this user",
            ) from None
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise EmbedderSetupError(
                f"the file {path} holds no key", where=f"{self.where}.api_key_file", hint="put the key alone into it"
            )
        return key


def spread(bound_s: float) -> float:
    """Return a random wait in the upper half of the bound, so that callers spread out."""
    return bound_s * (0.5 + random.random() / 2)  # noqa: S311 - spreads load, guards nothing


def _reason(body: bytes, secrets: Sequence[str]) -> str:
    """Return what an error's body says, without what must not be repeated; nothing when it is no JSON."""
    try:
        reason = _message(msgspec.json.decode(body))
    except msgspec.DecodeError:
        return ""
    reason = " ".join(reason.split())[:REASON_CHARACTERS]
    pieces = [reason[at : at + QUOTE_CHARACTERS] for at in range(len(reason) - QUOTE_CHARACTERS + 1)]
    quoted = any(
        secret in reason or any(piece in secret for piece in pieces) for secret in secrets if len(secret) > SHORT_TEXT
    )
    return "(its message repeats what was sent, and is not shown)" if quoted else reason


def _message(answer: Any) -> str:
    """Return the message in the forms that providers give it: OpenAI, text-embeddings-inference, FastAPI."""
    match answer:
        case str():
            return answer
        case {"error": {"message": str(message), "code": str(code)}}:
            return f"{code}: {message}"
        case {"error": {"message": str(message)}} | {"error": str(message)} | {"message": str(message)}:
            return message
        case {"detail": str(message)} | {"detail": [{"msg": str(message)}, *_]}:
            return message
        case _:
            return ""
