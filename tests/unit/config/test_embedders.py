"""The sections of remote embedders: addresses and keys, and the examples in the documentation."""

from __future__ import annotations

import re

import pytest

from cdcsync.config import (
    OnnxEmbedder,
    OpenAIEmbedder,
    PythonEmbedder,
    SentenceTransformersEmbedder,
    TeiEmbedder,
    render,
)
from tests import ROOT
from tests.unit.config.files import SECTIONS, problems, read

PAGE = ROOT / "docs" / "embedders.md"
REMOTE = '[embedders.hosted]\ntype = "openai"\nmodel = "m"\ndimensions = 8\n'
KEY = "sk-very-secret-0123456789"


def test_the_examples_of_the_documentation_are_right() -> None:
    examples = re.findall(r"```toml\n(.*?)```", PAGE.read_text(), re.DOTALL)
    kinds: set[type] = set()
    for example in examples:
        config = read(example + SECTIONS, OPENAI_API_KEY=KEY, AZURE_OPENAI_API_KEY=KEY)
        kinds.update(type(config.embedders[name]) for name in re.findall(r"\[embedders\.(\w+)\]", example))
    assert kinds == {OpenAIEmbedder, TeiEmbedder, SentenceTransformersEmbedder, OnnxEmbedder, PythonEmbedder}


def test_a_key_is_never_shown_and_the_path_of_one_is() -> None:
    config = read(REMOTE + 'api_key = "${KEY}"\n' + SECTIONS, KEY=KEY)
    assert config.embedders["hosted"].api_key == KEY  # type: ignore[union-attr]
    assert KEY not in render(config)

    with_file = read(REMOTE + 'api_key_file = "/run/secrets/key"\n' + SECTIONS)
    assert "/run/secrets/key" in render(with_file)
    assert problems(REMOTE + 'api_key = "a"\napi_key_file = "b"\n' + SECTIONS) == [
        "embedders.hosted.api_key_file: cannot be used together with api_key"
    ]


@pytest.mark.parametrize("key", ["two words", "schlüssel", "line\\nbreak"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_shown(key: str) -> None:
    (problem,) = problems(REMOTE + f'api_key = "{key}"\n' + SECTIONS)
    assert problem.startswith("embedders.hosted.api_key: expected a key of visible ASCII characters")
    assert key not in problem


@pytest.mark.parametrize(
    "url", ["http://h", "https://h.example:8443/v1/", "http://127.0.0.1:8080", "http://[::1]:1/a/b"]
)
def test_an_address_is_a_url(url: str) -> None:
    read(REMOTE + f'base_url = "{url}"\n' + SECTIONS)


@pytest.mark.parametrize(
    "url", ["", "h:80", "ftp://h", "http://", "http://h:port", "http://h:0", "http://h ost", "//h"]
)
def test_anything_else_is_no_address(url: str) -> None:
    (problem,) = problems(REMOTE + f'base_url = "{url}"\n' + SECTIONS)
    assert "expected a URL such as" in problem


@pytest.mark.parametrize("url", ["http://me:s3cret@h/v1", "http://h/v1?key=s3cret", "http://h/#s3cret"])
def test_an_address_holds_no_secret(url: str) -> None:
    (problem,) = problems(REMOTE + f'base_url = "{url}"\n' + SECTIONS)
    assert "without user, password, query and fragment" in problem
    assert "s3cret" not in problem
