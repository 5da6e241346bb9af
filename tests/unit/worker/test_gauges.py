"""What the metrics show of the two servers, and of one that does not answer."""

from __future__ import annotations

import math

import anyio
import msgspec
import pytest

from cdcsync.errors import SetupError, TargetUnavailable
from cdcsync.status import Status
from cdcsync.worker.gauges import GAUGES_S, set_gauges_for_ever
from cdcsync.worker.readings import AWAY_S
from cdcsync.worker.state import WorkerState
from tests.support.statuses import LIVE, STATUS
from tests.support.virtual import in_virtual_time
from tests.support.worker_states import CONFIG, follow, gauge, read_as


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (SetupError("permission denied", hint="grant it"), "the status cannot be read: permission denied; grant it"),
        (KeyError("a mistake of ours"), None),
    ],
)
def test_a_status_that_cannot_be_read_ends_no_worker_and_is_read_again(error: Exception, reason: str | None) -> None:
    async def main() -> None:
        state, broken = WorkerState(CONFIG), True

        def reading() -> Status:
            if broken:
                raise error
            return STATUS

        await follow(state)
        read_as(state, reading)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(set_gauges_for_ever, state)
            await anyio.sleep(3 * GAUGES_S)
            assert state.not_ready() == [reason] * (reason is not None)
            assert gauge(state, "cdcsync_connected", side="target") == 1  # it answers
            broken = False
            await anyio.sleep(GAUGES_S)
            assert state.not_ready() == []
            assert gauge(state, "cdcsync_index_state", index="articles", state="live") == 1
            tasks.cancel_scope.cancel()

    in_virtual_time(main)


def test_figures_are_not_known_once_the_target_is_away_for_longer_than_a_restart() -> None:
    async def main() -> None:
        state, away = WorkerState(CONFIG), False

        def reading() -> Status:
            if away:
                raise TargetUnavailable("connection refused", where="target")
            return STATUS

        def known() -> bool:
            return not math.isnan(gauge(state, "cdcsync_index_chunks", index="articles") or 0)

        await follow(state)
        read_as(state, reading)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(set_gauges_for_ever, state)
            await anyio.sleep(1)
            away = True
            await anyio.sleep(AWAY_S - GAUGES_S)
            assert known()
            await anyio.sleep(3 * GAUGES_S)
            assert not known()
            away = False
            await anyio.sleep(GAUGES_S)
            assert known()
            tasks.cancel_scope.cancel()

    in_virtual_time(main)


def test_an_index_that_cannot_be_read_is_a_reason_once_that_lasts_and_its_figures_are_not_known() -> None:
    damaged = msgspec.structs.replace(LIVE, unreadable="invalid page; restore it")
    status = msgspec.structs.replace(STATUS, indexes={"articles": damaged, "notes": LIVE})

    async def main() -> None:
        state = WorkerState(CONFIG)
        await follow(state)
        read_as(state, lambda: status)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(set_gauges_for_ever, state)
            await anyio.sleep(CONFIG.worker.ready_max_lag_s - 1)
            assert state.not_ready() == []
            await anyio.sleep(2)
            assert state.not_ready() == ["index articles cannot be read: invalid page; restore it"]
            tasks.cancel_scope.cancel()
        assert state.not_loaded() == ["index articles cannot be read: invalid page; restore it"]
        assert gauge(state, "cdcsync_index_chunks", index="notes") == 0
        unknown = gauge(state, "cdcsync_index_chunks", index="articles")
        assert unknown is not None
        assert math.isnan(unknown)

    in_virtual_time(main)
