"""How often a provider is probed that does not answer the probe. Time is virtual."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from cdcsync import config
from cdcsync.embedders.hashing import HashEmbedder
from cdcsync.errors import EmbedError
from cdcsync.flows.embed import Dispatcher, probe_for_ever
from cdcsync.metrics import Metrics
from tests.support.virtual import in_virtual_time


def test_a_text_that_a_provider_refuses_is_probed_after_longer_and_longer_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked: list[float] = []

    async def look(*_: object) -> Any:
        looked.append(anyio.current_time())
        raise EmbedError("this text is not allowed")

    monkeypatch.setattr("cdcsync.flows.embed.probe._look", look)

    async def main() -> None:
        metrics, pool = Metrics(), object()
        dispatcher = Dispatcher(HashEmbedder("h", config.HashEmbedder(dimensions=8)), metrics, anyio.current_time)
        dispatcher.ready.set()
        with anyio.move_on_after(24 * 3600):
            await probe_for_ever(pool, "cdcsync", "s", {"h": dispatcher}, metrics)  # type: ignore[arg-type]

    in_virtual_time(main)
    assert 24 < len(looked) < 100
