"""Statuses: one that is made up, and a pipeline without a worker whose status is read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from typing import Any, LiteralString

from cdcsync.config import Config, HashEmbedder, Index, QualifiedName, Source, Target
from cdcsync.documents.documents import Documents
from cdcsync.documents.templates import Template
from cdcsync.lsn import Lsn
from cdcsync.model.rows import Shape
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.status import IndexStatus, Status, WorkerStatus, read_status
from cdcsync.target.ddl.relations import create_index_relations
from cdcsync.target.ddl.shared import create_shared
from cdcsync.target.pipelines import Pipelines
from tests.support.servers import Database

LIVE = IndexStatus("live", None, "public.articles", "public.articles_index")
STATUS = Status(
    version=1,
    read_at=datetime(2026, 5, 4, 12, 0, tzinfo=UTC),
    pipeline="cdcsync",
    publication="cdcsync",
    checkpoint="0/100",
    lag_bytes=0,
    lag_seconds=0.0,
    caught_up=True,
    slot=None,
    worker=WorkerStatus("host:42", True, None),
    indexes={"articles": LIVE},
    problems=[],
)
"""A pipeline that has nothing to do."""

ARTICLES = Index(table="articles", text="{title}", embedder="e", view="public.articles_index")


class Pipeline:
    """A pipeline's two sides, set up as a worker does it, without the worker."""

    def __init__(self, config: Config, source: Connection, target: Connection, dsn: str) -> None:
        self.config = config
        self.source = source
        self.target = target
        self.dsn = dsn
        self.pipelines = Pipelines("cdcsync", config.source.slot)

    async def status(self) -> Status:
        return await read_status(self.config, self.source, self.target)

    async def set_up(self, *indexes: str) -> None:
        await create_shared(self.target, "cdcsync")
        await self.pipelines.ensure(self.target, "cdcsync")
        for name in indexes:
            await create_index_relations(self.target, "cdcsync", spec(name))
            await self.target.execute(
                "INSERT INTO cdcsync.indexes (name, slot, source_table, view_name, key, columns, fingerprint,"
                " generation, model, dimensions, vector_type, distance, state) VALUES (%s, %s, 'public.articles', %s,"
                " '{id}', '{}', '', 1, 'feature hashing', 3, 'vector', 'cosine', 'live')",
                [name, self.config.source.slot, f"public.{name}_index"],
            )

    async def begin(self) -> Lsn:
        """Create the slot, and let the pipeline begin where it does."""
        await self.source.execute(
            "SELECT pg_create_logical_replication_slot(%s, 'pgoutput')", [self.config.source.slot]
        )
        begin = await self.one("SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s")
        await self.checkpoint(Lsn.parse(begin))
        return Lsn.parse(begin)

    async def one(self, statement: LiteralString) -> Any:
        cursor = await self.source.execute(statement, [self.config.source.slot])
        row = await cursor.fetchone()
        assert row is not None
        return row[0]

    async def checkpoint(self, lsn: Lsn, *, caught_up: bool = True) -> None:
        lease = await self.pipelines.take_over(self.target, "host:42")
        await self.pipelines.commit(self.target, lease, lsn, caught_up=caught_up)

    async def reach_the_end(self) -> None:
        """Put the checkpoint where the WAL ends once this is written, or after it: nobody else is quiet for us."""
        end = await self.one("SELECT pg_current_wal_lsn()::text FROM (SELECT %s) AS slot")
        await self.checkpoint(Lsn(Lsn.parse(end) + 1_000_000))

    @asynccontextmanager
    async def worker(self) -> AsyncIterator[None]:
        """Hold the pipeline's lock as a running worker does."""
        async with await connect(self.dsn, "target") as session:
            assert await self.pipelines.try_lock(session)
            yield

    async def age(self, seconds: float) -> None:
        """Let time pass for the pipeline's row."""
        await self.target.execute(
            "UPDATE cdcsync.pipelines SET caught_up_at = caught_up_at - make_interval(secs => %s),"
            " updated_at = updated_at - make_interval(secs => %s)",
            [seconds, seconds],
        )


def spec(name: str) -> IndexSpec:
    return IndexSpec(
        name=name,
        config=Index(table="articles", text="{title}", embedder="e", view=f"public.{name}_index"),
        shape=Shape(name, QualifiedName("public", "articles"), ("id",), (), ("title",)),
        documents=Documents(Template.parse("{title}")),
        source_key_types=("bigint",),
        key_types=("bigint",),
        carried_types=(),
        model="feature hashing",
        dimensions=3,
        distance="cosine",
        fingerprint="",
    )


def problem(status: Status, words: str) -> str:
    """Return the one problem with these words."""
    (found,) = [one for one in status.problems if words in one]
    return found


@asynccontextmanager
async def pipelines(database: Database) -> AsyncIterator[Callable[..., Awaitable[Pipeline]]]:
    """Make pipelines from their indexes, whose source and target are one database."""
    async with AsyncExitStack() as stack:

        async def made(**indexes: Index) -> Pipeline:
            config = Config(
                source=Source(dsn=database.dsn, slot=database.name),  # slots belong to the server, databases to a test
                target=Target(dsn=database.dsn),
                embedders={"e": HashEmbedder(dimensions=3)},
                indexes=indexes or {"articles": ARTICLES},
            )
            source = await stack.enter_async_context(await connect(database.dsn, "source"))
            target = await stack.enter_async_context(await connect(database.dsn, "target"))
            return Pipeline(config, source, target, database.dsn)

        yield made


async def begun(pipeline: Pipeline) -> Pipeline:
    """Return a pipeline with one live, empty index, that has begun."""
    await pipeline.set_up("articles")
    await pipeline.begin()
    return pipeline
