"""Fills the parts of written pages that follow from the code, each between two comments:

    <!-- metrics stream -->   tables of metrics.md, from `cdcsync.metrics`
    <!-- labels -->           their labels
    <!-- events -->           levels and keys of logs.md, from the calls of the loggers; the meanings are the page's own
    <!-- api Index.search --> headings and text of api.md, from signatures and docstrings
    <!-- fields Hit -->       the fields of a struct
    <!-- errors -->           the public errors
    <!-- end -->

Between the pages' own words, these are what docs/reference.py writes and a test compares.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec

import cdcsync
from cdcsync.errors import CdcsyncError
from cdcsync.metrics import LABELS, Metrics

PACKAGE = Path(cdcsync.__file__).parent
HERE = Path(__file__).parent

_PART = re.compile(
    r"(<!-- (metrics|labels|events|api|fields|errors)(?: ([\w.]+))? -->\n)(.*?)(<!-- end -->)", re.DOTALL
)


def filled(page: str) -> str:
    """Return a page with its parts as the code has them now."""

    def fill(match: re.Match[str]) -> str:
        before, kind, argument, content, after = match.groups()
        return f"{before}\n{_MADE[kind](argument, content).strip()}\n\n{after}"

    return _PART.sub(fill, (HERE / page).read_text(encoding="utf-8"))


# -- metrics ------------------------------------------------------------------------------------------------------


def _metrics(part: str, _: str) -> str:
    rows = []
    for one in Metrics().described:
        if one.part == part:
            labels = ", ".join(f"`{label}`" for label in one.labels)
            rows.append(f"| `{one.name}` | {one.kind} | {one.unit} | {labels} | {one.meaning} |")
    assert rows, f"no metric is of the part {part}"
    return "\n".join(["| metric | type | unit | labels | meaning |", "| --- | --- | --- | --- | --- |", *rows])


def _labels(_: str, __: str) -> str:
    rows = [f"| `{name}` | {values} |" for name, values in LABELS.items()]
    return "\n".join(["| label | values |", "| --- | --- |", *rows])


# -- events -------------------------------------------------------------------------------------------------------

_LEVELS = ("debug", "info", "warning", "error", "critical")
_LEVEL_OF = {level: level for level in _LEVELS} | {"exception": "error"}
"""By method of a logger, the level that is written."""


class Event(msgspec.Struct, frozen=True):
    """How an event is logged: its levels from mild to severe, and its keys in the order of the code."""

    levels: tuple[str, ...]
    keys: tuple[str, ...]


def log_calls() -> Iterator[tuple[str, tuple[str, ...], ast.Call]]:
    """Yield each call of a module's logger, with its place and the levels that it may have."""
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if "log." not in text:  # most modules log nothing, and parsing all of them takes seconds
            continue
        tree = ast.parse(text)
        # `say = log.info if … else log.error`, and then `say(…)`
        aliases = {
            target.id: _levels(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and _levels(node.value)
            for target in node.targets
            if isinstance(target, ast.Name) and not isinstance(node.value, ast.Call)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            alias = aliases.get(node.func.id) if isinstance(node.func, ast.Name) else None
            if levels := alias or (_levels(node.func) if isinstance(node.func, ast.Attribute) else None):
                yield f"{path.relative_to(PACKAGE.parent)}:{node.lineno}", levels, node


def _levels(node: ast.AST) -> tuple[str, ...]:
    """Return the levels of the module's logger that an expression names."""
    named = {
        _LEVEL_OF.get(part.attr)
        for part in ast.walk(node)
        if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "log"
    }
    return tuple(level for level in _LEVELS if level in named)


def logged() -> dict[str, Event]:
    """Return the events of the code; one that is logged in several places has the keys of all."""
    events: dict[str, Event] = {}
    for _, levels, call in log_calls():
        name = ast.literal_eval(call.args[0])
        before = events.get(name, Event((), ()))
        events[name] = Event(
            tuple(level for level in _LEVELS if level in (*before.levels, *levels)),
            tuple(dict.fromkeys((*before.keys, *(keyword.arg or "**" for keyword in call.keywords)))),
        )
    return events


def _events(_: str, content: str) -> str:
    events = logged()

    def row(match: re.Match[str]) -> str:
        name, meaning = match.groups()
        if (event := events.get(name)) is None:
            return ""
        return f"| `{name}` | {', '.join(event.levels)} | {' '.join(f'`{key}`' for key in event.keys)} | {meaning} |\n"

    return re.sub(r"^\| `(\w+)` \| [^|]*\| [^|]*\| (.+) \|\n", row, content, flags=re.MULTILINE)


# -- the Python interface -----------------------------------------------------------------------------------------


def _api(name: str, _: str) -> str:
    found: object = cdcsync
    for part in name.split("."):
        found = inspect.getattr_static(found, part) if inspect.isclass(found) else getattr(found, part)
    if isinstance(found, classmethod):
        found = found.__func__
    heading = name
    if inspect.isroutine(found):
        parameters = [
            one.replace(annotation=inspect.Parameter.empty)
            for one in inspect.signature(found).parameters.values()
            if one.name not in ("self", "cls")
        ]
        heading += str(inspect.Signature(parameters))
    return f"### `{heading}`\n\n{_rendered(inspect.getdoc(found) or '')}"


def _rendered(docstring: str) -> str:
    """Return a docstring as Markdown: parameters as a list, errors as another."""
    text, *fields = re.split(r"^:(?=param|raises|ivar)", docstring, flags=re.MULTILINE)
    lines: dict[str, list[str]] = {"param": [], "ivar": [], "raises": []}
    for field in fields:
        kind, names, meaning = re.fullmatch(r"(\w+) ([^:]+):\s*(.*)", field.strip(), re.DOTALL).groups()  # type: ignore[union-attr]
        named = ", ".join(f"`{one.strip()}`" for one in names.split(","))
        lines[kind].append(f"- {named}: {_one_line(meaning)}")
    paragraphs = [_one_line(part) for part in text.strip().split("\n\n")]
    described = [*lines["param"], *lines["ivar"]]
    if described:
        paragraphs.append("\n".join(described))
    if lines["raises"]:
        paragraphs.append("Raises\n\n" + "\n".join(lines["raises"]))
    return "\n\n".join(paragraphs)


def _fields(name: str, _: str) -> str:
    struct = getattr(cdcsync, name)
    tree = ast.parse(inspect.getsource(struct)).body[0]
    assert isinstance(tree, ast.ClassDef)
    rows = []
    for node, after in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            assert isinstance(after, ast.Expr), f"{name}.{node.target.id} has no docstring"
            meaning = _one_line(inspect.cleandoc(ast.literal_eval(after.value)))
            rows.append(
                f"| `{node.target.id}` | `{ast.unparse(node.annotation)}` | {meaning} |".replace(
                    " | None`", "` or `None`"
                )
            )
    return "\n".join(["| field | type | meaning |", "| --- | --- | --- |", *rows])


def _errors(_: str, __: str) -> str:
    rows = []
    for name in cdcsync.__all__:
        error = getattr(cdcsync, name)
        if inspect.isclass(error) and issubclass(error, CdcsyncError):
            base = "" if error is CdcsyncError else f"`{error.__bases__[0].__name__}`"
            summary = _one_line((inspect.getdoc(error) or "").partition("\n\n")[0])
            rows.append(f"| `{name}` | {base} | {error.retry.value} | {summary} |")
    return "\n".join(["| error | is a | retry | when |", "| --- | --- | --- | --- |", *rows])


def _one_line(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().replace("|", "\\|")


_MADE = {
    "metrics": _metrics,
    "labels": _labels,
    "events": _events,
    "api": _api,
    "fields": _fields,
    "errors": _errors,
}
