"""Embedders that cannot be made or do not do what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cdcsync.cli.queries import examine_all
from cdcsync.config import Config, HashEmbedder
from cdcsync.embedders import Kind, Vectors
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.embedders.reranking import CrossEncoderReranker
from cdcsync.errors import EmbedderSetupError, EmbedderUnavailable
from cdcsync.preflight import Finding, build_embedders, examine_embedders, examine_rerankers
from tests.support.preflight import ARTICLES, configured, examined, the_error
from tests.support.provider import FakeProvider, status
from tests.support.servers import Database

pytestmark = pytest.mark.server


async def test_an_embedder_that_cannot_be_made_does_not_hide_the_others(database: Database, tmp_path: Path) -> None:
    database.execute(ARTICLES)
    broken = f'[embedders.broken]\ntype = "sentence-transformers"\nmodel = "{tmp_path / "nothing"}"'
    config = configured(database.dsn, embedders=broken, articles="", broken='embedder = "broken"')
    report = await examined(config)
    assert the_error(report) == report.findings[0]
    assert [spec.name for spec in report.specs] == ["articles"]
    findings: list[Finding] = []
    assert list(build_embedders(config, findings)) == ["hash"]


class Failing(Hashing):
    """An embedder that does not do what it says."""

    def __init__(self, fault: Exception | None) -> None:
        super().__init__("failing", HashEmbedder(dimensions=16))
        self.fault = fault
        self.open_now = False

    async def open(self) -> None:
        self.open_now = True
        if self.fault is not None:
            raise self.fault

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        return np.ones((len(texts), 15), dtype=np.float32)

    async def aclose(self) -> None:
        self.open_now = False


async def test_a_deep_check_loads_each_model_and_looks_at_a_vector() -> None:
    unreachable = Failing(EmbedderUnavailable("the provider is away", hint="wait"))
    wrong = Failing(None)
    sound = Hashing("sound", HashEmbedder(dimensions=16))
    findings = await examine_embedders({"away": unreachable, "wrong": wrong, "sound": sound})
    assert [(finding.level, finding.where) for finding in findings] == [
        ("error", "embedders.away"),
        ("error", "embedders.wrong"),
        ("ok", "embedders.sound"),
    ]
    assert "(1, 15)" in findings[1].message
    assert not unreachable.open_now
    assert not wrong.open_now


LOCAL = '[rerankers.local]\ntype = "sentence-transformers"\nmodel = "acme/jugde"\n'


def reranked(provider: FakeProvider) -> Config:
    """Return a configuration whose indexes name a reranker of a server and one of this machine, but not a third."""
    served = f'type = "tei"\nbase_url = "{provider.tei_url}"\ntimeout_s = 1\n'
    sections = f"[rerankers.served]\n{served}[rerankers.unused]\n{served}{LOCAL}"
    dsn = "postgresql://a@h/db"
    return configured(dsn, embedders=sections, articles='reranker = "served"', notes='reranker = "local"')


async def test_a_deep_check_scores_a_word_with_each_reranker_that_an_index_names(
    provider: FakeProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(_: CrossEncoderReranker) -> None:
        raise EmbedderSetupError("acme/jugde cannot be loaded", where="rerankers.local.model", hint="name another one")

    monkeypatch.setattr(CrossEncoderReranker, "_load", load)
    config = reranked(provider)
    found = await examine_rerankers(config, deep=True)
    assert [(one.level, one.where, one.hint) for one in found] == [
        ("ok", "rerankers.served", None),
        ("error", "rerankers.local.model", "name another one"),
    ]
    assert [(one.level, one.where) for one in await examine_rerankers(config, deep=False)] == [
        ("ok", "rerankers.served")
    ]
    assert [body["texts"] for _, _, body in provider.requests] == [["word"]] * 2
    provider.stop()
    assert [one.level for one in await examine_rerankers(config, deep=False)] == ["error"]


async def test_a_check_tells_of_a_reranker_that_does_not_work(
    database: Database, provider: FakeProvider, tmp_path: Path
) -> None:
    provider.always = status(404)
    database.execute(ARTICLES)
    section = f'[rerankers.served]\ntype = "tei"\nbase_url = "{provider.tei_url}"\n'
    config = configured(database.dsn, embedders=section, articles='reranker = "served"')
    findings, _ = await examine_all(config, deep=False)
    assert [one.where for one in findings if one.level == "error" and one.where.startswith("rerankers")]
