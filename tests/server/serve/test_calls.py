"""The record of calls: kept for its time, bounded while the database is away, and stored when the server stops."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, LiteralString

import anyio
import jwt
import msgspec
import psycopg
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from prometheus_client import Counter
from psycopg import conninfo, sql
from structlog.testing import capture_logs

from cdcsync.serve import calls
from cdcsync.serve.calls import Recorder
from cdcsync.target import calls as table
from cdcsync.target.calls import DDL, Call
from tests.support.kills import Killed, kill_at
from tests.support.servers import Database
from tests.support.serving import SEARCH, Office, ask, served, tenant
from tests.support.workers import until

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def _emptied(tickets: Office) -> Iterator[None]:
    tickets.database.execute("TRUNCATE cdcsync.calls")
    yield
    tickets.database.execute("TRUNCATE cdcsync.calls")


def recorder(office: Office, days: int = 30, **changes: Any) -> Recorder:
    dropped = Counter("dropped", "Dropped.", registry=None)
    return Recorder(changes.get("dsn", office.database.dsn), "cdcsync", days, dropped)


def call(subject: str) -> Call:
    return Call(datetime.now(UTC), subject, None, "search", "tickets", "ok", 1, "aa", None, [], 1.0, None)


def subjects(office: Office) -> list[str]:
    return [row[0] for row in office.database.execute("SELECT subject FROM cdcsync.calls ORDER BY 1")]


async def test_calls_older_than_their_days_are_deleted_by_the_server_itself(tickets: Office) -> None:
    for subject, days in [("old", 31), ("young", 29)]:
        tickets.database.execute(
            "INSERT INTO cdcsync.calls (at, subject, tool, outcome, ms)"
            " VALUES (now() - %s * interval '1 day', %s, 'search', 'ok', 1)",
            [days, subject],
        )
    async with served(tickets.serving(anonymous=True, audit_days=30)) as client:
        await client.get("/v1/indexes")
        kept = ["anonymous", "young"]
        await anyio.to_thread.run_sync(until, lambda: subjects(tickets) == kept, "the old call to be deleted")


@pytest.fixture
def revoked(tickets: Office) -> Iterator[Callable[[str], str]]:
    """Returns a DSN of the server's role without these privileges on the record; it has them back after the test."""

    def change(verb: LiteralString, privileges: str) -> None:
        statement = sql.SQL(verb).format(sql.SQL(privileges), sql.Identifier(tickets.reader))
        tickets.database.execute(statement)

    def revoke(privileges: str) -> str:
        change("REVOKE {} ON cdcsync.calls FROM {}", privileges)
        return conninfo.make_conninfo(tickets.database.dsn, user=tickets.reader, password="reader")

    yield revoke
    change("GRANT {} ON cdcsync.calls TO {}", "INSERT, DELETE")


def record_old(office: Office) -> None:
    office.database.execute(
        "INSERT INTO cdcsync.calls (at, subject, tool, outcome, ms)"
        " VALUES (now() - interval '31 days', 'old', 'search', 'ok', 1)"
    )


@pytest.mark.parametrize("days", [0, 30])
async def test_old_calls_are_deleted_when_the_server_starts_and_regularly_even_if_nobody_calls(
    tickets: Office, monkeypatch: pytest.MonkeyPatch, days: int
) -> None:
    monkeypatch.setattr(calls, "FORGET_S", 0.05)
    record_old(tickets)
    async with served(tickets.serving(anonymous=True, audit_days=days)):
        for _ in range(2):
            await anyio.to_thread.run_sync(until, lambda: subjects(tickets) == [], "the old call to be deleted")
            record_old(tickets)


@pytest.mark.parametrize("days", [0, 30])
@pytest.mark.parametrize("kind", ["reads", "standby", "no record", "no schema"])
async def test_a_target_where_a_server_may_delete_nothing_is_not_told_of(
    tickets: Office, database: Database, revoked: Callable[[str], str], days: int, kind: str
) -> None:
    dsn = tickets.database.dsn
    match kind:
        case "reads":
            dsn = revoked("INSERT, DELETE")
        case "standby":
            dsn = conninfo.make_conninfo(dsn, options="-c default_transaction_read_only=on")
        case "no record":
            database.execute("CREATE SCHEMA cdcsync")
            dsn = database.dsn
        case _:
            dsn = database.dsn
    made = recorder(tickets, days, dsn=dsn)
    with capture_logs() as logged:
        await made._forget()
        config = tickets.serving(anonymous=True, audit_days=days)
        config = msgspec.structs.replace(config, serve=msgspec.structs.replace(config.serve, dsn=dsn))
        async with served(config) as client:
            assert (await client.get("/livez")).status_code == 200
    await made._session.aclose()
    assert "calls_not_forgotten" not in [one["event"] for one in logged]


async def test_a_server_that_records_and_may_not_delete_says_so(tickets: Office, revoked: Callable[[str], str]) -> None:
    made = recorder(tickets, dsn=revoked("DELETE"))
    made.record(call("ana"))
    with capture_logs() as logged:
        await made._store()
        await made._forget()
    await made._session.aclose()
    assert subjects(tickets) == ["ana"]
    assert [one["event"] for one in logged] == ["calls_not_forgotten"]


async def test_nothing_is_recorded_where_calls_are_kept_for_no_day(tickets: Office) -> None:
    async with served(tickets.serving(anonymous=True, audit_days=0)) as client:
        assert (await client.get("/v1/indexes")).status_code == 200
    assert subjects(tickets) == []


async def test_calls_that_wait_when_the_server_stops_are_stored(tickets: Office) -> None:
    made = recorder(tickets)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.run)
        await anyio.lowlevel.checkpoint()
        for number in range(calls.BATCH + 1):
            made.record(call(f"{number:04}"))
        tasks.cancel_scope.cancel()
    assert len(subjects(tickets)) == calls.BATCH + 1


async def test_while_the_database_is_away_so_many_wait_and_the_rest_is_counted(
    tickets: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calls, "MOST", 3)
    made = recorder(tickets, dsn="host=127.0.0.1 port=1 dbname=nothing")
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(made.run)
        for number in range(5):
            made.record(call(str(number)))
        assert (len(made._waiting), made._dropped._value.get()) == (3, 2)
        tasks.cancel_scope.cancel()


# -- texts that cannot be stored --------------------------------------------------------------------------------


@pytest.fixture
def latin(tickets: Office) -> Iterator[psycopg.Connection[Any]]:
    """A target that has no characters beyond Latin-1, with a record."""
    name = f"{tickets.database.name}_latin"
    identifier = sql.Identifier(name)
    with tickets.database.connect() as admin:
        admin.execute(sql.SQL("CREATE DATABASE {} ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0").format(identifier))
        with tickets.database.server.connect(name) as inside:
            inside.execute("CREATE SCHEMA cdcsync")
            for statement in DDL:
                inside.execute(sql.SQL(statement).format(schema=sql.Identifier("cdcsync"), literal="cdcsync"))
            yield inside
        admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(identifier))


@pytest.mark.parametrize(
    ("claims", "status"),
    [
        ({}, 200),
        ({"sub": "bo\0b"}, 401),
        ({"sub": "bo\ud83d"}, 401),
        ({"tenant": "t1\0"}, 401),
        ({"tenant": "\ude00"}, 401),
        ({"tenant": "ENDLESS"}, 401),
    ],
    ids=["good", "nul", "surrogate", "tenant with nul", "tenant with surrogate", "endless tenant"],
)
async def test_a_token_of_a_caller_whom_no_text_can_name_is_refused_and_the_next_call_is_recorded(
    tickets: Office, tmp_path: Path, claims: dict[str, Any], status: int
) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key())) | {"kid": "one"}
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [public]}))
    good = {"sub": "ana", "tenant": "t1", "iss": "us", "aud": "cdcsync", "exp": int(time.time()) + 600}

    def signed(**changes: Any) -> str:
        payload = json.dumps({**good, **changes}).replace('"ENDLESS"', "9" * 5000).encode()
        return jwt.api_jws.encode(payload, key, algorithm="ES256", headers={"kid": "one", "typ": "JWT"})

    config = tickets.serving(jwks=str(tmp_path / "jwks.json"), issuer="us", audience="cdcsync", tenant=tenant())
    async with served(config) as client:
        assert (await ask(client, "printer", signed(**claims))).status_code == status
        assert (await ask(client, "printer", signed(sub="next"))).status_code == 200
        await anyio.to_thread.run_sync(until, lambda: "next" in subjects(tickets), "the next call to be recorded")
    assert subjects(tickets) == (["ana", "next"] if status == 200 else ["next"])


async def test_names_of_filters_that_the_target_has_no_characters_for_are_recorded_as_escapes(
    tickets: Office, latin: psycopg.Connection[Any]
) -> None:
    config = tickets.serving(anonymous=True, audit_queries=True)
    dsn = conninfo.make_conninfo(tickets.database.dsn, dbname=latin.info.dbname)
    config = msgspec.structs.replace(config, serve=msgspec.structs.replace(config.serve, dsn=dsn))

    def recorded() -> list[tuple[Any, ...]]:
        return latin.execute("SELECT query, filters FROM cdcsync.calls ORDER BY at").fetchall()

    async with served(config) as client:
        for query, column in [("one", "€"), ("two €", "ok"), ("thrée", "é\0"), ("four", "ok")]:
            await client.post(SEARCH, json={"query": query, "mode": "text", "filter": {column: 1}})
        await anyio.to_thread.run_sync(until, lambda: len(recorded()) == 4, "all calls to be recorded")
    assert recorded() == [
        ("one", ["\\u20ac"]),
        ("two \\u20ac", ["ok"]),
        ("thrée", ["é?"]),
        ("four", ["ok"]),
    ]


OVERFLOWING = 2**40
"""Hits that no integer of PostgreSQL can count."""


@pytest.mark.parametrize(
    ("odd", "kept", "dropped", "reason"),
    [
        (lambda one: msgspec.structs.replace(one, hits=OVERFLOWING), [], 1, ["NumericValueOutOfRange"]),
        (lambda one: msgspec.structs.replace(one, subject=None), [], 1, ["NotNullViolation"]),
        (lambda one: msgspec.structs.replace(one, hits=object()), [], 1, ["ProgrammingError"]),
        (lambda one: msgspec.structs.replace(one, subject="bo\ud83d"), ["bo\\ud83d"], 0, []),
    ],
    ids=["out of range", "null", "no type", "surrogate"],
)
@pytest.mark.parametrize("many", [1, 3, 2 * calls.BATCH])
async def test_a_call_that_the_target_refuses_is_dropped_alone(
    tickets: Office, many: int, odd: Callable[[Call], Call], kept: list[str], dropped: int, reason: list[str]
) -> None:
    made = recorder(tickets)
    good = [f"{number:04}" for number in range(many)]
    made._waiting = [call(one) for one in good]
    made._waiting.insert(many // 2, odd(call("odd")))
    with capture_logs() as logged:
        await made._store()
        if dropped:  # another one of its kind is counted, and not told of again
            made._waiting = [odd(call("odd"))]
            await made._store()
    await made._session.aclose()
    assert subjects(tickets) == sorted([*good, *kept])
    assert made._dropped._value.get() == 2 * dropped
    assert [(one["event"], one["error"]) for one in logged] == [("call_not_storable", one) for one in reason]


async def test_a_target_that_stores_nothing_is_told_of_once_and_calls_wait(
    tickets: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    dsn = conninfo.make_conninfo(tickets.database.dsn, options="-c default_transaction_read_only=on")
    made = recorder(tickets, dsn=dsn)
    made.record(call("ana"))
    with capture_logs() as logged:
        for _ in range(2):
            await made._store()
    await made._session.aclose()
    assert [(one["event"], one["waiting"]) for one in logged] == [("calls_not_recorded", 1)]
    assert [one.subject for one in made._waiting] == ["ana"]
    assert made._dropped._value.get() == 0


@pytest.mark.parametrize(("point", "stored"), [("calls written", []), ("calls committed", ["ana", "ben"])])
async def test_a_kill_leaves_all_calls_of_a_batch_or_none(
    tickets: Office, monkeypatch: pytest.MonkeyPatch, point: str, stored: list[str]
) -> None:
    made = recorder(tickets)
    kill_at(monkeypatch, table, point)

    with pytest.raises(Killed):
        await made._store_batch([call("ana"), call("ben")])

    await made._session.aclose()
    assert subjects(tickets) == stored


async def test_old_calls_that_were_deleted_before_a_kill_are_gone(
    tickets: Office, monkeypatch: pytest.MonkeyPatch
) -> None:
    record_old(tickets)
    made = recorder(tickets)
    kill_at(monkeypatch, table, "old calls deleted")

    with pytest.raises(Killed):
        await made._forget()

    await made._session.aclose()
    assert subjects(tickets) == []
