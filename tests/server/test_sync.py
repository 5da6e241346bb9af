"""An index for threads."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import anyio
import pytest

import cdcsync
import cdcsync.sync
from cdcsync.errors import UsageError
from tests.support.searched import Model, indexed, keys
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"away": False, "slow": False, "opened": 0, "asked": []}.items():
        monkeypatch.setattr(Model, name, value)


def test_the_twin_has_the_same_methods_with_the_same_parameters() -> None:
    def public(kind: type) -> dict[str, list[str]]:
        found = {name: inspect.signature(value) for name, value in vars(kind).items() if callable(value)}
        return {name: list(signature.parameters) for name, signature in found.items() if not name.startswith("_")}

    assert public(cdcsync.sync.Index) == public(cdcsync.Index)
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
