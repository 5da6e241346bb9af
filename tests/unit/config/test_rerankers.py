"""The sections of rerankers: defaults, limits, and secrets that are not shown."""

from __future__ import annotations

import pytest

from cdcsync.config import render
from cdcsync.config.rerankers import SentenceTransformersReranker, TeiReranker
from tests.unit.config.files import SECTIONS, problems, read

TEI = '[rerankers.best]\ntype = "tei"\nbase_url = "http://127.0.0.1:8080"\n'
LOCAL = '[rerankers.best]\ntype = "sentence-transformers"\nmodel = "cross-encoder"\n'
USED = 'reranker = "best"\n'


def test_both_types_are_read_with_their_defaults() -> None:
    hosted = read(TEI + SECTIONS + USED).rerankers["best"]
    local = read(LOCAL + SECTIONS + USED).rerankers["best"]
    assert isinstance(hosted, TeiReranker)
    assert isinstance(local, SentenceTransformersReranker)
    assert (hosted.candidates, local.candidates) == (50, 50)
    assert (hosted.batch_texts, local.device, local.trust_remote_code) == (32, "auto", False)


@pytest.mark.parametrize(
    ("lines", "key"),
    [
        ("candidates = 0\n", "candidates"),
        ("candidates = 1001\n", "candidates"),
        ("batch_texts = 0\n", "batch_texts"),
        ("timeout_s = 0\n", "timeout_s"),
        ('base_url = "h:80"\n', "base_url"),
        ('api_key = "a"\napi_key_file = "b"\n', "api_key_file"),
        ('model = "m"\n', "model"),
    ],
)
def test_a_wrong_value_is_named_by_its_key(lines: str, key: str) -> None:
    section = TEI if "base_url" not in lines else TEI.split("base_url")[0]
    (problem,) = problems(section + lines + SECTIONS + USED)
    assert problem.startswith(f"rerankers.best.{key}: ")


def test_an_index_names_a_reranker_that_is_there() -> None:
    (problem,) = problems(TEI + SECTIONS + 'reranker = "worst"\n')
    assert "indexes.articles.reranker" in problem
    assert "best" in problem


def test_keys_and_headers_are_not_shown() -> None:
    text = TEI + 'api_key = "planted-key"\nheaders = { "x-gateway" = "planted-header" }\n' + SECTIONS + USED
    assert "planted" not in render(read(text))
