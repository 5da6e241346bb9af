"""When a wait for transactions of others is told, how many of them people hear of, and that it is taken back."""

from __future__ import annotations

from typing import Any, cast

import anyio
import pytest

from cdcsync.flows import blocked
from cdcsync.flows.blocked import REPORT_S, Blocked, noted
from cdcsync.source.transactions import Blocker
from tests.support.virtual import in_virtual_time

CONNECTION: Any = cast(Any, None)


def test_a_wait_is_told_once_it_lasts_again_and_again_and_taken_back_at_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def blockers(_: object, xids: list[int]) -> list[Blocker]:
        return [Blocker(f"pid {xid}", f"SELECT pg_terminate_backend({xid})") for xid in xids]

    monkeypatch.setattr(blocked, "blockers", blockers)
    logged: list[list[str]] = []
    problems = {"notes": "another"}

    async def main() -> None:
        with Blocked("it waits for", noted(problems, "articles"), logged.append) as wait:
            await anyio.sleep(REPORT_S / 2)
            await wait.by(CONNECTION, [1])
            assert (logged, problems) == ([], {"notes": "another"})
            await wait.due()
            await wait.by(CONNECTION, [1, 2, 3, 4, 5])
            await wait.by(CONNECTION, [1])
            assert logged == [["pid 1", "pid 2", "pid 3", "pid 4", "pid 5"]]
            assert problems["articles"].startswith(
                "it waits for pid 1, which ends with SELECT pg_terminate_backend(1);"
            )
            assert problems["articles"].endswith("pid 3, which ends with SELECT pg_terminate_backend(3); 2 more")
            await wait.due()
            await wait.by(CONNECTION, [])
            assert problems["articles"] == "it waits for transactions that no session shows"
            raise ConnectionError

    with pytest.raises(ConnectionError):
        in_virtual_time(main)
    assert problems == {"notes": "another"}
