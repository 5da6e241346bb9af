"""Asks a worker on this machine to embed a query with the model that it has loaded.

Source: docs/search.md, "From the command line".
"""

from __future__ import annotations

import http.client
from typing import TYPE_CHECKING

import anyio
import anyio.to_thread
import msgspec

if TYPE_CHECKING:
    from cdcsync.config import Config

TIMEOUT_S = 5.0
"""A worker on this machine answers at once; one that is busy is not waited for longer than loading the model takes."""

_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # what a worker listens on # noqa: S104 # nosec B104


class _Embedded(msgspec.Struct, frozen=True):
    model: str
    vector: list[float]


async def embedded_by_worker(config: Config, embedder: str, model: str, text: str) -> list[float] | None:
    """Return a query's vector as a running worker makes it; None if there is none, or one with another model."""
    host, port = config.worker.listen_address
    if port == 0:
        return None
    body = msgspec.json.encode({"embedder": embedder, "text": text})
    answer = await anyio.to_thread.run_sync(_post, _EVERYWHERE.get(host, host), port, body)
    return answer.vector if answer is not None and answer.model == model else None


def _post(host: str, port: int, body: bytes) -> _Embedded | None:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT_S)
    try:
        connection.request("POST", "/embed", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        content = response.read()
        return msgspec.json.decode(content, type=_Embedded) if response.status == 200 else None
    except (OSError, http.client.HTTPException, msgspec.DecodeError):
        return None
    finally:
        connection.close()
