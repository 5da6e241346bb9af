"""References to environment variables in the texts of a configuration file.

`${NAME}` is the variable's value, `${NAME:-default}` the default when it is unset or empty, `$$` one dollar
sign. A dollar sign before anything else is itself. What a variable holds is not looked through again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from cdcsync.config.checking import join
from cdcsync.config.problems import Problems

_REFERENCE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?::-(?P<default>[^}]*))?\}|(?P<open>\{))"
)


def expand(value: Any, environ: Mapping[str, str], problems: Problems, key_path: str = "") -> Any:
    """Return the value with the references in all its texts replaced; keys stay as they are.

    A text with a reference that cannot be replaced is noted as a problem and stays as it is.
    """
    match value:
        case dict():
            return {key: expand(item, environ, problems, join(key_path, key)) for key, item in value.items()}
        case list():
            return [expand(item, environ, problems, f"{key_path}[{at}]") for at, item in enumerate(value)]
        case str():
            return _expand_text(value, environ, problems, key_path)
        case _:
            return value


def _expand_text(text: str, environ: Mapping[str, str], problems: Problems, key_path: str) -> str:
    faults: list[tuple[str, str]] = []

    def replacement(reference: re.Match[str]) -> str:
        if reference["dollar"]:
            return "$"
        if reference["open"]:
            faults.append(("${ is not followed by NAME} or NAME:-default}", "write $${ for a plain ${"))
            return ""
        name, default = reference["name"], reference["default"]
        held = environ.get(name)
        if not held and default is not None:
            return default
        if held is None:
            fix = f"set it, write ${{{name}:-value}} to have a default, or $${{{name}}} for the text itself"
            faults.append((f"environment variable {name} is not set", fix))
            return ""
        if not _is_unicode(held):
            faults.append((f"environment variable {name} is not valid UTF-8", "set it to UTF-8 text"))
        return held

    expanded = _REFERENCE.sub(replacement, text)
    if not faults:
        return expanded
    messages, fixes = zip(*dict(faults).items(), strict=True)
    problems.add(key_path, "; ".join(messages), fixes[0])
    return text


def _is_unicode(text: str) -> bool:
    """Tell whether the system could decode the bytes that it stands for."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
