"""Statuses as they are read from real servers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from cdcsync.cli.queries import read_status_once
from cdcsync.errors import SetupError, SourceUnavailable, TargetUnavailable
from cdcsync.status import read_status
from tests.support.statuses import Pipeline, problem

pytestmark = [pytest.mark.server, pytest.mark.anyio]


async def test_before_the_first_start_everything_is_absent(make_stopped: Callable[..., Awaitable[Pipeline]]) -> None:
    status = await (await make_stopped()).status()
    assert status.problems == [
        f"schema cdcsync of the target holds no pipeline {status.pipeline}: run `cdcsync run` first"
    ]
    assert (status.checkpoint, status.lag_bytes, status.caught_up, status.slot) == (None, None, None, None)
    assert (status.worker.name, status.worker.running) == (None, False)
    index = status.indexes["articles"]
    assert (index.state, index.reason) == ("absent", "not set up yet: `cdcsync run` does it")
    assert (index.table, index.view, index.model) == ("public.articles", "public.articles_index", None)


async def test_another_pipelines_tables_are_not_ours(make_stopped: Callable[..., Awaitable[Pipeline]]) -> None:
    pipeline = await make_stopped()
    await pipeline.set_up()
    await pipeline.target.execute("UPDATE cdcsync.pipelines SET slot = 'other'")
    assert problem(await pipeline.status(), "run `cdcsync run` first")


async def test_a_source_that_is_away_leaves_lag_and_slot_unknown(stopped: Pipeline) -> None:
    full = SourceUnavailable("role ann has as many connections as it may", where="source", hint="raise its limit")
    without = await read_status(stopped.config, full, stopped.target)
    await stopped.source.close()
    broken = await stopped.status()
    assert problem(without, "the source cannot be read").endswith(f"unknown: {full.with_fix}")
    for status in (without, broken):
        assert (status.lag_bytes, status.lag_seconds, status.caught_up, status.slot) == (None, None, None, None)
        assert problem(status, "the source cannot be read, so lag and slot are unknown")
        assert problem(status, "no worker runs")
        assert status.indexes["articles"].state == "live"
        assert status.checkpoint is not None


async def test_a_source_that_refuses_to_be_read_says_why(stopped: Pipeline) -> None:
    refused = SetupError("the password is wrong", where="source", hint="correct it")
    status = await read_status(stopped.config, refused, stopped.target)
    assert problem(status, "the source cannot be read").endswith("unknown: the password is wrong; correct it")
    await stopped.source.execute("SET ROLE pg_monitor")
    await stopped.target.execute("REVOKE EXECUTE ON FUNCTION pg_current_wal_lsn() FROM PUBLIC, pg_monitor")
    status = await stopped.status()
    assert "permission denied" in problem(status, "the source cannot be read, so lag and slot are unknown")
    assert (status.lag_bytes, status.indexes["articles"].state) == (None, "live")


async def test_a_target_that_is_away_is_an_error(stopped: Pipeline) -> None:
    await stopped.target.close()
    with pytest.raises(TargetUnavailable):
        await stopped.status()


async def test_a_role_that_may_not_read_our_tables_is_told_to_be_granted_that(stopped: Pipeline) -> None:
    await stopped.target.execute("SET ROLE pg_read_all_settings")  # on every server, and without rights to our tables
    with pytest.raises(SetupError, match="permission denied") as refused:
        await stopped.status()
    assert "config roles" in str(refused.value.hint)


async def test_tables_that_lack_a_newer_column_are_told_to_be_upgraded(stopped: Pipeline) -> None:
    await stopped.target.execute("ALTER TABLE cdcsync.audits DROP COLUMN proven_without")
    assert "start `cdcsync run` of this one" in problem(await stopped.status(), "proven_without")


async def test_reading_writes_nothing_and_leaves_no_transaction(stopped: Pipeline) -> None:
    for connection in (stopped.source, stopped.target):
        await connection.execute("SET default_transaction_read_only = on")
    await stopped.status()
    for connection in (stopped.source, stopped.target):
        assert connection.info.transaction_status.name == "IDLE"


async def test_tables_of_another_version_are_told_by_their_version_and_not_by_what_they_lack(
    make_stopped: Callable[..., Awaitable[Pipeline]],
) -> None:
    pipeline = await make_stopped()
    await pipeline.target.execute("CREATE SCHEMA IF NOT EXISTS cdcsync")
    await pipeline.target.execute("CREATE TABLE cdcsync.pipelines (id int)")
    with pytest.raises(SetupError, match="of version 1"):
        await read_status_once(pipeline.config)
