"""The fill flow: a generation gets a vector of each stored chunk, then its HNSW index, and is ready.

    chunks, in the order of their numbers ─► page ─► vectors of a quick model ──────────────► settled tier ─┐
                                                 └─► backlog, where the embed flow finds them ─► fresh tier ─┴─► HNSW

It is a load like a first one: texts are in the backfill lane, so that live changes come first, `tokens_per_day` stops
it first, and a page that a quick model can embed at once is written with its vectors. Every page commits with the place
that it reached; after any crash the flow continues there.

Meanwhile and afterwards, apply writes changes to all generations (`target/apply`).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping
from itertools import islice

import anyio
import msgspec
import structlog
from psycopg import sql

from cdcsync.backoff import Backoff
from cdcsync.errors import CdcsyncError, leading
from cdcsync.flows.build import Builds, settle_all
from cdcsync.flows.embed import Dispatcher, EmbedLoop
from cdcsync.flows.embed.pages import page_vectors
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.locking import until_locked
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.ddl.names import Names
from cdcsync.target.filling import Filling, Stored
from cdcsync.target.generations import Generation, Generations

log = structlog.get_logger()

PAGE_CHUNKS = 1_000
"""Chunks of a page: whoever applies waits for the end of its transaction, some milliseconds."""

FEW_CHUNKS = 100
"""Chunks of a page while live changes come in: they wait for its model, its processor and its locks."""

QUICK_S = 0.25
"""A page whose texts the model takes longer for goes to the backlog, as the pages of a first load do: the embed flow
keeps several calls of a provider under way, and knows what to do about texts that fail."""

PAGE_S = QUICK_S / 2
"""Pages are made small enough for this: in the backlog, vectors cost several times as much."""

TRIED_TEXTS = 32
"""Texts of the first call of a model that nobody has called yet."""

POLL_S = 0.2
"""How often it is looked whether the backlog has room again, or is empty."""

WINDOWS = 4
"""So many windows of the embed loop wait in the backlog: it never runs dry, and nothing waits there for long."""


class _Page(msgspec.Struct):
    """A page on its way.

    :ivar lacking: those of its chunks that had no vector of their text when it was read.
    :ivar last: the number of its last chunk.
    :ivar few: whether live changes come in.
    """

    lacking: list[Stored]
    last: int
    chunks: int
    few: bool
    vectors: Mapping[bytes, FloatVector] = {}


class Fill:
    """Fills one generation of one index."""

    def __init__(
        self,
        dsn: str,
        schema: str,
        live: IndexSpec,
        spec: IndexSpec,
        dispatcher: Dispatcher,
        loop: EmbedLoop,
        most_rows_per_s: Callable[[], float],
        builds: Builds,
    ) -> None:
        """Make the flow.

        :param live: the index with the generation that searches use.
        :param spec: the index with the generation that is to be filled.
        :param loop: the one that empties its backlog.
        :param most_rows_per_s: the limit that the configuration has for backfills now; 0 for none.
        :param builds: the worker's.
        """
        self._dsn = dsn
        self._schema = schema
        self._live = live
        self._spec = spec
        self._dispatcher = dispatcher
        self._loop = loop
        self._most_rows_per_s = most_rows_per_s
        self._builds = builds
        self._generations = Generations(schema)

    async def run(self) -> None:
        """Return once the generation is ready, or is not to be filled any more.

        Whatever fails is tried again, more and more rarely, and `status` says why: what is wrong with one generation
        is not to stop the index, nor any other.
        """
        where = f"index {self._spec.name}"
        backoff = Backoff(
            lambda failure: log.warning(
                "migration_waits", index=where, error=str(failure.error), fix=failure.error.hint
            ),
            errors=CdcsyncError,
        )
        async with Session(self._dsn, "target", application_name="cdcsync migrate", works=True) as session:
            while True:
                async with backoff:
                    try:
                        with speaking_of("target", where=where):
                            await self._fill_and_build(await session.connection())
                    except CdcsyncError as error:
                        await self._note(session, error)
                        raise
                    return

    async def _note(self, session: Session, error: CdcsyncError) -> None:
        """Say in the target why the generation cannot be filled now, if the target can be asked."""
        with contextlib.suppress(CdcsyncError), speaking_of("target"):
            connection = await session.connection()
            await self._generations.note_reason(connection, self._spec.name, self._spec.generation, error.with_fix)
            crash_point("reason of a migration noted")

    async def _entry(self, connection: Connection) -> Generation | None:
        """Return the generation's row if it is still to be filled."""
        for one in await self._generations.of(connection, self._spec.name):
            if one.generation == self._spec.generation and one.state == "filling":
                return one
        return None

    async def _fill_and_build(self, connection: Connection) -> None:
        name, generation = self._spec.name, self._spec.generation
        filling = Filling(connection, self._schema, self._spec, self._live)
        entry = await self._entry(connection)
        if entry is None:
            return
        stamped = entry.filled_at is not None
        log.info("migration_fills", index=name, generation=generation, after=entry.cursor, embedder=entry.embedder)
        while True:
            if not await self._pages(connection, filling):
                return
            await self._drain(filling)
            # The proof that all is there; until now that was a conclusion.
            if not (lacking := await filling.lacking()):
                break
            log.error("migration_incomplete", index=name, generation=generation, chunks=lacking)
            await self._generations.begin_again(connection, name, generation)
            crash_point("fill begun again")
            stamped = False
        if not stamped:
            await self._generations.stamp(connection, name, generation, "filled_at")
            crash_point("generation filled")
        await settle_all(connection, self._schema, self._spec)
        log.info("hnsw_building", index=name, generation=generation)
        await self._builds.hnsw(self._spec)
        vectors = Names(self._schema, self._spec.relations).vectors(generation)
        await connection.execute(sql.SQL("ANALYZE {}").format(vectors))
        await self._generations.stamp(connection, name, generation, "ready_at")
        crash_point("generation ready")
        log.info("migration_ready", index=name, generation=generation)

    async def _pages(self, connection: Connection, filling: Filling) -> bool:
        """Write page after page until there are no more; False if the generation is not wanted any more.

        The model is at one page while the page before it is written.
        """
        made: _Page | None = None
        while (entry := await self._entry(connection)) is not None:
            await self._wait_for_room(filling)
            began = anyio.current_time()
            pace = self._pace(entry.max_rows_per_s)
            page = await self._read(filling, entry.cursor if made is None else made.last, pace)
            try:
                async with anyio.create_task_group() as tasks:
                    if made is not None:
                        tasks.start_soon(self._write, filling, made)
                    if page is not None and not filling.takes_over:
                        page.vectors = await self._vectors(page.lacking)
            except BaseExceptionGroup as group:
                raise leading(group) from None
            if page is None:
                return True
            made = page
            if page.few:
                await anyio.sleep(anyio.current_time() - began)  # half of the time is for others
            await anyio.sleep(max(0.0, page.chunks / pace - (anyio.current_time() - began)))
        return False

    async def _read(self, filling: Filling, after: int, pace: float) -> _Page | None:
        few = self._loop.beside_live
        limit = FEW_CHUNKS if few else self._page_chunks
        page = await filling.page(after, max(1, min(limit, int(min(pace, PAGE_CHUNKS)))))
        if not page:
            return None
        return _Page(await filling.without_vector(page), page[-1].chunk_id, len(page), few)

    @property
    def _page_chunks(self) -> int:
        """How many chunks a page should have, so that a quick model can embed it at once, though it slows down."""
        fitting = self._dispatcher.texts_within(PAGE_S)
        return min(PAGE_CHUNKS, fitting) if fitting >= FEW_CHUNKS else PAGE_CHUNKS

    async def _write(self, filling: Filling, page: _Page) -> None:
        async def write() -> bool:
            if filling.takes_over:
                return await filling.take_over(page.lacking, page.last)
            return await filling.store(page.lacking, page.vectors, page.last)

        table = f"{self._spec.relations}_vectors_{self._spec.generation}"
        await until_locked(write, table=table, vacuumed=filling.vacuumed)
        self._loop.notify(live=False)

    async def _vectors(self, page: list[Stored]) -> Mapping[bytes, FloatVector]:
        """Return the vectors of a page if the model makes them quickly; a first call tells whether it does."""
        texts = {one.hash: one.text for one in page}
        vectors: dict[bytes, FloatVector] = {}
        if not self._dispatcher.pace.measured and self._dispatcher.waits_until(load=True) is None:
            vectors |= await page_vectors(self._dispatcher, self._spec, dict(islice(texts.items(), TRIED_TEXTS)))
        left = {one: text for one, text in texts.items() if one not in vectors}
        if len(left) <= self._dispatcher.texts_within(QUICK_S):
            vectors |= await page_vectors(self._dispatcher, self._spec, left)
        return vectors

    async def _wait_for_room(self, filling: Filling) -> None:
        """Wait while the stream is late, and while enough texts wait for the embed loop."""
        most = WINDOWS * self._dispatcher.pace.window_texts
        while self._dispatcher.far_behind or await filling.waiting(most) >= most:  # noqa: ASYNC110 - the target tells
            await anyio.sleep(POLL_S)

    def _pace(self, own: int | None) -> float:
        """Return how many chunks may be filled a second: those that the command and the configuration allow."""
        return min([float(one) for one in (own or 0, self._most_rows_per_s()) if one], default=math.inf)

    async def _drain(self, filling: Filling) -> None:
        """Wait until no text of the fill waits for its vector."""
        while await filling.waiting(1):  # noqa: ASYNC110 - the target tells
            await anyio.sleep(POLL_S)
