"""What is told of related tables: whatever would keep documents from following them, with the SQL that helps."""

from __future__ import annotations

import psycopg
import pytest

from cdcsync.preflight.findings import Finding
from tests.support.preflight import Role, configured, examined, warnings
from tests.support.servers import Database

pytestmark = pytest.mark.server

TABLES = (
    "CREATE TABLE tickets (id int PRIMARY KEY, subject text, customer_id int);"
    "CREATE TABLE comments (id int PRIMARY KEY, ticket_id int NOT NULL, body text, created int);"
    "CREATE TABLE customers (id int PRIMARY KEY, name text);"
    "CREATE TABLE ticket_tags (ticket_id int, tag_id int, PRIMARY KEY (ticket_id, tag_id));"
    "CREATE TABLE tags (id int PRIMARY KEY, name text);"
)
TICKETS = 'table = "tickets"\nembedder = "hash"\ntext = "{subject} {%s}"\n[indexes.tickets.related.%s]\n'
COMMENTS = TICKETS % ("comments", "comments") + 'table = "comments"\non = { ticket_id = "id" }\ntext = "{body}"\n'
TAGS = TICKETS % ("tags", "tags") + (
    'table = "tags"\non = { id = "tag_id" }\nvia = { table = "ticket_tags", on = { ticket_id = "id" } }\n'
)


async def test_related_tables_that_have_all_they_need_pass(database: Database) -> None:
    database.execute(f"{TABLES} ALTER TABLE comments REPLICA IDENTITY FULL")
    more = 'order_by = "created DESC, lower(body)"\nwhere = "body <> \'\'"\n'

    report = await examined(configured(database.dsn, tickets=COMMENTS + more))

    assert report.errors == []
    assert report.specs[0].tables == report.specs[0].config.followed


@pytest.mark.proof_from(8)
@pytest.mark.parametrize(
    ("lines", "sign", "hint"),
    [
        (COMMENTS, "does not cover (ticket_id)", "ALTER TABLE public.comments REPLICA IDENTITY FULL"),
        (COMMENTS, "does not cover (ticket_id)", "CREATE UNIQUE INDEX comments_identity ON public.comments"),
        (COMMENTS.replace('"comments"\non', '"coments"\non'), "no table public.coments", "create it"),
        (COMMENTS.replace("{body}", "{boddy}"), "has no column boddy", 'did you mean "body"?'),
        (COMMENTS.replace("ticket_id =", "ticket ="), "has no column ticket", "ticket_id"),
        (COMMENTS.replace('= "id"', '= "nr"'), "public.tickets has no column nr", "its columns are"),
        (TICKETS % ("tags.name", "tags") + TAGS.split("]\n", 1)[1], "several with the same", "limit = 1"),
        (COMMENTS.replace("{comments}", "{comments} {comment}"), "has no column comment", 'did you mean "comments"?'),
        (COMMENTS.replace("{comments}", "{comments} {owner.name}"), 'no column "owner.name"', "tickets.related.owner]"),
        (COMMENTS.replace("{comments}", "{comments} {coments.body}"), "coments.body", 'did you mean "comments.body"?'),
        (COMMENTS + 'where = "now() > \'2000-01-01\'"', "changes with time (now)", "carry the column"),
        (COMMENTS + 'where = "random() > 0.5"', "volatile", "depends on the row alone"),
        (COMMENTS + 'where = "EXISTS (SELECT FROM public.tags)"', "reads the table tags", "columns of public.comments"),
        (COMMENTS + 'where = "boddy IS NULL"', 'column "boddy" does not exist', None),
        (COMMENTS + 'order_by = "random()"', "volatile", "depends on the row alone"),
        (COMMENTS + 'order_by = "(SELECT 1)"', "holds a query", "name columns"),
        (COMMENTS.replace('ticket_id = "id"', 'body = "id"'), "body as text", "ALTER COLUMN body TYPE integer"),
        (COMMENTS + 'order_by = "created DESK"', "its rows cannot be read", None),
        (COMMENTS.replace("comments]", "subject]").replace("{comments}", ""), "could be either", "another name"),
    ],
    ids=lambda one: one[:40] if one is not None and "\n" not in one else "",
)  # fmt: skip
async def test_what_a_related_table_lacks_is_told(database: Database, lines: str, sign: str, hint: str | None) -> None:
    database.execute(TABLES)
    if "cover" not in sign:
        database.execute("ALTER TABLE comments REPLICA IDENTITY FULL")
    report = await examined(configured(database.dsn, tickets=lines))
    told = [one for one in report.errors if sign in one.message]
    assert told, report.errors
    assert hint is None or hint in str(told[0].hint)


@pytest.mark.parametrize("side", ["comments", "tickets"])
async def test_columns_that_postgresql_cannot_compare_are_told(database: Database, side: str) -> None:
    kinds = {"comments": "mood", "tickets": "mood"} | {side: "felt"}
    database.execute(
        "CREATE TYPE mood AS ENUM ('a', 'b'); CREATE DOMAIN felt AS mood;"
        f" CREATE TABLE tickets (id {kinds['tickets']} UNIQUE, n int PRIMARY KEY, subject text);"
        f" CREATE TABLE comments (id int PRIMARY KEY, ticket_id {kinds['comments']}, body text);"
        " ALTER TABLE comments REPLICA IDENTITY FULL; CREATE INDEX ON comments (ticket_id)"
    )
    (error,) = (await examined(configured(database.dsn, tickets=COMMENTS))).errors
    assert error.where == "indexes.tickets.related.comments.on"
    assert f"of public.{side} is of public.felt, a domain over an enum" in error.message


@pytest.mark.parametrize("mine", ["", "COLLATE loose"])
@pytest.mark.parametrize("theirs", ["", "COLLATE loose", 'COLLATE "C"'])
async def test_columns_that_are_equal_by_two_collations_are_told(database: Database, mine: str, theirs: str) -> None:
    try:
        database.execute("CREATE COLLATION loose (provider = icu, locale = 'und-u-ks-level2', deterministic = false)")
    except psycopg.errors.FeatureNotSupported:
        pytest.skip("this server is built without ICU, so all its collations are deterministic")
    database.execute(
        f"CREATE TABLE tickets (id int PRIMARY KEY, code text {theirs}, subject text);"
        f"CREATE TABLE comments (id int PRIMARY KEY, ticket text {mine}, body text);"
        "ALTER TABLE comments REPLICA IDENTITY FULL"
    )
    lines = COMMENTS.replace('ticket_id = "id"', 'ticket = "code"')

    async def told() -> list[Finding]:
        report = await examined(configured(database.dsn, tickets=lines))
        return [one for one in report.errors if one.where == "indexes.tickets.related.comments.on"]

    if "loose" not in mine + theirs or mine == theirs:
        assert await told() == []
        return
    (error,) = await told()
    assert "public.comments has ticket in the collation " in error.message
    assert "public.loose" in error.message
    statement = str(error.hint).removeprefix("give both columns one collation: ").removesuffix(", for one")
    assert statement.startswith("ALTER TABLE public.tickets ALTER COLUMN code TYPE text COLLATE ")
    database.execute(statement)
    assert await told() == []


async def test_a_missing_index_is_told_with_the_rows_that_make_it_matter(database: Database) -> None:
    database.execute(f"{TABLES} ALTER TABLE comments REPLICA IDENTITY FULL")
    database.execute("INSERT INTO comments SELECT i, i, 'body' FROM generate_series(1, 5000) i; ANALYZE comments")

    (warning,) = warnings(await examined(configured(database.dsn, tickets=COMMENTS)))

    assert "public.comments has some 5,000 rows and no index on (ticket_id)" in warning.message
    assert warning.hint == "CREATE INDEX CONCURRENTLY ON public.comments (ticket_id)"


async def test_a_related_table_that_the_role_may_not_read_is_told(lone_database: Database, role: Role) -> None:
    lone_database.execute(f"{TABLES} ALTER TABLE comments REPLICA IDENTITY FULL")
    lone_database.execute(
        f'GRANT SELECT ON tickets TO "{role.name}"; CREATE PUBLICATION cdcsync FOR TABLE tickets, comments'
    )

    report = await examined(configured(role.dsn, lone_database.dsn, tickets=COMMENTS))

    assert any("may not read" in one.message and "public.comments" in one.where for one in report.errors)


async def test_a_publication_that_lacks_a_related_table_is_told(lone_database: Database, role: Role) -> None:
    lone_database.execute(f"{TABLES} ALTER TABLE comments REPLICA IDENTITY FULL")
    lone_database.execute(
        f'GRANT SELECT ON tickets, comments TO "{role.name}"; CREATE PUBLICATION cdcsync FOR TABLE tickets'
    )

    report = await examined(configured(role.dsn, lone_database.dsn, tickets=COMMENTS))

    told = [one for one in report.errors if "does not send public.comments" in one.message]
    assert told[0].hint == "ALTER PUBLICATION cdcsync ADD TABLE public.comments"
