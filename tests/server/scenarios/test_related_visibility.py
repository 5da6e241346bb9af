"""Commits that are delivered and that no snapshot shows yet, beside changes of related rows and another index."""

from __future__ import annotations

from collections.abc import Callable

import psycopg
import pytest

from cdcsync.demo.cluster import Cluster
from tests.server.scenarios.test_related import BOOKS, REVIEWS
from tests.support.scenes import Followed, MakeScene
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

HIDDEN = {
    "a document is deleted": "DELETE FROM books WHERE id = 3",
    "a document is deleted by a prepared transaction": "DELETE FROM books WHERE id = 3; PREPARE TRANSACTION 'deletion'",
    "a document fulfils its condition no more": "UPDATE books SET title = 'gone' WHERE id = 3",
    "a document's key changes": "UPDATE books SET id = 33 WHERE id = 3",
    "a related row comes": "INSERT INTO reviews VALUES (1, 3, 'hidden')",
}


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("restarted", [False, True], ids=["", "restarted"])
@pytest.mark.parametrize("statement", HIDDEN.values(), ids=HIDDEN)
def test_what_waits_for_a_standby_is_not_undone_by_a_related_row_and_holds_no_other_index_up(
    make_scene: MakeScene, make_cluster: Callable[..., Cluster], statement: str, restarted: bool
) -> None:
    cluster = make_cluster(settings={"synchronous_standby_names": "nobody", "synchronous_commit": "local"})
    books = Followed("books", "{title} {reviews}", more=REVIEWS, where="title <> 'gone'")
    scene = make_scene(
        [*BOOKS, "CREATE TABLE plain (id int PRIMARY KEY, title text)"],
        {"books": books, "plain": Followed("plain")},
        source=cluster.dsn(),
    )
    pipeline = scene.pipeline
    with (
        psycopg.connect(cluster.dsn(), autocommit=True) as admin,
        psycopg.connect(cluster.dsn(), autocommit=True) as waiting,
    ):
        for one in ("BEGIN", *statement.split("; "), "SET synchronous_commit = on"):
            waiting.execute(one.encode())
        waiting.pgconn.send_query(b"COMMIT PREPARED 'deletion'" if "PREPARE" in statement else b"COMMIT")
        waits = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        until(lambda: admin.execute(waits).fetchone() == (True,), "the commit to wait")
        scene.execute("INSERT INTO plain VALUES (1, 'one')")
        lsn = pipeline.position()
        until(lambda: pipeline.reached("plain", lsn), pipeline.tail)  # what waits is delivered, and applied
        if restarted:
            assert pipeline.stop(pipeline.processes[-1]) == 0
            pipeline.start()
        scene.execute("INSERT INTO reviews VALUES (2, 3, 'seen')")
        scene.execute("INSERT INTO plain VALUES (2, 'two')")
        lsn = pipeline.position()
        until(lambda: pipeline.reached("plain", lsn), pipeline.tail)
        assert pipeline.target.execute("SELECT count(*) FROM cdcsync.plain_chunks").fetchone() == (2,)
        assert pipeline.event("reread_put_off")["index"] == "books"
        admin.execute("ALTER SYSTEM SET synchronous_standby_names = ''")
        admin.execute("SELECT pg_reload_conf()")
        while waiting.pgconn.get_result() is not None:
            pass
    scene.settle()
    scene.oracle_reads("books", "books_expected")
    scene.follows("books")
