"""Findings: each fault is told once."""

from __future__ import annotations

import psycopg

from cdcsync.errors import SourceUnavailable
from cdcsync.preflight import Finding
from cdcsync.preflight.findings import nearest, noting, or_ok


def test_a_server_that_goes_away_is_told_once_however_many_checks_it_fails() -> None:
    findings: list[Finding] = []
    for _ in range(3):
        with noting(findings, "target", "target"):
            raise psycopg.OperationalError("server closed the connection unexpectedly")
    with noting(findings, "target", "target"):
        raise SourceUnavailable("gone", where="elsewhere")
    assert [(finding.level, finding.where) for finding in findings] == [("error", "target"), ("error", "elsewhere")]


def test_good_news_is_told_unless_there_is_an_error() -> None:
    warning, error = Finding.warning("t", "slow"), Finding.error("t", "gone", None)
    assert or_ok([warning], "t", "fine") == [Finding.ok("t", "fine"), warning]
    assert or_ok([warning, error], "t", "fine") == [warning, error]


def test_the_nearest_name_is_guessed_only_if_it_is_near() -> None:
    assert nearest("artikles", ["tickets", "articles"]) == "articles"
    assert nearest("orders", ["tickets", "articles"]) is None
