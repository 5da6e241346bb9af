"""Our messages in the WAL: after one, nothing that was read can be taken back by a crash of the source."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from cdcsync.postgres.liveness import same_cluster
from cdcsync.postgres.queries import fetch_value
from cdcsync.postgres.sessions import connect
from cdcsync.source.marks import flush, unflushed
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

FLUSHED = "SELECT pg_current_wal_flush_lsn() >= %s::pg_lsn"


async def test_what_was_committed_without_being_flushed_is_on_disk_afterwards(
    make_cluster: Callable[..., Cluster], target: Database
) -> None:
    dsn = make_cluster(settings={"wal_writer_delay": "10s"}).dsn()
    with psycopg.connect(dsn, autocommit=True, options="-c synchronous_commit=off") as hurried:
        hurried.execute("CREATE TABLE seen ()")
        row = hurried.execute("SELECT pg_current_wal_insert_lsn()::text").fetchone()
    assert row is not None
    async with await connect(dsn, "source", application_name="reader") as reader:
        assert await fetch_value(reader, "SELECT to_regclass('public.seen') IS NOT NULL")
        assert not await fetch_value(reader, FLUSHED, [row[0]])
        behind = await unflushed(reader)
        assert behind is not None
        await flush(reader, behind)
        assert await fetch_value(reader, FLUSHED, [row[0]])
        end = await fetch_value(reader, "SELECT pg_current_wal_insert_lsn()::text")
        await flush(reader, behind)
        assert await fetch_value(reader, "SELECT pg_current_wal_insert_lsn()::text") == end  # nothing was left to do
    # A commit in the source's own cluster flushes what was seen there; one in another cluster does not.
    async with (
        await connect(dsn, "source", application_name="reader") as reader,
        await connect(dsn, "target", application_name="beside") as beside,
        await connect(target.dsn, "target", application_name="elsewhere") as elsewhere,
    ):
        assert same_cluster(beside, reader)
        assert not same_cluster(elsewhere, reader)
