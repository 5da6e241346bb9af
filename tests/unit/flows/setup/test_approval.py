"""How many texts a change may embed without an approval."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.config import parse
from cdcsync.flows.setup.approval import CONFIRM_ABOVE_TEXTS, confirm_above
from cdcsync.model.spec import IndexSpec
from tests.support.configs import Section, configuration
from tests.support.indexes import make_spec

PRICED = {"type": "openai", "model": "m", "dimensions": 3, "price_per_million_tokens": 2.5}
EMBEDDERS: dict[str, Section] = {"free": {"type": "hash"}, "priced": PRICED | {"base_url": "http://127.0.0.1:1"}}


@pytest.mark.parametrize(
    ("live", "other", "limit"),
    [
        ("free", None, None),
        ("free", "free", None),
        ("priced", None, CONFIRM_ABOVE_TEXTS),
        ("priced", "free", CONFIRM_ABOVE_TEXTS),
        ("free", "priced", CONFIRM_ABOVE_TEXTS),
        ("free", "gone", None),
    ],
)
def test_there_is_a_limit_where_the_embedder_of_any_generation_has_a_price(
    live: str, other: str | None, limit: int | None
) -> None:
    text = configuration("postgresql://h/d", embedders=EMBEDDERS, indexes={"articles": {"embedder": "free"}})
    config = parse(text, {}, where="here")
    spec = make_spec()

    def by(embedder: str) -> IndexSpec:
        return msgspec.structs.replace(spec, config=msgspec.structs.replace(spec.config, embedder=embedder))

    several = msgspec.structs.replace(by(live), others=() if other is None else (by(other),))
    assert confirm_above(config, several) == limit
