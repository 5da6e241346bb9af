"""Takes a worker's place for the time of one job, where none runs, or where the one that runs goes away.

The job itself is a request that any worker serves. So nothing depends on which one does: should another worker start
meanwhile, it waits for the lock, or has it, and serves the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from cdcsync.backoff import Backoff
from cdcsync.config import Config
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection, Session
from cdcsync.target.pipelines import Pipelines
from cdcsync.worker import run as worker
from cdcsync.worker.state import WorkerState

LOOK_S = 5.0
"""How often it is looked whether the worker that ran at first still does: one that is restarted is back by then."""


@asynccontextmanager
async def worker_ensured(target: Connection, config: Config) -> AsyncIterator[bool]:
    """See to it that a worker runs while the block does; yields whether that is ourselves from the beginning.

    What ends our worker, such as a gap, ends the block with that error, in an exception group.
    """
    states: list[WorkerState] = []
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        holder = await pipelines.holder(target)

    async def work() -> None:
        if holder is not None:
            await _none_holds(config, pipelines)
        await worker.run(config, started=states.append, handle_signals=False, listening=False)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(work)
        yield holder is None
        if states:
            states[0].stop()
        else:
            tasks.cancel_scope.cancel()


async def _none_holds(config: Config, pipelines: Pipelines) -> None:
    """Return once no worker holds the pipeline's lock."""
    backoff = Backoff()
    async with Session(config.target.dsn, "target", application_name="cdcsync") as session:
        while True:
            await anyio.sleep(LOOK_S)
            async with backoff:
                with speaking_of("target"):
                    connection = await session.connection()
                    if await pipelines.end_silent(connection) or await pipelines.holder(connection) is None:
                        return
