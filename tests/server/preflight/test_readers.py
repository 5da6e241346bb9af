"""Who reads rows of an index past row-level security is told, with statements that end that, and nobody else is."""

from __future__ import annotations

import re
import secrets
from collections.abc import AsyncIterator

import msgspec
import psycopg
import pytest
from psycopg import sql

from cdcsync.config import QualifiedName
from cdcsync.postgres.sessions import connect
from cdcsync.preflight import Finding, Report
from cdcsync.preflight import readers as module
from cdcsync.source.relations import read_tables
from cdcsync.target.registry import Registry
from tests.support.preflight import ARTICLES, configured, examined, follow, warnings
from tests.support.roles import Roles, grant
from tests.support.servers import Database, Server

pytestmark = pytest.mark.server

CHUNKS = "cdcsync.articles_chunks"
VIEW = "public.articles_index"
LINES = 'columns = ["tenant"]'
SLOT = "preflight_readers"

SECURE = f"ALTER TABLE {CHUNKS} ENABLE ROW LEVEL SECURITY"
POLICY = f"{SECURE}; CREATE POLICY mine ON {CHUNKS} USING (tenant = 1)"


class Readers:
    """An index of two tenants' rows, and two roles: of one that reads it, and of one that owns the table."""

    def __init__(self, database: Database, role: str, other: str) -> None:
        self.database, self.role, self.other = database, role, other
        self.config = configured(database.dsn, slot=SLOT, articles=LINES)

    def execute(self, *statements: str) -> None:
        for statement in statements:
            self.database.execute(statement.format(role=self.role, other=self.other))

    async def told(self, serve: str = "") -> list[Finding]:
        config = self.config
        if serve:
            config = configured(self.database.dsn, slot=SLOT, embedders=f'[serve]\nrole = "{serve}"', articles=LINES)
        return of_readers(await examined(config))

    def sees(self, relation: str, role: str | None = None) -> list[int]:
        """Return the tenants that a role sees in a relation."""
        with self.database.connect() as connection:
            connection.execute(sql.SQL("SET ROLE {}").format(sql.Identifier(role or self.role)))
            return [one for (one,) in connection.execute(f"SELECT DISTINCT tenant FROM {relation} ORDER BY 1".encode())]

    def type(self, hint: str | None, condition: str = "tenant = 1") -> None:
        """Run the statements of a hint, with a condition in place of its dots."""
        parts = str(hint).removesuffix('; docs/security.md, "Readers of an index", has more').split("; ")
        for part in parts:
            statement = re.sub(r" USING \(…\), .*$", f" USING ({condition})", part)
            if re.match("[A-Z]+ ", statement):
                self.database.execute(statement)


def of_readers(report: Report) -> list[Finding]:
    return [one for one in warnings(report) if "row-level security" in one.message]


@pytest.fixture
async def readers(database: Database, server: Server) -> AsyncIterator[Readers]:
    roles = [f"cdcsync_test_{what}_{secrets.token_hex(4)}" for what in ("reader", "other")]
    with server.connect() as admin:
        for role in roles:
            admin.execute(sql.SQL("CREATE ROLE {}").format(sql.Identifier(role)))
    database.execute(f"{ARTICLES}; ALTER TABLE articles OWNER TO {roles[1]}")
    made = Readers(database, *roles)
    await follow(database, made.config)
    database.execute(
        f"INSERT INTO {CHUNKS} (id, tenant, chunk_no, content, content_hash, document_hash, commit_lsn)"
        " SELECT i, i, 0, 'text', '', '', '0/0' FROM generate_series(1, 2) AS i"
    )
    database.execute(
        "INSERT INTO cdcsync.articles_vectors_1 (chunk_id, content_hash, embedding)"
        f" SELECT chunk_id, '', array_fill(1, '{{16}}')::vector FROM {CHUNKS}"
    )
    database.execute("GRANT USAGE ON SCHEMA public TO PUBLIC")
    yield made
    for role in roles:
        database.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}; DROP ROLE {role}")


READ = f"GRANT SELECT ON {VIEW} TO {{role}}"

QUIET = {
    # what somebody does; nobody sees more than a policy says
    "nothing at all": (),
    "a reader without policies": (READ,),
    "policies without a reader": (POLICY,),
    "a view with its reader's privileges": (POLICY, READ, f"ALTER VIEW {VIEW} SET (security_invoker = on)"),
    "a reader of the chunks": (POLICY, f"GRANT SELECT ON {CHUNKS} TO {{role}}"),
    "a reader without the view's schema": (POLICY, READ, "REVOKE USAGE ON SCHEMA public FROM PUBLIC"),
    "a reader who sees every row by a policy": (
        POLICY,
        READ,
        f"CREATE POLICY every ON {CHUNKS} FOR SELECT TO {{role}} USING (true)",
    ),
    "a reader whom no policy holds": (POLICY, READ, "ALTER ROLE {role} BYPASSRLS"),
    "a source with row-level security, and no reader": ("ALTER TABLE articles ENABLE ROW LEVEL SECURITY",),
    "a source whose owner reads the index": (
        "ALTER TABLE articles ENABLE ROW LEVEL SECURITY",
        f"GRANT SELECT ON {VIEW}, {CHUNKS} TO {{other}}",
    ),
    "a source that shows the reader every row": (
        "ALTER TABLE articles ENABLE ROW LEVEL SECURITY",
        "CREATE POLICY every ON articles TO {role} USING (true)",
        READ,
    ),
}


@pytest.mark.parametrize("case", QUIET)
async def test_who_sees_no_more_than_policies_say_is_not_told_of(readers: Readers, case: str) -> None:
    if "security_invoker" in str(QUIET[case]) and version(readers) < 150000:
        pytest.skip("before PostgreSQL 15 no view reads with its reader's privileges")
    readers.execute(*QUIET[case])
    assert await readers.told() == []


def version(readers: Readers) -> int:
    with readers.database.connect() as connection:
        return connection.info.server_version


@pytest.mark.parametrize("whom", ["{role}", "PUBLIC"])
@pytest.mark.parametrize("what", ["SELECT", "SELECT (tenant)"])
async def test_readers_of_a_view_past_the_policies_of_its_chunks_are_told_of(
    readers: Readers, whom: str, what: str
) -> None:
    readers.execute(POLICY, f"GRANT {what} ON {VIEW} TO {whom}", f"GRANT SELECT ON {VIEW} TO {{other}}")
    readers.execute("ALTER ROLE {other} BYPASSRLS")
    assert readers.sees(VIEW) == [1, 2]

    (one,) = await readers.told()

    assert one.where == "indexes.articles.view"
    assert one.message.startswith(
        f"{whom.format(role=readers.role)} may read {VIEW} past the row-level security of {CHUNKS}"
    )
    readers.type(one.hint)
    if version(readers) >= 150000:
        assert readers.sees(VIEW) == [1]
        assert readers.sees(VIEW, readers.other) == [1, 2]
    assert await readers.told() == []


async def test_both_views_are_told_of_and_mended_at_once(readers: Readers) -> None:
    readers.execute(POLICY, READ, f"GRANT SELECT ON {VIEW}_chunks TO {{role}}")
    (one,) = await readers.told()
    assert f"{VIEW}, {VIEW}_chunks past" in one.message
    readers.type(one.hint)
    assert await readers.told() == []
    if version(readers) >= 150000:
        assert readers.sees(VIEW) == readers.sees(f"{VIEW}_chunks") == [1]


async def test_before_postgresql_15_the_view_is_taken_from_its_readers(
    readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "INVOKER_VERSION", 10**9)
    readers.execute(POLICY, READ, f"GRANT SELECT ON {VIEW} TO {{other}}", "ALTER ROLE {other} BYPASSRLS")
    (one,) = await readers.told()
    assert "security_invoker" not in str(one.hint)
    readers.type(one.hint)
    assert await readers.told() == []
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        readers.sees(VIEW)
    assert readers.sees(VIEW, readers.other) == [1, 2]


@pytest.mark.parametrize("relation", [VIEW, f"{VIEW}_chunks", CHUNKS])
@pytest.mark.parametrize(("condition", "seen"), [("tenant = 1", [1]), ("true", [1, 2])])
async def test_row_level_security_of_the_source_that_nothing_repeats_is_told_of(
    readers: Readers, relation: str, condition: str, seen: list[int]
) -> None:
    readers.execute("ALTER TABLE articles ENABLE ROW LEVEL SECURITY")
    readers.execute("GRANT USAGE ON SCHEMA cdcsync TO {role}", f"GRANT SELECT ON {relation} TO {{role}}")
    assert readers.sees(relation) == [1, 2]

    (one,) = await readers.told()

    assert "the source holds readers of public.articles to row-level security" in one.message
    assert f"{readers.role} may read every row in {relation}" in one.message
    readers.type(one.hint, condition)
    assert await readers.told() == []
    if version(readers) >= 150000:
        assert readers.sees(relation) == seen


async def test_everybody_who_may_read_the_chunks_is_told_of_as_well(readers: Readers) -> None:
    readers.execute("ALTER TABLE articles ENABLE ROW LEVEL SECURITY")
    readers.execute("GRANT USAGE ON SCHEMA cdcsync TO PUBLIC", f"GRANT SELECT ON {CHUNKS} TO PUBLIC")
    (one,) = await readers.told()
    assert f"PUBLIC may read every row in {CHUNKS}" in one.message
    assert "ALTER VIEW" not in str(one.hint)
    readers.type(one.hint)
    assert await readers.told() == []
    assert readers.sees(CHUNKS) == [1]


async def test_the_role_of_the_tool_server_goes_on_reading_and_is_not_told_of(readers: Readers) -> None:
    readers.execute("ALTER TABLE articles ENABLE ROW LEVEL SECURITY", READ)
    readers.execute(f"GRANT SELECT ON {CHUNKS} TO {{other}}", "GRANT USAGE ON SCHEMA cdcsync TO {other}")
    readers.execute("ALTER TABLE articles OWNER TO CURRENT_USER")
    (one,) = await readers.told(serve=readers.other)
    assert readers.other not in one.message
    readers.type(one.hint)
    assert await readers.told(serve=readers.other) == []
    assert readers.sees(CHUNKS, readers.other) == [1, 2]


async def test_policies_of_the_tool_server_alone_are_not_taken_for_an_operators(readers: Readers) -> None:
    readers.execute(SECURE, f"CREATE POLICY cdcsync_tenant ON {CHUNKS} USING (current_user <> '{{other}}')", READ)
    assert await readers.told() == []


async def test_a_schema_of_the_source_that_our_role_of_the_target_may_not_use_is_no_error(
    database: Database, server: Server
) -> None:
    roles = Roles(server)
    role = roles.name("target")
    try:
        database.execute(
            "CREATE SCHEMA shop; CREATE TABLE shop.articles (id bigint PRIMARY KEY, title text, body text)"
        )
        database.execute("ALTER TABLE shop.articles ENABLE ROW LEVEL SECURITY")
        database.execute("CREATE EXTENSION IF NOT EXISTS vector")
        grant(database, target_role=role)
        dsn = roles.dsn(database, role)
        config = configured(database.dsn, dsn, slot=SLOT, articles='table = "shop.articles"')
        await follow(msgspec.structs.replace(database, dsn=dsn), config)
        database.execute(f"GRANT USAGE ON SCHEMA public TO PUBLIC; GRANT SELECT ON {VIEW} TO PUBLIC")

        report = await examined(config)

        assert [spec.name for spec in report.specs] == ["articles"]
        assert any("the source holds readers of shop.articles" in one.message for one in of_readers(report))
    finally:
        database.execute(f"REASSIGN OWNED BY {role} TO CURRENT_USER; DROP OWNED BY {role}")
        roles.drop()


async def test_nobody_who_changes_a_table_with_policies_is_waited_for(readers: Readers, database: Database) -> None:
    readers.execute(READ, "ALTER TABLE articles ENABLE ROW LEVEL SECURITY")
    readers.execute("CREATE POLICY mine ON articles FOR SELECT USING (tenant = 1)")
    named = {QualifiedName("public", "articles")}
    async with await connect(database.dsn, "target") as connection:
        secured = list((await read_tables(connection, named)).values())
        entry = (await Registry("cdcsync").all(connection))["articles"]
        with database.connect() as other, other.transaction():
            other.execute(f"LOCK TABLE articles, {CHUNKS}".encode())
            await connection.execute("SET lock_timeout = '1s'")
            (one,) = await module.reader_findings(connection, "cdcsync", entry, secured, None)
    assert "may read every row" in one.message


async def test_an_index_is_followed_although_nobody_can_tell_who_reads_it(
    readers: Readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_READERS", "SELECT 1 / 0")
    report = await examined(readers.config)
    assert [spec.name for spec in report.specs] == ["articles"]
    assert any("who may read it cannot be looked at" in one.message for one in warnings(report))


async def test_another_index_is_not_mistaken_for_this_one(readers: Readers, database: Database) -> None:
    readers.execute(POLICY, "CREATE VIEW elsewhere AS SELECT 1 AS tenant", "GRANT SELECT ON elsewhere TO {role}")
    readers.execute("COMMENT ON VIEW elsewhere IS 'cdcsync index articles_old: public.articles with its vectors'")
    assert await readers.told() == []
    with pytest.raises(psycopg.Error):
        readers.sees(VIEW)
