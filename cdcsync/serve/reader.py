"""The indexes that the server offers, which share connections and models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import anyio
import msgspec
import psycopg
import structlog
from psycopg import conninfo

from cdcsync.config import Config
from cdcsync.errors import CdcsyncError, EmbedderSetupError, EmbedError, TargetUnavailable
from cdcsync.index import Resources
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import IDLE_S, Session
from cdcsync.postgres.settings import CONNECT_TIMEOUT_S
from cdcsync.serve.exposure import UNHELD
from cdcsync.serve.offered import Offered
from cdcsync.serve.problems import Problem, without_rows
from cdcsync.tracing import Tracing

log = structlog.get_logger()


class Reader:
    """The indexes that the server offers, which share connections and models. For any number of tasks.

    :ivar loaded: whether loading their models has been tried.
    """

    def __init__(self, config: Config, tracing: Tracing) -> None:
        serve = config.serve
        dsn = _given_up_within(serve.dsn or config.target.dsn, serve.deadline_s)
        target = msgspec.structs.replace(config.target, dsn=dsn)
        self._resources = Resources(
            msgspec.structs.replace(config, target=target),
            connections=serve.connections,
            model_timeout_s=serve.deadline_s / 2,
            application_name="cdcsync serve",
            tracing=tracing,
        )
        # Of its own: calls may hold all connections of the pool, and the target answers all the same.
        self._probe = Session(dsn, "target", application_name="cdcsync serve", idle_s=IDLE_S)
        self._probing = anyio.Lock()
        self.indexes = {name: Offered(self._resources, name) for name in serve.indexes or config.indexes}
        self.loaded = False

    def index(self, name: str) -> Offered:
        """Return an index.

        :raises Problem: the server does not offer it.
        """
        if name not in self.indexes:
            raise Problem(
                404, "No such index", f"there is no index {name[:80]!r}", f"there are: {', '.join(self.indexes)}"
            )
        return self.indexes[name]

    async def aclose(self) -> None:
        """Close sessions and models."""
        await self._probe.aclose()
        await self._resources.aclose()

    async def ping(self) -> None:
        """Ask the target anything, however many calls are being answered.

        :raises TargetUnavailable, SetupError: it does not answer.
        """
        async with self._probing:
            for last in (False, True):
                connection = await self._probe.connection()
                try:
                    with speaking_of("target"):
                        await fetch_value(connection, "SELECT 1")
                    return
                except TargetUnavailable:  # the session may have broken since the last time
                    if last:
                        raise

    async def load(self) -> None:
        """Load models and rerankers, so that no call waits for that; what cannot be loaded is tried again by a call.

        Also tells where tenants are kept apart by the server's own filter alone, and what the server's role lacks.
        """
        for index in self.indexes.values():
            with _telling(index.name):
                await index.require_schemas()
                if past := await index.exposure():
                    log.warning("tenants_not_held", index=index.name, past=past, fix=UNHELD)
                await index.load()
            with _telling(index.name):
                await index.load_reranker()
        self.loaded = True


@contextmanager
def _telling(index: str) -> Iterator[None]:
    """Log why an index cannot be searched, or not with its models."""
    try:
        yield
    except (EmbedError, EmbedderSetupError) as error:
        log.warning("model_not_loaded", index=index, error=str(error), fix=error.hint)
    except CdcsyncError as error:
        shown = without_rows(error)
        log.warning("index_not_searchable", index=index, error=str(shown), fix=shown.hint)


def _given_up_within(dsn: str, deadline_s: float) -> str:
    """Return a DSN whose server counts as away before a call's deadline, so that the call can say so.

    A DSN that has a `connect_timeout` of its own is left as it is.
    """
    with suppress(psycopg.ProgrammingError):  # connecting will tell what is wrong with it
        if "connect_timeout" not in conninfo.conninfo_to_dict(dsn):
            return conninfo.make_conninfo(dsn, connect_timeout=min(CONNECT_TIMEOUT_S, max(2, int(deadline_s / 2))))
    return dsn
