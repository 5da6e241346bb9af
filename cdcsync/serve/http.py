"""The HTTP API.

    GET  /v1/indexes                        what can be searched, columns, freshness
    POST /v1/indexes/NAME/search            a search
    GET  /v1/indexes/NAME/documents/KEY     a document, with an ETag
    POST /v1/embed                          vectors of queries
    GET  /openapi.json                      the API described
    GET  /livez /readyz /metrics            as the worker's
    GET  /                                  a search page
    /mcp                                    MCP over streamable HTTP

A request that cannot be answered gets a problem (RFC 9457) that says what to change. When a client goes away, its
statement is cancelled.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Sequence
from importlib import resources
from typing import TypeVar, get_args
from urllib.parse import unquote

import anyio
import msgspec
import structlog
from prometheus_client.exposition import choose_encoder
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cdcsync.config.values import is_loopback
from cdcsync.errors import CdcsyncError, Unavailable, leading
from cdcsync.http.headers import Secured, security_headers
from cdcsync.malformed import MALFORMED
from cdcsync.serve.messages import EmbedRequest, Indexes, SearchRequest
from cdcsync.serve.openapi import describe
from cdcsync.serve.problems import SEE_LOG, Problem, failed
from cdcsync.serve.service import Service, Tool, caller_of

log = structlog.get_logger()

T = TypeVar("T", bound=msgspec.Struct)

Endpoint = Callable[[Request, bytes], Awaitable[Response]]
"""Answers a request whose body has been read."""

PING_S = 2.0
"""How long /readyz waits for the target."""

_NOT_AMONG = re.compile(r"Invalid enum value .* - at `\$\.(\w+)`", re.DOTALL)
"""The words for a member of a request that is none of the texts that it can be."""

_PAGE = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")


HEADERS = security_headers(_PAGE)

ALLOWED_HEADERS = (
    *("Authorization", "Content-Type", "If-None-Match", "traceparent", "tracestate"),
    *("MCP-Protocol-Version", "Mcp-Session-Id", "Last-Event-ID", "Mcp-Method", "Mcp-Name"),
)
"""The headers that a page of `cors_origins` may send: clients of MCP in browsers send those of the second line. This
server has neither sessions nor streams, so no answer names one.

Source: Model Context Protocol, "Transports" (Streamable HTTP)."""

STOPPING = Problem(503, "Stopping", "the server is stopping", "call again", retry_after_s=1)


class _Key(PathConvertor):
    """The rest of a path: Starlette's own ends at a line break, which a key may hold."""

    regex = "(?s:.*)"


register_url_convertor("key", _Key())


def make_app(service: Service, *, more: Sequence[BaseRoute] = ()) -> Starlette:
    """Return the application.

    :param more: routes of MCP.
    """
    serve = service.serve
    described = msgspec.json.encode(describe(serve))

    async def indexes(request: Request, _: bytes) -> Response:
        return _json(Indexes(await service.list_indexes(caller_of(request.headers))))

    async def search(request: Request, body: bytes) -> Response:
        wanted = _decoded(request, body, SearchRequest)
        return _json(await service.search(caller_of(request.headers), request.path_params["index"], wanted))

    async def document(request: Request, _: bytes) -> Response:
        key = _key_of(request)
        found = await service.fetch(caller_of(request.headers), request.path_params["index"], key)
        headers = {"ETag": found.etag, "Cache-Control": "private, no-cache"}
        if _matches(request.headers.get("if-none-match", ""), found.etag):
            return Response(status_code=304, headers=headers)
        return _json(found, headers)

    async def embed(request: Request, body: bytes) -> Response:
        wanted = _decoded(request, body, EmbedRequest)
        return _json(await service.embed(caller_of(request.headers), wanted.index, wanted.texts))

    async def openapi(_: Request) -> Response:
        return Response(described, media_type="application/json")

    async def livez(_: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(_: Request) -> Response:
        reasons = [] if service.reader.loaded else ["models are being loaded"]
        try:
            with anyio.fail_after(PING_S):
                await service.reader.ping()
        except CdcsyncError as error:
            log.warning("not_ready", error=str(error), fix=error.hint)
            # Whoever may ask this need not learn names of hosts and roles; the log has them.
            away = isinstance(error, Unavailable)
            reasons.append("the target does not answer" if away else f"the target refuses this server; {SEE_LOG}")
        except TimeoutError:
            reasons.append("the target does not answer in time")
        return Response(
            msgspec.json.encode({"ready": not reasons, "reasons": reasons}),
            503 if reasons else 200,
            media_type="application/json",
        )

    async def metrics(request: Request) -> Response:
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        return Response(encode(service.metrics.registry), headers={"Content-Type": content_type})

    async def page(_: Request) -> Response:
        return HTMLResponse(_PAGE)

    routes: list[BaseRoute] = [
        Route("/v1/indexes", _guarded(indexes, service), methods=["GET"]),
        Route("/v1/indexes/{index}/search", _guarded(search, service), methods=["POST"]),
        Route("/v1/indexes/{index}/documents/{key:key}", _guarded(document, service), methods=["GET"]),
        Route("/v1/embed", _guarded(embed, service), methods=["POST"]),
        Route("/openapi.json", openapi, methods=["GET"]),
        Route("/livez", livez, methods=["GET"]),
        Route("/readyz", readyz, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/", page, methods=["GET"]),
        *more,
    ]
    hosts = serve.hosts if is_loopback(serve.listen_address[0]) else None
    middleware = [Middleware(Secured, headers=HEADERS, stopping=_problem(STOPPING), hosts=hosts)]
    if serve.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(serve.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=ALLOWED_HEADERS,
                expose_headers=["ETag", "Retry-After"],
            )
        )
    middleware += [Middleware(Gate, service=service), Middleware(WithItsClient)]
    app = Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_problem, Exception: _broken}
    )
    app.router.redirect_slashes = False
    return app


class Gate:
    """Refuses the calls of strangers, and those of a storm, by their headers alone.

    They are not routed, read or decoded.
    """

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        called = _called(scope["path"]) if scope["type"] == "http" else None
        if called is not None:
            problem = await self._service.shed(caller_of(Headers(scope=scope)), *called)
            if problem is not None:
                await _problem(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


class WithItsClient:
    """Ends a request when its client goes away, whichever route answers it: nobody takes the answer any more.

    A route must not work on after its answer either, as a background task would.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # With room for the only message of a request without a body, which not every route takes.
        arrived, messages = anyio.create_memory_object_stream[Message](1)

        async def listen(ended: anyio.CancelScope) -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await arrived.send(message)
            ended.cancel()

        try:
            async with arrived, messages, anyio.create_task_group() as tasks:
                tasks.start_soon(listen, tasks.cancel_scope)
                await self._app(scope, messages.receive, send)
                tasks.cancel_scope.cancel()
        except BaseExceptionGroup as group:
            raise leading(group) from None


_OF_INDEX = re.compile(r"/v1/indexes/([^/]+)/(search$|documents/)")
_TOOLS: dict[str, Tool] = {"/v1/indexes": "list_indexes", "/v1/embed": "embed", "/mcp": "mcp"}


def _called(path: str) -> tuple[Tool, str | None] | None:
    """Return the tool and the index that a path calls; None if it calls none."""
    if match := _OF_INDEX.match(path):
        return "search" if match[2] == "search" else "fetch", match[1]
    tool = _TOOLS.get(path)
    return tool and (tool, None)


class Unreadable(Problem):
    """A request whose body is too large, or not of the form that it should have."""


def _guarded(endpoint: Endpoint, service: Service) -> Callable[[Request], Awaitable[Response]]:
    """Read the body, and answer problems."""

    async def guarded(request: Request) -> Response:
        try:
            return await endpoint(request, await _read(request, service.serve.max_body_bytes))
        except Unreadable as unreadable:
            return _problem(await _counted(service, request, unreadable))
        except Problem as problem:
            return _problem(problem)

    return guarded


async def _counted(service: Service, request: Request, unreadable: Unreadable) -> Problem:
    """Return what to tell of a request that cannot be read: strangers, and those beyond their share, learn no more."""
    called = _called(request.url.path)
    return unreadable if called is None else await service.unreadable(caller_of(request.headers), *called, unreadable)


async def _read(request: Request, most: int) -> bytes:
    """Return the request's body.

    :raises Unreadable: it is too large.
    """
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise Unreadable(413, "Too large", f"the request has more than {most} bytes", "send less")
    return body


def _key_of(request: Request) -> list[str]:
    """Return the values of a key in a path: separated by commas before they are decoded, and with any slashes.

    :raises Problem: a slash before the key is encoded, so that the path is none of ours.
    """
    raw = (request.scope.get("raw_path") or request.url.path.encode()).decode("ascii", "replace").split("?")[0]
    _, version, indexes, _, documents, *key = raw.split("/", 5) + [""] * 5
    if (version, indexes, documents) != ("v1", "indexes", "documents"):
        raise Problem(404, "Not found", "there is nothing at this path", "GET /openapi.json lists the paths")
    return [unquote(part) for part in key[0].split(",")]


_ETAG = re.compile(r'(?:W/)?("[^"]*")')


def _matches(condition: str, etag: str) -> bool:
    """Say whether an `If-None-Match` names an ETag, compared weakly.

    Source: RFC 9110, section 13.1.2.
    """
    return condition.strip() == "*" or etag in _ETAG.findall(condition)


def _decoded(request: Request, body: bytes, kind: type[T]) -> T:
    """Return a request's body as one of our structs.

    :raises Unreadable: it is compressed, not JSON, or not of this form.
    """
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise Unreadable(415, "Compressed", "the request has a Content-Encoding", "send JSON without compression")
    media = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media != "application/json":
        raise Unreadable(
            415, "Not JSON", "the request's Content-Type is another", "send Content-Type: application/json"
        )
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.ValidationError as error:
        raise Unreadable(422, "Not of this form", _told(error, kind), "GET /openapi.json describes it") from None
    except MALFORMED as error:
        raise Unreadable(400, "Not JSON", str(error)[:200], "send a JSON object") from None


def _told(error: msgspec.ValidationError, kind: type[msgspec.Struct]) -> str:
    """Return what is wrong with a request; of a member that is one of a few words, these."""
    said = str(error)
    if (refused := _NOT_AMONG.fullmatch(said)) is None:
        return said
    (words,) = (get_args(one.type) for one in msgspec.structs.fields(kind) if one.encode_name == refused[1])
    return f"{said}: it is one of {', '.join(words)}"


def _json(content: object, headers: dict[str, str] | None = None) -> Response:
    body = msgspec.json.encode(content, enc_hook=str)
    return Response(
        body, media_type="application/json", headers={"Cache-Control": "private, no-store", **(headers or {})}
    )


def _problem(problem: Problem) -> Response:
    return Response(
        msgspec.json.encode(problem.body),
        problem.status,
        headers={"Cache-Control": "no-store", **problem.headers},
        media_type="application/problem+json",
    )


async def _http_problem(_: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 500
    title, detail = {
        404: ("Not found", "there is nothing at this path"),
        405: ("Not allowed", "not by this method"),
    }.get(status, ("The call failed", "the server could not answer"))
    answer = _problem(Problem(status, title, detail, "GET /openapi.json lists the paths"))
    if isinstance(error, HTTPException) and error.headers:
        answer.headers.update(error.headers)
    return answer


async def _broken(_: Request, __: Exception) -> Response:
    # The server logs the exception; the middleware is not around this answer.
    answer = _problem(failed())
    answer.headers.update(HEADERS)
    return answer
