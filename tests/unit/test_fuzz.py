"""The inputs that fuzzing kept: each is fed to its parser again, which must not fail by an error of another kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from fuzz import inputs
from fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_no_input_that_was_kept_breaks_its_parser(name: str) -> None:
    found = inputs.kept(name)
    assert found, f"none is kept: python -m fuzz --target {name} --keep"
    for one in found:
        TARGETS[name](one)


def test_inputs_are_kept_once_by_size_and_come_back_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "CORPUS", tmp_path / "corpus")
    assert inputs.kept("decode") == []

    assert inputs.keep("decode", [b"longer", b"", b"\x00\n", b"", b"x" * (inputs.KEPT_BYTES + 1)]) == 3

    assert inputs.kept("decode") == [b"", b"\x00\n", b"longer"]
    inputs.unpack("decode", tmp_path / "files")
    assert sorted(path.read_bytes() for path in (tmp_path / "files").iterdir()) == [b"", b"\x00\n", b"longer"]
