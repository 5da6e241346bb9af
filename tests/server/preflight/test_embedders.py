"""Embedders that cannot be made or do not do what they say."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from cdcsync.config import HashEmbedder
from cdcsync.embedders import Kind, Vectors
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.errors import EmbedderUnavailable
from cdcsync.preflight import Finding, build_embedders, examine_embedders
from tests.support.preflight import ARTICLES, configured, examined, the_error
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
