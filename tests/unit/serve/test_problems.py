"""Problems as callers read them: in headers, and in the text of a tool's error."""

from __future__ import annotations

import pytest

from cdcsync.errors import (
    CdcsyncError,
    EmbedderUnavailable,
    SetupError,
    TargetUnavailable,
    TextRejected,
    UsageError,
)
from cdcsync.serve.problems import Problem, problem_of


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (Problem(422, "Wrong", "k is wrong", "ask for less"), "k is wrong. Ask for less."),
        (Problem(429, "Too many", "too fast", "slow down", retry_after_s=2.1), "too fast. Slow down. Retry after 3 s."),
        (Problem(503, "Away", "it is away", "wait", retry_after_s=0.05), "it is away. Wait. Retry after 1 s."),
    ],
)
def test_an_agent_reads_what_is_wrong_what_to_change_and_when_to_call_again(problem: Problem, told: str) -> None:
    assert str(problem) == told


def test_the_header_names_whole_seconds_at_least_one() -> None:
    assert Problem(429, "Too many", "too fast", "wait", retry_after_s=2.1).headers == {"Retry-After": "3"}
    assert Problem(503, "Away", "it is away", "wait", retry_after_s=0.0).headers == {"Retry-After": "1"}


@pytest.mark.parametrize("candid", [False, True])
@pytest.mark.parametrize(
    "error",
    [UsageError("no"), TextRejected("no"), EmbedderUnavailable("no"), TargetUnavailable("no"), SetupError("no")],
)
def test_each_problem_says_what_to_do_although_an_error_has_no_hint(error: CdcsyncError, candid: bool) -> None:
    assert problem_of(error, candid=candid).body["fix"]
