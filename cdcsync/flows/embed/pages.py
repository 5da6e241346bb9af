"""Vectors of a whole page of texts, made before the page is written, by a model that is quick enough."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice

import structlog

from cdcsync.errors import CdcsyncError
from cdcsync.flows.embed.dispatcher import Dispatcher
from cdcsync.model.spec import IndexSpec
from cdcsync.model.vectors import FloatVector

log = structlog.get_logger()


async def page_vectors(
    dispatcher: Dispatcher, spec: IndexSpec, texts: Mapping[bytes, str]
) -> Mapping[bytes, FloatVector]:
    """Return the vectors of a load's texts by their hash, call after call.

    Those that a failure leaves out are missing, and those that wait for `tokens_per_day`.
    """
    vectors: dict[bytes, FloatVector] = {}
    try:
        while texts and dispatcher.waits_until(load=True) is None:
            call = dict(islice(texts.items(), dispatcher.batch(texts)))
            vectors |= spec.usable((await dispatcher.embed(call)).vectors)
            texts = dict(islice(texts.items(), len(call), None))
    except CdcsyncError as error:
        # The rest goes to the backlog, where the embed loop meets the same error and deals with it.
        log.debug("page_not_embedded", index=spec.name, texts=len(texts), error=str(error))
    return vectors
