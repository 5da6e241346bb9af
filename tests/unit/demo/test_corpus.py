"""The demo's text: the standard library's documentation."""

from __future__ import annotations

import sysconfig
from itertools import islice
from pathlib import Path

import pytest

from cdcsync.demo.corpus import MIN_CHARACTERS, Entry, docstrings

SOURCE = '''"""A module whose only purpose is to be read by a test."""
import sys
raise SystemExit("imported!")

if sys.platform == "win32":
    def where(path):
        """Return where the thing is, on the one platform."""
else:
    def where(path, *, deep: bool = False) -> str:
        """Return where the thing is, on the other platform."""

class Box(dict, metaclass=type):
    """Holds things until somebody comes and asks for them."""

    @property
    def size(self):
        """How many things there are in the box, as a number."""

    @size.setter
    def size(self, value):
        """Throw things away until this many are left in the box."""

    def _hidden(self):
        """Private things are not part of the documentation at all."""

async def short():
    """Too short."""

def outer():
    def inner():
        """Definitions inside functions are out of everyone's reach."""

def surrogate():
    """A lone surrogate cannot be stored by any server: \\ud800 is one."""

def zero():
    """A NUL cannot be stored in a text either, whatever it means: \\0."""
'''


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of our own making."""
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    return tmp_path


def write(path: Path, source: str = SOURCE) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)


def test_the_standard_library_has_a_thousand_entries_and_more() -> None:
    entries = list(docstrings())
    assert len(entries) >= 1_000
    assert len({(entry.module, entry.name) for entry in entries}) == len(entries)
    assert all(len(entry.doc) >= MIN_CHARACTERS for entry in entries)
    assert not any(part.startswith("_") for entry in entries for part in entry.module.split("."))
    modules = {entry.module.partition(".")[0] for entry in entries}
    assert modules.isdisjoint({"test", "idlelib", "lib2to3", "turtledemo"})
    assert {"json", "threading", "zipfile"} <= modules


def test_a_limit_takes_the_beginning_of_the_same_order_from_many_modules() -> None:
    first = list(docstrings(300))
    assert first == list(islice(docstrings(), 300))
    assert len({entry.module for entry in first}) > 10
    assert list(docstrings(0)) == []


def test_entries_are_read_without_importing_anything(library: Path) -> None:
    write(library / "things.py")
    assert list(docstrings()) == [
        Entry("things", "__doc__", "module things", "A module whose only purpose is to be read by a test."),
        Entry("things", "where", "where(path)", "Return where the thing is, on the one platform."),
        Entry(
            "things", "Box", "class Box(dict, metaclass=type)", "Holds things until somebody comes and asks for them."
        ),
        Entry("things", "Box.size", "size(self)", "How many things there are in the box, as a number."),
    ]


def test_packages_are_named_as_they_are_imported(library: Path) -> None:
    write(library / "pack" / "__init__.py")
    write(library / "pack" / "part.py")
    assert {entry.module for entry in docstrings()} == {"pack", "pack.part"}


@pytest.mark.parametrize(
    "path", ["test/a.py", "pack/tests/a.py", "site-packages/a.py", "idlelib/a.py", "_private.py", "pack/_private/a.py"]
)
def test_what_is_no_public_library_is_left_out(path: str, library: Path) -> None:
    write(library / path)
    write(library / "kept.py")
    assert {entry.module for entry in docstrings()} == {"kept"}


@pytest.mark.parametrize("source", ["def broken(:", "# coding: nonsense\n", "x = '\0'"])
def test_a_file_that_cannot_be_parsed_is_left_out(source: str, library: Path) -> None:
    write(library / "broken.py", source)
    write(library / "kept.py")
    assert {entry.module for entry in docstrings()} == {"kept"}


def test_a_library_without_sources_has_no_entries(library: Path) -> None:
    assert list(docstrings()) == []
