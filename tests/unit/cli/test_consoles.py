"""The console of the commands: its own control characters reach the terminal, and no others."""

from __future__ import annotations

import pytest
from rich.console import Group
from rich.table import Table
from rich.text import Text

from cdcsync.cli.printing import console


@pytest.mark.parametrize("wrap", [True, False])
def test_whatever_is_printed_no_text_of_others_can_take_over_the_terminal(
    wrap: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    hostile = "a\x1b[2Jb\x9b31mc\u202ed\x07"
    table = Table("name")
    table.add_row(hostile)
    out = console(wrap=wrap)
    out.print(Text(hostile, "red"))
    out.print(Group(Text.assemble("x ", (hostile, "bold")), table, hostile))

    printed = capsys.readouterr().out
    assert printed.count("a·[2Jb·31m") == 4
    assert "\x1b[31m" in printed  # our own colours
    assert not [one for one in ("\x1b[2J", "\x9b", "\u202e", "\x07") if one in printed]
