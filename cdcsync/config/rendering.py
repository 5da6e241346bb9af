"""A configuration as text for people and editors: the effective file, and the JSON schema of any."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec

from cdcsync.config import embedders, related, rerankers, sections, serving
from cdcsync.config.checking import join
from cdcsync.config.redaction import REDACTED, is_secret_key, redact_dsn, redact_url
from cdcsync.config.sections import Config
from cdcsync.config.shape import descriptions, summary


def render(config: Config) -> str:
    """Return the configuration as TOML with all defaults filled in and all secrets replaced by `***`.

    `parse` reads it back, to an equal configuration when it held no secret.
    """
    return "\n".join(_section_lines("", msgspec.to_builtins(config))).lstrip("\n") + "\n"


def _section_lines(key_path: str, section: Mapping[str, Any]) -> Iterator[str]:
    values = {key: value for key, value in section.items() if not isinstance(value, dict)}
    if values:
        yield f"\n[{key_path}]"
    # Each header may be a secret. Nothing of an index is one: it names columns, such as `key` and `token_id`.
    same = "secret" if key_path.endswith(".headers") else "" if key_path.startswith("indexes.") else None
    for key, value in values.items():
        yield f"{_key(key)} = {_toml(key if same is None else same, value)}"
    for key, value in section.items():
        if key not in values:
            yield from _section_lines(join(key_path, key), value)


def _key(key: str) -> str:
    return key if re.fullmatch("[A-Za-z0-9_-]+", key) else _quoted(key)


def _toml(key: str, value: Any) -> str:
    match value:
        case None:
            # TOML has no null; where None is allowed, the reader takes an empty text for it.
            return '""'
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return toml_text(_shown(key, value))
        case _:
            return f"[{', '.join(_toml(key, item) for item in value)}]"


def _shown(key: str, text: str) -> str:
    if key == "dsn":
        return redact_dsn(text)
    if key == "jwks":
        return redact_url(text)
    return REDACTED if text and is_secret_key(key) else text


def toml_text(text: str) -> str:
    """Quote a text, in which `$` must not become a reference."""
    return _quoted(text.replace("$", "$$"))


def _quoted(text: str) -> str:
    """Quote a text as it is: JSON's escapes are TOML's too, and DEL needs one more."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def schema() -> dict[str, Any]:
    """Return the JSON schema (2020-12) of a configuration file, with each section and key described."""
    document = msgspec.json.schema(Config)
    known = {**vars(embedders), **vars(rerankers), **vars(serving), **vars(related), **vars(sections)}
    for name, definition in document["$defs"].items():
        section = known[name]
        definition["description"] = summary(section)
        names = {field.name: field.encode_name for field in msgspec.structs.fields(section)}
        for field, description in descriptions(section).items():
            definition["properties"][names[field]]["description"] = description
    plain: dict[str, Any] = json.loads(msgspec.json.encode(document))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "cdcsync configuration", **plain}
