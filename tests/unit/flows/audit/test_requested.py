"""What a comparison waits for before it begins: a position that the stream comes to, though the source writes on."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from cdcsync.flows.audit import requested
from cdcsync.lsn import Lsn

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("written", "awaited"),
    [((10, 20, 30), [10, 10, 10]), ((20, 10, 30), [20, 10, 10])],
    ids=["a stream that stays late", "a source that another took the place of"],
)
async def test_what_is_waited_for_does_not_move_away_from_a_stream_that_is_late(
    monkeypatch: pytest.MonkeyPatch, written: tuple[int, ...], awaited: list[int]
) -> None:
    ends, asked = iter(written), list[int]()

    async def insert_lsn(_: object) -> Lsn:
        return Lsn(next(ends))

    async def reach(position: Lsn, anew: bool) -> None:
        asked.append(position)
        if len(asked) < len(written):
            await anyio.sleep_forever()

    monkeypatch.setattr(requested, "insert_lsn", insert_lsn)
    monkeypatch.setattr(requested, "REACH_S", 0.01)
    source = cast(Any, SimpleNamespace(info=SimpleNamespace(server_version=180_006)))

    await requested._arrive(source, "articles", reach)

    assert asked == awaited
