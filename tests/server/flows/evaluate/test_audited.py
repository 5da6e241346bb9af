"""`cdcsync evaluate --from-audit`: what callers asked becomes a judged set, graded by a person between two runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cdcsync.flows.evaluate.audited import gather
from cdcsync.postgres.sessions import connect
from cdcsync.target.search import stored_spec
from tests.support.serving import Office

pytestmark = pytest.mark.server

QUESTIONS = ["printer of room 8", "login of room 9", "xyzzy"]


@pytest.fixture
def asked(tickets: Office) -> Iterator[Office]:
    """A record in which the first question was asked twice, and one search failed."""
    insert = (
        "INSERT INTO cdcsync.calls (subject, tool, index_name, outcome, hits, query_hash, query, ms)"
        " VALUES ('ana', %s, %s, %s, 1, %s, %s, 1)"
    )
    for tool, index, outcome, text in [
        ("search", "tickets", "ok", QUESTIONS[0]),
        ("search", "tickets", "ok", QUESTIONS[0]),
        ("search", "tickets", "ok", QUESTIONS[1]),
        ("search", "tickets", "ok", QUESTIONS[2]),
        ("search", "tickets", "ok", None),
        ("search", "tickets", "ok", "  "),
        ("search", "tickets", "failed", "not this one"),
        ("search", "others", "ok", "nor this one"),
    ]:
        tickets.database.execute(insert, [tool, index, outcome, (text or "-").strip()[:7], text])
    yield tickets
    tickets.database.execute("TRUNCATE cdcsync.calls")


def evaluate(office: Office, directory: Path, *more: str) -> int:
    return office.command("evaluate", "tickets", "--from-audit", directory, *more)


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "judgments.jsonl").read_text().splitlines()]


def grade(directory: Path, good: dict[str, str]) -> None:
    graded = [{**one, "grade": int(good.get(one["text"]) == one["document"])} for one in lines(directory)]
    (directory / "judgments.jsonl").write_text("".join(json.dumps(one) + "\n" for one in graded))


def test_questions_are_listed_with_what_any_mode_finds_and_graded_ones_measured(
    asked: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "asked"
    assert evaluate(asked, directory) == 0
    assert "3 questions" in capsys.readouterr().out
    found = lines(directory)
    assert {one["text"] for one in found} == set(QUESTIONS)
    assert all(one["grade"] is None and one["content"] for one in found)
    assert len({(one["query"], one["document"]) for one in found}) == len(found)
    assert sum(one["text"] == QUESTIONS[0] for one in found) > 10  # more than one mode finds

    assert evaluate(asked, directory, "--min", "nDCG@10=0.1") == 2
    assert "nothing is graded yet" in capsys.readouterr().err

    answers = {text: next(one["document"] for one in found if one["text"] == text) for text in QUESTIONS[:2]}
    grade(directory, answers)
    before = lines(directory)
    assert evaluate(asked, directory, "--json") == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["from_audit"]["questions"], shown["from_audit"]["ungraded"]) == (3, 0)
    assert shown["judged"]["queries"] == 2
    assert lines(directory) == before  # nothing new, and every grade kept
    assert evaluate(asked, directory, "--min", "R@100=0.9") == 0


def test_a_new_question_is_added_to_those_that_are_graded(asked: Office, tmp_path: Path) -> None:
    assert evaluate(asked, tmp_path, "--queries", "1") == 0
    grade(tmp_path, {QUESTIONS[0]: lines(tmp_path)[0]["document"]})
    before = lines(tmp_path)
    assert {one["text"] for one in before} == {QUESTIONS[0]}  # asked most often
    assert evaluate(asked, tmp_path) == 0
    after = lines(tmp_path)
    assert after[: len(before)] == before
    assert {one["text"] for one in after} == set(QUESTIONS)


def test_a_record_without_texts_says_what_keeps_them(
    tickets: Office, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(tickets, tmp_path) == 2
    assert "serve.audit_queries = true" in capsys.readouterr().err
    assert evaluate(tickets, tmp_path, "--judged", str(tmp_path)) == 2
    assert "cannot be combined" in capsys.readouterr().err


@pytest.mark.anyio
async def test_the_model_is_found_under_whatever_name_its_section_has_now(asked: Office, tmp_path: Path) -> None:
    config = asked.config
    renamed = msgspec.structs.replace(config, embedders={"renamed": config.embedders["fake"]})
    async with await connect(config.target.dsn, "target", application_name="test") as connection:
        spec = await stored_spec(connection, config.target.schema, "tickets", config.index_named("tickets"))
        gathered = await gather(connection, renamed, spec, tmp_path, most=10)
    assert gathered.questions == 3
