"""What leads the tool server's role past the policy is told, however it leads there, and nothing else is."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from cdcsync.serve.reader import Reader
from cdcsync.tracing import Tracing
from tests.support.serving import Office, with_tokens

pytestmark = [pytest.mark.server, pytest.mark.anyio]

CHUNKS = "cdcsync.tickets_chunks"
POLICIES = 'the policies on "cdcsync"."tickets_chunks"'
VIEW = f"CREATE VIEW shown.one AS SELECT * FROM {CHUNKS}"
INVOKER = f"CREATE VIEW shown.one WITH (security_invoker) AS SELECT * FROM {CHUNKS}"
COUNT = f"RETURNS bigint LANGUAGE plpgsql SECURITY DEFINER AS 'BEGIN RETURN (SELECT count(*) FROM {CHUNKS}); END'"

CASES: dict[str, tuple[str, list[str], str]] = {
    # what somebody does; what is told; a statement that then shows the role a row of a tenant
    "nothing": ("SELECT 1", [], ""),
    "a view": (f"{VIEW}; GRANT SELECT ON shown.one TO {{role}}", ["view shown.one"], "SELECT FROM shown.one"),
    "a view that it may not read": (VIEW, [], ""),
    "one column of a view": (
        f"{VIEW}; GRANT SELECT (content) ON shown.one TO {{role}}",
        ["view shown.one"],
        "SELECT content FROM shown.one",
    ),
    "a view of a schema that it may not use": (
        f"{VIEW}; GRANT SELECT ON shown.one TO {{role}}; REVOKE USAGE ON SCHEMA shown FROM {{role}}",
        [],
        "",
    ),
    "a view on a view": (
        f"{VIEW}; CREATE VIEW shown.two AS SELECT * FROM shown.one; CREATE VIEW shown.three AS SELECT * FROM shown.two;"
        " GRANT SELECT ON shown.three TO {role}",
        ["view shown.three"],
        "SELECT FROM shown.three",
    ),
    "a materialized view on a view": (
        f"{VIEW}; CREATE MATERIALIZED VIEW shown.two AS SELECT * FROM shown.one; GRANT SELECT ON shown.two TO {{role}}",
        ["view shown.two"],
        "SELECT FROM shown.two",
    ),
    "a view with its caller's privileges": (f"{INVOKER}; GRANT SELECT ON shown.one TO {{role}}", [], ""),
    "a view on one with its caller's privileges": (
        f"{INVOKER}; CREATE VIEW shown.two AS SELECT * FROM shown.one; GRANT SELECT ON shown.two TO {{role}}",
        [],
        "",
    ),
    "a materialized view on one with its caller's privileges": (
        f"{INVOKER}; CREATE MATERIALIZED VIEW shown.two AS SELECT * FROM shown.one;"
        " GRANT SELECT ON shown.two TO {role}",
        ["view shown.two"],
        "SELECT FROM shown.two",
    ),
    "the record of calls": ("GRANT SELECT ON cdcsync.calls TO {role}", ["table cdcsync.calls"], "TABLE cdcsync.calls"),
    "a column of the record": (
        "GRANT SELECT (query) ON cdcsync.calls TO {role}",
        ["table cdcsync.calls"],
        "SELECT query FROM cdcsync.calls",
    ),
    "a view of the record": (
        "CREATE VIEW shown.one AS SELECT * FROM cdcsync.calls; GRANT SELECT ON shown.one TO {role}",
        ["view shown.one"],
        "TABLE shown.one",
    ),
    "the backlog": (
        "GRANT SELECT ON cdcsync.tickets_backlog TO {role}",
        ["table cdcsync.tickets_backlog"],
        "TABLE cdcsync.tickets_backlog",
    ),
    "a function": (f"CREATE FUNCTION shown.one() {COUNT}", ["function shown.one()"], "SELECT shown.one()"),
    "a function that it may not call": (
        f"CREATE FUNCTION shown.one() {COUNT}; REVOKE EXECUTE ON FUNCTION shown.one() FROM PUBLIC",
        [],
        "",
    ),
    "another role": (
        f"CREATE ROLE {{other}}; GRANT USAGE ON SCHEMA cdcsync TO {{other}}; GRANT SELECT ON {CHUNKS} TO {{other}};"
        " GRANT {other} TO {role}",
        ["role {other}"],
        f"SET ROLE {{other}}; SELECT FROM {CHUNKS}",
    ),
    "a policy for another role": (
        "COMMENT ON POLICY cdcsync_tenant ON cdcsync.tickets_chunks IS 'cdcsync: somebody else sees the rows'",
        [POLICIES],
        "",
    ),
    "a policy that is given to another role": (
        f"CREATE ROLE {{other}}; ALTER POLICY cdcsync_tenant ON {CHUNKS} TO {{other}};"
        f" CREATE POLICY mine ON {CHUNKS} TO {{role}} USING (true)",
        [POLICIES],
        f"SELECT FROM {CHUNKS}",
    ),
    "another policy beside it": (
        f"CREATE POLICY mine ON {CHUNKS} USING (true)",
        [POLICIES],
        f"SELECT FROM {CHUNKS}",
    ),
}


@pytest.fixture
def other(tickets: Office) -> Iterator[str]:
    """The name of a role; what the cases have made is undone afterwards."""
    name = f"cdcsync_test_other_{secrets.token_hex(4)}"
    comment = tickets.database.execute("SELECT obj_description(oid, 'pg_policy') FROM pg_policy")[0][0]
    tickets.database.execute(f"CREATE SCHEMA shown; GRANT USAGE ON SCHEMA shown TO {tickets.reader}")
    yield name
    for statement in (
        "DROP SCHEMA shown CASCADE",
        f"REVOKE SELECT, SELECT (query) ON cdcsync.calls FROM {tickets.reader}",
        f"GRANT SELECT (at) ON cdcsync.calls TO {tickets.reader}",
        f"REVOKE SELECT ON cdcsync.tickets_backlog FROM {tickets.reader}",
        f"DROP POLICY IF EXISTS mine ON {CHUNKS}",
        f"ALTER POLICY cdcsync_tenant ON {CHUNKS} TO PUBLIC",
    ):
        tickets.database.execute(statement)
    tickets.database.execute(
        sql.SQL("COMMENT ON POLICY cdcsync_tenant ON cdcsync.tickets_chunks IS {}").format(sql.Literal(comment))
    )
    if tickets.database.execute("SELECT FROM pg_roles WHERE rolname = %s", [name]):
        tickets.database.execute(f"DROP OWNED BY {name}")
        tickets.database.execute(f"DROP ROLE {name}")


@pytest.mark.parametrize("case", CASES)
async def test_what_leads_past_the_policy_is_told(tickets: Office, tmp_path: Path, other: str, case: str) -> None:
    made, past, shows = (
        CASES[case][0].format(role=tickets.reader, other=other),
        [one.format(other=other) for one in CASES[case][1]],
        CASES[case][2].format(other=other),
    )
    tickets.database.execute(made)
    config = with_tokens(tickets, tmp_path / "tokens.json", role=tickets.reader)
    if shows:
        with psycopg.connect(config.serve.dsn) as session:
            session.execute(shows)
    reader = Reader(config, Tracing())
    try:
        assert await reader.index("tickets").exposure() == past
    finally:
        await reader.aclose()
