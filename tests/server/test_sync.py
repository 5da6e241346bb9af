"""An index for threads."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from inspect import signature

import anyio
import pytest

import cdcsync
import cdcsync.sync
from cdcsync.config import Config, HashEmbedder, Source, Target
from cdcsync.errors import UsageError
from tests.support.indexes import make_spec
from tests.support.misuses import CALLS
from tests.support.searched import Model, indexed, keys
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"away": False, "slow": False, "opened": 0, "asked": []}.items():
        monkeypatch.setattr(Model, name, value)


def test_the_twin_has_the_same_attributes_and_its_methods_the_same_parameters() -> None:
    config = Config(
        source=Source(dsn="dbname=articles"),
        target=Target(dsn="dbname=articles"),
        embedders={"hash": HashEmbedder()},
        indexes={"articles": make_spec().config},
    )

    def public(index: object) -> dict[str, object]:
        found = {name: getattr(index, name) for name in dir(index) if not name.startswith("_")}
        return {name: list(signature(one).parameters) if callable(one) else one for name, one in found.items()}

    assert public(cdcsync.sync.Index.open(config, "articles")) == public(cdcsync.Index.open(config, "articles"))
    assert cdcsync.sync.Index.search.__doc__ == cdcsync.Index.search.__doc__


async def test_threads_search_at_the_same_time_and_a_closed_index_says_so(database: Database) -> None:
    async with indexed(database) as (_, config):

        def use() -> None:
            with cdcsync.sync.Index.open(config, "articles") as articles, articles.beside("articles") as other:
                with ThreadPoolExecutor(8) as threads:
                    found = list(threads.map(lambda _: keys(articles.search("dog house", k=1)), range(24)))
                assert found == [[2]] * 24
                assert keys(other.search("dog house", mode="text")) == [2]
                assert articles.wait_for("0/0") is True or articles.wait_for("0/0", timeout_s=0) is False
                assert articles.embed(["one"]).shape == (1, 32)
            for index in (articles, other):
                with pytest.raises(UsageError, match="closed"):
                    index.search("dog")
            assert not [thread for thread in threading.enumerate() if "cdcsync" in thread.name]
            with pytest.raises(UsageError, match="no index nowhere"):
                cdcsync.sync.Index.open(config, "nowhere")

        await anyio.to_thread.run_sync(use)
    assert Model.opened == 0


async def test_threads_are_told_of_arguments_that_cannot_be_used_as_tasks_are(database: Database) -> None:
    async with indexed(database) as (_, config):

        def use() -> None:
            with cdcsync.sync.Index.open(config, "articles") as articles:
                for method, arguments, named, told in CALLS:
                    with pytest.raises(UsageError, match=told):
                        getattr(articles, method)(*arguments, **named)
                assert keys(articles.search("dog house", k=1)) == [2]

        await anyio.to_thread.run_sync(use)


def in_a_child(use: Callable[[], object]) -> str:
    """Call a function in a copy of this process, which ends in any case, and return what it raised."""
    reads, writes = os.pipe()
    if (child := os.fork()) == 0:
        signal.alarm(20)  # what hangs is killed
        try:
            use()
        except BaseException as error:
            os.write(writes, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as told:
        raised = told.read()
    os.waitpid(child, 0)
    return raised


@pytest.mark.proof
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
async def test_an_index_that_was_opened_before_a_fork_says_so_and_serves_its_own_process(database: Database) -> None:
    async with indexed(database) as (_, config):

        def use() -> None:
            with cdcsync.sync.Index.open(config, "articles") as articles, articles.beside("articles") as other:
                assert keys(articles.search("dog house", k=1)) == [2]
                for index in (articles, other):
                    raised = in_a_child(lambda index=index: index.search("dog"))  # type: ignore[misc]
                    assert raised.startswith("UsageError: cdcsync.sync.Index: it was opened before this process was"), (
                        raised
                    )
                    assert in_a_child(lambda index=index: index.__exit__()) == ""  # type: ignore[misc]
                    assert keys(index.search("dog house", k=1)) == [2]

        await anyio.to_thread.run_sync(use)
        async with cdcsync.Index.open(config, "articles") as articles:
            assert keys(await articles.search("dog house", k=1)) == [2]

            def again() -> None:
                async def search() -> None:
                    async with articles:
                        await articles.search("dog")

                anyio.run(search)

            raised = in_a_child(lambda: in_a_thread(again))
            assert raised.startswith("UsageError: cdcsync.Index: it was opened before this process was forked"), raised
            assert keys(await articles.search("dog house", k=1)) == [2]


async def test_an_index_of_another_event_loop_says_so_and_serves_its_own(database: Database) -> None:
    async with indexed(database) as (_, config), cdcsync.Index.open(config, "articles") as articles:
        calls: list[Callable[[cdcsync.Index], Awaitable[object]]] = [
            lambda index: index.search("dog", timeout_s=5),
            lambda index: index.search("dog", after_lsn="0/0"),
            lambda index: index.rerank("dog", []),
            lambda index: index.embed(["dog"]),
            lambda index: index.wait_for("0/0"),
            lambda index: index.__aenter__(),
        ]
        for index in (articles, articles.beside("articles")):
            for call in calls:
                with pytest.raises(UsageError, match="belongs to another event loop") as raised:
                    await anyio.to_thread.run_sync(anyio.run, call, index)
                assert "cdcsync.sync.Index" in str(raised.value.hint)
            assert keys(await index.search("dog house", k=1)) == [2]


def in_a_thread(use: Callable[[], None]) -> None:
    """Call a function where no event loop runs, and raise what it raises."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(use).result()
