"""Reports: one error is raised as it is, several as one message."""

from __future__ import annotations

import pytest

from cdcsync.errors import SetupError
from cdcsync.preflight import Finding, Report, refuse


def test_a_report_without_errors_is_not_refused() -> None:
    refuse(Report([Finding.ok("source", "fine"), Finding.warning("target", "hm")], []))


def test_a_single_error_is_raised_as_it_is() -> None:
    with pytest.raises(SetupError) as refused:
        refuse(Report([Finding.ok("source", "fine"), Finding.error("t", "has no key", "give it one")], []))
    assert (refused.value.where, refused.value.message, refused.value.hint) == ("t", "has no key", "give it one")
    assert refused.value.exit_code == 2


def test_several_errors_are_raised_as_one_with_a_block_each() -> None:
    errors = [Finding.error("a", "first", "correct it"), Finding.error("b", "second", None)]
    with pytest.raises(SetupError) as refused:
        refuse(Report([*errors, Finding.warning("c", "third")], []))
    assert refused.value.message == (
        "2 problems keep this configuration from working\n\n  a: first\n    fix: correct it\n\n  b: second"
    )
    assert refused.value.hint


def test_a_report_passes_only_if_all_its_errors_do() -> None:
    away, wrong = Finding("error", "source", "starting up", None, passes=True), Finding.error("t", "no key", None)
    assert [Report(found, []).passes for found in ([], [away], [away, wrong])] == [False, True, False]
