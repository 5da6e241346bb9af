"""Values of options, from the text that was typed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
import typer.main

from cdcsync.cli.values import convert_here


class Colour(StrEnum):
    """A choice."""

    red = "red"
    green = "green"
    blue = "blue"


def take(
    word: Annotated[str, typer.Argument()] = "none",
    more: Annotated[list[str] | None, typer.Option()] = None,
    file: Annotated[Path | None, typer.Option()] = None,
    count: Annotated[int, typer.Option(min=1, max=1000)] = 10,
    least: Annotated[list[int] | None, typer.Option(min=2)] = None,
    rate: Annotated[float | None, typer.Option(min=0.5)] = None,
    colour: Annotated[Colour, typer.Option()] = Colour.red,
    flag: Annotated[bool, typer.Option("--flag")] = False,
) -> dict[str, Any]:
    """Return what a command with such parameters gets."""
    return {name: value for name, value in locals().items() if value}


def taken(*arguments: str) -> Any:
    line = typer.Typer()
    line.command()(take)
    command: Any = typer.main.get_command(line)
    for parameter in command.params:
        convert_here(parameter)
    return command(list(arguments), standalone_mode=False)


DEFAULTS = {"word": "none", "count": 10, "colour": Colour.red}


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], {}),
        (["word"], {"word": "word"}),
        (["--more", "a", "--more", ""], {"more": ["a", ""]}),
        (["--file", "a/b"], {"file": Path("a/b")}),
        (["--count", "1000"], {"count": 1000}),
        (["--least", "2", "--least", "9"], {"least": [2, 9]}),
        (["--rate", "0.5"], {"rate": 0.5}),
        (["--rate", "3"], {"rate": 3.0}),
        (["--colour", "blue"], {"colour": Colour.blue}),
        (["--flag"], {"flag": True}),
    ],
    ids=str,
)
def test_a_command_gets_values_of_the_types_that_it_names(arguments: list[str], expected: dict[str, Any]) -> None:
    got = taken(*arguments)
    assert got == DEFAULTS | expected
    assert {name: type(value) for name, value in got.items()} == {
        name: type(value) for name, value in (DEFAULTS | expected).items()
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--file", ""], "'--file': the name of the file is empty"),
        (["--count", "ten"], "'--count': it must be a whole number, not ten"),
        (["--count", "1.5"], "'--count': it must be a whole number, not 1.5"),
        (["--count", "0"], "'--count': it must be from 1 to 1,000, not 0"),
        (["--count", "9" * 5000], "'--count': it must be a whole number, not 999999999999999999999…"),
        (["--least", "3", "--least", "1"], "'--least': it must be at least 2, not 1"),
        (["--rate", "fast"], "'--rate': it must be a number, not fast"),
        (["--rate", "nan"], "'--rate': it must be a number, not nan"),
        (["--rate", "inf"], "'--rate': it must be a number, not inf"),
        (["--rate", "0"], "'--rate': it must be at least 0.5, not 0"),
        (["--colour", "pink"], "'--colour': it must be red, green or blue, not pink"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_value_that_a_parameter_cannot_have_is_refused_in_words(arguments: list[str], told: str) -> None:
    with pytest.raises(typer.BadParameter) as refused:
        taken(*arguments)
    assert told in refused.value.format_message()
