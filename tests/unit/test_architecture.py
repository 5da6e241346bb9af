"""docs/architecture.md and CONTRIBUTING.md against the tree: floors, named files, and a test file for each module."""

from __future__ import annotations

import ast
import re
import tomllib
from pathlib import Path

import pytest

from tests import ROOT

PACKAGE = ROOT / "cdcsync"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
INTERNAL = {"__main__", "__init__", "py.typed", "__pycache__"}


def floors_of_the_page() -> list[set[str]]:
    table = PAGE.split("## The floors")[1].split("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    return [set(re.findall(r"`(\w+)(?:/|\.py)`", row)) for row in rows]


def test_the_floors_are_those_that_import_linter_holds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    layers = next(one["layers"] for one in contracts if one["id"] == "floors")
    held = [set(re.findall(r"\w+", layer)) - INTERNAL for layer in layers]
    assert floors_of_the_page() == [floor for floor in held if floor]


def test_each_entry_of_the_package_has_its_floor() -> None:
    entries = {path.stem for path in PACKAGE.iterdir() if path.name not in INTERNAL} - INTERNAL
    assert set().union(*floors_of_the_page()) == entries


def test_the_files_that_the_page_names_exist() -> None:
    named = [name for name in re.findall(r"`([\w/]+(?:\.\w+)?)`", PAGE) if "/" in name.strip("/")]
    assert len(named) > 20
    places = [PACKAGE, ROOT]
    gone = [
        name
        for name in named
        if not any((place / name).exists() or (place / f"{name.split('.')[0]}.py").exists() for place in places)
    ]
    assert not gone


def siblings(folder: Path) -> dict[str, list[Path]]:
    """Return the modules and folders of a folder, and their files."""
    modules = {path.stem: [path] for path in folder.glob("*.py") if path.stem not in INTERNAL}
    return modules | {path.parent.name: [*path.parent.rglob("*.py")] for path in folder.glob("*/__init__.py")}


def imported(files: list[Path], package: str) -> set[str]:
    """Return the modules of a package that these files import, by their names in it."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))]
    found = [f"{node.module}.{one.name}" for node in nodes if isinstance(node, ast.ImportFrom) for one in node.names]
    found += [one.name for node in nodes if isinstance(node, ast.Import) for one in node.names]
    return {name.removeprefix(f"{package}.").split(".")[0] for name in found if name.startswith(f"{package}.")}


@pytest.mark.parametrize(
    "folder",
    sorted(path.parent for path in PACKAGE.rglob("*/__init__.py")),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_each_folder_lists_its_files_in_the_order_in_which_they_import(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    listed = re.findall(r"^ {4}(\w+)/? {2,}\S", text, re.MULTILINE)
    files = siblings(folder)
    assert sorted(listed) == sorted(files)
    package = ".".join(folder.relative_to(ROOT).parts)
    upwards = [
        (name, other)
        for place, name in enumerate(listed)
        for other in imported(files[name], package) & set(listed[place + 1 :])
    ]
    assert not upwards


KEPT = {
    # Of one attempt, raised for those alone who wait for it.
    ("embedders/ray.py", "self._failure"),
}
"""Errors that are raised although they were made before, and why that keeps little."""


def test_each_error_that_is_raised_is_a_new_one() -> None:
    """One that is raised again and again keeps the frames of every time, and with them the call's arguments."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assigned = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            raised = node.exc
            held = isinstance(raised, ast.Attribute) and ast.unparse(raised.value) == "self"
            of_module = isinstance(raised, ast.Name) and (raised.id in assigned or raised.id.isupper())
            if held or of_module:
                found.add((str(path.relative_to(PACKAGE)), ast.unparse(raised)))
    assert found == KEPT


def test_what_others_wrote_is_read_with_one_list_of_what_that_may_raise() -> None:
    """Bytes that are no UTF-8, and what is nested too deeply, are no errors of msgspec's own."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Try):
                caught = [ast.unparse(handler.type) for handler in node.handlers if handler.type is not None]
            elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("suppress"):
                caught = [ast.unparse(argument) for argument in node.args]
            else:
                continue
            if any("msgspec." in one for one in caught) and not any("MALFORMED" in one for one in caught):
                found.add(f"{path.relative_to(PACKAGE)}: {caught}")
    assert not found


def test_files_of_text_are_opened_in_an_encoding_that_is_named() -> None:
    unnamed = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, "attr", getattr(call.func, "id", None))
            texts = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
            modes = [one for one in texts if re.fullmatch("[rwaxbt+]{1,3}", one)]
            opens = name in ("open", "fdopen") and (bool(modes) or isinstance(call.func, ast.Name))
            whole = name in ("read_text", "write_text")
            named = any(one.arg == "encoding" for one in call.keywords) or any(one.startswith("utf-8") for one in texts)
            if (whole or opens) and not named and not any("b" in one for one in modes):
                unnamed.append(f"{path.relative_to(PACKAGE)}:{call.lineno}")
    assert unnamed == []


def test_each_module_has_a_test_file_of_its_name_or_a_word_about_where_it_runs() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Find your way")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)}
    tested = {path.name.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    modules = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    untested = {str(path.with_suffix("")) for path in modules if path.name not in tested and path.stem not in INTERNAL}
    assert untested == listed
