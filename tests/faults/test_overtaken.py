"""A worker that was cut off while a command did its work: it stands by, and continues once that has ended."""

from __future__ import annotations

import signal
from collections.abc import Callable

import pytest

from tests.support.outages import MakeSimple
from tests.support.servers import Database
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.faults]


def test_a_worker_that_a_repair_overtook_stands_by_and_continues(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source, target = make_database(), make_database()
    pipeline = make_simple(source.dsn, target.dsn, rows=50)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    streamed = pipeline.times("streaming")

    worker.send_signal(signal.SIGSTOP)
    for database in (source, target):
        database.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE application_name LIKE 'cdcsync%'"
            " AND datname = current_database()"
        )
    target.execute("DELETE FROM cdcsync.articles_chunks WHERE id = 7")
    repaired = pipeline.answer("verify", "articles", "--repair", "--json")
    worker.send_signal(signal.SIGCONT)

    assert repaired["repaired"]
    pipeline.event("overtaken")
    until(lambda: pipeline.times("streaming") > streamed, pipeline.tail)
    source.execute("UPDATE articles SET title = title || ' again'")
    pipeline.in_step()
    assert worker.poll() is None
