"""Which examination a pipeline begins with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import anyio
import msgspec
import pytest

from cdcsync.errors import IndexFault
from cdcsync.worker import run

pytestmark = pytest.mark.anyio


class Settings(msgspec.Struct):
    indexes: dict[str, object] = {}


def report(name: str) -> Any:
    plan = SimpleNamespace(name=name, seen=None)
    return SimpleNamespace(plans=[plan], broken={}, indexes={}, specs=[], errors=[], target_reached=True)


async def test_an_examination_made_ahead_is_not_kept_for_later_once_an_index_is_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stopping = anyio.Event()
    state: Any = SimpleNamespace(
        stopping=stopping, config=Settings(), examined=lambda **_: None, note_waiting=lambda why: None
    )
    config: Any = SimpleNamespace(target=SimpleNamespace(dsn="", schema="cdcsync"))
    found = iter(["ahead", "fresh"])
    begun: list[str] = []

    async def examine(*_: object) -> Any:
        return report(next(found))

    async def hold(*_: object) -> dict[str, object]:
        return {}

    class Pipeline:
        """The first one is examined again while an index is paused, the second ends at once, the third is the last."""

        def __init__(
            self, *_: object, plans: list[Any], look_again: Callable[[], Awaitable[None]], **others: object
        ) -> None:
            begun.extend(plan.name for plan in plans)
            self._look_again = look_again

        async def set_up(self, broken: object) -> str:
            return "ready" if len(begun) == 1 else "outdated"

        async def work(self) -> list[IndexFault]:
            await self._look_again()
            return [IndexFault("its column is gone", where="table a", index="a")]

        async def aclose(self) -> None:
            if len(begun) == 3:
                stopping.set()

    monkeypatch.setattr(run, "examine", examine)
    monkeypatch.setattr(run, "_hold", hold)
    monkeypatch.setattr(run, "Pipeline", Pipeline)
    monkeypatch.setattr(run, "make_dispatchers", lambda *_: {})
    async with anyio.create_task_group() as tasks:
        await run._run_pipelines(config, state, report("first"), {}, tasks)
    assert begun == ["first", "first", "fresh"]
