"""Crash points: every place that commits or acknowledges has one, and an armed one kills."""

from __future__ import annotations

from collections import Counter

import pytest

from tests import ROOT
from tests.chaos import commits
from tests.chaos.killing_tests import killed_at
from tests.chaos.scenes import ELSEWHERE, SCENES


def test_every_place_that_commits_or_acknowledges_has_a_crash_point() -> None:
    lacking = [
        f"{one.file}:{one.line} {one.function}: {one.what} lacks {one.lacks}"
        for one in commits.lacking(commits.sources())
    ]

    assert not lacking, "\n".join(lacking)


NEW = "new.py"

HEAD = """
from cdcsync.target.apply import IndexWriter
from cdcsync.target.stage import Stage
from cdcsync.target.ddl.views import put_view as put, read_view
STATEMENT = sql.SQL("DELETE FROM {}")
async def mine(connection, statement):
    await connection.execute(sql.SQL(statement).format("t"))
"""


def _found(body: str, head: str = HEAD) -> list[str]:
    """Return what is found in a function with this body."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    text = f"{head}async def new(connection, writers: dict[str, IndexWriter], something):\n{lines}"
    return [one.what for one in commits.lacking({**commits.sources(), NEW: text}, only=NEW)]


@pytest.mark.parametrize(
    "body",
    [
        'await connection.execute("DELETE FROM t")',
        'text = sql.SQL("INSERT INTO {}").format(1)\nfor one in something:\n    await connection.execute(text)',
        "await connection.execute(STATEMENT.format(1))",
        'await fetch_value(connection, "UPDATE t SET a = 1 RETURNING a")',
        'await mine(connection, "ALTER TABLE {} ADD a text")',
        "await put(connection)",
        "for one in writers.values():\n    await one.apply(1)",
        "stage = Stage(connection)\nawait stage.fill([])",
    ],
)
def test_what_commits_is_found_however_it_is_named(body: str) -> None:
    assert len(_found(body)) == 1
    indent = "    " if "for " in body else ""
    assert _found(f"{body}\n{indent}crash_point('done')") == []


@pytest.mark.parametrize(
    "body",
    [
        'await connection.execute("SELECT 1")',
        'statement = sql.SQL("SELECT {}")\nawait connection.execute(statement, ["DELETED"])',
        "await read_view(connection)",
        "await something.apply(1)",
    ],
)
def test_what_only_reads_is_no_place_that_commits(body: str) -> None:
    assert _found(body) == []


def test_no_two_crash_points_have_the_same_name() -> None:
    assert [name for name, times in Counter(commits.points()).items() if times > 1] == []


def test_a_point_that_no_history_comes_to_is_one_that_a_test_kills_at() -> None:
    assert set(ELSEWHERE) <= set(commits.points())
    assert not ELSEWHERE.keys() & SCENES.keys()
    killed = {file: killed_at((ROOT / file).read_text()) for file in set(ELSEWHERE.values())}
    assert [(point, file) for point, file in ELSEWHERE.items() if point not in killed[file]] == []


@pytest.mark.parametrize(
    "text",
    [
        '    pipeline.start(CDCSYNC_CRASH_AT="batch committed#2")',
        '    for at in ("slot created", "batch committed"):\n        pipeline.command("run", CDCSYNC_CRASH_AT=at)',
        "    kill_at(monkeypatch, streaming, 'batch committed')",
    ],
)
def test_a_use_of_a_point_in_a_test_is_a_kill(text: str) -> None:
    assert "batch committed" in killed_at(f"def test_it(pipeline):\n{text}\n")


@pytest.mark.parametrize(
    "text",
    [
        "@pytest.mark.parametrize(('point', 'left'), [('slot created', 1)])\ndef test_it(point):\n",
        "def test_it():\n  for _, point in (('a', 'slot created'),):\n",
    ],
)
def test_points_may_come_beside_what_they_leave(text: str) -> None:
    assert killed_at(f"{text}    kill_at(monkeypatch, keys, point)\n") == {"slot created"}


def test_the_points_that_a_test_is_parametrized_by_are_killed_at() -> None:
    text = (
        "from cdcsync.target import keys\n"
        "@pytest.mark.parametrize('at', {})\n"
        "def test_it(at):\n"
        "    kill_at(monkeypatch, keys, at)\n"
    )

    assert killed_at(text.format("['slot created']")) == {"slot created"}
    assert killed_at(text.format("points(keys)")) == {"vectors without a chunk deleted"}
    assert killed_at(text.format("[one for one in points(keys) if one.startswith('slot')]")) == set()


@pytest.mark.parametrize(
    "text",
    [
        "    # killed at batch committed\n    pipeline.start()",
        '    """Kill at batch committed."""\n    pipeline.start(CDCSYNC_CRASH_AT="slot created")',
        '    assert pipeline.said("batch committed")',
    ],
)
def test_a_point_that_is_only_spoken_of_is_not_killed_at(text: str) -> None:
    assert "batch committed" not in killed_at(f"def test_it(pipeline):\n{text}\n")


@pytest.mark.proof
def test_a_crash_point_that_is_taken_away_is_missed() -> None:
    files = commits.sources()
    unnoticed = []
    for name, text in files.items():
        lines = text.splitlines(keepends=True)
        for place, line in enumerate(lines):
            if line.strip().startswith("crash_point("):
                without = "".join([*lines[:place], line.replace("crash_point(", "print("), *lines[place + 1 :]])
                if not commits.lacking({**files, name: without}, only=name):
                    unnoticed.append(f"{name}: {line.strip()}")

    assert unnoticed == []
