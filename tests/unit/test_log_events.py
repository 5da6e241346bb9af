"""docs/logs.md lists every event that the code logs, with its levels and keys, and nothing else."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

import cdcsync
from tests import ROOT

PACKAGE = Path(cdcsync.__file__).parent
PAGE = ROOT / "docs" / "logs.md"

METHODS = {"debug", "info", "warning", "error", "exception", "critical"}


class Event(msgspec.Struct, frozen=True):
    """How an event is logged."""

    levels: frozenset[str]
    keys: frozenset[str]


def levels_of(node: ast.AST) -> frozenset[str]:
    """Return the levels of the module's logger that an expression names."""
    return frozenset(
        part.attr
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute)
        and isinstance(part.value, ast.Name)
        and part.value.id == "log"
        and part.attr in METHODS
    )


def calls() -> Iterator[tuple[str, frozenset[str], ast.Call]]:
    """Return each call of a module's logger, with its place and the levels that it may have."""
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        # `say = log.info if … else log.error`, and then `say(…)`
        aliases = {
            target.id: levels_of(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and levels_of(node.value)
            for target in node.targets
            if isinstance(target, ast.Name) and not isinstance(node.value, ast.Call)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            alias = aliases.get(node.func.id) if isinstance(node.func, ast.Name) else None
            if levels := alias or (levels_of(node.func) if isinstance(node.func, ast.Attribute) else None):
                yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", levels, node


def logged() -> dict[str, Event]:
    """Return the events of the code; one that is logged in several places has the keys of all."""
    events: dict[str, Event] = {}
    for _, levels, call in calls():
        name = ast.literal_eval(call.args[0])
        keys = frozenset(keyword.arg or "**" for keyword in call.keywords)
        before = events.get(name, Event(frozenset(), frozenset()))
        events[name] = Event(before.levels | levels, before.keys | keys)
    return events


def documented() -> dict[str, Event]:
    """Return the events of the page."""
    rows = re.findall(r"^\| `(\w+)` \| ([a-z, ]+) \| ([^|]*) \| .+ \|$", PAGE.read_text(), re.MULTILINE)
    return {
        name: Event(frozenset(re.findall(r"\w+", levels)), frozenset(re.findall(r"`(\w+)`", keys)))
        for name, levels, keys in rows
    }


def test_every_event_is_a_fixed_name_with_named_keys() -> None:
    loose = [
        place
        for place, _, call in calls()
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
    assert not [name for name, event in logged().items() if event.keys & taken]
