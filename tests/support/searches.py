"""Searches that go on all the time, as applications make them, while an index migrates."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

import cdcsync
from tests import ROOT
from tests.support.migrations import NEW, OLD
from tests.support.workers import Pipeline

SEARCHES_PER_S = 20

COMMANDS_PER_S = 2
"""A command is a process: more of them would be most of the work, and what they ask they ask as often as it changes."""


class Searches(ABC):
    """Searches all the time, and holds every answer against the model of its generation."""

    QUERY = "which article is about 11 and 7"

    def __init__(self, pipeline: Pipeline) -> None:
        self.models = {1: OLD, 2: NEW}
        self.answers: Counter[tuple[str, int]] = Counter()
        """By who asked, and by generation."""
        self.pipeline = pipeline
        self.over = False

    def check(self, who: str, generation: int, found: Sequence[tuple[str, float, bool]]) -> None:
        """Fail unless texts were found, whose distances are those of the model, but for stale ones."""
        assert found, f"{who} found nothing in generation {generation}"
        model = self.models[generation]
        query, texts = model.vectors([self.QUERY])[0], model.vectors([text for text, _, _ in found])
        for (text, distance, stale), expected in zip(found, 1 - texts @ query, strict=True):
            assert stale or abs(distance - expected) < 1e-3, f"{who}, generation {generation}: {text!r}"
        self.answers[who, generation] += 1

    @abstractmethod
    async def by_sql(self) -> None:
        """Search as an application that embeds by itself."""

    @abstractmethod
    def check_hits(self, hits: Sequence[dict[str, Any]]) -> None:
        """Check what the command answers, which does not say which generation it asked."""

    async def by_python(self) -> None:
        async with cdcsync.Index.open(self.pipeline.config, "articles") as articles:
            while not self.over:
                hits = await articles.search(self.QUERY, k=5)
                assert hits.warning is None
                assert hits.generation is not None
                found = [(hit.content, hit.distance or 0.0, hit.stale or hit.distance is None) for hit in hits]
                self.check("python", hits.generation, found)
                await anyio.sleep(1 / SEARCHES_PER_S)

    async def by_command(self) -> None:
        ask = partial(self.pipeline.answer, "search", "articles", self.QUERY, "--mode", "vector", PYTHONPATH=str(ROOT))
        while not self.over:
            hits = await anyio.to_thread.run_sync(ask)
            assert hits
            self.check_hits(hits)
            await anyio.sleep(1 / COMMANDS_PER_S)

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        async with anyio.create_task_group() as tasks:
            for search in (self.by_sql, self.by_python, self.by_command):
                tasks.start_soon(search)
            yield
            self.over = True

    async def some_more(self, generation: int) -> None:
        """Wait until each has searched a generation several times more."""
        before = dict(self.answers)
        for who, times in (("sql", 5), ("python", 5), ("command", 1)):
            with anyio.fail_after(60):
                while self.answers[who, generation] < before.get((who, generation), 0) + times:  # noqa: ASYNC110
                    await anyio.sleep(0.05)
