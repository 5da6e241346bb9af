"""The contract of docs/embedders.md, "When an embedder misbehaves": each row of its table for each kind of embedder."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import UTC, datetime

import anyio
import pytest

from cdcsync.errors import EmbedderUnavailable, EmbedError, TextRejected
from cdcsync.flows.embed import Dispatcher
from cdcsync.flows.embed.calls import Made
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import Problem
from tests import ROOT
from tests.support.embedding import embedded
from tests.support.simulated import KINDS, Simulated, Temper, embedder_of
from tests.support.virtual import in_virtual_time

TEXTS = [f"text number {at}" for at in range(24)]
BAD = TEXTS[9]

PAGE = (ROOT / "docs" / "embedders.md").read_text()


class Seen:
    """What became of the texts, and what an operator was told meanwhile."""

    def __init__(self) -> None:
        self.made = Made({}, {})
        self.problems: list[Problem] = []
        self.at_the_end: Problem | None = None
        self.provider = Simulated(Temper())


def run(kind: str, temper: Temper) -> Seen:
    """Embed all texts in one call, and again whenever the embedder works, and watch what is told."""
    seen = Seen()
    seen.provider = Simulated(temper)
    texts = {text.encode(): text for text in TEXTS}
    with pytest.MonkeyPatch.context() as patch:
        embedder = embedder_of(kind, seen.provider, patch)

        async def main() -> None:
            dispatcher = Dispatcher(embedder, Metrics(), anyio.current_time)

            def changed() -> None:
                if dispatcher.problem is not None:
                    seen.problems.append(dispatcher.problem)

            dispatcher.health.changed = changed
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(dispatcher.run)
                while len(seen.made.vectors) + len(seen.made.failed) < len(texts):
                    try:
                        seen.made = await embedded(dispatcher, texts)
                    except EmbedderUnavailable:
                        await dispatcher.health.works()
                seen.at_the_end = dispatcher.problem
                tasks.cancel_scope.cancel()
            await embedder.aclose()

        in_virtual_time(main)
    return seen


def nobodys(kind: str, fault: str) -> None:
    """A provider that asks for a short wait is waited for, and nothing is told."""
    seen = run(kind, Temper(outages=[(0, 5, fault)], retry_after="2"))
    assert len(seen.made.vectors) == len(TEXTS)
    assert seen.problems == []


def embedders(kind: str, fault: str, *, retry_after: str | None = "2", lasts_s: float = 200) -> None:
    """No text loses an attempt; the reason and the next attempt are told; the vectors follow when it works."""
    if fault == "silence":  # a class of the user's has no time limit but that of any call
        lasts_s = 2_000
    seen = run(kind, Temper(outages=[(0, lasts_s, fault)], retry_after=retry_after))
    assert seen.made.failed == {}
    assert len(seen.made.vectors) == len(TEXTS)
    assert seen.problems
    assert seen.at_the_end is None
    for problem in seen.problems:
        assert problem.message.isprintable()
        assert problem.message
        assert problem.until is not None
        assert (problem.until - datetime.now(UTC)).total_seconds() <= 3_600
        assert not any(text in str(problem) for text in TEXTS)


def a_long_wait(kind: str, fault: str) -> None:
    """A wait of years becomes one of an hour at most."""
    embedders(kind, fault, retry_after="99999999999", lasts_s=4_000)


def texts(kind: str, fault: str) -> None:
    """One text is listed with the reason; all others have their vectors, and nobody is alarmed."""
    seen = run(kind, Temper(bad={BAD: fault}))
    assert set(seen.made.failed) == {BAD.encode()}
    assert len(seen.made.vectors) == len(TEXTS) - 1
    (error,) = seen.made.failed.values()
    assert error.message.isprintable()
    assert BAD not in str(error)
    assert seen.problems == []
    assert type(error) in (EmbedError, TextRejected, EmbedderUnavailable)


def refused(kind: str, fault: str) -> None:
    """One text is given up at once."""
    texts(kind, fault)
    (error,) = run(kind, Temper(bad={BAD: fault})).made.failed.values()
    assert isinstance(error, TextRejected)


def sizes(kind: str, fault: str) -> None:
    """Calls become smaller; nothing fails and nobody is alarmed."""
    seen = run(kind, Temper(most_texts=5, limited_by=fault))
    assert (len(seen.made.vectors), seen.made.failed, seen.problems) == (len(TEXTS), {}, [])
    assert seen.provider.largest <= 5


def calls(kind: str, fault: str) -> None:
    """Fewer calls run at a time; no text is blamed."""
    seen = run(kind, Temper(most_calls=1, limited_by=fault))
    assert seen.made.failed == {}
    assert len(seen.made.vectors) == len(TEXTS)


def either(kind: str, fault: str) -> None:
    """The word decides: of all answers it is the embedder's fault, of one text's the text's."""
    embedders(kind, fault)
    texts(kind, fault)


ROWS: dict[str, tuple[Callable[[str, str], None], tuple[str, ...]]] = {
    "429 or 503 with a short wait": (nobodys, ("429", "503")),
    "429 or 503 with a long wait": (a_long_wait, ("429", "503")),
    "the account's quota": (a_long_wait, ("429",)),
    "401, 403, 404": (embedders, ("401", "403", "404", "301")),
    "400, 413, 422, also for the word": (embedders, ("400", "413", "422")),
    "500 or another status": (embedders, ("500", "418", "cut", "html", "garbage", "nested", "silence")),
    "vectors of another length": (embedders, ("longer",)),
    "it cannot be reached": (embedders, ("unreachable",)),
    "any of these for one text": (texts, ("401", "403", "404", "500", "cut", "html", "garbage", "silence", "longer")),
    "400, 413, 422 for one text": (refused, ("400", "413", "422")),
    "a vector of one text": (texts, ("empty", "nan", "inf", "zeros", "huge")),
    "too many texts": (sizes, ("413", "400", "500", "cut", "silence", "html")),
    "too many calls": (calls, ("500", "cut")),
    "other vectors than texts": (either, ("too few", "too many", "numbering")),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_contract_holds(row: str, kind: str) -> None:
    contract, faults = ROWS[row]
    for fault in faults:
        contract(kind, fault)


def test_every_row_of_the_page_has_a_test() -> None:
    table = PAGE.partition("| situation |")[2].partition("\n\n")[0]
    situations = re.findall(r"^\| ([^|]+) \| [^|]+ \| [^|]+ \| [^|]+ \|$", table, re.MULTILINE)[1:]
    assert len(situations) == len(ROWS)
    for situation, row in zip(situations, ROWS, strict=True):
        assert situation.startswith(row)
