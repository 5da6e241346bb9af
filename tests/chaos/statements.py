"""What a call of the package sends to a server, and whose method it is: names are resolved to what they stand for.

A name stands for each value that its function assigns to it; if there is none, for those of its module, and if it is
imported, for those of the module that it comes from. A call of a function stands for what that function returns.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "cdcsync"

Function = ast.FunctionDef | ast.AsyncFunctionDef


@cache
def nodes(root: ast.AST) -> tuple[ast.AST, ...]:
    """Return a node and all below it, as `ast.walk` does; kept, because the same trees are walked over and over."""
    return tuple(ast.walk(root))


class Module:
    """A file of the package with its names."""

    def __init__(self, text: str) -> None:
        self.tree = ast.parse(text)
        self._parents = {child: node for node in nodes(self.tree) for child in ast.iter_child_nodes(node)}
        self._assigned: dict[ast.AST, dict[str, list[ast.AST]]] = {}
        self._returned: dict[str, list[ast.AST]] = {}
        self.imported: dict[str, tuple[str, str]] = {}
        """The module and the name there of each name that comes from the package; no name if it is the module."""
        for node in nodes(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("cdcsync"):
                for one in node.names:
                    self.imported[one.asname or one.name] = (str(node.module), one.name)
            elif isinstance(node, Function):
                returned = [one.value for one in nodes(node) if isinstance(one, ast.Return) and one.value]
                self._returned.setdefault(node.name, []).extend(returned)
            for name, value in _assignments(node):
                self._assigned.setdefault(self._scope(node), {}).setdefault(name, []).append(value)

    def texts(self, call: ast.Call) -> set[str]:
        """Return the texts that a call is given."""
        found: set[str] = set()
        seen: set[ast.AST] = set()
        for one in call.args:
            if isinstance(one, ast.List | ast.Tuple | ast.Dict):  # values, or statements that are written here
                found |= {str(text.value) for text in nodes(one) if isinstance(text, ast.Constant)}
            else:
                self._gather(one, found, seen)
        return found

    def holders(self, classes: Collection[str]) -> set[str]:
        """Return the names that stand for an object of these classes, or for something that holds such objects."""
        held = set(classes)
        places = [pair for names in self._assigned.values() for pair in names.items()]
        for node in nodes(self.tree):
            if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
                name = node.arg if isinstance(node, ast.arg) else _identifier(node.target)
                places.append((name, [node.annotation]))
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.returns is not None:
                places.append((node.name, [node.returns]))
        while True:
            more = {name for name, values in places if any(held & _identifiers(value) for value in values)}
            if more <= held:
                return held - set(classes)
            held |= more

    def _scope(self, node: ast.AST) -> ast.AST:
        while node in self._parents:
            node = self._parents[node]
            if isinstance(node, Function):
                return node
        return self.tree

    def _gather(self, node: ast.AST, found: set[str], seen: set[ast.AST]) -> None:
        for one in nodes(node):
            if one in seen:
                continue
            seen.add(one)
            if isinstance(one, ast.Constant) and isinstance(one.value, str):
                found.add(one.value)
            elif isinstance(one, ast.Name | ast.Attribute) and isinstance(one.ctx, ast.Load):
                for module, value in self._values(one):
                    module._gather(value, found, seen)

    def _values(self, node: ast.Name | ast.Attribute) -> Iterator[tuple[Module, ast.AST]]:
        """Yield what a name stands for, each with the module in which it is written."""
        name = _identifier(node)
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and (came := self.imported.get(node.value.id)) is not None:
                other = of_name(f"{came[0]}.{came[1]}")
                if other is not None:
                    yield from other.own(name)
            elif isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                for names in self._assigned.values():
                    yield from ((self, value) for value in names.get(f"self.{name}", ()))
                yield from self.own(name)
            return
        scope = self._scope(node)
        while True:
            local = self._assigned.get(scope, {}).get(name, [])
            if local or scope is self.tree:
                break
            scope = self._scope(scope)
        yield from ((self, value) for value in local)
        if not local:
            yield from self.own(name)
            if (came := self.imported.get(name)) is not None and (other := of_name(came[0])) is not None:
                yield from other.own(came[1])

    def own(self, name: str) -> Iterator[tuple[Module, ast.AST]]:
        """Yield what a name of this module, or of a class in it, stands for."""
        yield from ((self, value) for value in self._assigned.get(self.tree, {}).get(name, ()))
        yield from ((self, value) for value in self._returned.get(name, ()))
        if (came := self.imported.get(name)) is not None and (other := of_name(came[0])) is not None:
            yield from other.own(came[1])


@cache
def module(text: str) -> Module:
    """Return the module of a text."""
    return Module(text)


@cache
def of_name(name: str) -> Module | None:
    """Return a module of the package; None if it is no module of it."""
    place = PACKAGE.joinpath(*name.split(".")[1:])
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.exists():
            return module(path.read_text())
    return None


def file_of(name: str) -> str:
    """Return the file of a module, by its path in the package."""
    return "/".join(name.split(".")[1:]) + ".py"


def _assignments(node: ast.AST) -> Iterator[tuple[str, ast.AST]]:
    match node:
        case ast.Assign(targets=targets, value=value):
            pairs = [(target, value) for target in targets]
        case ast.AnnAssign(target=target, value=value) | ast.AugAssign(target=target, value=value) if value is not None:
            pairs = [(target, value)]
        case ast.NamedExpr(target=target, value=value):
            pairs = [(target, value)]
        case ast.For(target=target, iter=value) | ast.AsyncFor(target=target, iter=value):
            pairs = [(target, value)]
        case ast.comprehension(target=target, iter=value):
            pairs = [(target, value)]
        case ast.withitem(context_expr=value, optional_vars=target) if target is not None:
            pairs = [(target, value)]
        case _:
            return
    for target, value in pairs:
        for one in nodes(target):
            if isinstance(one, ast.Name):
                yield one.id, value
            elif isinstance(one, ast.Attribute) and isinstance(one.value, ast.Name) and one.value.id == "self":
                yield f"self.{one.attr}", value


def _identifier(node: ast.AST) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _identifiers(node: ast.AST) -> set[str]:
    """Return the names in an expression; annotations may be texts."""
    names = {_identifier(one) for one in nodes(node)} - {""}
    return names | {f"self.{one}" for one in names}
