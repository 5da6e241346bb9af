"""Reads plain data (what tomllib gives) into sections, reporting every problem in plain words with its key path.

msgspec would stop at the first problem and name it in terms of JSON. This walks the same type information
and, for data without problems, builds the same values as `msgspec.convert` does, with one addition: TOML has
no null, so an empty text stands for None where None is allowed.
"""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Iterable
from typing import Any, Final, cast

import msgspec.inspect as mi

from cdcsync.config.problems import Problems
from cdcsync.config.shape import Section, descriptions
from cdcsync.config.values import RULE

WRONG: Final = object()
"""Stands for a value whose problem has been noted."""

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_NEEDS_ONE = "at least one [{}.NAME] section is needed"
_LIMITS = (
    ("gt", operator.gt, "above"),
    ("ge", operator.ge, "of at least"),
    ("lt", operator.lt, "below"),
    ("le", operator.le, "at most"),
)
_MAX_SHOWN = 10**15
"""Larger numbers are described, not printed: a hexadecimal literal can have any length."""


def join(key_path: str, key: str) -> str:
    """Return the path of a key within the section at `key_path`, as TOML writes it."""
    key = key if _BARE_KEY.fullmatch(key) else '"' + key.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"{key_path}.{key}" if key_path else key


def read_fields(kind: mi.StructType, value: dict[str, Any], key_path: str, problems: Problems) -> dict[str, Any]:
    """Return by field the section's values that are there and right; note what is wrong with the others."""
    # A key that is a keyword of Python (`class`) belongs to a field of another name.
    known = {field.encode_name: field for field in kind.fields}
    values = {}
    for key, item in value.items():
        if key in known:
            values[known[key].name] = _read(known[key].type, item, join(key_path, key), problems)
        elif key != kind.tag_field:
            problems.add(join(key_path, key), f"unknown key; {suggestion(key, known)}")
    for key, field in known.items():
        if field.required and key not in value:
            named = isinstance(field.type, mi.DictType) and isinstance(
                field.type.value_type, mi.StructType | mi.UnionType
            )
            message = _NEEDS_ONE.format(key) if named else "is required"
            problems.add(join(key_path, key), message, f"it is {descriptions(kind.cls)[field.name].rstrip('.')}")
    return {key: item for key, item in values.items() if item is not WRONG}


def _read(kind: mi.Type, value: Any, key_path: str, problems: Problems) -> Any:
    """Return the value as its type has it, or WRONG with the problem noted."""
    match kind:
        case mi.Metadata(type=inner, extra=extra):
            read = _read(inner, value, key_path, problems)
            rule = (extra or {}).get(RULE)
            if read is not WRONG and rule is not None and (fault := rule(read)) is not None:
                return _wrong(problems, key_path, fault)
            return read
        case mi.StructType() | mi.DictType() if not isinstance(value, dict):
            return _wrong(problems, key_path, f"expected a section, got {_found(value)}")
        case mi.StructType():
            return _read_section(kind, value, key_path, problems)
        case mi.DictType():
            return _read_named(kind, value, key_path, problems)
        case mi.UnionType(types=types):
            return _read_union(types, value, key_path, problems)
        case mi.VarTupleType(item_type=item_type):
            if not isinstance(value, list):
                return _wrong(problems, key_path, f"expected a list, got {_found(value)}")
            items = [_read(item_type, item, f"{key_path}[{at}]", problems) for at, item in enumerate(value)]
            return WRONG if any(item is WRONG for item in items) else tuple(items)
        case mi.LiteralType(values=allowed):
            if value not in allowed:
                got = f'"{value}"' if isinstance(value, str) else _found(value)
                return _wrong(problems, key_path, f"expected {_listed(allowed)}, got {got}")
            return value
        case mi.IntType() | mi.FloatType():
            return _read_number(kind, value, key_path, problems)
        case mi.StrType() if not isinstance(value, str):
            return _wrong(problems, key_path, f"expected text, got {_found(value)}")
        case mi.BoolType() if not isinstance(value, bool):
            return _wrong(problems, key_path, f"expected true or false, got {_found(value)}")
        case mi.StrType() | mi.BoolType():
            return value
        case _:
            raise TypeError(f"{key_path}: a section has a type that no file can hold: {kind}")


def _wrong(problems: Problems, key_path: str, message: str) -> Any:
    problems.add(key_path, message)
    return WRONG


def _read_section(kind: mi.StructType, value: dict[str, Any], key_path: str, problems: Problems) -> Any:
    values = read_fields(kind, value, key_path, problems)
    expected = {field.name for field in kind.fields if field.required or field.encode_name in value}
    if values.keys() != expected:
        return WRONG
    section = cast("Section", kind.cls(**values))
    for key, fault in section.faults():
        problems.add(join(key_path, key), fault)
    return section


def _read_named(kind: mi.DictType, value: dict[str, Any], key_path: str, problems: Problems) -> dict[str, Any]:
    """Return the entries that are right: problems of one do not hide what can be said of the others."""
    if not value and kind.min_length:
        problems.add(key_path, _NEEDS_ONE.format(key_path))
    entries = {}
    for key, item in value.items():
        name = _read(kind.key_type, key, join(key_path, key), problems)
        entry = _read(kind.value_type, item, join(key_path, key), problems)
        if name is not WRONG and entry is not WRONG:
            entries[name] = entry
    return entries


def _read_union(types: tuple[mi.Type, ...], value: Any, key_path: str, problems: Problems) -> Any:
    """Read an optional value, a plain one of any kind, or one of several kinds of section, told apart by a tag."""
    kinds = [kind for kind in types if not isinstance(kind, mi.NoneType)]
    if len(kinds) < len(types) and value == "":
        return None
    if len(kinds) == 1:
        return _read(kinds[0], value, key_path, problems)
    if not any(isinstance(kind, mi.StructType) for kind in kinds):
        plain = isinstance(value, (str, int, float))
        return (
            value if plain else _wrong(problems, key_path, f"expected a text, number or boolean, got {_found(value)}")
        )
    if not isinstance(value, dict):
        return _wrong(problems, key_path, f"expected a section, got {_found(value)}")
    tagged = {str(kind.tag): kind for kind in kinds if isinstance(kind, mi.StructType)}
    tag_field = next(str(kind.tag_field) for kind in tagged.values())
    tag_path = join(key_path, tag_field)
    if tag_field not in value:
        return _wrong(problems, tag_path, f"is required; known types: {', '.join(tagged)}")
    if not isinstance(tag := value[tag_field], str):
        return _wrong(problems, tag_path, f"expected text, got {_found(tag)}")
    if tag not in tagged:
        return _wrong(problems, tag_path, f'unknown type "{tag}"; known types: {", ".join(tagged)}')
    return _read_section(tagged[tag], value, key_path, problems)


def _read_number(kind: mi.IntType | mi.FloatType, value: Any, key_path: str, problems: Problems) -> Any:
    whole = isinstance(kind, mi.IntType)
    expected = "a whole number" if whole else "a number"
    if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
        return _wrong(problems, key_path, f"expected {expected}, got {_found(value)}")
    limits = [(holds, words, limit) for name, holds, words in _LIMITS if (limit := getattr(kind, name)) is not None]
    if not all(holds(value, limit) for holds, _, limit in limits):
        bounds = " and ".join(f"{words} {limit}" for _, words, limit in limits)
        return _wrong(problems, key_path, f"expected {expected} {bounds}, got {_found(value)}")
    return value if whole else float(value)


def _found(value: object) -> str:
    """Name a value's kind, and show it where it is short and cannot be a secret."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return str(value) if abs(value) < _MAX_SHOWN or not isinstance(value, int) else "a very large number"
        case str():
            return "text"
        case list():
            return "a list"
        case dict():
            return "a section"
        case _:
            return "a date or time"


def suggestion(word: str, known: Iterable[str]) -> str:
    """Say which known name was likely meant, or which there are."""
    known = list(known)
    if nearest := difflib.get_close_matches(word, known, n=1):
        return f'did you mean "{nearest[0]}"?'
    return f"known here: {', '.join(known)}"


def _listed(words: Iterable[object]) -> str:
    *most, last = (f'"{word}"' for word in words)
    return f"{', '.join(most)} or {last}"
