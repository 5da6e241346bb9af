"""Functions of the user's: found, known by their version, and kept from doing harm."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cdcsync.documents.functions import ChunkFunction, DocumentFunction
from cdcsync.errors import ConfigError, DocumentError

MODULE = """
def document(row):
    return f"{row['title']} by {row['author']}"

def nothing(row):
    return None

def fails(row):
    return str(int(row["title"]))

def wrong(row):
    return {"a": object(), "b": "a\\0b", "c": "\\udc00"}[row["title"]]

def halves(text):
    return text.split("|")

class Maker:
    def made(self, row):
        return "made"

made = Maker().made
text = "no function"
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The module, under a name that no other test has imported."""
    name = f"functions_of_{abs(hash(request.node.nodeid))}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    return name


def documents(path: str) -> DocumentFunction:
    return DocumentFunction(path, ("title", "author"), "indexes.a.documents")


def test_a_function_gets_the_row_by_column_and_makes_its_document(module: str) -> None:
    assert documents(f"{module}:document").render(["Moby Dick", None]) == "Moby Dick by None"
    assert documents(f"{module}:made").render(["", ""]) == "made"


def test_a_row_may_have_no_document(module: str) -> None:
    assert documents(f"{module}:nothing").render(["a", "b"]) == ""


def test_an_error_says_what_and_where_and_nothing_of_the_row(module: str) -> None:
    with pytest.raises(DocumentError) as caught:
        documents(f"{module}:fails").render(["secret", "b"])

    line = 1 + MODULE.splitlines().index('    return str(int(row["title"]))')
    assert str(caught.value) == f"{module}:fails failed with ValueError in {module}.py, line {line}"


@pytest.mark.parametrize(
    ("title", "message"),
    [("a", "returned object, not str"), ("b", "with a NUL character"), ("c", "holds a lone surrogate")],
)
def test_what_postgresql_could_not_store_is_that_row_s_error(module: str, title: str, message: str) -> None:
    with pytest.raises(DocumentError, match=message):
        documents(f"{module}:wrong").render([title, ""])


def test_chunks_are_a_list_of_texts(module: str) -> None:
    assert ChunkFunction(f"{module}:halves", "w").cut("a|b") == ["a", "b"]
    with pytest.raises(DocumentError, match="returned str, not a list of texts"):
        ChunkFunction("builtins:str", "w").cut("a")
    with pytest.raises(DocumentError, match="returned int, not a list of texts"):
        ChunkFunction("builtins:len", "w").cut("a")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module_here:f", "cannot be imported: ModuleNotFoundError"),
        ("{module}:no_such_function", "cannot be imported: AttributeError"),
        ("{module}:text", "is not a function"),
        ("builtins:len", "has no source file and no version"),
    ],
)
def test_a_function_that_is_not_there_is_a_wrong_configuration(module: str, path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        documents(path.format(module=module)).fingerprint  # noqa: B018
    assert caught.value.where == "indexes.a.documents"
    assert caught.value.hint


def test_without_a_version_any_change_of_the_file_is_a_change(module: str, tmp_path: Path) -> None:
    before = documents(f"{module}:document").fingerprint
    assert documents(f"{module}:document").fingerprint == before
    assert documents(f"{module}:nothing").fingerprint != before

    path = tmp_path / f"{module}.py"
    path.write_text(path.read_text() + "# more\n")

    assert documents(f"{module}:document").fingerprint != before


def test_with_a_version_only_that_counts(module: str, tmp_path: Path) -> None:
    import importlib

    function: Any = importlib.import_module(module).document
    function.version = 1
    before = documents(f"{module}:document").fingerprint
    path = tmp_path / f"{module}.py"
    path.write_text(path.read_text() + "# more\n")
    assert documents(f"{module}:document").fingerprint == before

    function.version = 2

    assert documents(f"{module}:document").fingerprint != before
