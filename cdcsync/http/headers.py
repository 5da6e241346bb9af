"""Headers on every answer, which shut off what a browser could be tricked into.

A page of ours loads nothing from elsewhere and runs no script but its own, whose hash is in the policy.

Source: Content Security Policy Level 3; OWASP, "HTTP Headers Cheat Sheet".
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from collections.abc import Mapping

import anyio
from starlette.datastructures import MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send


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


class Secured:
    """Puts headers on every answer, those of errors too, and answers a request that the server's stop cuts short.

    :param headers: those that an answer has unless the application sets others.
    :param stopping: the answer to a request that is cut short.
    """

    def __init__(self, app: ASGIApp, headers: Mapping[str, str], stopping: Response) -> None:
        self._app = app
        self._headers = headers
        self._stopping = stopping

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        begun = False

        async def secured(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self._headers.items():
                    headers.setdefault(name, value)
                begun = True
            await send(message)

        try:
            await self._app(scope, receive, secured)
        except anyio.get_cancelled_exc_class():
            # The task is this request's own, and only the server cancels it, when it stops. Raised further, it would be
            # logged as a bug. The client may be gone.
            if not begun:
                with anyio.CancelScope(shield=True), contextlib.suppress(Exception):
                    await self._stopping(scope, receive, secured)
