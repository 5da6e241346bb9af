"""Asks a worker that runs on this machine.

It embeds a query with the model that it has loaded, and tells what only it remembers of its work.

Source: docs/searching.md, "From the command line".
"""

from __future__ import annotations

import http.client
from collections.abc import Mapping
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

from cdcsync.malformed import MALFORMED

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.model.spec import IndexSpec
    from cdcsync.status import Status

TIMEOUT_S = 5.0
"""A worker on this machine answers at once; one that is busy is not waited for longer than loading the model takes."""

STATUS_S = 1.0
"""The worker's memory is not worth a longer wait: the status itself is read from the servers."""

MOST_BYTES = 64 * 2**20
"""More than a worker answers. Another program on its port may announce any length."""

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what a worker listens on # noqa: S104 # nosec B104


class _Embedded(msgspec.Struct, frozen=True):
    model: str
    vector: list[float]


async def embedded_by_worker(config: Config, embedder: str, model: str, text: str) -> list[float] | None:
    """Return a query's vector as a running worker makes it; None if there is none, or one with another model."""
    address = _address(config)
    if address is None:
        return None
    body = msgspec.json.encode({"embedder": embedder, "text": text})
    content = await anyio.to_thread.run_sync(_ask, *address, "POST", "/embed", body, TIMEOUT_S)
    try:
        answer = None if content is None else msgspec.json.decode(content, type=_Embedded)
    except MALFORMED:
        return None
    return answer.vector if answer is not None and answer.model == model else None


async def questions_by_worker(
    config: Config, spec: IndexSpec, questions: Mapping[str, str]
) -> dict[str, list[float]] | None:
    """Return the vectors of many queries by their ids; None if a worker does not make all of them."""
    vectors = {}
    for name, text in questions.items():
        vector = await embedded_by_worker(config, spec.config.embedder, spec.model, text)
        if vector is None:
            return None
        vectors[name] = vector
    return vectors


async def remembered_by_worker(config: Config, status: Status) -> Status:
    """Return the status with what the worker that runs or waits remembers; as it is if none answers on this machine."""
    from cdcsync.status import Status, as_waiting, with_problems

    address = _address(config)
    if address is None:
        return status
    content = await anyio.to_thread.run_sync(_ask, *address, "GET", "/status", None, STATUS_S)
    try:
        told = None if content is None else msgspec.json.decode(content, type=Status)
    except MALFORMED:
        return status
    if told is None or told.pipeline != status.pipeline:
        return status
    if told.worker.waits is not None and (not status.worker.running or told.worker.name == status.worker.name):
        status = as_waiting(status, told.worker.name, told.worker.waits)
    elif not status.worker.running or told.worker != status.worker:
        return status
    indexes = {
        name: msgspec.structs.replace(
            index,
            text_freshness=told.indexes[name].text_freshness,
            vector_freshness=told.indexes[name].vector_freshness,
            progress=told.indexes[name].progress,
        )
        if name in told.indexes
        else index
        for name, index in status.indexes.items()
    }
    problems = {name: why for name, index in told.indexes.items() if (why := index.problem) is not None}
    status = with_problems(msgspec.structs.replace(status, indexes=indexes), problems)
    host, port = config.worker.listen_address
    page = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
    return msgspec.structs.replace(status, events=told.events, page=page)


def _address(config: Config) -> tuple[str, int] | None:
    """Return where a worker on this machine answers; None where the port is any free one."""
    host, port = config.worker.listen_address
    return None if port == 0 else (_EVERYWHERE.get(host, host), port)


def _ask(host: str, port: int, method: str, path: str, body: bytes | None, timeout_s: float) -> bytes | None:
    connection = http.client.HTTPConnection(host, port, timeout=timeout_s)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"} if body is not None else {})
        response = connection.getresponse()
        content = response.read(MOST_BYTES)
        return content if response.status == 200 else None
    except (OSError, http.client.HTTPException, *MALFORMED):
        return None
    finally:
        connection.close()
