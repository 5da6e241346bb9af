"""Protects browsers from being tricked, by headers on every answer and by checking the host that a request names.

A page of ours loads nothing from elsewhere and runs no script but its own, whose hash is in the policy. And a page of
somebody else's, whose name leads to this machine by DNS, reads nothing of a server that listens on loopback.

Source: Content Security Policy Level 3; OWASP, "HTTP Headers Cheat Sheet"; RFC 9110, section 7.2 (Host).
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

import anyio
from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cdcsync.config.values import is_address, is_loopback


def security_headers(page: str) -> dict[str, str]:
    """Return the headers of a server whose one page is `page`."""
    return {
        "Content-Security-Policy": (
            f"default-src 'none'; script-src {_inline_hashes(page, 'script')};"
            f" style-src {_inline_hashes(page, 'style')}; connect-src 'self';"
            " img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "X-Frame-Options": "DENY",
    }


def _inline_hashes(page: str, tag: str) -> str:
    """Return the policy's source expressions for a page's inline blocks of one kind."""
    blocks = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
    digests = [base64.b64encode(hashlib.sha256(block.encode()).digest()).decode() for block in blocks]
    return " ".join(f"'sha256-{digest}'" for digest in digests)


FOREIGN = (
    "this server listens on loopback, and the request names another host: ask for localhost or an address, or list the"
    " name under `hosts` in the configuration\n"
)


class Secured:
    """Puts headers on every answer, those of errors too, and answers a request that the server's stop cuts short.

    :param headers: those that an answer has unless the application sets others.
    :param stopping: the answer to a request that is cut short.
    :param hosts: names that requests over loopback may ask for, besides localhost and addresses; None for any.
    """

    def __init__(
        self, app: ASGIApp, headers: Mapping[str, str], stopping: Response, hosts: Collection[str] | None = None
    ) -> None:
        self._app = app
        self._headers = headers
        self._stopping = stopping
        self._hosts = None if hosts is None else {"localhost", *(name.lower().rstrip(".") for name in hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        begun = False
        answering = self._app if self._named(scope) else PlainTextResponse(FOREIGN, 403)

        async def secured(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                begun = True
            await send(message)

        try:
            await answering(scope, receive, secured)
        except anyio.get_cancelled_exc_class():
            # The task is this request's own, and only the server cancels it, when it stops. Raised further, it would be
            # logged as a bug. The client may be gone.
            if not begun:
                with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
                    await self._stopping(scope, receive, secured)

    def _named(self, scope: Scope) -> bool:
        """Whether a request may name the host that it names."""
        server = scope.get("server")
        if self._hosts is None or scope["type"] != "http" or server is None or not is_loopback(server[0]):
            return True
        host = Headers(scope=scope).get("host", "").lower()
        # Without the port, and an address of IPv6 without its brackets.
        name, closed, _ = host.removeprefix("[").partition("]" if host.startswith("[") else ":")
        return name.rstrip(".") in self._hosts or (is_address(name) and (":" not in name or closed == "]"))


FOREIGN_ORIGIN = "this request comes from a page of another site: list its origin under `cors_origins`\n"


def of_known_origin(headers: Headers, allowed: Collection[str]) -> bool:
    """Say whether a request comes from no page, from one of this server or machine, or from one of these origins."""
    origin = headers.get("origin")
    if origin is None or origin in allowed or "*" in allowed:
        return True
    try:
        parts = urlsplit(origin.lower())
        name = parts.hostname or ""
    except ValueError:
        return False
    return (
        name == "localhost"
        or (is_address(name) and is_loopback(name))
        or parts.netloc == headers.get("host", "").lower()
    )
