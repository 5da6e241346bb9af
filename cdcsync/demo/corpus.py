"""Real text for the demo: the documentation inside Python's standard library.

Every installation of Python carries thousands of docstrings that its users can judge a search by. They
are read from the source files with `ast`; nothing is imported, so nothing is executed.
"""

from __future__ import annotations

import ast
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import msgspec

MIN_CHARACTERS = 40
"""Shorter docstrings ("See base class.") say nothing that a search could find."""

EXCLUDED = frozenset(
    {"dist-packages", "encodings", "idlelib", "lib2to3", "site-packages", "test", "tests", "turtledemo"}
)
"""Directories that hold no library to read about: tests, examples, an editor, generated tables of characters, and what
others have installed."""


Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class Entry(msgspec.Struct, frozen=True):
    """A documented object; `(module, name)` is unique."""

    module: str
    """Dotted, as imported."""
    name: str
    """Dotted within the module; `__doc__` for the module itself."""
    signature: str
    """As in the source, without the body: `copy(x)`, `class Thread`, `module copy`."""
    doc: str
    """The docstring, with its indentation removed."""


def docstrings(limit: int | None = None) -> Iterator[Entry]:
    """Yield the public documentation of the standard library.

    The order is that of a checksum of the modules' names: the same on every machine, and such that the first thousand
    entries come from all over the library. A file that is missing or cannot be parsed is left out.

    :param limit: how many entries at most; `None` is all (some 4,500 in CPython 3.11).
    """
    root = Path(sysconfig.get_path("stdlib"))
    remaining = limit
    for module, path in sorted(_modules(root), key=lambda found: (zlib.crc32(found[0].encode()), found[0])):
        for entry in _entries(module, path):
            if remaining is not None:
                if remaining <= 0:
                    return
                remaining -= 1
            yield entry


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the names and files of the public modules below `root`."""
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[-1] == "__init__":
            parts = parts[:-1]
        public = all(part.isidentifier() and not part.startswith("_") for part in parts)
        if parts and public and EXCLUDED.isdisjoint(parts):
            yield ".".join(parts), path


def _entries(module: str, path: Path) -> Iterator[Entry]:
    """Yield what one file documents, in the order of the file."""
    try:
        with warnings.catch_warnings(action="ignore"):  # such as invalid escapes: not ours to correct
            tree = ast.parse(path.read_bytes(), filename=str(path))
    except (OSError, SyntaxError, ValueError):
        return
    seen = set[str]()
    for name, signature, node in ((("__doc__", f"module {module}", tree)), *_definitions(tree.body, "")):
        doc = ast.get_docstring(node)
        # A property's setter or a platform's variant has the name of an earlier definition: the first one counts.
        if doc is not None and len(doc) >= MIN_CHARACTERS and name not in seen and _storable(doc):
            seen.add(name)
            yield Entry(module, name, signature, doc)


def _definitions(body: list[ast.stmt], prefix: str) -> Iterator[tuple[str, str, Definition]]:
    """Yield the public definitions of a module or class, those under `if` and `try` too, but none inside functions."""
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef() if node.name.startswith("_"):
                continue
            case ast.ClassDef():
                name = prefix + node.name
                bases = ", ".join(map(ast.unparse, [*node.bases, *node.keywords]))
                yield name, f"class {node.name}({bases})" if bases else f"class {node.name}", node
                yield from _definitions(node.body, f"{name}.")
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
                yield prefix + node.name, f"{node.name}({ast.unparse(node.args)}){returns}", node
            case ast.If() | ast.Try():
                yield from _definitions(node.body, prefix)
                yield from _definitions(node.orelse, prefix)
                if isinstance(node, ast.Try):
                    for handler in node.handlers:
                        yield from _definitions(handler.body, prefix)
            case _:
                continue


def _storable(text: str) -> bool:
    """Return whether PostgreSQL can hold the text: UTF-8 without lone surrogates, and no NUL."""
    try:
        return b"\0" not in text.encode()
    except UnicodeEncodeError:
        return False
