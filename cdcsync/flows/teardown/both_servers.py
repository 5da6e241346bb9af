"""One drop in the target and on the source: it waits on one of them while it holds no lock on the other.

The target commits last (the folder's rules 3 to 5).
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TypeVar

from psycopg import sql

from cdcsync.config import Config, QualifiedName
from cdcsync.errors import AnotherServer, CdcsyncError, SetupError
from cdcsync.postgres.autovacuums import Vacuumed
from cdcsync.postgres.errors import LOCKED_OUT, speaking_of
from cdcsync.postgres.liveness import WatchedConnection
from cdcsync.postgres.locking import ATTEMPTS, BRIEFLY, attempt, publishing_locks, until_locked
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.preflight.identity import connect_followed
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.belongings import Relations, own_dependents

T = TypeVar("T")

LET_GO_S = 3.0
"""How long the source may take for its part while the target's tables are locked: searches wait as long. It takes some
milliseconds, and waits for a lock no longer than `BRIEFLY`."""


async def connect_source(
    config: Config, target: Connection, *, application_name: str
) -> tuple[WatchedConnection, AnotherServer | None]:
    """Open a session with the server that the pipeline follows, or with the first host if none of them is that one.

    :returns: with the session, why its server is not the one that was followed.
    """
    try:
        return await connect_followed(config, target, application_name=application_name), None
    except AnotherServer as error:
        return await connect(config.source.dsn, "source", application_name=application_name), error


class SourcePart:
    """What a command does on the source: a statement about the publication, if any, and what came of it.

    :ivar where: the publication, for errors.
    :ivar done: what the source has said to be dropped.
    """

    def __init__(
        self,
        source: WatchedConnection,
        publication: str,
        statement: sql.Composed | None,
        tables: Sequence[QualifiedName] = (),
    ) -> None:
        """Hold a statement that locks the publication and these tables."""
        self.where = f"publication {publication}"
        self.done: list[str] = []
        self._source = source
        self._publication = publication
        self._statement = statement
        self._tables = tables

    async def make_room(self) -> None:
        """Wait until the statement gets its locks, and hold none of them: an autovacuum has given way by then.

        :raises SetupError: somebody has held a table, or the publication, for some seconds.
        """
        source, statement = self._source, self._statement
        if statement is None:
            return

        async def rehearse() -> None:
            async with source.transaction(force_rollback=True):
                await source.execute(statement)

        vacuumed = Vacuumed(source, [(one.schema, one.name) for one in self._tables]) if self._tables else None
        with speaking_of("source", where=self.where):
            try:
                await until_locked(rehearse, table=self.where, attempts=ATTEMPTS, vacuumed=vacuumed)
            except LOCKED_OUT as error:
                locks = await publishing_locks(source, self._publication, self._tables)
                raise SetupError(
                    "another session has held a lock for some seconds that keeps the publication from being changed"
                    + "".join(f": {lock}" for lock in locks[:1])
                    + "; nothing was dropped",
                    where=self.where,
                    hint=f"{locks[0].remedy if locks else 'wait for that session: pg_locks names it'}; then try again",
                ) from error

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Give the source `LET_GO_S` for what it drops in this block, while the target's tables are locked.

        :raises CdcsyncError: it failed. The error says what was dropped.
        """
        try:
            with self._source.cut_after(LET_GO_S):
                yield
        except CdcsyncError as error:
            if self._source.was_cut:
                error.message = f"the server has not answered for {LET_GO_S:g} s"
            error.message += (
                f"; dropped on the source, as far as it has answered: {', '.join(self.done) or 'nothing'};"
                " in the target: nothing"
            )
            again = "then run the command again, which drops what is left"
            error.hint = f"{error.hint}; {again}" if error.hint else again
            raise


async def dropped(
    target: Connection,
    config: Config,
    drop: Callable[[], Awaitable[T]],
    let_go: Callable[[], Awaitable[None]],
    part: SourcePart,
    *,
    relations: Relations,
    where: str,
) -> T:
    """Drop something in one transaction, when nobody uses these relations; returns what `drop` does.

    :param let_go: drops what there is on the source, directly before that commits. If a lock is in its way, nothing
        was dropped, and both are done again.
    :raises SetupError: others use them for some seconds, or something that is not ours depends on them.
    :raises SourceUnavailable: the source does not do its part in time.
    """

    async def change() -> T:
        await part.make_room()
        async with target.transaction():
            await target.execute(BRIEFLY)
            done = await drop()
            with part.limited():
                await let_go()
            crash_point("drop written")
        crash_point("drop committed")
        return done

    tables = [QualifiedName.parse(one) for one in relations.tables]
    views = [QualifiedName.parse(one) for one in relations.views]
    named = [*tables, *views, QualifiedName(config.target.schema, "pipelines")]
    vacuumed = Vacuumed(target, [(table.schema, table.name) for table in named])
    with own_dependents(), speaking_of("target"):
        return await attempt(target, change, named, where=where, vacuumed=vacuumed)
