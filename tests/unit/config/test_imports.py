"""Functions and classes that a configuration names: found, or told why not, in the error of whoever asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdcsync.config.imports import import_named
from cdcsync.errors import CdcsyncError, ConfigError, EmbedderSetupError


def test_a_name_may_lie_inside_of_a_class() -> None:
    assert import_named("pathlib:Path.cwd", ConfigError, "indexes.articles.documents") == Path.cwd


def test_what_cannot_be_called_is_nothing() -> None:
    assert import_named("sys:version", ConfigError, "indexes.articles.documents") is None


@pytest.mark.parametrize("path", ["nosuchmodule:make", "pathlib:NoSuchClass"])
@pytest.mark.parametrize("error", [ConfigError, EmbedderSetupError])
def test_a_name_that_is_not_there_is_the_callers_error_with_the_place_and_a_fix(
    path: str, error: type[CdcsyncError]
) -> None:
    with pytest.raises(error, match=f"{path} cannot be imported") as raised:
        import_named(path, error, "embedders.mine.class")
    assert raised.value.where == "embedders.mine.class"
    assert "PYTHONPATH" in str(raised.value.hint)
