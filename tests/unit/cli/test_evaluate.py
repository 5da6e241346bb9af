"""`cdcsync evaluate`: options that contradict each other are refused before a server is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from cdcsync.cli import main
from tests.support.configs import configuration


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--measure", "nDCG@10"], "apply to judged questions only"),
        (["--weights", "0:1:0.1"], "apply to judged questions only"),
        (["--min", "nDCG@10=0.4"], "apply to judged questions only"),
        (["--against", "LAST"], "apply to judged questions only"),
        (["--judged", "a", "--from-audit", "b"], "cannot be combined"),
        (["--judged", "a", "--where", "true"], "there can be no condition"),
        (["--plot", "figures.pdf"], "only SVG and PNG"),
    ],
)
def test_options_that_cannot_hold_together_are_refused(
    arguments: list[str],
    problem: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cdcsync.toml").write_text(configuration("host=127.0.0.1 port=1 dbname=nowhere"))
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "articles", *arguments])
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    assert problem in " ".join(told.err.split())
