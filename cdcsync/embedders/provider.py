"""A provider behind HTTP: one request, with all that may go wrong put into our errors.

    EmbedderUnavailable    it is away, overloaded, or tells us to wait for longer than a request does
    EmbedderSetupError     it says that the key or the address is wrong
    TextRejected           it says no to this request: too long, not allowed, or malformed
    EmbedError             it tried and gave nothing usable: 500, a cut connection, no answer in time

These are what the provider says. Whether the texts or the provider are at fault is decided above, by asking for
something else. Messages never hold the key, nor a text.
"""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from datetime import UTC, datetime
from http.cookiejar import CookieJar, DefaultCookiePolicy
from pathlib import Path
from typing import NoReturn

import anyio
import httpx2
import msgspec

from cdcsync import __version__, config
from cdcsync.config.redaction import is_secret_key
from cdcsync.embedders.foreign import PACKED, Body, reason, repeatable
from cdcsync.embedders.pacing import WAITED, Pace, retry_after_s
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable, EmbedError, TextRejected
from cdcsync.logs import get_logger

log = get_logger()

QUERY_TRIES = 3
"""Attempts at a request that a person waits for. Documents have one: what is above knows better what to ask next."""

FIRST_RETRY_S = 0.5

CONNECT_TIMEOUT_S = 10.0
"""Longer than the slowest handshake across the world, shorter than a server at work may take to answer."""

PATIENCE_S = 90.0
"""A request waits no longer than this for a provider that asks for it; beyond it, the caller decides. Our own budgets
ask for less at a time: after a minute's worth was taken at once, 72 s."""

TRUSTED = 3
AGAIN_S = 0.1
"""So often in a row a provider's own word on how long to wait is taken; then ours grows from this, if it is longer."""

KEEP_IDLE_S = 30.0
"""Idle connections are closed before common servers and load balancers do so (60 s), in the middle of a request."""


PROXIES = "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY"


class Answer(msgspec.Struct, frozen=True):
    """A provider's response, of any status."""

    status: int
    headers: httpx2.Headers
    body: bytes


class Told(msgspec.Struct):
    """How often, and how long in all, a request was told to wait."""

    times: int = 0
    seconds: float = 0.0


class Provider:
    """One provider: its address, key, connections and pace.

    :param where: the section that describes it, for messages.
    """

    def __init__(
        self,
        where: str,
        settings: config.OpenAIEmbedder | config.TeiEmbedder | config.TeiReranker,
        *,
        requests_per_minute: int | None = None,
        tokens_per_minute: int | None = None,
    ) -> None:
        self.where = where
        self._settings = settings
        self._budgets = (requests_per_minute, tokens_per_minute)
        self._url = settings.base_url.rstrip("/")
        self._client: httpx2.AsyncClient | None = None
        self._pace: Pace | None = None

    @property
    def is_open(self) -> bool:
        """Whether `ask` may be called."""
        return self._client is not None

    def open(self) -> None:
        """Make the pool of connections; the first request opens one.

        :raises EmbedderSetupError: the key's file cannot be read, or the environment names proxies or certificates that
            cannot be used.
        """
        if self._client is not None:
            return
        self._key()
        connections = self._settings.concurrency
        try:
            self._client = httpx2.AsyncClient(
                headers={
                    "user-agent": f"cdcsync/{__version__}",
                    "accept": "application/json",
                    "accept-encoding": PACKED,
                },
                # One that takes no cookies: they would grow for as long as the provider makes up new ones.
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
                timeout=httpx2.Timeout(self._settings.timeout_s, connect=CONNECT_TIMEOUT_S, pool=None),
                limits=httpx2.Limits(
                    max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEP_IDLE_S
                ),
            )
        except Exception as error:
            # The library reads them. Its words may repeat a proxy's password.
            raise EmbedderSetupError(
                f"the environment's settings for HTTP cannot be used ({type(error).__name__})",
                where=self.where,
                hint=f"correct {PROXIES}, and SSL_CERT_FILE; a proxy's address begins with http:// or https://",
            ) from None
        requests, tokens = self._budgets
        self._pace = Pace(anyio.current_time(), requests_per_minute=requests, tokens_per_minute=tokens)

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
        tries: int = 1,
    ) -> bytes:
        """Return the answer to a request: GET without a body, POST with one.

        Being told to wait for a short time costs no try.

        :param path: what comes after the base URL.
        :param texts: what messages must not repeat.
        :param tokens: how many tokens the request has, by estimate.
        :param at_most: how many bytes an answer can have.
        :raises EmbedderUnavailable: the provider is away, overloaded, or asks for more patience than there is.
        :raises EmbedderSetupError: the key, the address or the model's name is wrong.
        :raises TextRejected: the provider says no to this request.
        :raises EmbedError: it failed `tries` times.
        """
        failures = 0
        told = Told()
        while True:
            await self._admission(tokens)
            sent = [*texts, *self._secrets()]
            problem = await self._attempt(path, body, at_most, sent)
            if isinstance(problem, Answer):
                answer = problem
                if answer.status == httpx2.codes.OK:
                    return answer.body
                problem = f"{answer.status} {reason(answer.body, sent)}".strip()
                if answer.status in (429, 503):
                    self._wait(answer, problem, told)
                    continue
                self._raise_if_final(answer.status, problem)
                problem = f"the provider answers {problem}"
            failures += 1
            log.debug("provider_failed", where=self.where, failures=failures, error=problem)
            if failures >= tries:
                raise EmbedError(problem, where=self.where)
            await anyio.sleep(spread(FIRST_RETRY_S * 2 ** (failures - 1)))

    async def _admission(self, tokens: float) -> None:
        """Wait until a request may go, and note it."""
        assert self._pace is not None
        while True:
            now = anyio.current_time()
            wait = self._pace.wait_s(now, tokens)
            if wait <= 0:
                self._pace.take(now, tokens)
                return
            if wait > PATIENCE_S:
                raise EmbedderUnavailable(
                    "the provider's or our own rate limit is reached", where=self.where, retry_after_s=wait
                )
            await anyio.sleep(wait)
            if (waited := WAITED.get()) is not None:
                waited.seconds += anyio.current_time() - now

    async def _attempt(self, path: str, body: bytes | None, at_most: int, sent: Sequence[str]) -> Answer | str:
        """Send the request once; returns the answer, or what went wrong on the way.

        :param sent: what must not be repeated.
        """
        assert self._pace is not None
        try:
            with anyio.fail_after(self._settings.timeout_s):
                answer = await self._send(path, body, at_most)
        except httpx2.ConnectError as error:
            self._failed_to_connect(repeatable(str(error)))
        except httpx2.ConnectTimeout:
            self._failed_to_connect("the connection timed out")
        except httpx2.ProxyError as error:
            self._failed_to_connect(f"the proxy answers {repeatable(str(error), sent)}")
        except (TimeoutError, httpx2.TimeoutException):
            return f"no answer within {self._settings.timeout_s:g} s"
        except EmbedderSetupError:  # the key cannot be read
            raise
        except EmbedError as error:
            return error.message
        except Exception as error:  # whatever the HTTP library makes of bytes that are not HTTP
            # Bytes that it stumbled over may be anything, escaped or not, so they are left out.
            words = str(error).partition("bytearray(")[0].rstrip(" :")
            return f"the connection broke: {repeatable(words, sent) or type(error).__name__}"
        if answer is None:
            return f"the answer is larger than {at_most} bytes"
        self._pace.heard(anyio.current_time(), answer.headers)
        return answer

    async def _send(self, path: str, sent: bytes | None, at_most: int) -> Answer | None:
        assert self._client is not None
        headers = {"content-type": "application/json"} if sent is not None else {}
        if key := self._key():
            headers["authorization"] = f"Bearer {key}"
        method = "GET" if sent is None else "POST"
        headers |= self._settings.headers
        query = self._settings.query or None
        async with self._client.stream(
            method, self._url + path, content=sent, headers=headers, params=query
        ) as response:
            body = Body(response.headers.get("content-encoding", ""), at_most)
            async for part in response.aiter_raw():
                if not body.add(part):
                    return None
            return Answer(response.status_code, response.headers, bytes(body.received))

    def _failed_to_connect(self, problem: str) -> NoReturn:
        raise EmbedderUnavailable(
            f"the provider cannot be reached: {problem}",
            where=self.where,
            hint=f"check that {self._url} is up and can be reached from here{_by_proxy()}",
        )

    def _wait(self, answer: Answer, problem: str, told: Told) -> None:
        """Hold everybody back for as long as the provider asks, or ever longer when it does not say."""
        assert self._pace is not None
        asked = retry_after_s(answer.headers, datetime.now(UTC))
        # Whoever says again and again that no wait is needed, and has no time, is not taken at their word.
        own = 2.0**told.times if asked is None else AGAIN_S * 2.0 ** (told.times - TRUSTED)
        wait = max(asked or 0.0, spread(min(30.0, own)) if asked is None or told.times >= TRUSTED else 0.0)
        told.times += 1
        told.seconds += wait
        self._pace.hold(anyio.current_time(), wait)
        log.debug("provider_asks_to_wait", where=self.where, seconds=round(wait, 2), reason=problem)
        if "insufficient_quota" in problem or told.seconds > PATIENCE_S:
            raise EmbedderUnavailable(
                f"the provider answers {problem}",
                where=self.where,
                hint="check that the account has credit and its limits fit the load",
                retry_after_s=wait,
            )

    def _raise_if_final(self, status: int, problem: str) -> None:
        """Raise what another attempt would meet again."""
        message = f"the provider answers {problem}"
        if status in (400, 413, 422):
            raise TextRejected(
                message,
                where=self.where,
                hint="if it refuses every text, check that it knows the model and the options",
            )
        if status in (401, 403):
            raise EmbedderSetupError(message, where=self.where, hint="check that the key is right and may do this")
        if status == httpx2.codes.PROXY_AUTHENTICATION_REQUIRED:
            raise EmbedderSetupError(message, where=self.where, hint=f"check {PROXIES}, and the password in them")
        if 300 <= status < 400 or status in (404, 405):
            raise EmbedderSetupError(message, where=self.where, hint="check that base_url and model are right")

    def correct(self, tokens: float) -> None:
        """Note that a request had so many tokens more than was estimated, or fewer when negative."""
        if self._pace is not None:
            self._pace.correct(anyio.current_time(), tokens)

    def _secrets(self) -> list[str]:
        """Return what no message may repeat."""
        settings = self._settings
        named: list[tuple[str, object]] = [*settings.query.items()]
        if not isinstance(settings, config.TeiReranker):
            named += [*settings.document_body.items(), *settings.query_body.items()]
        return [self._key(), *settings.headers.values(), *(str(value) for name, value in named if is_secret_key(name))]

    def _key(self) -> str:
        path = self._settings.api_key_file
        if not path:
            return self._settings.api_key
        try:
            key = Path(path).read_text("utf-8").strip()
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


def _by_proxy() -> str:
    """Say for a hint that requests may take the way through a proxy."""
    for name in PROXIES.replace(" and", ",").split(", "):
        if os.environ.get(name) or os.environ.get(name.lower()):
            return f"; requests go through the proxy that {name} names, but to hosts that NO_PROXY lists"
    return ""


def spread(bound_s: float) -> float:
    """Return a random wait in the upper half of the bound, so that callers spread out."""
    return bound_s * (0.5 + random.random() / 2)  # noqa: S311 - spreads load, guards nothing
