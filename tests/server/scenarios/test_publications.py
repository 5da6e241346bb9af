"""Publications that someone made: of all tables, of a schema, with row filters and with column lists."""

from __future__ import annotations

import pytest

from tests.support.scenes import Followed, MakeScene
from tests.support.servers import Server
from tests.support.workers import PATIENCE_S, until

pytestmark = [pytest.mark.server]

TABLE = "CREATE TABLE {t} (id int PRIMARY KEY, title text, n int, secret text)"
ROWS = "INSERT INTO {t} SELECT i, 'title ' || i, i, 'secret ' || i FROM generate_series(1, 10) i"
WRITES = (
    "UPDATE {t} SET title = 'changed' WHERE id = 1",
    "UPDATE {t} SET id = 100 WHERE id = 2",
    "DELETE FROM {t} WHERE id = 3",
    "INSERT INTO {t} VALUES (50, 'new', 50, 'x')",
    "UPDATE {t} SET secret = 'other'",
)


@pytest.fixture(autouse=True)
def needs_filters(server: Server) -> None:
    """Row filters, column lists and publications of schemas are of PostgreSQL 15."""
    with server.connect() as connection:
        if connection.info.server_version < 150000:
            pytest.skip("PostgreSQL 15 has row filters, column lists and publications of schemas")


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    ("publication", "apart"),
    [
        ("FOR ALL TABLES", False),
        ("FOR ALL TABLES", True),
        ("FOR TABLE beat, there, TABLES IN SCHEMA other", False),
    ],
    ids=["all tables, one database", "all tables, two databases", "a schema"],
)
def test_a_publication_of_many_tables_serves_and_is_left_as_it_is(
    make_scene: MakeScene, publication: str, apart: bool
) -> None:
    scene = make_scene(
        [
            "CREATE SCHEMA other",
            *(one.format(t=table) for table in ("there", "other.there") for one in (TABLE, ROWS)),
            f"CREATE PUBLICATION someones {publication}",
        ],
        {"there": Followed("there", columns=("n",)), "elsewhere": Followed("other.there", columns=("n",))},
        publication="someones",
        apart=apart,
    )
    made = scene.pipeline.source.execute("SELECT * FROM pg_publication, pg_publication_tables").fetchall()

    for table in ("there", "other.there"):
        scene.execute(*(one.format(t=table) for one in WRITES))
    scene.follows()

    # Tables that come later, with rows and without a key, are none of our business and in nobody's way.
    scene.execute(
        "CREATE TABLE other.later (note text)", "INSERT INTO other.later VALUES ('x')", "DROP TABLE other.later"
    )
    scene.execute("TRUNCATE there, other.there", *(one.format(t="there") for one in (ROWS, *WRITES)))
    scene.follows()
    if apart:
        assert scene.pipeline.source.execute("SELECT * FROM pg_publication, pg_publication_tables").fetchall() == made


def test_a_row_filter_holds_for_the_load_the_stream_and_what_is_read_again(make_scene: MakeScene) -> None:
    big = "(SELECT string_agg(md5(i::text), '') FROM generate_series(1, 300) i)"
    scene = make_scene(
        [
            TABLE.format(t="filtered"),
            ROWS.format(t="filtered"),
            f"UPDATE filtered SET secret = {big}",
            "ALTER TABLE filtered REPLICA IDENTITY FULL",
            "CREATE PUBLICATION filtering FOR TABLE beat, filtered WHERE (n > 3 AND title <> '%')",
            "CREATE VIEW seen AS SELECT * FROM filtered WHERE n > 3 AND title <> '%'",
        ],
        {"filtered": Followed("filtered", "{title} {secret}", ("n",))},
        publication="filtering",
    )
    # The oracle reads what the publication lets through.
    scene.oracle_reads("filtered", "seen")
    scene.follows()
    scene.execute(
        "UPDATE filtered SET n = 1 WHERE id = 5",  # leaves
        "UPDATE filtered SET n = 9 WHERE id = 1",  # enters, with a large value
        "UPDATE filtered SET title = 'stays' WHERE id = 7",
        "UPDATE filtered SET title = '%' WHERE id = 8",
        "UPDATE filtered SET id = 60, n = 60 WHERE id = 2",
        "DELETE FROM filtered WHERE id IN (3, 9)",
        "INSERT INTO filtered VALUES (70, 'out', 0), (71, 'in', 71)",
    )
    scene.follows()
    replayed = scene.command("replay", "filtered")
    assert replayed.returncode == 0, replayed.stderr
    verified = scene.command("verify", "filtered")
    assert verified.returncode == 0, verified.stdout + verified.stderr
    scene.follows()


@pytest.mark.proof
def test_a_row_filter_that_fails_for_a_row_is_a_gap_and_after_it_costs_that_row_alone(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            *(one.format(t=table) for table in ("filtered", "beside") for one in (TABLE, ROWS)),
            "ALTER TABLE filtered REPLICA IDENTITY FULL",
            "CREATE PUBLICATION someones FOR TABLE beat, beside, filtered WHERE (100 / n > 3)",
        ],
        {"filtered": Followed("filtered", columns=("n",)), "beside": Followed("beside")},
        publication="someones",
    )
    scene.execute("INSERT INTO filtered VALUES (50, 'divides by nothing', 0)")
    assert scene.pipeline.processes[0].wait(timeout=PATIENCE_S) == 1
    said = " ".join(scene.pipeline.tail().split())
    assert "the source fails each time that it decodes what follows the checkpoint: division by zero" in said
    assert "the publication's condition on the rows of a table fails for a row" in said

    scene.reconfigured(lambda text: text.replace("[source]", '[source]\non_gap = "resync"'))
    scene.pipeline.start()
    failed = "SELECT index_name, key FROM cdcsync.failed_documents"
    until(lambda: scene.pipeline.target.execute(failed).fetchall() == [("filtered", ["50"])], scene.pipeline.tail)
    scene.heals("beside")

    scene.execute("ALTER PUBLICATION someones SET TABLE beat, beside, filtered WHERE (n <> 5)", "DELETE FROM filtered")
    scene.heals()
    assert scene.pipeline.target.execute(failed).fetchall() == []
    assert len(scene.pipeline.processes) == 2


def test_a_column_list_needs_only_what_the_index_does(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            TABLE.format(t="listed"),
            ROWS.format(t="listed"),
            "CREATE PUBLICATION narrow FOR TABLE beat, listed (id, title, n)",
        ],
        {"listed": Followed("listed", columns=("n",))},
        publication="narrow",
    )
    scene.execute(*(one.format(t="listed") for one in WRITES))
    scene.follows()

    scene.execute("ALTER PUBLICATION narrow SET TABLE beat, listed (id, n)", "UPDATE listed SET n = 7 WHERE id = 4")
    assert "title" in scene.paused("listed")
    scene.follows("beat")


def test_an_index_goes_on_when_its_table_is_sent_by_another_rule_than_before(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            TABLE.format(t="ruled"),
            ROWS.format(t="ruled"),
            "CREATE PUBLICATION ruling FOR TABLE beat, ruled (id, title)",
        ],
        {"ruled": Followed("ruled")},
        publication="ruling",
    )
    for rule in ("beat, ruled", "beat, ruled WHERE (true)", "beat, ruled (title, id, n)"):
        scene.at_once(
            "UPDATE ruled SET title = title || '.' WHERE id < 5",
            f"ALTER PUBLICATION ruling SET TABLE {rule}",
            "UPDATE ruled SET title = title || '!' WHERE id > 3",
        )
        scene.execute("DELETE FROM ruled WHERE id = (SELECT max(id) FROM ruled)")
    scene.heals("ruled")
