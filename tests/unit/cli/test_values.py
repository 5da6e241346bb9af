"""Values of options, from the text that was typed."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pytest
import typer
import typer.main
from typer.core import TyperArgument, TyperOption

from cdcsync.cli import main
from cdcsync.cli.entry import command_line
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
        (["caf\udce9"], "'word': it is not valid text in this locale's encoding: write it in UTF-8, and use"),
        (["--more", "a", "--more", "\udcff"], "'--more': it is not valid text in this locale's encoding"),
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


# -- the parameters of the commands -----------------------------------------------------------------------------


class Parameter(NamedTuple):
    """A parameter of a command, and the words that get as far as its value."""

    command: str
    name: str
    kind: type
    least: float | None
    most: float | None
    before: tuple[str, ...]
    after: tuple[str, ...]

    def given(self, value: str) -> list[str]:
        """Return the words of a command line with this value."""
        return [*self.before, value, *self.after]


def parameters() -> list[Parameter]:
    """Return each parameter of each command that takes a text or a number."""
    found: list[Parameter] = []

    def walk(command: Any, words: tuple[str, ...]) -> None:
        for one in getattr(command, "commands", {}).values():
            walk(one, (*words, one.name))
        arguments = [one for one in command.params if isinstance(one, TyperArgument)]
        # Every argument gets a word, and so does every option that must be there: without them nothing is read.
        needed = [
            part for one in command.params if isinstance(one, TyperOption) and one.required for part in named(one)
        ]
        for one in command.params:
            kind = one.type_descriptor.annotation
            kind = kind.__args__[0] if getattr(kind, "__origin__", None) is list else kind
            if kind not in (str, int, float):
                continue
            information = one.type_descriptor.parameter_info
            if isinstance(one, TyperArgument):
                at = arguments.index(one)
                before, after = (
                    [word(other) for other in arguments[:at]],
                    [word(other) for other in arguments[at + 1 :]],
                )
                begin, end = (*words, *needed, "--", *before), tuple(after)
            else:
                begin, end = (*words, *needed, named(one)[0]), tuple(map(word, arguments))
            found.append(Parameter(" ".join(words), str(one.name), kind, information.min, information.max, begin, end))

    walk(command_line(), ())
    return found


def named(option: TyperOption) -> list[str]:
    return [option.opts[-1], "word"]


def word(argument: TyperArgument) -> str:
    kind: Any = argument.type_descriptor.annotation
    return str(next(iter(kind)).value) if isinstance(kind, type) and issubclass(kind, StrEnum) else "word"


PARAMETERS = parameters()
NUMBERS = [one for one in PARAMETERS if one.kind is not str]
TEXTS = [one for one in PARAMETERS if one.kind is str]


def named_so(value: object) -> str:
    return f"{value.command} {value.name}" if isinstance(value, Parameter) else ascii(value)[:12]


def refusal_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return what is told of a command that is refused as a mistake of the operator."""
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr()
    assert (ended.value.code, told.out) == (2, "")
    return " ".join(told.err.split())


def test_the_commands_have_numbers_and_texts() -> None:
    assert {("audit", "hours"), ("token new", "days"), ("migrate", "max_rows_per_s"), ("search", "skip")} <= {
        (one.command, one.name) for one in NUMBERS
    }
    assert {("token new", "subject"), ("audit", "tool"), ("search", "words"), ("evaluate", "against")} <= {
        (one.command, one.name) for one in TEXTS
    }


@pytest.mark.parametrize("number", NUMBERS, ids=named_so)
@pytest.mark.parametrize(
    "value", ["", "-1", "nan", "-nan", "inf", "-inf", "1e400", "²", "9" * 40, "9" * 5000], ids=named_so
)
def test_no_command_takes_a_number_without_a_meaning(
    number: Parameter, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "it must be" in refusal_of(number.given(value), capsys)


@pytest.mark.parametrize("number", NUMBERS, ids=named_so)
def test_every_number_has_bounds(number: Parameter, capsys: pytest.CaptureFixture[str]) -> None:
    assert number.least is not None
    assert number.most is not None
    for value in (number.least - 1, number.most + 1):
        assert f"it must be from {number.least:,} to {number.most:,}" in refusal_of(number.given(str(value)), capsys)


@pytest.mark.parametrize("text", TEXTS, ids=named_so)
def test_no_command_takes_bytes_that_are_no_text(text: Parameter, capsys: pytest.CaptureFixture[str]) -> None:
    assert "it is not valid text in this locale's encoding" in refusal_of(text.given("b\udcffb"), capsys)
