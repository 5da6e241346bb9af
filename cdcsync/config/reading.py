"""From a file or its text to a `Config`: TOML, environment, sections, and what sections must be together."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import msgspec
import msgspec.inspect as mi

from cdcsync.config.checking import read_fields, suggestion
from cdcsync.config.environment import expand
from cdcsync.config.names import QualifiedName
from cdcsync.config.problems import Problems
from cdcsync.config.sections import Config, Index
from cdcsync.config.serving import Serve
from cdcsync.errors import ConfigError


def load(path: str | Path, environ: Mapping[str, str] | None = None) -> Config:
    """Read a configuration file and return it as a `Config`.

    :param path: the file.
    :param environ: the variables that replace `${NAME}` in it; by default the environment of this process.
    :raises ConfigError: the file does not exist, cannot be read or is wrong; the message lists everything that is.
    """
    where = str(path)
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            "there is no such file",
            where=where,
            hint="name the file with -c FILE or CDCSYNC_CONFIG, or write one: cdcsync init DSN --table TABLE",
        ) from None
    except IsADirectoryError:
        raise ConfigError("is a directory", where=where, hint="name the file in it with -c FILE") from None
    except OSError as error:
        raise ConfigError(
            f"cannot be read: {error.strerror}", where=where, hint="check the path, and the permissions of this user"
        ) from error
    try:
        # Some editors begin a file with a byte order mark, which TOML knows nothing of.
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"is not UTF-8 (byte {error.start}, line {line})", where=where, hint="save the file as UTF-8"
        ) from error
    return parse(text, os.environ if environ is None else environ, where=where)


def parse(text: str, environ: Mapping[str, str], *, where: str) -> Config:
    """Read a configuration from TOML text.

    References to environment variables (`${NAME}`, `${NAME:-default}`) are replaced and omitted keys get
    their defaults, also those that depend on others: the target's database and each index's view.

    :param environ: the environment variables.
    :param where: what to call the text in errors: its file's name.
    :raises ConfigError: the text is not TOML, or keys or values are wrong; the message lists all that are.
    """
    problems = Problems()
    try:
        data = expand(tomllib.loads(text), environ, problems)
    except tomllib.TOMLDecodeError as error:
        raise _not_toml(text, str(error), where) from error
    except ValueError:
        # The interpreter's guard against slow conversions, which tomllib lets through; it suggests code to call.
        raise ConfigError(
            "contains a number with thousands of digits", where=where, hint="correct that number"
        ) from None
    except RecursionError:
        raise ConfigError("is nested too deeply", where=where, hint="look for brackets that were left open") from None
    values = read_fields(cast("mi.StructType", mi.type_info(Config)), data, "", problems)
    indexes = {name: _with_view(name, index) for name, index in values.get("indexes", {}).items()}
    _check_indexes(indexes, data.get("embedders"), data.get("rerankers"), problems)
    _check_offered(values.get("serve"), data.get("indexes"), problems)
    problems.check(where)
    config = Config(**{**values, "indexes": indexes})
    if "dsn" in data.get("target", {}):
        return config
    target = msgspec.structs.replace(config.target, dsn=config.source.dsn)
    return msgspec.structs.replace(config, target=target)


_PLACE = re.compile(r" \(at (?:line (\d+), column (\d+)|end of document)\)$")

_QUOTES = "close it; a text of several lines stands in three of them"

_CAUSES = (
    ("Expected '=' after a key", "an equals sign is missing after the key", "write key = value"),
    ("Expected ']", "a section's name is not closed", "write [section]"),
    (
        "Expected newline or end of document",
        "something follows the value",
        "write one key a line, and texts in quotation marks",
    ),
    ("Invalid initial character for a key", "a key is missing", "write key = value, or [section]"),
    ("Invalid statement", "this is neither a section nor a key with its value", "write key = value, or [section]"),
    ("Invalid value", "the value is missing, or is a text without quotation marks", 'write texts as "text"'),
    (
        "Unterminated string",
        "a quotation mark is not closed",
        _QUOTES,
    ),
    ("Expected '\"'", "a quotation mark is not closed", _QUOTES),
    ('Expected "\'"', "a quotation mark is not closed", _QUOTES),
    (
        "Illegal character '\\n'",
        "a quotation mark is not closed on its line",
        _QUOTES,
    ),
    ("Unescaped", "a backslash in a text begins an escape", "write two, or put the text in single quotation marks"),
    ("Unclosed array", "a list is not closed", "write ] at its end"),
    ("Unclosed inline table", "a section in braces is not closed", "write } at its end"),
    ("Cannot overwrite a value", "this key stands there already", "remove one of the two"),
    ("Cannot declare", "this section stands there already", "put the keys of both into one"),
    ("Cannot mutate", "a list or a section in braces cannot be added to later", "put all of it into one place"),
    ("Cannot redefine", "this section stands there already, in another form", "put the keys of both into one"),
    ("Duplicate inline table key", "this key stands there already", "remove one of the two"),
    ("Invalid date or datetime", "this is not a date", "write 2026-01-31, or put the text in quotation marks"),
    ("Invalid hex value", "an escape in a text is not finished", "write \\uXXXX with four digits"),
    ("Found invalid character", "this character may not stand here", "remove it"),
    ("Illegal character", "this character may not stand here", "remove it"),
)
"""How tomllib's messages begin, what they mean, and the fix."""


def _not_toml(text: str, message: str, where: str) -> ConfigError:
    """Return the error of a text that is not TOML, with the line and a caret under the place.

    Of the line only what stands before a value is shown: the value may be a password.
    """
    place = _PLACE.search(message)
    said = message[: place.start()] if place is not None else message
    lines = text.splitlines() or [""]
    if place is None or place[1] is None:
        number, column = len(lines), len(lines[-1]) + 1
    else:
        number, column = int(place[1]), int(place[2])
        if number > len(lines) or (column == 1 and not lines[number - 1]):
            # At a line break that is one too early or too late: the line before is meant.
            number = min(max(1, number - 1), len(lines))
            column = len(lines[number - 1]) + 1
    cause, hint = _cause(said, lines[:number])
    shown = re.split(r"""(?<==)|["']|://""", lines[number - 1], maxsplit=1)[0].replace("\t", " ")
    if len(shown) < len(lines[number - 1].rstrip()):
        shown = f"{shown.rstrip()} …"
    caret = " " * min(column - 1, len(shown) - (1 if shown.endswith("…") else 0)) + "^"
    margin = f"{number} | "
    return ConfigError(
        f"is not TOML, line {number}, column {column}: {cause}\n{margin}{shown}\n{' ' * (len(margin) - 2)}| {caret}",
        where=where,
        hint=hint,
    )


def _cause(said: str, lines: Sequence[str]) -> tuple[str, str]:
    """Return what a message of tomllib means, and the fix.

    :param lines: those up to the one where reading failed, which may be after the mistake.
    """
    if said.startswith("Expected '='") and re.match(r"\s*[\w-]+\s*=\s*\{", lines[-1]):
        return "this text is not in quotation marks, so its braces begin a section", 'write texts as "text"'
    if said.startswith("Invalid value") and re.match(r"\s*([\w-]+\s*=|\[\w)", lines[-1]):
        for number, line in reversed(list(enumerate(lines[:-1], 1))):
            if re.match(r"\s*[\w-]+\s*=\s*\[[^\]]*$", line):
                return f"the list that begins in line {number} is not closed", "write ] at its end"
            if re.match(r"\s*[\w-]+\s*=", line):
                break
    return next(
        ((cause, hint) for begin, cause, hint in _CAUSES if said.startswith(begin)),
        ("the text is not as TOML has it", "correct the text at that place"),
    )


def _with_view(name: str, index: Index) -> Index:
    return index if index.view else msgspec.structs.replace(index, view=f"public.{name}_index")


def _check_indexes(indexes: Mapping[str, Index], embedders: object, rerankers: object, problems: Problems) -> None:
    """Note indexes whose embedder is not declared, and views that two of them claim.

    :param embedders: the [embedders] section as the file has it: a faulty embedder is a declared one all the same.
    """
    owners: dict[QualifiedName, str] = {}
    for name, index in indexes.items():
        if isinstance(embedders, dict) and embedders and index.embedder not in embedders:
            problems.add(
                f"indexes.{name}.embedder",
                f"there is no [embedders.{index.embedder}] section; {suggestion(index.embedder, embedders)}",
            )
        declared = rerankers if isinstance(rerankers, dict) else {}
        if index.reranker and index.reranker not in declared:
            problems.add(
                f"indexes.{name}.reranker",
                f"there is no [rerankers.{index.reranker}] section; {suggestion(index.reranker, declared)}",
            )
        owner = owners.setdefault(index.view_name, name)
        if owner != name:
            problems.add(f"indexes.{name}.view", f"{index.view_name} is the view of index {owner} already")


def _check_offered(serve: Serve | None, indexes: object, problems: Problems) -> None:
    """Note indexes that the tool server is to offer and that are not declared.

    :param serve: None if the file has no such section, or a faulty one.
    :param indexes: the [indexes] section as the file has it.
    """
    if serve is None or not isinstance(indexes, dict) or not indexes:
        return
    for name in serve.indexes:
        if name not in indexes:
            problems.add("serve.indexes", f"there is no [indexes.{name}] section; {suggestion(name, indexes)}")
