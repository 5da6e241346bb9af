"""One index over many equal tables, such as one in each tenant's schema; tables appear and go while it is followed."""

from __future__ import annotations

import json

import pytest

from tests.support.scenes import Followed, MakeScene, Scene
from tests.support.workers import until

pytestmark = [pytest.mark.server]

TENANTS = ("tenant_a", "tenant_b", "tenant_c")
COLUMNS = "(id int PRIMARY KEY, title text, kind text, note text)"
LARGE = "(SELECT string_agg(md5(n::text), '') FROM generate_series(1, 200) n)"


def tenant(name: str, rows: int = 20) -> list[str]:
    return [
        f"CREATE SCHEMA IF NOT EXISTS {name}",
        f"CREATE TABLE {name}.articles {COLUMNS}",
        f"ALTER TABLE {name}.articles ALTER note SET STORAGE EXTERNAL",
        f"INSERT INTO {name}.articles SELECT i, '{name} ' || i, (ARRAY['draft', 'public'])[1 + i % 2], {LARGE}"
        f" FROM generate_series(1, {rows}) i",
    ]


@pytest.fixture(scope="module")
def tenants(make_scene: MakeScene) -> Scene:
    """Three tenants with equal tables, one of another kind beside them, and one that no pattern matches."""
    return make_scene(
        [
            *(statement for name in TENANTS for statement in tenant(name)),
            f"CREATE TABLE public.archived_articles {COLUMNS}",
            "INSERT INTO public.archived_articles VALUES (1, 'old', 'public', NULL)",
            "CREATE TABLE tenant_a.notes (id int PRIMARY KEY, title text)",
            "CREATE SCHEMA other",
            f"CREATE TABLE other.articles {COLUMNS}",
        ],
        {
            "everyones": Followed("tenant_*.articles public.archived_*", "{title} {note}", ("kind",)),
            "published": Followed("tenant_*.articles", where="kind <> 'draft' AND length(note) > 0"),
            "ours": Followed("tenant_a.articles"),
        },
    )


BOTH = ("everyones", "published", "ours")


def test_rows_of_all_tables_are_in_one_index_by_their_tables_name(tenants: Scene) -> None:
    tenants.execute(
        *(f"UPDATE {name}.articles SET title = title || ' new' WHERE id < 5" for name in TENANTS),
        "UPDATE tenant_a.articles SET id = id + 100 WHERE id = 5",
        "UPDATE tenant_b.articles SET kind = 'draft' WHERE id = 7",
        "DELETE FROM tenant_c.articles WHERE id IN (1, 2)",
        "INSERT INTO public.archived_articles VALUES (2, 'older', 'public', NULL)",
        "INSERT INTO other.articles VALUES (1, 'nobody asks', 'public', 'x')",
    )
    tenants.at_once(*(f"INSERT INTO {name}.articles VALUES (200, 'in one go', 'public', 'x')" for name in TENANTS))
    tenants.follows(*BOTH)


def test_the_same_key_in_two_tables_is_two_documents(tenants: Scene) -> None:
    tenants.at_once(
        "INSERT INTO tenant_a.articles VALUES (300, 'of a', 'public', 'x')",
        "INSERT INTO tenant_b.articles VALUES (300, 'of b', 'public', 'x')",
        "DELETE FROM tenant_a.articles WHERE id = 300",
    )
    tenants.follows(*BOTH)


def test_the_truncation_of_one_table_leaves_the_rows_of_the_others(tenants: Scene) -> None:
    tenants.at_once(
        "UPDATE tenant_a.articles SET title = 'before' WHERE id = 9",
        "TRUNCATE tenant_b.articles",
        "INSERT INTO tenant_b.articles SELECT * FROM tenant_c.articles WHERE id < 9",
        "UPDATE tenant_c.articles SET title = 'after' WHERE id = 9",
    )
    tenants.follows(*BOTH)
    tenants.at_once("TRUNCATE tenant_b.articles, tenant_c.articles", *tenant("tenant_b")[3:], *tenant("tenant_c")[3:])
    tenants.follows(*BOTH)


@pytest.mark.proof
def test_tables_that_appear_and_go_are_followed(tenants: Scene) -> None:
    tenants.execute(*tenant("tenant_new"), "UPDATE tenant_new.articles SET title = 'changed' WHERE id = 1")
    tenants.heals("everyones", "published")
    tenants.execute("UPDATE tenant_new.articles SET title = 'followed' WHERE id = 2", "DROP SCHEMA tenant_new CASCADE")
    tenants.execute("UPDATE tenant_a.articles SET title = 'meanwhile' WHERE id = 10")
    tenants.heals("everyones", "published")
    worker = tenants.pipeline.processes[-1]
    tenants.pipeline.stop(worker)
    tenants.execute(*tenant("tenant_later", 7))
    tenants.pipeline.start()
    tenants.heals(*BOTH)


def test_commands_know_all_tables(tenants: Scene) -> None:
    tenants.settle()
    for arguments in (
        ["--key", json.dumps(["tenant_a.articles", "11"])],
        ["--where", "source_table = 'tenant_b.articles' AND id > 3"],
        [],
    ):
        replayed = tenants.command("replay", "everyones", *arguments)
        assert replayed.returncode == 0, replayed.stderr
    estimate = json.loads(tenants.command("replay", "everyones", "--dry-run", "--json").stdout)
    target = tenants.pipeline.target
    (documents,) = target.execute("SELECT count(*) FROM cdcsync.everyones_chunks WHERE chunk_no = 0").fetchone() or (0,)
    assert estimate["rows"] == documents
    target.execute("DELETE FROM cdcsync.everyones_chunks WHERE source_table = 'tenant_c.articles' AND id % 2 = 0")
    assert tenants.command("verify", "everyones", "--repair").returncode in (0, 1)
    until(lambda: tenants.equal("everyones"), tenants.pipeline.tail)
    verified = json.loads(tenants.command("verify", "everyones", "--json").stdout)
    assert verified["equal"], verified
    found = tenants.command("search", "everyones", "tenant_b", "--filter", "source_table=tenant_b.articles")
    assert found.returncode == 0, found.stderr
