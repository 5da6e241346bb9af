"""What pauses an index: a reason that names what is wrong, the remedy, and since when; the others go on meanwhile.

Each case has a table and an index of its own, and one worker has them all beside a sound index. Its role owns the
tables and has no other privileges. The remedies are typed as the reason or the operations page says; no worker is
started again.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from functools import partial

import msgspec
import psycopg
import pytest
from psycopg import conninfo, sql

from tests.support.configs import NO_AUDIT
from tests.support.scenes import BEAT, Followed, MakeScene, Scene, scene
from tests.support.servers import Server, fresh_database
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.timeout(400)]

TABLE = "CREATE TABLE {t} (id int PRIMARY KEY, title text, rating int, label text, low public.low)"
ROWS = "INSERT INTO {t} SELECT i, 'title ' || i, i, 'l' || i, 1 FROM generate_series(1, {rows}) i"
"""A condition is tried on fewer rows before an index is loaded."""
KEY = "ALTER TABLE {t} DROP CONSTRAINT {t}_pkey, ADD PRIMARY KEY (id{more})"

REFUSING = """
    CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION 'not here'; END $$;
    CREATE TRIGGER refusing BEFORE INSERT OR UPDATE ON cdcsync.{t}_chunks EXECUTE FUNCTION refuse()
"""

TYPED = "{remedy}"
"""A remedy that is typed as the index's reason has it."""


class Case(msgspec.Struct, frozen=True):
    """What pauses an index and what ends that, in SQL on the source, and words of the reason.

    :ivar there: what is done in the target before it.
    """

    cause: str
    says: tuple[str, ...]
    remedy: str
    columns: tuple[str, ...] = ("rating",)
    more: str = ""
    there: str = ""
    remedy_there: str = ""


CASES = {
    "the table has no column": Case(
        "ALTER TABLE {t} DROP COLUMN rating", ("rating",), "ALTER TABLE {t} ADD COLUMN rating int"
    ),
    "the table is called": Case(
        "ALTER TABLE {t} RENAME TO {t}_away", ("{t}_away",), "ALTER TABLE {t}_away RENAME TO {t}"
    ),
    "the replica identity is": Case(
        "ALTER TABLE {t} REPLICA IDENTITY NOTHING",
        ("replica identity",),
        "ALTER TABLE {t} REPLICA IDENTITY DEFAULT",
    ),
    "its key is": Case(KEY.replace("{more}", ", rating"), ("its key is (id, rating)",), KEY.replace("{more}", "")),
    "the table was dropped": Case("DROP TABLE {t}", ("dropped",), f"{TABLE}; {ROWS.replace('{rows}', '9')}"),
    "other tables inherit from the table now": Case(
        "CREATE TABLE {t}_child () INHERITS ({t})", ("{t}_child",), "ALTER TABLE {t}_child NO INHERIT {t}"
    ),
    "the publication does not send": Case(
        "ALTER PUBLICATION cdcsync DROP TABLE {t}; ALTER PUBLICATION cdcsync ADD TABLE {t} (id, title)",
        ("column list", "rating"),
        "ALTER PUBLICATION cdcsync DROP TABLE {t}; ALTER PUBLICATION cdcsync ADD TABLE {t}",
    ),
    "the role may not read": Case("REVOKE SELECT ON {t} FROM {role}", ("may not read", "GRANT SELECT"), TYPED),
    "the target refuses a value": Case(
        "INSERT INTO {t} VALUES (77, 'too high', 500, 'l', 1)",
        ("refuses a value", "of the row 77"),
        "SELECT",
        there="ALTER TABLE cdcsync.{t}_chunks ADD CONSTRAINT small CHECK (rating < 100)",
        remedy_there="ALTER TABLE cdcsync.{t}_chunks DROP CONSTRAINT small",
    ),
    "… would be empty after a crash of the target": Case(
        "SELECT",
        ("{t}_chunks, {t}_vectors_1_fresh would be empty", "SET LOGGED"),
        "SELECT",
        there="ALTER TABLE cdcsync.{t}_chunks SET UNLOGGED; ALTER TABLE cdcsync.{t}_vectors_1_fresh SET UNLOGGED",
        remedy_there=TYPED,
    ),
    "… has triggers or rules": Case(
        "UPDATE {t} SET title = 'swallowed' WHERE id = 1; INSERT INTO {t} VALUES (20, 'swallowed', 1, 'l', 1);"
        " DELETE FROM {t} WHERE id = 2",
        ("{t}_chunks has triggers or rules by which other rows could be written", "DISABLE TRIGGER swallowing"),
        "SELECT",
        there="CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RETURN NULL; END $$;"
        " CREATE TRIGGER swallowing BEFORE INSERT OR UPDATE OR DELETE ON cdcsync.{t}_chunks"
        " FOR EACH ROW EXECUTE FUNCTION swallow()",
        remedy_there=TYPED,
    ),
    "the table exists and has no column of vectors": Case(
        "SELECT",
        ("has no column of vectors",),
        "SELECT",
        there="ALTER TABLE cdcsync.{t}_vectors_1 DROP COLUMN embedding CASCADE",
        remedy_there=TYPED,
    ),
    "the target says, or the source says": Case(
        "UPDATE {t} SET title = 'refused' WHERE id = 5",
        ("the target says: not here",),
        "SELECT",
        there=REFUSING,
        remedy_there="DROP TRIGGER refusing ON cdcsync.{t}_chunks",
    ),
}
"""By how the row of the operations page begins."""

NAMES = {cause: f"c{at}" for at, cause in enumerate(CASES)}


class Outcome(msgspec.Struct, frozen=True):
    """What became of an index: as it was paused, and whether its remedy healed it."""

    reason: str
    remedy: str | None
    since: datetime
    told: bool
    healed: bool


def narrow_role(server: Server, database: str, name: str) -> str:
    """Make a role that may replicate and create, and no more; returns its DSN."""
    password = secrets.token_hex(8)
    parts = {"role": sql.Identifier(name), "password": sql.Literal(password), "database": sql.Identifier(database)}
    with server.connect(database) as admin:
        admin.execute(sql.SQL("CREATE ROLE {role} LOGIN REPLICATION PASSWORD {password}").format(**parts))
        admin.execute(sql.SQL("GRANT CREATE ON DATABASE {database} TO {role}").format(**parts))
        admin.execute(sql.SQL("GRANT CREATE ON SCHEMA public TO {role}").format(**parts))
    return conninfo.make_conninfo(server.dsn, dbname=database, user=name, password=password)


@pytest.fixture(scope="module")
def outcomes(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Outcome]]:
    """Have every cause pause its index, see that the sound one goes on, then type every remedy."""
    with contextlib.ExitStack() as stack:
        role = f"narrow_{secrets.token_hex(4)}"
        admin = stack.enter_context(server.connect())
        stack.callback(admin.execute, sql.SQL("DROP ROLE IF EXISTS {}").format(sql.Identifier(role)))
        database = stack.enter_context(fresh_database(server))
        dsn = narrow_role(server, database.name, role)
        made = stack.enter_context(
            scene(
                server,
                tmp_path_factory.mktemp("pauses"),
                [
                    "CREATE DOMAIN public.low AS int",
                    *(one.format(t=name, rows=9) for name in NAMES.values() for one in (TABLE, ROWS)),
                ],
                {
                    name: Followed(name, columns=CASES[cause].columns, more=CASES[cause].more)
                    for cause, name in NAMES.items()
                },
                apart=True,
                source=dsn,
                started=False,
                hurry={
                    "cdcsync.model.pauses.FIRST_DELAY_S": 2.0,
                    "cdcsync.model.pauses.MOST_DELAY_S": 12.0,
                    "cdcsync.flows.watch.RELATIONS_S": 2.0,
                },
            )
        )
        made.pipeline.target.execute("CREATE DOMAIN public.low AS int CHECK (VALUE < 10)")
        made.pipeline.start()
        yield gone_through(made, role)


def gone_through(made: Scene, role: str) -> dict[str, Outcome]:
    pipeline = made.pipeline
    for name in [BEAT, *NAMES.values()]:
        until(partial(live, made, name), partial(described, made, name))
    began = datetime.now(UTC) - timedelta(minutes=1)
    for cause, case in CASES.items():
        if case.there:
            pipeline.target.execute(case.there.format(t=NAMES[cause]).encode())
        for statement in case.cause.format(t=NAMES[cause], role=role).split("; "):
            made.execute(statement)
    found = {}
    for cause, name in NAMES.items():
        made.paused(name)
        found[cause] = until(partial(paused_row, made, name), partial(described, made, name))[0]
        assert found[cause][2] > began
    made.follows(BEAT)

    def readiness_names(index: str) -> bool:
        return any(f"index {index} " in reason for reason in json.loads(pipeline.get("/readyz")[1])["reasons"])

    told = {cause: comes_true(partial(readiness_names, name)) for cause, name in NAMES.items()}
    for cause, case in CASES.items():
        if case.remedy_there:
            pipeline.target.execute(case.remedy_there.format(t=NAMES[cause], remedy=found[cause][1]).encode())
        typed = case.remedy.format(t=NAMES[cause], remedy=found[cause][1])
        for statement in typed.split("; "):
            made.execute(statement)
    outcomes = {}
    for cause, name in NAMES.items():
        healed = comes_true(partial(made.healed, name))
        reason, remedy, since = found[cause]
        outcomes[cause] = Outcome(reason, remedy, since, told[cause], healed)
    made.follows(BEAT)
    assert len(pipeline.processes) == 1
    assert pipeline.processes[0].poll() is None
    return outcomes


def paused_row(made: Scene, name: str) -> list[tuple[str, str | None, datetime]]:
    """Return why an index is paused, what to do, and since when; nothing while it is being tried again."""
    return made.pipeline.target.execute(
        "SELECT reason, remedy, paused_at FROM cdcsync.indexes WHERE name = %s AND state = 'paused'", [name]
    ).fetchall()


def live(made: Scene, name: str) -> bool:
    row = made.pipeline.target.execute("SELECT to_regclass('cdcsync.indexes') IS NOT NULL").fetchone()
    found = (
        row == (True,)
        and made.pipeline.target.execute("SELECT state FROM cdcsync.indexes WHERE name = %s", [name]).fetchone()
    )
    return found == ("live",)


def described(made: Scene, name: str) -> str:
    return f"{name}: {made.pipeline.tail()}"


def comes_true(probe: Callable[[], bool]) -> bool:
    """Return whether the probe came true; a case that fails does not hide the others."""
    try:
        until(probe, "")
    except pytest.fail.Exception:
        return False
    return True


@pytest.mark.parametrize("cause", CASES)
def test_a_cause_pauses_its_index_alone_and_its_remedy_heals_it(outcomes: dict[str, Outcome], cause: str) -> None:
    case, name, outcome = CASES[cause], NAMES[cause], outcomes[cause]
    for words in case.says:
        assert words.format(t=name) in outcome.reason
    assert outcome.remedy
    assert outcome.reason.endswith(outcome.remedy)
    assert "start" not in outcome.remedy
    assert outcome.told
    assert outcome.healed


ALLOWED = """CREATE FUNCTION public.allowed(id int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
$$ BEGIN IF id > 500 THEN RETURN id > (SELECT least FROM public.limits); END IF; RETURN true; END $$"""
FILLED, EMPTIED = "REFRESH MATERIALIZED VIEW limits", "REFRESH MATERIALIZED VIEW limits WITH NO DATA"


@pytest.mark.proof
def test_a_load_that_the_source_ends_pauses_its_index_alone_and_is_made_once_it_can_be(make_scene: MakeScene) -> None:
    # The condition holds for the rows that it is tried on. Of later ones the source cannot tell, and not because of any
    # of them: the load ends, the first one as well as one that a doubt asked for.
    made = make_scene(
        [
            "CREATE MATERIALIZED VIEW limits AS SELECT 0 AS least WITH NO DATA",
            ALLOWED,
            *(
                f"CREATE TABLE {name} (id int PRIMARY KEY, title text);"
                f" INSERT INTO {name} SELECT i, 'title ' || i FROM generate_series(1, 600) i"
                for name in ("loaded", "sound")
            ),
        ],
        {"loaded": Followed("loaded", where="public.allowed(id)"), "sound": Followed("sound")},
        started=False,
        hurry={"cdcsync.model.pauses.FIRST_DELAY_S": 2.0, "cdcsync.model.pauses.MOST_DELAY_S": 12.0},
    )
    made.pipeline.start()
    until(partial(live, made, "sound"), partial(described, made, "sound"))
    edits = ("insert", "insert, update, delete, truncate")
    for doubt in (False, True):
        if doubt:
            made.execute(EMPTIED, *(f"ALTER PUBLICATION cdcsync SET (publish = '{kinds}')" for kinds in edits))
        until(partial(failed_load, made), partial(described, made, "loaded"))
        made.follows("sound")
        until(partial(tells_of_load, made), partial(described, made, "loaded"))
        made.execute(FILLED, f"UPDATE loaded SET title = 'changed {doubt}' WHERE id IN (5, 505)")
        made.heals("loaded")
    made.follows()
    assert len(made.pipeline.processes) == 1


def tells_of_load(made: Scene) -> bool:
    """Say whether readiness names the index; not while it is being tried again."""
    reasons = json.loads(made.pipeline.get("/readyz")[1])["reasons"]
    return any("index loaded " in reason and "has not been populated" in reason for reason in reasons)


def failed_load(made: Scene) -> bool:
    found = paused_row(made, "loaded")
    return bool(found) and found[0][0].startswith("its load failed: ") and "has not been populated" in found[0][0]


@pytest.mark.proof
def test_an_index_that_cannot_be_set_up_is_tried_again_once_its_table_changes_and_not_before(
    make_scene: MakeScene,
) -> None:
    # The version before stored less of an index, so nothing of it equals what this one reads.
    made = make_scene(
        [
            statement
            for name in ("unsafe", "watched")
            for statement in (f"CREATE TABLE {name} (id int PRIMARY KEY, title text)", f"INSERT INTO {name} VALUES (1)")
        ],
        {"unsafe": Followed("unsafe"), "watched": Followed("watched")},
        worker_lines=NO_AUDIT,
        hurry={"cdcsync.model.pauses.FIRST_DELAY_S": 3600.0, "cdcsync.flows.watch.WATCH_S": 0.2},
    )
    pipeline = made.pipeline
    pipeline.stop(pipeline.processes[-1])
    pipeline.target.execute("ALTER TABLE cdcsync.unsafe_chunks SET UNLOGGED")
    pipeline.target.execute(
        "UPDATE cdcsync.indexes SET made_of = jsonb_set(made_of - 'functions_written', '{tables}', (SELECT"
        " jsonb_object_agg(key, value - 'details') FROM jsonb_each(made_of -> 'tables'))) WHERE name = 'unsafe'"
    )
    streams = pipeline.times("streaming")
    pipeline.start()
    until(lambda: pipeline.times("streaming") > streams, pipeline.tail)
    for changes in (0, 1):
        if changes:
            made.execute("ALTER TABLE unsafe ALTER title SET STATISTICS 5")
            until(lambda: pipeline.times("tables_changed"), pipeline.tail)
        for look in (1, 2, 3):
            made.execute(f"ALTER TABLE watched ALTER title SET STATISTICS {10 * look + changes}")
            until(partial(doubted, made, 3 * changes + look), pipeline.tail)
        assert pipeline.times("tables_changed") == changes
        assert pipeline.times("index_paused") == 1 + changes
    made.follows("watched")


def doubted(made: Scene, times: int) -> bool:
    return made.pipeline.times("index_doubted") == times


REFUSAL = """CREATE OR REPLACE FUNCTION refuse() RETURNS event_trigger LANGUAGE plpgsql AS $$ BEGIN
IF EXISTS (SELECT FROM pg_event_trigger_ddl_commands() WHERE object_identity ~ '^cdcsync[.]({})_')
THEN RAISE 'no more tables here'; END IF; END $$"""


@pytest.mark.proof
def test_new_indexes_that_the_target_refuses_are_paused_in_one_pass_and_everybody_is_told(
    make_scene: MakeScene,
) -> None:
    refused = ("wide", "wider")
    made = make_scene(
        [
            "CREATE TABLE sound (id int PRIMARY KEY, title text)",
            "INSERT INTO sound SELECT i, 'title ' || i FROM generate_series(1, 9) i",
            *(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)" for name in refused),
        ],
        {name: Followed(name) for name in (*refused, "sound")},
        worker_lines=NO_AUDIT,
        started=False,
        hurry={"cdcsync.model.pauses.FIRST_DELAY_S": 5.0, "cdcsync.model.pauses.MOST_DELAY_S": 5.0},
    )
    pipeline = made.pipeline
    made.target.execute(REFUSAL.format("|".join(refused)))
    made.target.execute("CREATE EVENT TRIGGER refuse ON ddl_command_end EXECUTE FUNCTION refuse()")
    pipeline.start()
    pipeline.event("streaming")
    names = [one["event"] for one in pipeline.events() if one["event"] in ("index_paused", "streaming")]
    assert names[:3] == ["index_paused", "index_paused", "streaming"]
    until(partial(live, made, "sound"), pipeline.tail)

    def told() -> list[str]:
        """Return which indexes readiness names; while they are tried again, the worker sets up."""
        reasons = json.loads(pipeline.get("/readyz")[1])["reasons"]
        said = "paused: the target says: no more tables here"
        return [name for name in refused if any(f"index {name} is {said}" in reason for reason in reasons)]

    until(lambda: told() == list(refused), pipeline.tail)
    shown = pipeline.get("/metrics")[1].decode()
    assert 'cdcsync_index_state{index="wide",state="paused"} 1.0' in shown
    made.follows("sound")
    # The others go on while they are tried again, and one that can be set up by then is.
    made.target.execute(REFUSAL.format("wider"))
    until(lambda: live(made, "wide"), pipeline.tail)
    made.follows("sound")
    pipeline.stop(pipeline.processes[0])
    status = json.loads(made.command("status", "--json").stdout)
    assert [status["indexes"][name]["state"] for name in ("wide", "wider", "sound")] == ["live", "paused", "live"]
    assert "no more tables here" in status["indexes"]["wider"]["reason"]
    assert not any("not set up yet" in problem for problem in status["problems"])


GATE = """CREATE FUNCTION public.gate(id int) RETURNS boolean IMMUTABLE LANGUAGE plpgsql AS
$$ BEGIN WHILE NOT pg_try_advisory_xact_lock_shared(4711) LOOP PERFORM pg_sleep(0.02); END LOOP; RETURN true; END $$"""


@pytest.mark.proof
def test_the_others_are_followed_while_a_paused_index_is_examined(make_scene: MakeScene) -> None:
    # The examination tries the condition of an index, and here that lasts for as long as the test likes.
    made = make_scene(
        [
            GATE,
            *(
                f"CREATE TABLE {name} (id int PRIMARY KEY, title text, rating int);"
                f" INSERT INTO {name} SELECT i, 'title ' || i, i FROM generate_series(1, 9) i"
                for name in ("gated", "limited", "sound")
            ),
        ],
        {
            "gated": Followed("gated", where="public.gate(id)"),
            "limited": Followed("limited", columns=("rating",)),
            "sound": Followed("sound"),
        },
        worker_lines=NO_AUDIT,
        hurry={
            "cdcsync.model.pauses.FIRST_DELAY_S": 2.0,
            "cdcsync.model.pauses.MOST_DELAY_S": 2.0,
            "cdcsync.source.conditions.TRIAL_S": 600.0,
        },
    )
    pipeline = made.pipeline
    pipeline.target.execute("ALTER TABLE cdcsync.limited_chunks ADD CONSTRAINT small CHECK (rating < 100)")
    tried = "SELECT count(*) > 0 FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND query LIKE '%gate%'"
    with psycopg.connect(pipeline.config.source.dsn) as holder:
        holder.execute("SELECT pg_advisory_xact_lock(4711)")
        made.execute("UPDATE limited SET rating = 500 WHERE id = 1")
        made.paused("limited")
        until(lambda: pipeline.source.execute(tried).fetchone() == (True,), pipeline.tail)
        made.execute("UPDATE sound SET title = 'meanwhile' WHERE id = 1")
        until(partial(made.equal, "sound"), pipeline.tail)
    pipeline.target.execute("ALTER TABLE cdcsync.limited_chunks DROP CONSTRAINT small")
    made.heals()
    assert len(pipeline.processes) == 1


@pytest.mark.proof
def test_a_paused_index_whose_vectors_are_to_be_others_is_built_anew_as_its_fix_says(make_scene: MakeScene) -> None:
    tables = ("other", "sound")
    made = make_scene(
        [f"CREATE TABLE {one} (id int PRIMARY KEY, title text)" for one in tables],
        {one: Followed(one) for one in tables},
        worker_lines=NO_AUDIT,
        started=False,
    )
    own = '[embedders.own]\ntype = "hash"\ndimensions = 12\n'
    made.reconfigured(lambda text: re.sub(r'(?s)(\[indexes\.other].*?embedder = )"fake"', r'\1"own"', text) + own)
    pipeline = made.pipeline
    worker = pipeline.start()
    pipeline.live()
    assert pipeline.stop(worker) == 0
    made.reconfigured(lambda text: text.replace("dimensions = 12", "dimensions = 24"))
    worker = pipeline.start()
    made.paused("other")
    findings = json.loads(pipeline.command("check", "--json").stdout)["findings"]
    (fix,) = [one["hint"] for one in findings if one["where"] == "indexes.other.embedder"]
    stops, drops, starts = fix.partition("; ")[0].split(", ")
    assert (stops, starts) == ("if it was never loaded: stop the worker and its standbys", "and start the worker again")

    assert pipeline.stop(worker) == 0
    dropped = pipeline.command(*drops.removeprefix("cdcsync ").split(), "--yes")
    assert dropped.returncode == 0, dropped.stderr
    pipeline.start()
    until(lambda: made.target.execute("SELECT FROM cdcsync.indexes WHERE name = 'other'"), pipeline.tail)
    made.heals()
