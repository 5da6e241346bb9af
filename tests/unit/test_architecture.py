"""docs/architecture.md and CONTRIBUTING.md against the tree: floors, named files, and a test file for each module."""

from __future__ import annotations

import re
import tomllib

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


def test_each_module_has_a_test_file_of_its_name_or_a_word_about_where_it_runs() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Find your way")[1].split("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    listed = {name for cell in cells for name in re.findall(r"`([\w/]+)`", cell)}
    tested = {path.name.removeprefix("test_") for path in (ROOT / "tests").rglob("test_*.py")}
    modules = {path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py")}
    untested = {str(path.with_suffix("")) for path in modules if path.name not in tested and path.stem not in INTERNAL}
    assert untested == listed
