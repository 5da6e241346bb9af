"""Writes the reference as it follows from the code: every key, command, metric, event and public name.

    python docs/reference.py            write configuration.md and commands.md, and fill metrics.md, logs.md and api.md

`make docs` runs it, and a test fails if a page is not what the code says.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from typer.core import TyperGroup

from cdcsync import config
from cdcsync.cli.entry import command_line
from docs.filled import filled

HERE = Path(__file__).parent
MADE = "<!-- Made by docs/reference.py from the code: change it there. -->"

_KINDS = {"string": "text", "integer": "integer", "number": "number", "boolean": "true or false"}


# -- configuration ----------------------------------------------------------------------------------------------


def configuration() -> str:
    """Return the page of the configuration file."""
    schema = config.schema()
    definitions: dict[str, Any] = schema["$defs"]
    lines = [
        "# Configuration",
        "",
        MADE,
        "",
        "One TOML file: `-c FILE`, else the one that `CDCSYNC_CONFIG` names, else `cdcsync.toml`. `cdcsync config"
        " example` prints one with every key explained, `cdcsync config show` the one in effect with all defaults, and"
        " `cdcsync config schema` a JSON schema for editors. Texts may hold `${NAME}`, which is replaced by that"
        " variable of the environment.",
        "",
    ]
    root = _resolved(schema, definitions)
    for name, section in root["properties"].items():
        lines += _sections(name, section, definitions)
    return "\n".join(lines).rstrip() + "\n"


def _sections(name: str, section: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    """Yield a section of the file, and those of its kinds where it has several."""
    by_name = "additionalProperties" in section and section.get("type") == "object"
    inner = section["additionalProperties"] if by_name else section
    title = f"[{name}.NAME]" if by_name else f"[{name}]"
    kinds = _kinds(inner, definitions)
    if not kinds:
        return
    for kind in kinds:
        tag = kind["properties"].get("type", {}).get("enum", [None])[0] if len(kinds) > 1 else None
        yield f"## `{title}`" + (f' with `type = "{tag}"`' if tag else "")
        yield ""
        if kind.get("description"):
            yield kind["description"]
            yield ""
        yield from _table(kind, definitions)
        yield from _nested(title[1:-1], kind, definitions, ())


def _nested(title: str, kind: dict[str, Any], definitions: dict[str, Any], within: tuple[str, ...]) -> Iterator[str]:
    """Yield the sections in a section, such as [indexes.NAME.chunking]; one that may hold its like is shown once."""
    for key, value in kind["properties"].items():
        by_name = isinstance(value.get("additionalProperties"), dict)
        nested = _kinds(value["additionalProperties"] if by_name else value, definitions)
        if len(nested) != 1 or key in within:
            continue
        inner = f"{title}.{key}.NAME" if by_name else f"{title}.{key}"
        yield f"### `[{inner}]`"
        yield ""
        if nested[0].get("description"):
            yield nested[0]["description"]
            yield ""
        yield from _table(nested[0], definitions)
        yield from _nested(inner, nested[0], definitions, (*within, key))


def _table(kind: dict[str, Any], definitions: dict[str, Any]) -> Iterator[str]:
    yield "| key | value | default | meaning |"
    yield "| --- | --- | --- | --- |"
    required = set(kind.get("required", []))
    for key, value in kind["properties"].items():
        if key == "type" and "enum" in value:
            continue
        default = "required" if key in required else _default(value.get("default"))
        meaning = _described(value, definitions)
        yield f"| `{key}` | {_value(value, definitions)} | {default} | {meaning} |"
    yield ""


def _kinds(value: dict[str, Any], definitions: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the sections that a value may be: none for a plain value."""
    found = []
    for one in value.get("anyOf", [value]):
        resolved = _resolved(one, definitions)
        if "anyOf" in resolved and resolved is not value:
            found += _kinds(resolved, definitions)
        elif "properties" in resolved:
            found.append(resolved)
    return found


def _resolved(value: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    reference = value.get("$ref")
    return definitions[reference.rpartition("/")[2]] if reference else value


def _value(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    parts = value.get("anyOf", [value])
    words = [word for part in parts if (word := _one(_resolved(part, definitions), definitions))]
    return " or ".join(dict.fromkeys(words))


def _one(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    if value.get("type") == "null":
        return ""
    if "enum" in value:
        return ", ".join(f"`{_toml(one)}`" for one in value["enum"])
    if "properties" in value:
        return "a section"
    if "anyOf" in value:
        return _value(value, definitions)
    kind = value.get("type")
    if kind == "array":
        return f"list of {_value(value.get('items', {}), definitions) or 'values'}"
    if kind == "object":
        return "a table by name"
    words = _KINDS.get(str(kind), "value")
    low, high, beyond = value.get("minimum"), value.get("maximum"), value.get("exclusiveMinimum")
    if beyond is not None:
        return f"{words} above {beyond:,}" + ("" if high is None else f", to {high:,}")
    if low is not None and high is not None:
        return f"{words}, {low:,} to {high:,}"
    return f"{words}, {low:,} or more" if low is not None else words


def _described(value: dict[str, Any], definitions: dict[str, Any]) -> str:
    text = value.get("description", "")
    return re.sub(r"\s+", " ", text).replace("|", "\\|")


def _default(value: Any) -> str:
    return "none" if value is None else f"`{_toml(value)}`"


def _toml(value: Any) -> str:
    """Write a value as the file does; TOML has no null, so a key without a value is left out."""
    match value:
        case bool():
            return str(value).lower()
        case str():
            return json.dumps(value, ensure_ascii=False)
        case int():
            return f"{value:_}"
        case list():
            return f"[{', '.join(map(_toml, value))}]"
        case dict():
            keys = (f"{key} = {_toml(one)}" for key, one in value.items() if one is not None)
            return "{" + ", ".join(keys) + "}"
        case _:
            return str(value)


# -- commands ---------------------------------------------------------------------------------------------------


def commands() -> str:
    """Return the page of the command line."""
    group = command_line()
    lines = [
        "# Commands",
        "",
        MADE,
        "",
        "Every command has `--help`. Results go to standard output, errors and logs to standard error; colours stay out"
        " of files and pipes, and everywhere with `NO_COLOR`. The exit status is 0 if the command did its work,"
        " 1 if it failed, and 2 if configuration, set-up or usage is wrong and nothing was changed; `plan` gives 3 if"
        " `run` would do something. Ctrl-C gives 130.",
        "",
    ]
    for name in sorted(group.commands):
        lines += _command(f"cdcsync {name}", group.commands[name])
    return "\n".join(lines).rstrip() + "\n"


def _command(path: str, command: Any) -> Iterator[str]:
    yield f"## `{path}`"
    yield ""
    yield _paragraphs(command.help or "")
    yield ""
    if isinstance(command, TyperGroup):
        for name in sorted(command.commands):
            yield from (line.replace("## ", "### ", 1) for line in _command(f"{path} {name}", command.commands[name]))
        return
    rows = list(_parameters(command))
    if rows:
        yield "| argument or option | default | meaning |"
        yield "| --- | --- | --- |"
        yield from rows
        yield ""
    if command.epilog:
        yield _paragraphs(command.epilog)
        yield ""


def _parameters(command: Any) -> Iterator[str]:
    for one in command.params:
        if one.name == "help":
            continue
        if one.param_type_name == "option":
            names = ", ".join(f"`{name}`" for name in (*one.opts, *one.secondary_opts))
            if not one.is_flag and one.metavar:
                names += f" `{one.metavar}`".replace("|", "\\|")
        else:
            names = f"`{one.metavar or one.name.upper()}`"
        meaning = re.sub(r"\s+", " ", one.help or "").replace("|", "\\|")
        if one.multiple and not re.search("repeat|several", meaning):
            meaning += " May be repeated."
        yield f"| {names} | {_preset(one)} | {meaning} |"


def _preset(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = parameter.default
    if default in (None, False, (), []) or callable(default):
        return ""
    return f"`{parameter.opts[0] if default is True else getattr(default, 'value', default)}`"


def _paragraphs(text: str) -> str:
    return "\n\n".join(re.sub(r"\s+", " ", part).strip() for part in re.split(r"\n\s*\n", inspect.cleandoc(text)))


PAGES: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "commands.md": commands,
    **{page: partial(filled, page) for page in ("metrics.md", "logs.md", "api.md")},
}

if __name__ == "__main__":
    for page, make in PAGES.items():
        (HERE / page).write_text(make(), encoding="utf-8")
