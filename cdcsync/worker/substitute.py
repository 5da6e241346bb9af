"""Takes a worker's place for the time of one job, where none runs.

The job itself is a request that any worker serves. So nothing depends on which one does: should another worker start
meanwhile, it waits for the lock, or has it, and serves the request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio

from cdcsync.config import Config
from cdcsync.postgres.sessions import Connection, speaking_of
from cdcsync.target.pipelines import Pipelines
from cdcsync.worker import run as worker
from cdcsync.worker.state import WorkerState


@asynccontextmanager
async def worker_ensured(target: Connection, config: Config) -> AsyncIterator[bool]:
    """See to it that a worker runs while the block does; yields whether that is ourselves.

    What ends the worker, such as a gap, ends the block with that error, in an exception group.
    """
    pipelines = Pipelines(config.target.schema, config.source.slot)
    with speaking_of("target"):
        holder = await pipelines.holder(target)
    if holder is not None:
        yield False
        return
    states: list[WorkerState] = []
    async with anyio.create_task_group() as tasks:

        async def work() -> None:
            await worker.run(config, started=states.append, handle_signals=False, listening=False)

        tasks.start_soon(work)
        yield True
        if states:
            states[0].stop()
        else:
            tasks.cancel_scope.cancel()
