"""The first load on a terminal: bars while it goes on, then where the page is."""

from __future__ import annotations

import io

import msgspec
import pytest
from rich.console import Console

from cdcsync.cli.loads import show_loads
from cdcsync.errors import TargetUnavailable
from cdcsync.status import Progress, Status
from tests.unit.status.test_rendering import LIVE, STATUS

pytestmark = pytest.mark.anyio


class Worker:
    """One that is asked a few times before its load is done."""

    port: int | None = 9477

    def __init__(self, *answers: Status | Exception) -> None:
        self.answers = list(answers)

    def not_loaded(self) -> list[str]:
        return ["index articles is building, not live"] if self.answers else []

    async def status(self) -> Status:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def loading(*parts: Progress) -> Status:
    index = msgspec.structs.replace(LIVE, state="building", progress=list(parts))
    return msgspec.structs.replace(STATUS, indexes={"articles": index})


async def test_bars_are_shown_until_the_load_is_done_and_then_where_the_page_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("cdcsync.cli.loads.READ_EVERY_S", 0.0)
    output = io.StringIO()
    console = Console(file=output, width=100, force_terminal=True, color_system=None)
    parts = Progress("rows", 250, 1_000, 15.0), Progress("vectors", 100, None)
    await show_loads(Worker(TargetUnavailable("is away"), loading(*parts), STATUS), console, "127.0.0.1")
    shown = output.getvalue()
    assert "25% of 1,000" in shown
    assert "15 s left" in shown
    assert shown.rstrip().endswith("searchable now: articles (1,000 rows); status page: http://127.0.0.1:9477/")
