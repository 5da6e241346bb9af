"""The examples that search, each run as an application would, and the fixture that applications test with."""

from __future__ import annotations

from typing import Any

import anyio
import httpx2
import pytest

from cdcsync.config import Config
from cdcsync.testing import Work, cdcsync_worker
from tests import ROOT
from tests.support.articles import read
from tests.support.configs import configuration
from tests.support.servers import Database

__all__ = ["cdcsync_worker"]

pytestmark = pytest.mark.server

TICKETS = {
    1: "I forgot my login and cannot get in",
    2: "The invoice of May has the wrong address",
    3: "The printer prints only in blue",
}
COMMENTS = {10: "Asked for the login by mail", 11: "A new toner for the printer has been ordered"}


def helpdesk(database: Database) -> Config:
    """Make tables of tickets and comments; returns the configuration of their indexes."""
    for name, rows in (("tickets", TICKETS), ("comments", COMMENTS)):
        database.execute(f"CREATE TABLE {name} (id int PRIMARY KEY, title text)")
        for id_, title in rows.items():
            database.execute(f"INSERT INTO {name} VALUES ({id_}, '{title}')")
    return read(configuration(database.dsn, indexes={"tickets": {}, "comments": {}}))


def test_retrievers_and_two_indexes_find_what_the_worker_follows(
    database: Database, cdcsync_worker: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import langchain_retriever  # type: ignore[import-not-found]
    import llamaindex_retriever  # type: ignore[import-not-found]
    import two_indexes  # type: ignore[import-not-found]

    with cdcsync_worker(helpdesk(database)) as worker:
        tickets = worker.index("tickets")
        langchain = langchain_retriever.CdcsyncRetriever(index=tickets, k=2)
        first, *others = langchain.invoke("forgot my login")
        assert (first.page_content, first.metadata["id"], len(others)) == (TICKETS[1], 1, 1)
        assert anyio.run(langchain.ainvoke, "forgot my login")[0] == first

        llamaindex = llamaindex_retriever.CdcsyncRetriever(tickets, k=1)
        (node,) = llamaindex.retrieve("printer in blue")
        assert (node.text, node.metadata, node.node.id_) == (TICKETS[3], {"id": 3}, "3/0")
        assert anyio.run(llamaindex.aretrieve, "printer in blue")[0].node.id_ == "3/0"

        found = anyio.run(lambda: two_indexes.search_everything(worker.config, "login", k=3))
        assert {(index, hit.key["id"]) for index, hit in found[:2]} == {("tickets", 1), ("comments", 10)}
        assert len(found) == 3

        database.execute("UPDATE tickets SET title = 'The password does not work' WHERE id = 1")
        worker.catch_up()
        assert langchain.invoke("password")[0].page_content == "The password does not work"


def test_users_of_the_web_application_find_what_they_have_just_written(
    database: Database, cdcsync_worker: Work, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import read_your_writes  # type: ignore[import-not-found]

    database.execute("CREATE TABLE notes (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, title text)")
    config = read(configuration(database.dsn, indexes={"notes": {}}))

    async def use(worker_config: Config) -> list[dict[str, Any]]:
        app = read_your_writes.make_app(worker_config)
        transport = httpx2.ASGITransport(app=app)
        answers = []
        async with (
            app.router.lifespan_context(app),
            httpx2.AsyncClient(transport=transport, base_url="http://notes") as client,
        ):
            for title in ("buy oranges", "call the plumber", "water the roses"):
                written = await client.post("/notes", params={"title": title})
                assert (written.status_code, "written=" in written.headers["set-cookie"]) == (201, True)
                answers.append((await client.get("/search", params={"q": title})).json())
        return answers

    with cdcsync_worker(config) as worker:
        answers = anyio.run(use, worker.config)
    assert [answer["notes"][0] for answer in answers] == ["buy oranges", "call the plumber", "water the roses"]
    assert [answer["current"] for answer in answers] == [True, True, True]
