"""The help, as a person reads it on a narrow terminal."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.core import TyperGroup

from cdcsync.cli.commands import index_names
from cdcsync.cli.entry import command_line, main
from cdcsync.errors import EXIT_WRONG


def commands(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield every command with its path."""
    yield path, command
    if isinstance(command, TyperGroup):
        for name, one in command.commands.items():
            yield from commands(one, (*path, name))


COMMANDS = dict(commands(command_line()))
"""Made once: making it takes a tenth of a second, and every process of a test run imports this."""


def shown(path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")
    with pytest.raises(SystemExit) as ended:
        main([*path, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_the_help_names_what_is_taken_as_people_do_and_breaks_no_word(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = shown(path, capsys, monkeypatch)
    assert not re.findall(r"<(?:bool|str|int|float|path|list|text)\b[^>]*>", text, re.IGNORECASE)
    assert max(map(len, text.splitlines())) <= 80

    command = COMMANDS[path]
    written = " ".join(str(getattr(one, "help", "") or "") for one in command.params)
    for word in re.findall(r"[A-Za-z_]{4,}", written):
        assert word in text, f"{word} is broken"


@pytest.mark.parametrize(
    "path", [path for path, command in COMMANDS.items() if isinstance(command, TyperGroup)], ids=" ".join
)
def test_who_names_no_command_gets_the_help_and_no_error(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*path])
    printed = capsys.readouterr()
    assert (ended.value.code, printed.err) == (EXIT_WRONG, "")
    assert "Commands" in printed.out


def completed(directory: Path, incomplete: str) -> list[str]:
    context = typer.Context(COMMANDS["verify",])
    context.params["config"] = directory / "cdcsync.toml"
    return index_names(context, incomplete)


def test_names_of_indexes_are_completed_from_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "cdcsync.toml").write_text(
        '[indexes.articles]\n[indexes.archive]\n[indexes.notes]\ntext = "${NOT_SET}"\n'
    )
    assert completed(tmp_path, "ar") == ["articles", "archive"]
    assert completed(tmp_path, "") == ["articles", "archive", "notes"]


@pytest.mark.parametrize("text", [None, "[indexes", "indexes = 3", "a = 1", "a = " + "[" * 5_000])
def test_a_file_that_is_wrong_completes_nothing_and_says_nothing(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "cdcsync.toml").write_text(text)
    assert completed(tmp_path, "") == []
