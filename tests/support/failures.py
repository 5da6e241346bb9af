"""Two indexes whose rows fail, and the list of them."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec

from cdcsync.model.batch import PageEnd
from cdcsync.model.changeset import ChangeSet, FailedDocument
from cdcsync.model.rows import Key
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.failures.documents import Listed, count_failed
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.session import ApplySession
from tests.support.indexes import SCHEMA, changes, document, make_spec, register, until

SLOT = "slot"

ARTICLES = make_spec(search=None, key={"id": "numeric"}, carried={})

NOTES = make_spec(name="notes", key={"region": "text", "id": "bigint"}, carried={}, search=None)


class Target:
    """Two indexes, the session that applies, and a connection of someone else's."""

    def __init__(self, session: ApplySession, connection: Connection) -> None:
        self.session = session
        self.connection = connection

    async def apply(self, *pages: PageEnd, **of_index: ChangeSet) -> None:
        await self.session.apply(of_index, pages, None, commit_time=None, caught_up=False)

    async def listed(self, index: str = "articles") -> dict[Key, tuple[str, int, str]]:
        """Return error, attempts and position of each row that is listed."""
        cursor = await self.connection.execute(
            "SELECT key, error, attempts, commit_lsn::text FROM cdcsync.failed_documents WHERE index_name = %s", [index]
        )
        return {tuple(key): (error, attempts, lsn) for key, error, attempts, lsn in await cursor.fetchall()}

    async def counted(self) -> Listed:
        return (await count_failed(self.connection, SCHEMA)).get("articles", Listed())


def failing(*keys: str | Key, lsn: int = 0x10, error: str = "it fails", besides: ChangeSet | None = None) -> ChangeSet:
    """Return a change set in which no document could be made of these rows; they follow what is `besides`."""
    given = changes() if besides is None else besides
    rows = [(key,) if isinstance(key, str) else key for key in keys]
    return msgspec.structs.replace(
        given,
        documents=[*given.documents, *(document(key, carried=(), lsn=lsn) for key in rows)],
        failed=[FailedDocument(key, error, lsn) for key in rows],
    )


@contextlib.asynccontextmanager
async def listing(dsn: str) -> AsyncIterator[Callable[[], Awaitable[Target]]]:
    """Create the indexes in an empty database, and open them, each time by another worker."""
    async with contextlib.AsyncExitStack() as stack:
        connection = await stack.enter_async_context(await connect(dsn, "target"))
        async with connection.transaction():
            await create_shared(connection, SCHEMA)
            await Pipelines(SCHEMA, SLOT).ensure(connection, "publication")
            for spec in (ARTICLES, NOTES):
                await create_index_relations(connection, SCHEMA, spec)
                await register(connection, spec, slot=SLOT)

        async def opened() -> Target:
            session = ApplySession(dsn, SCHEMA, SLOT)
            stack.push_async_callback(session.aclose)
            await until(session.try_open)  # the server may still be ending the session before this one
            await session.prepare([ARTICLES, NOTES])
            return Target(session, connection)

        yield opened
