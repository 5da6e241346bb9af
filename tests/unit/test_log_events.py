"""docs/logs.md lists every event that the code logs, with its levels and keys, and nothing else."""

from __future__ import annotations

import ast
import re

from docs.filled import Event, log_calls, logged
from tests import ROOT

PAGE = ROOT / "docs" / "logs.md"


def documented() -> dict[str, Event]:
    """Return the events of the page."""
    rows = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \| ([^|]*) \| .+ \|$", PAGE.read_text(), re.MULTILINE)
    return {
        name: Event(tuple(re.findall(r"\w+", levels)), tuple(re.findall(r"`(\w+)`", keys)))
        for name, levels, keys in rows
    }


def test_every_event_is_a_fixed_name_with_named_keys() -> None:
    loose = [
        place
        for place, _, call in log_calls()
        if len(call.args) != 1
        or not isinstance(call.args[0], ast.Constant)
        or not re.fullmatch(r"[a-z]+(_[a-z]+)*", str(call.args[0].value))
        or any(keyword.arg is None for keyword in call.keywords)
    ]
    assert not loose


def test_the_page_lists_every_event_of_the_code_with_its_levels_and_keys_and_no_other() -> None:
    assert documented() == logged()


def test_no_event_takes_the_name_of_a_key_that_every_line_has() -> None:
    taken = {"event", "level", "timestamp", "logger"}
    assert not [name for name, event in logged().items() if taken & {*event.keys}]
