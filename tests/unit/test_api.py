"""The public API: what `cdcsync` exports, what importing it costs, and that docs/api.md describes exactly that."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import cdcsync
import cdcsync.sync
from cdcsync.errors import UsageError
from tests import ROOT
from tests.support.articles import read
from tests.support.configs import NO_SERVER
from tests.support.misuses import CALLS, OPENING

PAGE = (ROOT / "docs" / "api.md").read_text()
HEADINGS = re.findall(r"^### `(.+)`$", PAGE, re.MULTILINE)
ROWS = re.findall(r"^\| `(\w+)` \|", PAGE.partition("<!-- errors -->")[2], re.MULTILINE)


def documented() -> set[str]:
    """Return the public names that the page has a heading or a row of a table for."""
    return {re.split(r"[.(]", heading)[0] for heading in HEADINGS} | set(ROWS)


def test_the_page_describes_every_public_name_and_no_other() -> None:
    assert documented() == set(cdcsync.__all__)


def test_the_page_describes_every_method_of_an_index_and_every_field_of_a_hit() -> None:
    methods = {f"Index.{name}" for name in vars(cdcsync.Index) if not name.startswith("_")} | {"Index.name"}
    assert {heading.partition("(")[0] for heading in HEADINGS if heading.startswith("Index.")} == methods
    table = PAGE.partition("<!-- fields Hit -->\n")[2].partition("<!-- end -->")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == list(cdcsync.Hit.__struct_fields__)


@pytest.mark.parametrize("heading", [heading for heading in HEADINGS if "(" in heading])
def test_signatures_on_the_page_are_those_of_the_code(heading: str) -> None:
    path, _, parameters = heading.rstrip(")").partition("(")
    found: object = cdcsync
    for part in path.split("."):
        found = getattr(found, part)
    signature = inspect.signature(found)  # type: ignore[arg-type]
    plain = [
        parameter.replace(annotation=inspect.Parameter.empty)
        for parameter in signature.parameters.values()
        if parameter.name != "self"
    ]
    shown = str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))
    assert shown == f"({parameters})"


def test_type_checkers_see_the_same_names() -> None:
    stub = ast.parse((Path(cdcsync.__file__).parent / "__init__.pyi").read_text())
    (exported,) = [node.value for node in stub.body if isinstance(node, ast.Assign)]
    assert set(ast.literal_eval(exported)) == set(cdcsync.__all__)
    for node in stub.body:
        if isinstance(node, ast.ImportFrom):
            for name in node.names:
                public = getattr(cdcsync, name.asname or name.name)
                assert public is getattr(sys.modules[str(node.module)], name.name)


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = {"torch", "numpy", "psycopg", "uvicorn", "starlette", "anyio", "msgspec"}
    shown = subprocess.run(
        [sys.executable, "-c", f"import cdcsync, sys; cdcsync.CdcsyncError; print({heavy!r} & sys.modules.keys())"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "set()"


def test_a_name_that_is_not_public_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        cdcsync.nonsense  # type: ignore[attr-defined]  # noqa: B018
    assert set(cdcsync.__all__) <= set(dir(cdcsync))


@pytest.mark.parametrize(("named", "told"), OPENING)
@pytest.mark.parametrize("face", [cdcsync.Index, cdcsync.sync.Index])
def test_an_index_is_not_opened_with_what_it_cannot_use(face: Any, named: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told) as refused:
        face.open(**{"config": read(NO_SERVER), "name": "articles"} | named)
    assert refused.value.hint


@pytest.mark.anyio
@pytest.mark.parametrize(("method", "arguments", "named", "told"), CALLS)
async def test_a_call_with_what_it_cannot_use_is_refused_before_any_server_is_asked(
    method: str, arguments: tuple[Any, ...], named: dict[str, Any], told: str
) -> None:
    index = cdcsync.Index.open(read(NO_SERVER), "articles")  # whose server does not answer
    with pytest.raises(UsageError, match=told) as refused:
        await getattr(index, method)(*arguments, **named)
    assert refused.value.hint
