"""Rendering: the effective file reads back to what it came from, its secrets hidden, and the schema describes it."""

from __future__ import annotations

import json
import tomllib
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.config import (
    Chunking,
    Config,
    Hnsw,
    Index,
    QualifiedName,
    Related,
    SentenceTransformersEmbedder,
    Source,
    Target,
    Worker,
    render,
    schema,
)
from cdcsync.config.rendering import _section_lines
from tests.unit.config.files import SECTIONS, read

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(str.strip)
NAMES = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=15)
SCHEMAS = NAMES.filter(lambda name: "%" not in name and not name.startswith("pg_") and name != "information_schema")
RELATIONS = st.builds(QualifiedName, NAMES, NAMES).map(str)
PAIRS = st.dictionaries(NAMES | st.sampled_from(["key", "token_id", "password"]), NAMES, min_size=1, max_size=2)
SECONDS = st.floats(min_value=0.01, max_value=86_400)
CONFIGS = st.builds(
    Config,
    source=st.builds(Source, streaming=st.booleans(), feedback_every_s=st.floats(0.1, 86_400), publication=NAMES),
    target=st.builds(Target, dsn=st.sampled_from(["", "service=app", "postgresql://ann@h/app"]), schema=SCHEMAS),
    worker=st.builds(Worker, batch_rows=st.integers(1, 100_000), stop_timeout_s=SECONDS),
    embedders=st.just({"a": SentenceTransformersEmbedder(model="m")})
    | st.builds(SentenceTransformersEmbedder, model=TEXTS, revision=TEXTS | st.none()).map(lambda one: {"a": one}),
    indexes=st.builds(
        Index,
        table=RELATIONS,
        text=TEXTS,
        embedder=st.just("a"),
        view=RELATIONS,
        columns=st.lists(NAMES, unique=True, max_size=3).map(tuple),
        key=st.lists(NAMES, unique=True, max_size=2).map(tuple),
        related=st.dictionaries(
            st.just("notes"), st.builds(Related, table=RELATIONS, on=PAIRS, text=TEXTS), max_size=1
        ),
        search=RELATIONS | st.none(),
        chunking=st.builds(Chunking, max_tokens=st.integers(33, 1_000)),
        hnsw=st.builds(Hnsw, m=st.integers(2, 32)),
    ).map(lambda index: {"articles": index}),
)


@given(CONFIGS)
def test_what_was_rendered_reads_back_as_the_same_configuration(config: Config) -> None:
    assert read(render(config)) == config


def test_the_effective_file_holds_every_default() -> None:
    config = read(SECTIONS)

    rendered = tomllib.loads(render(config))

    assert rendered["worker"] == msgspec.to_builtins(Worker()) | {"hosts": []}
    chunking = msgspec.to_builtins(Chunking()) | {"max_chunks": "", "chunks": ""}  # TOML has no null
    assert rendered["indexes"]["articles"]["chunking"] == chunking
    assert rendered["indexes"]["articles"]["view"] == "public.articles_index"
    assert rendered["embedders"]["test"] == {"type": "hash", "dimensions": 256, "latency_ms": 0.0}
    assert list(rendered) == ["source", "target", "worker", "embedders", "indexes", "serve"]


def test_passwords_are_hidden_and_the_file_still_reads() -> None:
    config = read(
        '[source]\ndsn = "postgresql://ann:s3cret@h/app?sslpassword=s3cret"\n'
        "[target]\ndsn = \"host=h password='s3cret x'\"" + SECTIONS
    )

    rendered = render(config)

    assert "s3cret" not in rendered
    again = read(rendered)
    assert again.source.dsn == "postgresql://ann:***@h/app?sslpassword=***"
    assert again.target.dsn == "host=h password='***'"
    assert again.indexes == config.indexes


def test_texts_under_secret_keys_are_hidden_and_numbers_are_not() -> None:
    # No section has such a key today; the embedders of providers do.
    section = {"api_key": "s3cret", "tokens": ["s3cret", ""], "max_tokens": 256, "deeper": {"password": "s3cret"}}

    lines = list(_section_lines("embedders.x", section))

    assert lines == [
        "\n[embedders.x]",
        'api_key = "***"',
        'tokens = ["***", ""]',
        "max_tokens = 256",
        "\n[embedders.x.deeper]",
        'password = "***"',
    ]


def test_a_dollar_sign_is_rendered_so_that_it_stays_one() -> None:
    config = read(SECTIONS.replace("{title}", "$$${TITLE} $1"), TITLE="${x}")

    assert config.indexes["articles"].text == "$${x} $1"
    assert read(render(config)) == config


def test_the_schema_is_json_and_describes_every_section_and_key() -> None:
    document = json.loads(json.dumps(schema()))

    assert document == schema()
    assert document["$ref"] == "#/$defs/Config"
    for name, definition in document["$defs"].items():
        assert definition["description"].endswith("."), name
        for key, described in definition["properties"].items():
            assert described.get("description") or key == "type", f"{name}.{key}"


def test_the_schema_says_what_reading_checks() -> None:
    definitions: dict[str, Any] = schema()["$defs"]

    assert definitions["Worker"]["properties"]["batch_rows"] == {
        "type": "integer",
        "minimum": 1,
        "maximum": 100_000,
        "default": 5_000,
        "description": "the most changed rows in one target transaction.",
    }
    assert definitions["Source"]["properties"]["slot"]["pattern"] == "^[a-z0-9_]{1,63}$"
    assert definitions["Index"]["properties"]["columns"]["default"] == []
    assert definitions["Index"]["required"] == ["embedder"]


@pytest.mark.parametrize("name", sorted(schema()["$defs"]))
def test_the_schema_allows_no_unknown_key(name: str) -> None:
    assert schema()["$defs"][name]["additionalProperties"] is False
