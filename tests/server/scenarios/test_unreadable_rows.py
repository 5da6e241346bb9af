"""A row that the source fails to read costs that row alone: it is listed, and all others are indexed and stay so."""

from __future__ import annotations

import json
from functools import partial

import msgspec
import pytest

from tests.support.configs import NO_AUDIT
from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

RELATED = """[indexes.NAME.related.parts]
table = "parts"
on = { item_id = "id" }
text = "{name}"
where = "10 / size > 0"
"""


class Case(msgspec.Struct):
    """A condition that fails for some rows.

    :ivar bad: makes a row such a row, and `good` makes it readable again.
    """

    where: str = ""
    bad: str = ""
    good: str = ""
    more: str = ""
    text: str = "{title}"


CASES = {
    "divided": Case("10 / n > 0", "UPDATE {t} SET n = 0", "UPDATE {t} SET n = 1"),
    "casting": Case("note::int < 100", "UPDATE {t} SET note = 'many'", "UPDATE {t} SET note = '7'"),
    "raising": Case("public.positive(n)", "UPDATE {t} SET n = -1", "UPDATE {t} SET n = 1"),
    "raising_a_code": Case("public.allowed(n)", "UPDATE {t} SET n = -1", "UPDATE {t} SET n = 1"),
    "two_rows": Case(
        "(SELECT g FROM generate_series(1, n) AS g) = 1",
        "UPDATE {t} SET n = 2",
        "UPDATE {t} SET n = 1",
    ),
    "parsing": Case("note::tsquery IS NOT NULL", "UPDATE {t} SET note = 'two words'", "UPDATE {t} SET note = 'word'"),
    "related": Case(
        "",
        "INSERT INTO parts SELECT id, 'broken', 0 FROM {t}",
        "UPDATE parts SET size = 1",
        RELATED,
        "{title} {parts}",
    ),
}
FUNCTION = """CREATE FUNCTION public.positive(n int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
$$ BEGIN IF n < 0 THEN RAISE 'the secret is %', n; END IF; RETURN n > 0; END $$"""

CODED = FUNCTION.replace("positive", "allowed").replace("n;", "n USING ERRCODE = '45000';", 1)


def table(name: str) -> list[str]:
    return [
        f"CREATE TABLE {name} (id int PRIMARY KEY, title text, n int, note text)",
        f"INSERT INTO {name} SELECT i, 'title ' || i, 1, '1' FROM generate_series(1, 60) i",
    ]


@pytest.fixture(scope="module")
def failing(make_scene: MakeScene) -> Scene:
    """An index for each condition, and one beside them."""
    return make_scene(
        [
            FUNCTION,
            CODED,
            "CREATE TABLE parts (item_id int, name text, size int)",
            "ALTER TABLE parts REPLICA IDENTITY FULL",
            "CREATE INDEX ON parts (item_id)",
            *(statement for name in ("beside", "again", *CASES) for statement in table(name)),
        ],
        {
            "beside": Followed("beside"),
            "again": Followed("again", where=CASES["casting"].where),
            **{name: Followed(name, case.text, where=case.where, more=case.more) for name, case in CASES.items()},
        },
    )


def found(scene: Scene, name: str) -> dict[str, str]:
    rows = scene.pipeline.target.execute(
        f"SELECT id::text, string_agg(content, '') FROM cdcsync.{name}_chunks GROUP BY 1"
    )
    return dict(rows.fetchall())


def listed(scene: Scene, name: str) -> dict[str, str]:
    rows = scene.pipeline.target.execute(
        "SELECT key[1], error FROM cdcsync.failed_documents WHERE index_name = %s", [name]
    )
    return dict(rows.fetchall())


def costs_only(scene: Scene, name: str, bad: set[str]) -> bool:
    scene.settle()
    ids = scene.pipeline.source.execute(f"SELECT id::text FROM {name}").fetchall()
    expected = {one for (one,) in ids} - bad
    seen = found(scene, name)
    scene.pipeline.difference = f"{name}: {sorted(expected ^ seen.keys())}, listed {listed(scene, name)}"
    return seen.keys() == expected and listed(scene, name).keys() == bad


@pytest.mark.proof_from(1)
@pytest.mark.parametrize(
    "name",
    [
        *("divided", "raising", "raising_a_code", "related"),
        *(pytest.param(name, marks=pytest.mark.proof) for name in ("casting", "two_rows", "parsing")),
    ],
)
def test_a_row_that_the_source_fails_to_read_is_listed_and_the_others_stay_right(failing: Scene, name: str) -> None:
    case, scene = CASES[name], failing
    for row in (7, 8, 33):
        scene.execute(case.bad.format(t=name) + f" WHERE id = {row}")
    scene.execute(f"UPDATE {name} SET title = 'changed beside them' WHERE id IN (6, 9, 40)")
    bad = {"7", "8", "33"}
    until(partial(costs_only, scene, name, bad), scene.pipeline.tail)
    assert found(scene, name)["9"].startswith("changed")
    said = listed(scene, name)["7"]
    assert said.startswith("the source fails to read the row: ")
    assert "secret" not in said
    assert "many" not in said

    replayed = scene.command("replay", name)
    assert replayed.returncode == 0, replayed.stderr
    assert costs_only(scene, name, bad), scene.pipeline.difference
    verified = json.loads(scene.command("verify", name, "--json").stdout)
    assert verified["differences"] == {"failed": 3}, verified
    failures = scene.command("failures", name, "list")
    assert "the source fails to read the row" in failures.stdout

    scene.execute(
        f"DELETE FROM {name} WHERE id = 33", case.good.format(t=name) + f" WHERE {'item_id' if case.more else 'id'} = 7"
    )
    until(partial(costs_only, scene, name, {"8"}), scene.pipeline.tail)
    assert scene.state(name)[0] == "live"
    scene.follows("beside")
    assert not scene.pipeline.times("index_paused")


@pytest.mark.proof
def test_a_restart_does_not_refuse_a_condition_that_fails_for_a_row(failing: Scene) -> None:
    scene = failing
    scene.execute("UPDATE again SET note = 'none' WHERE id = 1")
    until(lambda: "1" in listed(scene, "again"), scene.pipeline.tail)
    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.execute("UPDATE again SET title = 'meanwhile' WHERE id = 2")

    scene.pipeline.start()

    scene.settle()
    until(lambda: found(scene, "again")["2"] == "meanwhile", scene.pipeline.tail)
    assert scene.state("again")[0] == "live"


def test_stored_values_that_a_new_check_of_their_domain_refuses_are_indexed(make_scene: MakeScene) -> None:
    scene = make_scene(
        [
            "CREATE DOMAIN public.low AS int",
            "CREATE DOMAIN public.name AS text",
            "CREATE TABLE domains (k public.low, name public.name, v public.low, title text, PRIMARY KEY (k, name))",
            "INSERT INTO domains SELECT i, 'n' || i, i, 'title ' || i FROM generate_series(1, 50) i",
            "CREATE TABLE beside (id int PRIMARY KEY, title text)",
        ],
        {
            "domains": Followed("domains", columns=("v",), where="length(title) > 0"),
            "beside": Followed("beside"),
        },
    )
    scene.execute(
        "ALTER DOMAIN public.low ADD CONSTRAINT low CHECK (VALUE < 10) NOT VALID",
        "ALTER DOMAIN public.name ADD CONSTRAINT name CHECK (VALUE < 'n2') NOT VALID",
        "UPDATE domains SET title = 'changed' WHERE k > 20",
        "DELETE FROM domains WHERE k = 30",
    )
    scene.follows("domains", "beside")
    for arguments in ([], ["--key", json.dumps(["40", "n40"])]):
        replayed = scene.command("replay", "domains", *arguments)
        assert replayed.returncode == 0, replayed.stderr
    assert json.loads(scene.command("verify", "domains", "--json").stdout)["equal"]
    scene.heals("domains")
    assert not scene.pipeline.times("index_paused")


FITS = """CREATE OR REPLACE FUNCTION public.fits(n int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
$$ BEGIN IF n < 0 THEN {what}; END IF; RETURN n > 0; END $$"""


@pytest.mark.proof
def test_verify_the_audit_and_status_agree_about_rows_that_became_unreadable_without_an_event(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        [
            FITS.format(what="RETURN false"),
            *table("quiet"),
            *table("beside"),
            "UPDATE quiet SET n = -1 WHERE id IN (7, 8)",
            *(
                f"CREATE SCHEMA {name}; CREATE TABLE {name}.items (LIKE quiet INCLUDING ALL);"
                f" INSERT INTO {name}.items TABLE quiet"
                for name in ("tenant_a", "tenant_b")
            ),
        ],
        {
            "quiet": Followed("quiet", where="public.fits(n)"),
            "many": Followed("tenant_*.items", where="public.fits(n)"),
            "beside": Followed("beside"),
        },
        hurry={"cdcsync.flows.audit.rolling.FIRST_S": 1.0, "cdcsync.flows.audit.rolling.REST_S": 1.0},
    )

    def agree() -> bool:
        status = json.loads(scene.command("status", "--json").stdout)
        said = {name: one["failed_documents"] for name, one in status["indexes"].items()}
        for name, rows in (("quiet", 2), ("many", 4)):
            verified = json.loads(scene.command("verify", name, "--json").stdout)
            scene.pipeline.difference = f"{name}: {verified}, status {said}"
            assert verified["differences"] == {"failed": rows}, scene.pipeline.difference
            if said[name] != rows:
                return False
        return True

    # Rows that were left out by the condition are no difference before, and have no document afterwards.
    scene.execute(FITS.format(what="RAISE 'the secret is %', n"))
    until(lambda: len(listed(scene, "quiet")) == 2, scene.pipeline.tail)
    until(agree, scene.pipeline.tail)
    # The list is what status goes by: the audit sees that no such row is missing there.
    scene.pipeline.target.execute("DELETE FROM cdcsync.failed_documents")
    until(agree, scene.pipeline.tail)
    assert scene.pipeline.event("failures_unlisted")["rows"] > 0
    assert not scene.pipeline.times("audit_found")
    assert all(event["differences"].keys() == {"failed"} for event in differed(scene))
    assert all(scene.state(name)[0] == "live" for name in ("quiet", "many"))
    scene.follows("beside")


def differed(scene: Scene) -> list[dict[str, dict[str, int]]]:
    return [event for event in scene.pipeline.events() if event["event"] == "index_differed"]


CODES = (
    *("08006", "0A000", "22012", "25001", "25006", "25P02", "26000", "34000", "40001", "40P01", "42501", "42P01"),
    *("42P02", "42P18", "53100", "53200", "53300", "53400", "55000", "55P03", "57014", "57P01", "58030", "XX000"),
)
"""What stands for the state of a session, a server or a catalog unless a function chooses it."""

CHOOSING = """CREATE FUNCTION public.choosing(note text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
$$ BEGIN IF length(note) = 5 THEN RAISE 'the secret is %', note USING ERRCODE = note; END IF; RETURN true; END $$"""


@pytest.mark.proof
def test_a_row_for_which_a_function_raises_whatever_code_is_listed_in_the_stream_in_a_load_and_after_a_start(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        [CHOOSING, *table("choosing"), *table("beside")],
        {"choosing": Followed("choosing", where="public.choosing(note)"), "beside": Followed("beside")},
    )
    bad = {str(at) for at in range(1, len(CODES) + 1)}
    for at, code in enumerate(CODES, start=1):
        scene.execute(f"UPDATE choosing SET note = '{code}' WHERE id = {at}")
    scene.execute("UPDATE beside SET title = 'x' WHERE id = 1", "UPDATE choosing SET title = 'x' WHERE id = 60")
    until(partial(costs_only, scene, "choosing", bad), scene.pipeline.tail)
    assert not [said for said in listed(scene, "choosing").values() if "secret" in said]
    replayed = scene.command("replay", "choosing")
    assert replayed.returncode == 0, replayed.stderr
    assert costs_only(scene, "choosing", bad), scene.pipeline.difference

    scene.pipeline.stop(scene.pipeline.processes[-1])
    scene.pipeline.start()
    scene.execute("UPDATE choosing SET title = 'y' WHERE id = 60", "UPDATE choosing SET title = 'y' WHERE id < 20")
    until(lambda: found(scene, "choosing").get("60") == "y", scene.pipeline.tail)
    assert costs_only(scene, "choosing", bad), scene.pipeline.difference
    scene.follows("beside")
    assert not scene.pipeline.times("index_paused")


INSIDE = {
    "a_parameter_that_nobody_gave": "EXECUTE 'SELECT $1 LIKE ''good%'''",
    "a_write": "PERFORM nextval('public.counted')",
    "a_cancellation": "PERFORM pg_cancel_backend(pg_backend_pid()); PERFORM pg_sleep(60)",
}
FAILING = """CREATE FUNCTION public.{name}(note text) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
$$ BEGIN IF note = 'odd' THEN {what}; END IF; RETURN true; END $$"""


@pytest.mark.proof
def test_a_function_that_fails_inside_as_if_the_session_or_the_server_did_pauses_its_index_alone(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        [
            "CREATE SEQUENCE public.counted",
            *(FAILING.format(name=name, what=what) for name, what in INSIDE.items()),
            *(statement for name in ("beside", *INSIDE) for statement in table(name)),
            # More than those for which a condition is tried before the table is read again.
            *(f"INSERT INTO {name} SELECT i, 'title', 1, '1' FROM generate_series(61, 150) i" for name in INSIDE),
        ],
        {"beside": Followed("beside"), **{name: Followed(name, where=f"public.{name}(note)") for name in INSIDE}},
        hurry={"cdcsync.flows.follow.apply.MOST_ATTEMPTS": 3, "cdcsync.model.pauses.FIRST_DELAY_S": 2.0},
    )
    for name in INSIDE:
        scene.execute(f"INSERT INTO {name} VALUES (900, 'title', 1, 'odd')", "UPDATE beside SET title = 'x'")
        scene.paused(name)
        scene.follows("beside")
    for name in INSIDE:
        scene.execute(f"DELETE FROM {name} WHERE id = 900")
    scene.heals()
    assert len(scene.pipeline.processes) == 1


@pytest.mark.proof
def test_requests_of_the_others_are_served_beside_an_index_whose_statements_fail_again_and_again(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        [
            FITS.format(what="RETURN false"),
            *table("quiet"),
            *table("beside"),
            # After the first hundred rows, for which the condition is tried whenever the index is examined.
            "INSERT INTO quiet SELECT i, 'title ' || i, 1, '1' FROM generate_series(61, 150) i",
            "INSERT INTO quiet VALUES (151, 'title', -1, '1')",
        ],
        {"quiet": Followed("quiet", where="public.fits(n)"), "beside": Followed("beside")},
        worker_lines=NO_AUDIT,
        hurry={"cdcsync.postgres.locking.LOCKED_OUT_S": 0.5},
    )

    def served(index: str) -> bool:
        return scene.pipeline.target.execute(
            "SELECT count(*) = 2 FROM cdcsync.backfills WHERE index_name = %s AND kind IN ('resync', 'compare')"
            " AND state = 'done' AND filter IS NULL AND requested_at > %s",
            [index, asked_at],
        ).fetchone() == (True,)

    scene.settle()
    ((asked_at,),) = scene.target.execute("SELECT clock_timestamp()")
    scene.execute(FITS.format(what=INSIDE["a_cancellation"]))
    for name in ("quiet", "beside"):
        for kind, phase in (("resync", "rows"), ("compare", "rows")):
            scene.pipeline.target.execute(
                "INSERT INTO cdcsync.backfills (index_name, kind, phase) VALUES (%s, %s, %s)", [name, kind, phase]
            )
    until(partial(served, "beside"), scene.pipeline.tail)
    assert not served("quiet")
    assert {event["index"] for event in scene.pipeline.events() if event["event"] == "index_left_alone"} == {"quiet"}
    assert not scene.pipeline.times("backfill_waits") + scene.pipeline.times("comparison_waits")
    scene.execute(FITS.format(what="RETURN false"))
    until(partial(served, "quiet"), scene.pipeline.tail)
    scene.follows("beside", "quiet")


NOTES = """[indexes.NAME.related.notes]
table = "notes"
on = { item_id = "id" }
text = "{name}"
order_by = "md5(name)"
"""


@pytest.mark.proof
def test_a_document_that_takes_more_temporary_files_than_there_may_be_is_listed_and_holds_up_no_other_index(
    make_scene: MakeScene,
) -> None:
    scene = make_scene(
        [
            "CREATE TABLE notes (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, item_id int, name text)",
            "ALTER TABLE notes REPLICA IDENTITY FULL",
            "CREATE INDEX ON notes (item_id)",
            "DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET work_mem = ''64kB''', current_database());"
            " EXECUTE format('ALTER DATABASE %I SET temp_file_limit = ''512kB''', current_database()); END $$",
            *table("items"),
            *table("beside"),
        ],
        {"items": Followed("items", "{title} {notes}", more=NOTES), "beside": Followed("beside")},
        apart=True,
    )
    scene.execute(
        "INSERT INTO notes (item_id, name) SELECT 7, repeat(i::text, 40) FROM generate_series(1, 8000) i",
        "UPDATE beside SET title = 'x' WHERE id = 1",
        "INSERT INTO notes (item_id, name) VALUES (8, 'few')",
    )
    until(partial(costs_only, scene, "items", {"7"}), scene.pipeline.tail)
    assert "temp_file_limit" in listed(scene, "items")["7"]
    assert "few" in found(scene, "items")["8"]
    scene.follows("beside")
    replayed = scene.command("replay", "items")
    assert replayed.returncode == 0, replayed.stderr
    scene.execute("DELETE FROM notes WHERE id > 10 AND item_id = 7")
    until(partial(costs_only, scene, "items", set()), scene.pipeline.tail)
    assert not scene.pipeline.times("index_paused")
