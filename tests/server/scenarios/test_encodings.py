"""A source whose database has no encoding: its texts are followed as UTF-8, and one that is not is told of.

The server cannot send such a row at all, so nobody gets past it: that is a gap. After it the row alone is
listed, until it is corrected.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest
from psycopg import conninfo, sql

from tests.support.scenes import BEAT, Followed, Scene, scene
from tests.support.servers import Server
from tests.support.workers import PATIENCE_S, until

pytestmark = pytest.mark.server


@pytest.fixture
def ascii_scene(server: Server, tmp_path: Path) -> Iterator[Scene]:
    """Two indexes over a database with the encoding SQL_ASCII; the target has UTF-8."""
    name = f"cdcsync_test_{secrets.token_hex(6)}"
    with server.connect() as admin:
        admin.execute(
            sql.SQL("CREATE DATABASE {} ENCODING SQL_ASCII TEMPLATE template0 LOCALE 'C'").format(sql.Identifier(name))
        )
        try:
            with scene(
                server,
                tmp_path,
                ["CREATE TABLE notes (id int PRIMARY KEY, title text)", "INSERT INTO notes VALUES (1, 'Größe')"],
                {"notes": Followed("notes")},
                source=conninfo.make_conninfo(server.dsn, dbname=name, client_encoding="UTF8"),
                hurry={"cdcsync.model.pauses.FIRST_DELAY_S": 1.0, "cdcsync.model.pauses.MOST_DELAY_S": 2.0},
            ) as made:
                yield made
        finally:
            slots = "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE database = %s"
            admin.execute(slots, [name])
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_bytes_that_are_not_utf_8_are_a_gap_and_after_it_cost_their_row(ascii_scene: Scene) -> None:
    made = ascii_scene
    made.execute("INSERT INTO notes VALUES (2, 'größer')")
    made.follows()

    made.execute("INSERT INTO notes VALUES (3, E'gr\\xf6\\xdfer')")
    assert made.pipeline.processes[0].wait(timeout=PATIENCE_S) == 1
    said = " ".join(made.pipeline.tail().split())
    assert "the source fails each time that it decodes what follows the checkpoint" in said
    assert "not text in UTF-8: correct the row" in said

    made.reconfigured(lambda text: text.replace("[source]", '[source]\non_gap = "resync"'))
    made.pipeline.start()
    failed = "SELECT key, error FROM cdcsync.failed_documents"
    until(lambda: made.pipeline.target.execute(failed).fetchall(), made.pipeline.tail)
    ((key, error),) = made.pipeline.target.execute(failed).fetchall()
    assert key == ["3"]
    assert "invalid byte sequence" in error
    until(lambda: made.healed(BEAT), made.pipeline.tail)
    made.settle()

    made.execute("UPDATE notes SET title = 'größer' WHERE id = 3")
    made.heals()
    until(lambda: not made.pipeline.target.execute(failed).fetchall(), made.pipeline.tail)
    assert len(made.pipeline.processes) == 2
