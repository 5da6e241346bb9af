"""`cdcsync search` where no worker embeds the query: the model is loaded here, or is away."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cdcsync.cli.search import Answer, find
from cdcsync.config import Config, Worker
from cdcsync.errors import EmbedderUnavailable, UsageError
from tests.support.searched import Model, indexed

if TYPE_CHECKING:
    from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

USUAL: Mapping[str, Any] = {
    **{"k": 10, "mode": "hybrid", "filter_": {}, "where": None, "per_document": True, "skip": 0, "explain": False}
}


@pytest.fixture
async def config(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Config]:
    for name, value in {"away": False, "refuses": False, "slow": False, "opened": 0, "asked": []}.items():
        monkeypatch.setattr(Model, name, value)
    async with indexed(database) as (_, made):
        yield msgspec.structs.replace(made, worker=Worker(listen="127.0.0.1:0"))


async def found(config: Config, text: str, **options: Any) -> Answer:
    return await find(config, ["articles"], text, **{**USUAL, **options})


@pytest.mark.parametrize(("fault", "words"), [("away", "nobody is at home"), ("refuses", "401 the key has expired")])
async def test_while_the_model_is_away_words_are_searched_and_a_warning_says_so(
    config: Config, fault: str, words: str
) -> None:
    setattr(Model, fault, True)
    answer = await found(config, "dog house")
    assert [one.hit.key["id"] for one in answer.found] == [2]
    assert answer.warnings == [f"searched by words alone: {words}"]
    with pytest.raises(EmbedderUnavailable, match=words):
        await found(config, "dog house", mode="vector")


async def test_the_model_is_let_go_of_after_the_search(config: Config) -> None:
    answer = await found(config, "dog house", filter_={"tenant": {"in": ["2", "3"]}})
    assert (answer.found[0].hit.key, answer.warnings) == ({"id": 2}, [])
    assert (Model.asked, Model.opened) == (["dog house"], 0)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"filter_": {"colour": {"eq": "red"}}}, "colour"),
        ({"filter_": {"tenant": {"eq": "three"}}}, "tenant"),
        ({"where": "colour = 'red'"}, "colour"),
    ],
    ids=str,
)
async def test_a_wrong_condition_is_told_before_the_model_is_loaded(
    wrong: dict[str, Any], told: str, config: Config
) -> None:
    Model.away = True
    with pytest.raises(UsageError, match=told):
        await found(config, "dog house", **wrong)
