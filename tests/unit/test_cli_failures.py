"""`cdcsync failures`: what it takes; what it does is tested against a worker."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdcsync.cli import main

CONFIG = """
[source]
dsn = "postgresql://me@127.0.0.1:1/db"
[embedders.words]
type = "hash"
[indexes.articles]
table = "articles"
text = "{title}"
embedder = "words"
"""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["article", "list"], 2, "there are: articles"),
        (["articles", "forget"], 2, "forget"),
        (["articles"], 2, "discard"),
        (["articles", "list"], 1, "target"),
    ],
    ids=["unknown index", "unknown action", "no action", "no server"],
)
def test_what_cannot_be_done_is_said(
    arguments: list[str], status: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "cdcsync.toml"
    path.write_text(CONFIG)

    with pytest.raises(SystemExit) as exited:
        main(["failures", *arguments, "-c", str(path)])

    assert exited.value.code == status
    assert said in capsys.readouterr().err
