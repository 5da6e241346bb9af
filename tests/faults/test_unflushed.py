"""Commits that a crash of the source takes back: an index never holds what the source never had for good."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.support.outages import MakeSimple, make_target
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.faults]

LONG = "repeat({} || ' ', 400)"
"""A text that is stored out of line, so that a change of another column does not send it."""

WAITS = "SELECT EXISTS (SELECT FROM pg_locks WHERE NOT granted)"


def test_a_row_that_was_read_again_is_that_of_a_commit_which_a_crash_leaves(
    make_cluster: Callable[..., Cluster], make_simple: MakeSimple
) -> None:
    source, target = make_cluster(settings={"wal_writer_delay": "10s"}), make_cluster()
    pipeline = make_simple(source.dsn(), make_target(target))
    pipeline.source.execute("ALTER TABLE articles ALTER title SET STORAGE EXTERNAL")
    pipeline.source.execute(f"UPDATE articles SET title = {LONG.format('title')} WHERE id = 7")
    pipeline.start()
    pipeline.live()
    pipeline.in_step()

    def text() -> str:
        row = pipeline.target.execute("SELECT content FROM cdcsync.articles_chunks WHERE id = 7").fetchone()
        return "" if row is None else str(row[0])

    with (
        psycopg.connect(source.dsn(), options="-c synchronous_commit=off") as hurried,
        psycopg.connect(source.dsn()) as usual,
        ThreadPoolExecutor(1) as threads,
    ):
        # The worker reads the row again for the first change, and waits until the second one is committed.
        usual.execute("UPDATE articles SET tenant = 99 WHERE id = 7")
        locked = threads.submit(hurried.execute, "LOCK TABLE articles IN ACCESS EXCLUSIVE MODE")
        until(lambda: pipeline.source.execute(WAITS).fetchone() == (True,), "the lock is asked for")
        usual.commit()
        locked.result()
        hurried.execute(f"UPDATE articles SET title = {LONG.format(chr(39) + 'hurried' + chr(39))} WHERE id = 7")
        hurried.commit()
        until(lambda: text().startswith("hurried"), "the second change in the index")
        source.kill()

    source.start()
    pipeline.connect_source()
    pipeline.source.execute("UPDATE articles SET tenant = tenant + 1 WHERE id = 3")
    pipeline.in_step()
