"""What administrators do to a source under a running worker: it is followed, or told of, and never missed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from cdcsync.demo.programs import embedded_bin_dir
from tests import ROOT
from tests.support.outages import MakeSimple
from tests.support.roles import Roles, config, grant
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.servers import Database, Server
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.timeout(300)]

TABLE = "CREATE TABLE {t} (id int PRIMARY KEY, title text)"
ROWS = "INSERT INTO {t} SELECT i, 'title ' || i FROM generate_series(1, 9) i"
WRITE = ("UPDATE {t} SET title = title || '.' WHERE id % 3 = 0", "DELETE FROM {t} WHERE id = 4")


def writes(scene: Scene, table: str) -> None:
    scene.execute(*(one.format(t=table) for one in WRITE))


@pytest.mark.proof
def test_a_publication_that_is_renamed_is_made_again_under_its_name(make_scene: MakeScene) -> None:
    scene = make_scene([one.format(t="named") for one in (TABLE, ROWS)], {"named": Followed("named")})
    if scene.pipeline.source.info.server_version < 180000:
        pytest.skip("before PostgreSQL 18 this is a gap")
    scene.execute("ALTER PUBLICATION cdcsync RENAME TO another")
    writes(scene, "named")
    scene.heals()
    writes(scene, "named")
    scene.follows()


@pytest.mark.proof
def test_a_partition_that_is_detached_while_others_read_goes_once_it_is_gone(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            "CREATE TABLE parted (id int PRIMARY KEY, title text) PARTITION BY RANGE (id)",
            "CREATE TABLE low PARTITION OF parted FOR VALUES FROM (0) TO (5)",
            "CREATE TABLE high PARTITION OF parted FOR VALUES FROM (5) TO (100)",
            ROWS.format(t="parted"),
        ],
        {"parted": Followed("parted")},
    )
    with psycopg.connect(scene.source.dsn) as reader:
        reader.execute("SELECT count(*) FROM parted")
        with psycopg.connect(scene.source.dsn, autocommit=True) as other:
            other.execute("SET statement_timeout = '1s'")
            with pytest.raises(psycopg.errors.QueryCanceled):
                other.execute("ALTER TABLE parted DETACH PARTITION low CONCURRENTLY")
            # It is neither in nor out: nobody can read it through its parent any more.
            scene.execute("UPDATE high SET title = title || ' meanwhile'", "UPDATE low SET title = title || ' alone'")
            reader.rollback()
            other.execute("SET statement_timeout = 0")
            other.execute("ALTER TABLE parted DETACH PARTITION low FINALIZE")
    scene.heals()
    assert scene.pipeline.target.execute("SELECT min(id) FROM cdcsync.parted_chunks").fetchone() == (5,)
    scene.execute("ALTER TABLE parted ATTACH PARTITION low FOR VALUES FROM (0) TO (5)")
    scene.heals()


@pytest.mark.proof
def test_a_publication_that_stops_sending_generated_columns_pauses_the_index_that_needs_one(
    make_scene: MakeScene, server: Server
) -> None:
    with server.connect() as connection:
        if connection.info.server_version < 180000:
            pytest.skip("before PostgreSQL 18 no generated column is sent")
    scene = make_scene(
        [
            "CREATE TABLE made (id int PRIMARY KEY, title text, loud text GENERATED ALWAYS AS (upper(title)) STORED)",
            "INSERT INTO made (id, title) SELECT i, 'title ' || i FROM generate_series(1, 9) i",
        ],
        {"made": Followed("made", "{loud}")},
    )
    scene.execute("ALTER PUBLICATION cdcsync SET (publish_generated_columns = none)")
    assert "publish_generated_columns" in scene.paused("made")
    scene.follows("beat")
    scene.execute(
        "UPDATE made SET title = title || '.' WHERE id < 4",
        "ALTER PUBLICATION cdcsync SET (publish_generated_columns = stored)",
    )
    scene.heals()
    assert len(scene.pipeline.processes) == 1


def test_a_prepared_transaction_counts_once_it_commits(make_scene: MakeScene) -> None:
    scene = make_scene([one.format(t="prepared") for one in (TABLE, ROWS)], {"prepared": Followed("prepared")})
    if scene.pipeline.source.execute("SHOW max_prepared_transactions").fetchone() == ("0",):
        pytest.skip("this server allows no prepared transactions (max_prepared_transactions = 0)")
    names = [f"{scene.source.name}_{what}" for what in ("kept", "left")]
    for number, name in enumerate(names):
        with psycopg.connect(scene.source.dsn, autocommit=True) as connection:
            connection.execute("BEGIN")
            connection.execute(f"UPDATE prepared SET title = 'prepared' WHERE id = {1 + number}".encode())
            connection.execute(sql.SQL("PREPARE TRANSACTION {}").format(sql.Literal(name)))
    scene.follows()
    scene.execute(f"COMMIT PREPARED '{names[0]}'", f"ROLLBACK PREPARED '{names[1]}'")
    scene.follows()
    found = scene.pipeline.target.execute("SELECT id FROM cdcsync.prepared_chunks WHERE content = 'prepared'")
    assert found.fetchall() == [(1,)]


def test_a_database_that_is_renamed_is_told_by_name(make_scene: MakeScene) -> None:
    scene = make_scene([one.format(t="moved") for one in (TABLE, ROWS)], {"moved": Followed("moved")})
    scene.pipeline.stop(scene.pipeline.processes[-1])
    before = scene.pipeline.path.read_text()
    scene.pipeline.path.write_text(before.replace(scene.source.name, f"{scene.source.name}_gone", 1))
    worker = scene.pipeline.start()
    assert worker.wait(timeout=60) == 2
    assert "correct the database name in the DSN" in scene.pipeline.tail()
    # With the name corrected it goes on where it was.
    scene.pipeline.path.write_text(before)
    writes(scene, "moved")
    scene.pipeline.start()
    until(lambda: scene.pipeline.times("streaming") > 1, scene.pipeline.tail)
    scene.follows()


@pytest.mark.proof
def test_a_source_whose_transactions_are_read_only_is_followed_and_what_it_cannot_do_is_told(
    make_database: Callable[[], Database], make_simple: MakeSimple
) -> None:
    source = make_database()
    pipeline = make_simple(source.dsn, make_database().dsn, slot=source.name)
    pipeline.source.execute("CREATE PUBLICATION cdcsync FOR TABLE articles")
    with source.server.connect() as administrator:
        database = sql.Identifier(source.name)
        administrator.execute(sql.SQL("ALTER DATABASE {} SET default_transaction_read_only = on").format(database))
        worker = pipeline.start()
        pipeline.live()
        # Our own session is older than the setting.
        pipeline.source.execute("UPDATE articles SET title = title || ' again'")
        pipeline.in_step()

        pipeline.source.execute("ALTER PUBLICATION cdcsync DROP TABLE articles")
        until(lambda: "transactions are read-only here" in pipeline.get("/readyz")[1].decode(), pipeline.tail)

        administrator.execute(sql.SQL("ALTER DATABASE {} RESET default_transaction_read_only").format(database))
    pipeline.source.execute("UPDATE articles SET title = title || ' at last'")
    # It may have been written while the publication did not send the table: then the table is read again.
    until(pipeline.in_step_now, pipeline.tail)
    until(lambda: pipeline.get("/readyz")[0] == 200, pipeline.tail)
    assert worker.poll() is None


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("by", ["dump", "logical replication"])
def test_a_target_that_was_moved_to_another_database_goes_on_where_it_was(
    make_database: Callable[[], Database], make_simple: MakeSimple, tmp_path: Path, by: str
) -> None:
    source, before, after = make_database(), make_database(), make_database()
    pipeline = make_simple(source.dsn, before.dsn, slot=source.name)
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    pipeline.source.execute("UPDATE articles SET title = title || ' meanwhile' WHERE id % 3 = 0")
    dump = str(tmp_path / "target.dump")
    for program in (("pg_dump", "-Fc", "-f", dump, before.dsn), ("pg_restore", "-d", after.dsn, dump)):
        subprocess.run([embedded_bin_dir() / program[0], *program[1:]], check=True, capture_output=True)
    if by == "logical replication":  # which copies rows, and not sequences
        for (sequence,) in after.execute("SELECT format('cdcsync.%I', sequencename) FROM pg_sequences"):
            after.execute(f"ALTER SEQUENCE {sequence} RESTART")

    pipeline.configure(pipeline.path.read_text().replace(before.dsn, after.dsn))
    pipeline.connect_target()
    pipeline.log.unlink()
    pipeline.start()
    pipeline.source.execute("INSERT INTO articles SELECT i, 1, 'new ' || i FROM generate_series(100, 120) AS i")
    pipeline.event("streaming")
    pipeline.in_step()
    assert pipeline.times("index_paused") == pipeline.times("backfill_requested") == 0
    assert pipeline.command("replay", "articles").returncode == 0


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("by", ["the documented commands", "pg_restore alone"])
def test_the_role_of_a_target_moves_it_to_another_database_as_the_documentation_says(
    roles: Roles,
    make_database: Callable[[], Database],
    make_pipeline: Callable[[str], Pipeline],
    tmp_path: Path,
    by: str,
) -> None:
    source, before, after = make_database(), make_database(), make_database()
    source.execute("CREATE SCHEMA shop; CREATE TABLE shop.articles (id bigint PRIMARY KEY, tenant int, title text)")
    source.execute("INSERT INTO shop.articles SELECT i, i % 3, 'title ' || i FROM generate_series(1, 20) AS i")
    replicator, writer, reader = roles.name("source"), roles.name("target"), roles.create("reader")
    grant(source, source_role=replicator, tables="shop.articles")
    for database in (before, after):
        grant(database, target_role=writer, reader_role=reader, view_schema="search")
    read_from = roles.dsn(source, replicator)
    old, new = roles.dsn(before, writer), roles.dsn(after, writer)
    text = config(read_from, old, f"s_{source.name}", view="search.articles")
    pipeline = make_pipeline(text.replace("dimensions = 16", "dimensions = 2000"))
    worker = pipeline.start()
    pipeline.live()
    pipeline.in_step()
    assert pipeline.stop(worker) == 0
    grant(before, target_role=writer, reader_role=reader, view_schema="search")  # again, as the index is there now
    section = (ROOT / "docs" / "operations.md").read_text().partition("## Moving the target")[2]
    commands = section.partition("```sh\n")[2].partition("```")[0]
    if by == "pg_restore alone":  # which goes on without the search function
        commands = commands.partition("{ echo")[0] + 'pg_restore -L target.list -d "$NEW" target.dump || true'
    path = f"{embedded_bin_dir()}{os.pathsep}{os.environ['PATH']}"

    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "OLD": old, "NEW": new},
        capture_output=True,
        text=True,
    )

    assert done.returncode == 0, done.stderr
    search = "SELECT FROM cdcsync.articles_search('title', (SELECT embedding FROM search.articles LIMIT 1), k => 5)"
    if by != "pg_restore alone":
        with psycopg.connect(roles.dsn(after, reader)) as session:
            assert len(session.execute(search).fetchall()) == 5
    pipeline.configure(pipeline.path.read_text().replace(before.name, after.name))
    pipeline.connect_target()
    pipeline.log.unlink()
    pipeline.start()
    source.execute("INSERT INTO shop.articles SELECT i, 1, 'new ' || i FROM generate_series(100, 120) AS i")
    pipeline.event("streaming")
    pipeline.in_step()
    with psycopg.connect(roles.dsn(after, reader)) as session:
        assert len(session.execute(search).fetchall()) == 5
    assert pipeline.times("relations_missing") == (by == "pg_restore alone")
    assert pipeline.times("backfill_requested") == 0
