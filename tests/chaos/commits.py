"""Where a worker or a command commits or acknowledges, found by walking the syntax trees of its files.

A *commit site* is one of:

- `async with ….transaction():`, unless it always rolls back. It needs a crash point as the last statement of its body
  and another as the next statement after it.
- `await` of a statement that writes by itself, outside of a transaction. It needs a crash point as the next statement.
- `await` of a function that leaves the commit to its caller, outside of a transaction. The same.
- `await` of a function of an `INSIDE` file that writes, outside of a transaction. The same.
- `await` of what tells the source something for good: a status, a slot, a mark. The same.

A statement is what the call is given, with names resolved to their assignments: see `statements`. Senders are the
functions of `SENDING` and each function that passes one of its parameters on to a sender as the statement.
A function leaves the commit to its caller if its docstring says "The caller commits" or "the caller's transaction".
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import msgspec

from tests.chaos.statements import PACKAGE, file_of, module, nodes

FOLDERS = ("source", "target", "flows", "worker", "postgres")
"""What workers and commands run that may write."""

INSIDE = (
    "target/apply.py",
    "target/belongings.py",
    "target/stage.py",
    "target/failures/documents.py",
    "target/ddl/chunks_view.py",
    "target/ddl/relations.py",
    "target/ddl/generations.py",
    "target/ddl/grants.py",
    "target/ddl/marked.py",
    "target/ddl/shared.py",
    "target/ddl/standing.py",
    "target/ddl/tiers.py",
    "target/ddl/views.py",
)
"""Files whose functions run in their caller's transaction; a transaction of their own in it is a savepoint.

Each await of one that writes is a commit site if there is no transaction around it.
"""

OWNERS = {
    "target/registry.py": re.compile(r"registry(\(.*\))?\.(\w+)$", re.IGNORECASE),
    "target/generations.py": re.compile(r"generations(\(.*\))?\.(\w+)$", re.IGNORECASE),
    "target/audits.py": re.compile(r"audits(\(.*\))?\.(\w+)$", re.IGNORECASE),
    "target/pipelines.py": re.compile(r"pipelines(\(.*\))?\.(\w+)$", re.IGNORECASE),
}
"""Files that hold every statement on a table and leave each commit to the caller, with how a caller names them."""

QUERIES = PACKAGE / "postgres" / "queries.py"

TRANSACTIONS = ("transaction", "_chain")
"""What makes a transaction of a block."""

SENDING = frozenset(("execute", "executemany", "copy"))
"""Calls that send a statement; what passes a parameter of its own on to one of them sends, too."""

EXEMPT = {
    ("flows/evaluate/recall.py", "_snapshot"): "reads only",
    ("flows/setup/proof.py", "_ends_with"): "acknowledges nothing that was not before",
    ("flows/audit/soundness.py", "examine_chunks"): "reads only",
    ("target/locked_session.py", "_chain"): "its callers have the points",
    ("source/catalog.py", "read_catalog"): "reads only",
    ("flows/words.py", "_written"): "reads only",
    ("source/transactions.py", "in_doubt"): "writes what nobody reads",
    ("target/search/query.py", "search"): "reads only",
    ("target/search/query.py", "_read_apart"): "reads only",
    ("target/search/query.py", "check_condition"): "reads only",
    ("target/ddl/filters.py", "read_value"): "reads only",
    ("target/search/query.py", "_session_function"): "makes a function of its own session",
    ("target/requests/queue.py", "end_page"): "runs in the transaction of its batch",
    ("source/marks.py", "emit_mark"): "its caller has the point",
    ("source/marks.py", "flush"): "writes what nobody reads",
    ("source/reads.py", "reading"): "reads only",
    ("source/conditions.py", "_unless_locked"): "reads only",
    ("postgres/autovacuums.py", "end_autovacuums"): "locks, and writes nothing",
    ("postgres/sessions.py", "connect"): "settings of the session",
    ("postgres/temporary.py", "freeze"): "tables that end with the session",
    ("target/session.py", "_takes"): "always rolled back",
    ("target/backlog.py", "take_over"): "its transaction, with the points, is that of `_storing`",
}
"""Functions that commit nothing which outlives the session, or whose callers have the point."""

FINAL = (".send_status", ".create_slot", ".set_failover", "emit_mark")
"""Calls that tell the source something for good."""

WRITES = re.compile(
    r"\s*((INSERT|UPDATE|DELETE|TRUNCATE|CREATE|ALTER|DROP|COMMENT|VACUUM|REINDEX)\b|WITH .*(INSERT|UPDATE|DELETE) "
    r"|SELECT pg_(drop_replication_slot|replication_slot_advance|logical_emit_message))",
    re.DOTALL,
)
CALLERS = re.compile(r"caller\s+commits|caller's\s+transaction|needs a transaction around it", re.IGNORECASE)


class Site(msgspec.Struct, frozen=True, order=True):
    """A place that commits or acknowledges, and what it lacks."""

    file: str
    line: int
    function: str
    what: str
    lacks: str


class Leaving(msgspec.Struct, frozen=True):
    """The functions that leave the commit to their callers: by their own word, and of the files that own a table."""

    functions: set[str]
    owned: set[tuple[re.Pattern[str], str]]
    inside: set[str]
    methods: set[str] = set()
    holders: set[str] = set()

    def within(self, text: str) -> Leaving:
        """Return the same for the calls in a file: of what it imports from `INSIDE` files, and of objects of theirs."""
        written, inside = module(text), _inside_writing()
        names = {
            name
            for name, (came, there) in written.imported.items()
            if file_of(came) in INSIDE and there in inside[file_of(came)]
        }
        classes = {name for name, (came, _) in written.imported.items() if file_of(came) in INSIDE} - names
        methods = {name for names in inside.values() for name in names}
        return Leaving(self.functions, self.owned, names, methods, written.holders(classes))

    def without(self, names: set[str]) -> Leaving:
        """Return the same without functions of these names."""
        return msgspec.structs.replace(self, functions=self.functions - names)

    def has(self, call: ast.Call) -> bool:
        """Say whether a call is one of such a function."""
        if _called(call) in self.functions or _called(call) in self.inside:
            return True
        if isinstance(call.func, ast.Attribute) and _called(call) in self.methods:
            receiver = {one.id for one in nodes(call.func.value) if isinstance(one, ast.Name)}
            receiver |= {one.attr for one in nodes(call.func.value) if isinstance(one, ast.Attribute)}
            if receiver & self.holders:
                return True
        named = ast.unparse(call.func)
        return any(match[2] == name for pattern, name in self.owned if (match := pattern.search(named)))


def points(package: Path = PACKAGE) -> list[str]:
    """Return the names of all crash points, in the order of files and lines; a name that is used twice comes twice."""
    return [point for path in sorted(package.rglob("*.py")) for point in points_of(path.read_text())]


def points_of(text: str) -> list[str]:
    """Return the names of the crash points of a file."""
    return [
        str(call.args[0].value)
        for call in ast.walk(ast.parse(text))
        if _is_point(call) and isinstance(call, ast.Call) and isinstance(call.args[0], ast.Constant)
    ]


def sources(package: Path = PACKAGE) -> dict[str, str]:
    """Return the text of each file whose commits are looked at, by its path in the package."""
    paths = [path for folder in FOLDERS for path in sorted((package / folder).rglob("*.py"))]
    texts = {str(path.relative_to(package)): path.read_text() for path in paths}
    return {name: text for name, text in texts.items() if name not in INSIDE}


def lacking(files: Mapping[str, str], *, only: str | None = None) -> list[Site]:
    """Return the commit sites that lack a crash point, of one file if it is named."""
    callers = {name for file, text in files.items() if file not in OWNERS for name in _callers(text)}
    owned = {(pattern, name) for file, pattern in OWNERS.items() for name in _writing(files[file])}
    names = [name for name in files if name not in OWNERS and only in (None, name)]
    leaving = Leaving(callers, owned, set())
    return sorted(site for name in names for site in _sites(name, files[name], leaving.within(files[name])))


@cache
def _inside_writing() -> Mapping[str, frozenset[str]]:
    """Return the functions of each `INSIDE` file that write, by themselves or by others of such files."""
    texts = {file: (PACKAGE / file).read_text() for file in INSIDE}
    callers = {name for path in PACKAGE.rglob("*.py") for name in _callers(path.read_text())}
    writing: set[str] = set()
    while True:
        found = {file: _writing(text, frozenset(callers | writing)) for file, text in texts.items()}
        more = {name for names in found.values() for name in names}
        if more <= writing:
            return found
        writing |= more


@cache
def _senders(text: str) -> frozenset[str]:
    """Return what a file calls that sends a statement: of `SENDING`, of the package's queries, and of its own."""
    senders = set(SENDING)
    for one in (QUERIES.read_text(), text):
        tree = module(one).tree
        functions = [node for node in nodes(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        while True:
            more = {function.name for function in functions if _passes_on(function, senders)}
            if more <= senders:
                break
            senders |= more
    return frozenset(senders)


def _passes_on(function: ast.FunctionDef | ast.AsyncFunctionDef, senders: set[str]) -> bool:
    """Say whether a function sends a parameter of its own as a statement."""
    parameters = {one.arg for one in function.args.args + function.args.kwonlyargs} - {"self", "connection"}
    return any(
        isinstance(named, ast.Name) and named.id in parameters
        for node in nodes(function)
        if isinstance(node, ast.Call) and _called(node) in senders
        for argument in node.args[:2]
        if not isinstance(argument, ast.List | ast.Tuple | ast.Dict)
        for named in nodes(argument)
    )


@cache
def _writing(text: str, others: frozenset[str] = frozenset()) -> frozenset[str]:
    """Return the functions of a file that write, by themselves or by another one of them, or of `others`."""
    functions = [node for node in nodes(_parsed(text)) if isinstance(node, ast.AsyncFunctionDef)]
    writing: set[str] = set()
    while True:
        more = {
            one.name
            for one in functions
            for node in nodes(one)
            if isinstance(node, ast.Call) and (_called(node) in writing | others or _writes(node, text))
        }
        if more <= writing:
            return frozenset(writing)
        writing |= more


@cache
def _callers(text: str) -> frozenset[str]:
    """Return the functions of a file that leave the commit to their callers."""
    functions = [node for node in nodes(_parsed(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    return frozenset(one.name for one in functions if _by_caller(one))


@cache
def _parsed(text: str) -> ast.Module:
    return module(text).tree


def _sites(file: str, text: str, callers: Leaving) -> Iterator[Site]:
    tree = _parsed(text)
    inside = _inside(tree)
    for function in nodes(tree):
        if not isinstance(function, ast.AsyncFunctionDef) or function.name in inside or _by_caller(function):
            continue
        if (file, function.name) not in EXEMPT:
            order = list(_statements(function.body))
            yield from _of_block(file, function.name, function.body, order, callers.without(inside), text)


def _inside(tree: ast.Module) -> set[str]:
    """Return the private functions of a file that are called only inside a transaction."""
    functions = [node for node in nodes(tree) if isinstance(node, ast.AsyncFunctionDef)]
    inside = {one.name for one in functions if one.name.startswith("_") and not one.name.startswith("__")}
    while True:
        outside = {
            name for one in functions if one.name not in inside and not _by_caller(one) for name in _free(one.body)
        }
        if not inside & outside:
            return inside
        inside -= outside


def _free(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the names of what is called outside of a transaction."""
    for statement in body:
        if _is_transaction(statement):
            continue
        for block in _blocks(statement):
            yield from _free(block)
        yield from (_called(node) for node in _header(statement) if isinstance(node, ast.Call))


def _header(statement: ast.stmt) -> Iterator[ast.AST]:
    """Yield what a statement holds besides the statements in it."""
    for child in ast.iter_child_nodes(statement):
        if not isinstance(child, ast.stmt | ast.ExceptHandler | ast.match_case):
            yield from nodes(child)


def _of_block(
    file: str, function: str, body: list[ast.stmt], order: list[ast.stmt], callers: Leaving, text: str
) -> Iterator[Site]:
    """Yield what lacks a point among these statements; inside a transaction nothing commits by itself."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if _is_transaction(statement):
            assert isinstance(statement, ast.AsyncWith)
            inner = list(_statements(statement.body))
            if not _is_point(inner[-1]):
                yield Site(file, inner[-1].lineno, function, "transaction", "a point before its end")
            if not _is_point(_next(order, inner[-1])):
                yield Site(file, statement.lineno, function, "transaction", "a point after it")
            continue
        for block in _blocks(statement):
            yield from _of_block(file, function, block, order, callers, text)
        for what in _commits(statement, callers, text):
            if not _is_point(_next(order, statement)):
                yield Site(file, statement.lineno, function, what, "a point after it")


def _commits(statement: ast.stmt, callers: Leaving, text: str) -> Iterator[str]:
    for node in _header(statement):
        if isinstance(node, ast.Await) and isinstance(node.value, ast.Call):
            name = _called(node.value)
            if callers.has(node.value) or ast.unparse(node.value.func).endswith(FINAL):
                yield name
            elif _writes(node.value, text):
                yield "a statement that writes"


def _writes(call: ast.Call, text: str) -> bool:
    """Say whether a call in a file sends a statement that changes something which outlives the session."""
    if _called(call) not in _senders(text):
        return False
    return any(WRITES.match(one) and "TEMP TABLE" not in one for one in module(text).texts(call))


def _called(call: ast.Call) -> str:
    match call.func:
        case ast.Attribute(attr=name) | ast.Name(id=name):
            return name
    return ""


def _is_transaction(statement: ast.stmt) -> bool:
    if not isinstance(statement, ast.AsyncWith):
        return False
    for item in statement.items:
        call = item.context_expr
        if isinstance(call, ast.Call) and _called(call) in TRANSACTIONS:
            return not any(keyword.arg == "force_rollback" for keyword in call.keywords)
    return False


def _is_point(node: ast.AST | None) -> bool:
    if isinstance(node, ast.Expr):
        node = node.value
    return isinstance(node, ast.Call) and _called(node) == "crash_point"


def _by_caller(function: ast.AST) -> bool:
    assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
    return bool(CALLERS.search(ast.get_docstring(function) or ""))


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the simple statements of a block in the order in which they are written."""
    for statement in body:
        if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        blocks = _blocks(statement)
        if not any(blocks):
            yield statement
        for block in blocks:
            yield from _statements(block)


def _blocks(statement: ast.stmt) -> list[list[ast.stmt]]:
    """Return the blocks of a compound statement in the order in which they are written."""
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return []
    blocks = [getattr(statement, "body", [])]
    blocks += [handler.body for handler in getattr(statement, "handlers", [])]
    blocks += [getattr(statement, name, []) for name in ("orelse", "finalbody")]
    return blocks + [case.body for case in getattr(statement, "cases", [])]


def _next(order: list[ast.stmt], statement: ast.stmt) -> ast.stmt | None:
    """Return the simple statement that follows another, or with which a compound one begins."""
    if statement not in order:
        return next(_statements([statement]), None)
    place = order.index(statement) + 1
    return order[place] if place < len(order) else None
