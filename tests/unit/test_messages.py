"""Every message that an operator can get, in one place: `pytest tests/unit/test_messages.py -s -k printed` prints them.

They are read from the code, with the names of expressions in place of what they come to.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator

import msgspec
import pytest

from cdcsync import errors
from cdcsync.errors import CdcsyncError
from tests import ROOT

PACKAGE = ROOT / "cdcsync"
CLASSES = {name for name, one in inspect.getmembers(errors, inspect.isclass) if issubclass(one, CdcsyncError)}

TRANSLATED = (
    r"\bmend\b",
    r"\bgo(es)? on\b",
    r"^(What|Who|Whatever|That|Where)\b",
    r"(?<![Tt]here )\bis no\b (?!longer)",
    r"\bpydantic\b",
    r"\blibpq error\b",
    r"\bfe_sendauth\b",
    r"Input should be",
)
"""Words that no message has: other libraries', and those that read as translated."""


class Message(msgspec.Struct, frozen=True):
    """A message as the code has it."""

    place: str
    kind: str
    message: str
    fix: str | None


def rendered(node: ast.expr | None) -> str | None:
    """Return a text with the names of expressions in braces; None for what is no text of the code."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=values):
            return "".join(
                "{" + ast.unparse(one.value) + "}" if isinstance(one, ast.FormattedValue) else rendered(one) or ""
                for one in values
            )
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            sides = rendered(left), rendered(right)
            return "".join(side or "{…}" for side in sides)
        case ast.IfExp(body=body, orelse=orelse):
            return rendered(body) or rendered(orelse)
        case _:
            return None


def messages() -> Iterator[Message]:
    """Yield every message that the code raises or reports."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            function = node.func
            finding = isinstance(function, ast.Attribute) and ast.unparse(function) in (
                "Finding.error",
                "Finding.warning",
            )
            if not finding and not (isinstance(function, ast.Name) and function.id in CLASSES):
                continue
            at = 1 if finding else 0
            message = rendered(node.args[at] if len(node.args) > at else None)
            if message is None:
                continue
            named = {keyword.arg: keyword.value for keyword in node.keywords}
            fix = node.args[2] if finding and len(node.args) > 2 else named.get("hint")
            place = f"{path.relative_to(ROOT)}:{node.lineno}"
            yield Message(place, ast.unparse(function), message, None if fix is None else rendered(fix) or "{…}")


@functools.cache
def every() -> tuple[Message, ...]:
    """Return them, read once: not while tests are collected, which each of the processes does that run tests."""
    return tuple(messages())


def test_every_message_is_printed_in_one_place() -> None:
    assert len(every()) > 150
    for one in every():
        print(f"{one.place}  {one.kind}\n  error: {one.message}" + (f"\n  fix:   {one.fix}" if one.fix else ""))


@pytest.mark.parametrize("pattern", TRANSLATED)
def test_no_message_has_words_that_read_as_translated_or_are_another_librarys(pattern: str) -> None:
    found = [
        f"{one.place}: {text}"
        for one in every()
        for text in (one.message, one.fix)
        if text and re.search(pattern, text)
    ]
    assert found == []


def test_a_message_is_one_sentence_without_a_full_stop_and_begins_small() -> None:
    wrong = [
        f"{one.place}: {one.message}"
        for one in every()
        if one.message.endswith(".")
        or (re.match(r"[A-Z][a-z]+ [a-z]", one.message) and not one.message.startswith("PostgreSQL"))
    ]
    assert wrong == []


def test_whoever_can_act_is_told_how() -> None:
    lacking = [
        f"{one.place}: {one.message}"
        for one in every()
        if one.fix is None and one.kind in ("ConfigError", "UsageError", "EmbedderSetupError", "Finding.error")
    ]
    assert len(lacking) < 12, lacking
