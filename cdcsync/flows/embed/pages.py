"""Vectors of a whole page of texts, made before the page is written, by a model that is quick enough."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import anyio
import structlog

from cdcsync.errors import CdcsyncError
from cdcsync.flows.embed.dispatcher import Dispatcher
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector

log = structlog.get_logger()


async def page_vectors(
    dispatcher: Dispatcher, spec: IndexSpec, texts: Mapping[bytes, str]
) -> Mapping[bytes, FloatVector]:
    """Return the vectors of a load's texts by their hash, made by as many calls at a time as the embedder takes.

    Those that a failure leaves out are missing, and those that wait for `tokens_per_day`.
    """
    vectors: dict[bytes, FloatVector] = {}
    places = anyio.Semaphore(dispatcher.places)
    under_way = 0
    fails = False

    async def call(texts: Mapping[bytes, str]) -> None:
        nonlocal under_way, fails
        try:
            vectors.update(spec.usable((await dispatcher.embed(texts)).vectors))
        except CdcsyncError as error:
            # The rest goes to the backlog, where the embed loop meets the same error and deals with it.
            fails = True
            log.debug("page_not_embedded", index=spec.name, texts=len(texts), error=str(error))
        finally:
            under_way -= len(texts)
            places.release()

    async with anyio.create_task_group() as tasks:
        while texts:
            await places.acquire()
            if fails or dispatcher.waits_until(load=True) is not None:
                break
            part = dict(islice(texts.items(), dispatcher.batch(texts, of=under_way + len(texts))))
            texts = dict(islice(texts.items(), len(part), None))
            under_way += len(part)
            tasks.start_soon(call, part)
    return vectors
