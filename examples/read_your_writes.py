"""A web application whose users find what they have just written.

After a write the application asks the database how far its log is and gives the user that position as a cookie. A
search waits, for two seconds at most, until the index has got that far. Other users' searches do not wait.

    POST /notes?title=…     writes a note
    GET /search?q=…         finds notes

It works with source and index in one database or in two: the position is always the source's.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from cdcsync import Config, Index

WRITTEN = "written"
"""The cookie: the position of this user's last write."""

PATIENCE_S = 2.0
"""How long a search waits for the index. Then it answers with what is there."""


def make_app(config: Config) -> Starlette:
    """Return the application; the index named `notes` stays open as long as it runs."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with Index.open(config, "notes") as app.state.notes:
            yield

    async def write(request: Request) -> JSONResponse:
        async with await psycopg.AsyncConnection.connect(config.source.dsn) as connection:
            await connection.execute("INSERT INTO notes (title) VALUES (%s)", [request.query_params["title"]])
        # The commit is done. A session that stays open could ask by itself: SELECT pg_current_wal_insert_lsn().
        response = JSONResponse({"written": True}, 201)
        response.set_cookie(WRITTEN, await request.app.state.notes.lsn(), httponly=True, samesite="lax")
        return response

    async def search(request: Request) -> JSONResponse:
        notes: Index = request.app.state.notes
        written = request.cookies.get(WRITTEN)
        current = written is None or await notes.wait_for(written, timeout_s=PATIENCE_S)
        hits = await notes.search(request.query_params["q"], k=5)
        return JSONResponse(
            {"notes": [hit.content for hit in hits], "current": current, "warning": hits.warning},
        )

    return Starlette(routes=[Route("/notes", write, methods=["POST"]), Route("/search", search)], lifespan=lifespan)
