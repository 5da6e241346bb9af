"""Every claim of docs/security.md names a test that there is."""

from __future__ import annotations

import ast
import re

import pytest

from tests import ROOT

PAGE = (ROOT / "docs" / "security.md").read_text()
NAMED = re.findall(r"^\| .+ \| `(tests/[\w/]+\.py)::(test_\w+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_claim_has_its_test(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text())
    functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    assert test in functions


def test_every_row_of_the_claims_names_one() -> None:
    _, _, claims = PAGE.partition("<!-- claims:")
    assert len(re.findall(r"^\| (?!claim|---)", claims, re.MULTILINE)) == len(NAMED) > 25


def test_every_file_that_holds_a_promise_is_there() -> None:
    for path in re.findall(r"`(tests/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
