"""The example file: complete, in step with the sections, and its commented-out defaults are the defaults."""

from __future__ import annotations

import re
import tomllib
from itertools import pairwise
from typing import Any

import msgspec
import pytest

import cdcsync.config
from cdcsync.config import HashEmbedder, OpenAIEmbedder, TeiEmbedder, load, parse, schema
from cdcsync.config.shape import Section
from tests import ROOT

EXAMPLE = ROOT / "config" / "cdcsync.example.toml"
ENVIRON = {"CDCSYNC_SOURCE_DSN": "postgresql://cdcsync@db.example/app"}


def uncommented() -> str:
    """Return the example with its commented-out keys and sections switched on; prose has a space after the `#`."""
    return re.sub(r"^#(?=[\w\[])", "", EXAMPLE.read_text(), flags=re.MULTILINE)


def written() -> dict[type[Section], set[str]]:
    """Return the keys that the example writes of each section, commented out or not."""
    data = tomllib.loads(uncommented())
    full = parse(uncommented(), ENVIRON, where="example")
    found: dict[type[Section], set[str]] = {}

    def visit(section: Any, keys: dict[str, Any]) -> None:
        found.setdefault(type(section), set()).update(keys)
        for key, item in keys.items():
            if key == "options":
                continue  # keys of the user's own
            child = section[key] if isinstance(section, dict) else getattr(section, key, None)
            if isinstance(item, dict):
                visit(child, item)

    visit(full, data)
    return found


def test_the_example_is_a_configuration() -> None:
    example = load(EXAMPLE, ENVIRON)

    assert set(example.indexes) == {"articles"}
    assert example.source.dsn == example.target.dsn == ENVIRON["CDCSYNC_SOURCE_DSN"]


def test_the_commented_out_values_are_the_defaults() -> None:
    plain, full = load(EXAMPLE, ENVIRON), parse(uncommented(), ENVIRON, where="example")

    assert full.embedders["hashing"] == HashEmbedder()
    assert full.embedders["hosted"] == OpenAIEmbedder(model="text-embedding-3-small", dimensions=1536)
    assert full.embedders["served"] == TeiEmbedder(
        model="BAAI/bge-base-en-v1.5", dimensions=768, base_url="http://127.0.0.1:8080"
    )
    articles = {"articles": full.indexes["articles"]}
    assert plain == msgspec.structs.replace(full, embedders=plain.embedders, rerankers={}, indexes=articles)
    assert plain.embedders["minilm"] == full.embedders["minilm"]


@pytest.mark.parametrize("section", sorted(schema()["$defs"]))
def test_every_key_of_every_section_is_in_the_example(section: str) -> None:
    cls = getattr(cdcsync.config, section)
    tag = {"type"} if cls.__struct_config__.tag else set()

    assert written()[cls] == {*cls.__struct_encode_fields__, *tag}


def test_every_key_of_the_example_has_a_line_of_why_above_it() -> None:
    lines = EXAMPLE.read_text().splitlines()
    for above, line in pairwise(lines):
        if re.match(r"#?[a-z_]+ = ", line) and not line.startswith("#type = "):
            assert above.startswith("# "), line
