"""Plans in words."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cdcsync.cli.plans import embedding_text, print_plan, print_summary
from cdcsync.flows.plan import ConfigurationPlan, Embedding, IndexPlan, Spare

EMBEDDING = Embedding(documents=1_000, texts=2_500, tokens=90_000, price=1.8, seconds=125.0, estimated=True)
NOTHING = ConfigurationPlan([], [], [], [])


def test_what_is_embedded_is_told_with_its_cost() -> None:
    told = embedding_text(EMBEDDING)
    assert told == "embeds about 2,500 texts of 1,000 documents, some 90,000 tokens, price 1.80, about 125 s"
    alone = msgspec.structs.replace(EMBEDDING, price=None, seconds=None, estimated=False)
    assert embedding_text(alone) == "embeds 2,500 texts of 1,000 documents, some 90,000 tokens"
    assert embedding_text(msgspec.structs.replace(EMBEDDING, texts=0)) == "embeds nothing: every text has its vector"


@pytest.mark.parametrize(
    ("fields", "lines"),
    [
        ({"action": "unchanged"}, ["· docs: as it is"]),
        ({"action": "created", "rows": 12_345}, ["+ docs: created from 12,345 rows"]),
        ({"action": "read again", "rows": 9, "because": ["text"]}, ["~ docs: 9 rows read again: text"]),
        ({"action": "compared", "because": ["a", "b"]}, ["~ docs: compared: a; b"]),
        ({"action": "changed", "rebuilt": ["view x"]}, ["built again: view x"]),
        ({"action": "changed", "remaining": ["distance"]}, ["~ docs: continues as it is", "distance"]),
        (
            {"action": "paused", "because": ["no table"], "remedy": "create it"},
            ["! docs: paused: no table", "fix: create it"],
        ),
        (
            {"action": "created", "rows": 1, "embedding": EMBEDDING, "approval": "needed", "remedy": "approve"},
            ["embeds about 2,500 texts", "waits for approval: fix: approve"],
        ),
    ],
    ids=lambda one: one["action"] if isinstance(one, dict) else "",
)
def test_each_action_is_told(fields: dict[str, Any], lines: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    plan = msgspec.structs.replace(NOTHING, indexes=[IndexPlan(index="docs", **fields)])
    print_plan(plan)
    printed = capsys.readouterr().out
    for line in lines:
        assert line in printed
    last = "nothing to do" if fields["action"] == "unchanged" else "this is what `cdcsync run` would do"
    assert printed.splitlines()[-1] == last


def test_what_nothing_uses_is_told_with_its_size_and_the_command_that_frees_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    since = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
    plan = msgspec.structs.replace(
        NOTHING,
        unfollowed=[
            Spare("gone", None, 3 * 1024**2, since, "cdcsync drop gone"),
            Spare("left", None, 0, None, "cdcsync drop left"),
        ],
        generations=[Spare("docs", 1, 1024**2, None, "cdcsync migrate docs drop --generation 1")],
    )
    print_plan(plan)
    printed = capsys.readouterr().out
    assert "gone: no longer followed since 2026-01-02 03:04 UTC, 3.0 MiB; to remove it: cdcsync drop gone" in printed
    assert "left: no longer followed from now on, 0.0 MiB; to remove it: cdcsync drop left" in printed
    assert "docs: generation 1, 1.0 MiB, is not in use; cdcsync migrate docs drop --generation 1" in printed


def test_a_summary_has_a_line_for_each_index_with_which_something_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    print_summary(NOTHING)
    assert capsys.readouterr().out == "`run` would change nothing\n"
    waiting = IndexPlan(index="new", action="created", rows=3, embedding=EMBEDDING, approval="needed")
    print_summary(msgspec.structs.replace(NOTHING, indexes=[IndexPlan(index="same", action="unchanged"), waiting]))
    printed = capsys.readouterr().out
    assert "same" not in printed
    assert "new: created from 3 rows; embeds about 2,500 texts" in printed
    assert "waits for an approval" in printed
