"""Values of options and arguments: from the text that was typed to what the commands take.

Typer converts them with pydantic, whose import takes as long as a search, and which words its refusals for programmers.
The commands take texts, files, numbers and choices; those are converted here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

import typer
from typer.core import TyperArgument, TyperOption

SHOWN = 21
"""Characters of a value that a refusal repeats: enough to find it in what was typed."""


def convert_here(parameter: TyperOption | TyperArgument) -> None:
    """Have a parameter's values converted by this module, if they are of a kind that it knows."""
    kind: Any = parameter.type_descriptor.annotation
    several = get_origin(kind) is list
    convert = _converter(get_args(kind)[0] if several else kind, parameter)
    if convert is not None:
        words = [str(one.value) for one in kind] if isinstance(kind, type) and issubclass(kind, Enum) else []
        values = _Values(convert, several=several, words=words)
        parameter.get_runtime_param = lambda: values  # type: ignore[method-assign, assignment, return-value]


class _Values:
    """What typer asks for the value of a parameter."""

    def __init__(self, convert: Callable[[Any], Any], *, several: bool, words: Sequence[str]) -> None:
        self._convert = convert
        self._several = several
        self._words = words

    def coerce(self, value: Any, param: TyperOption | TyperArgument, ctx: typer.Context) -> Any:
        if value is None:
            return () if self._several else None
        try:
            return [self._convert(one) for one in value] if self._several else self._convert(value)
        except ValueError as error:
            raise typer.BadParameter(f"{error}{self._swapped(value, param, ctx)}", ctx=ctx, param=param) from None

    def _swapped(self, value: Any, param: TyperOption | TyperArgument, ctx: typer.Context) -> str:
        """Return the order of two arguments of which each is what the other should be; nothing if they are not."""
        given = ctx.params.values() if isinstance(param, TyperArgument) else ()
        turned = [other for other in given if other in self._words]
        return f"; the other way round: {ctx.command_path} {_short(value)} {turned[0]}" if turned else ""


def _converter(kind: Any, parameter: TyperOption | TyperArgument) -> Callable[[Any], Any] | None:
    information = parameter.type_descriptor.parameter_info
    if kind is bool:  # a flag has no text: it is there or not
        return bool
    if kind is str:
        return _text
    if kind is Path:
        return _path
    if kind in (int, float):
        return lambda value: _number(value, kind, information.min, information.max)
    if isinstance(kind, type) and issubclass(kind, Enum):
        return lambda value: _choice(value, kind)
    return None


def _text(value: str) -> str:
    """Return a text; bytes that the terminal's encoding has no characters for came as lone surrogates."""
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError("it is not valid text in this locale's encoding: write it in UTF-8, and use a UTF-8 locale")
    return value


def _path(value: str | Path) -> Path:
    if value == "":
        raise ValueError("the name of the file is empty")
    return Path(value)


def _number(value: str | float, kind: type[int] | type[float], least: float | None, most: float | None) -> float:
    try:
        number = kind(value)
    except (ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"it must be {'a whole number' if kind is int else 'a number'}, not {_short(value)}")
    if (least is not None and number < least) or (most is not None and number > most):
        bounds = f"at least {least:,}" if most is None else f"from {least:,} to {most:,}"
        raise ValueError(f"it must be {bounds}, not {_short(value)}")
    return number


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else text[:SHOWN] + "…"


def _choice(value: str | Enum, choices: type[Enum]) -> Enum:
    if isinstance(value, choices):
        return value
    *some, last = [str(one.value) for one in choices]
    if value not in (*some, last):
        raise ValueError(f"it must be {', '.join(some)} or {last}, not {_short(value)}")
    return choices(value)
