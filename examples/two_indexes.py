"""Tickets and comments, searched together.

Both indexes are of one configuration and share connections and models. Their scores are sums of reciprocal ranks, which
are comparable: the best ticket and the best comment have about the same.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import anyio

from cdcsync import Config, Hit, Index


async def search_everything(config: Config, text: str, *, k: int = 10) -> list[tuple[str, Hit]]:
    """Return the best hits of both indexes, each with the index that it is from."""
    async with Index.open(config, "tickets") as tickets, tickets.beside("comments") as comments:
        return await search_all([tickets, comments], text, k=k)


async def search_all(indexes: Sequence[Index], text: str, *, k: int) -> list[tuple[str, Hit]]:
    """Search several indexes at the same time, and return the best hits of all."""
    found: list[tuple[str, Hit]] = []

    async def search(index: Index) -> None:
        found.extend((index.name, hit) for hit in await index.search(text, k=k))

    async with anyio.create_task_group() as tasks:
        for index in indexes:
            tasks.start_soon(search, index)
    return heapq.nlargest(k, found, key=lambda one: one[1].score)
