"""At which crash points a test kills, as its code has it: a name in a comment or in a docstring is none.

A test kills by `CDCSYNC_CRASH_AT=…` in a call that starts a process, or by `kill_at(monkeypatch, module, …)`, which
ends the session. The point is a text, or a name that the test loops over or is parametrized by.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.chaos import commits
from tests.chaos.statements import PACKAGE, file_of


def killed_at(text: str) -> set[str]:
    """Return the crash points at which the tests of a file kill."""
    return {point for points in killing(text).values() for point in points}


def killing(text: str) -> dict[str, set[str]]:
    """Return the tests of a file that kill, each with the crash points at which it does."""
    tree = ast.parse(text)
    modules = {
        one.asname or one.name: file_of(f"{node.module}.{one.name}")
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cdcsync")
        for one in node.names
    }
    found = {
        test.name: {point for where in _kills(test) for point in _points(where, test, modules)}
        for test in ast.walk(tree)
        if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef) and test.name.startswith("test_")
    }
    return {test: points for test, points in found.items() if points}


def _kills(test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.expr]:
    """Yield the expressions that say where a test kills."""
    for node in ast.walk(test):
        if isinstance(node, ast.Call):
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "CDCSYNC_CRASH_AT")
            if isinstance(node.func, ast.Name) and node.func.id == "kill_at" and len(node.args) == 3:
                yield node.args[2]


def _points(where: ast.expr, test: ast.FunctionDef | ast.AsyncFunctionDef, modules: dict[str, str]) -> Iterator[str]:
    """Yield the points that an expression in a test stands for."""
    match where:
        case ast.Constant(value=str(point)):
            yield point.partition("#")[0]
        case ast.Tuple(elts=several) | ast.List(elts=several):
            for one in several:
                yield from _points(one, test, modules)
        case ast.Name(id=name):
            for values in _values(name, test):
                yield from _points(values, test, modules)
        case ast.Call(func=ast.Name(id="points"), args=[ast.Name(id=module)]) if module in modules:
            yield from commits.points_of((PACKAGE / modules[module]).read_text())
        case ast.ListComp(elt=ast.Name(id=name), generators=[ast.comprehension(iter=several, ifs=conditions)]):
            for point in _points(several, test, modules):
                # The conditions are of our own tests, and of the point alone.
                if all(eval(ast.unparse(one), {"__builtins__": {}}, {name: point}) for one in conditions):
                    yield point


def _values(name: str, test: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[ast.expr]:
    """Yield the lists of values that a name of a test takes, and the single ones where it has them beside others."""
    for node in ast.walk(test):
        if isinstance(node, ast.For):
            yield from _of_target(name, node.target, node.iter)
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize":
            yield from _of_target(name, *decorator.args[:2])


def _of_target(name: str, target: ast.expr, values: ast.expr) -> Iterator[ast.expr]:
    """Yield what a name takes of values, if it is the target or among several."""
    match target:
        case ast.Name(id=called) | ast.Constant(value=str(called)) if called == name:
            yield values
        case ast.Tuple(elts=several) if isinstance(values, ast.Tuple | ast.List):
            for place, one in enumerate(several):
                if name in (getattr(one, "id", ""), getattr(one, "value", "")):
                    yield from (each.elts[place] for each in values.elts if isinstance(each, ast.Tuple))
