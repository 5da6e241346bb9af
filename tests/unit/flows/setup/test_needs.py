"""Which load an index needs, and the reasons that are told."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from cdcsync.config.differences import as_stored
from cdcsync.flows.setup.needs import AWAITS_APPROVAL, BY_OTHER_RULES, need_of
from cdcsync.source.fingerprints import Difference
from cdcsync.target.ddl.missing import Missing
from cdcsync.target.entries import Entry
from tests.support.indexes import make_spec

SPEC = make_spec()
THEN = datetime(2026, 1, 1, tzinfo=UTC)


def entry(**changes: Any) -> Entry:
    """Return how the index of `SPEC` is registered, but for `changes`."""
    registered = Entry(
        name=SPEC.name,
        slot="s",
        source_table="public.articles",
        view_name="public.articles_index",
        key=("id",),
        columns=SPEC.shape.carried,
        fingerprint=SPEC.fingerprint,
        generation=1,
        model=SPEC.model,
        dimensions=SPEC.dimensions,
        vector_type="vector",
        distance="cosine",
        state="live",
        created_at=THEN,
        configuration=as_stored(SPEC.config),
    )
    return msgspec.structs.replace(registered, **changes)


def configured(**keys: Any) -> dict[str, Any]:
    return as_stored(SPEC.config) | keys


def test_an_index_as_it_was_needs_nothing() -> None:
    assert need_of(SPEC, entry(), Difference()) is None
    assert need_of(SPEC, entry(configuration=configured(inline_budget_ms=7.0)), Difference()) is None


@pytest.mark.parametrize(
    ("before", "kind", "rewrite", "because", "embeds"),
    [
        (None, "initial", False, ["the index is new"], True),
        (
            {"fingerprint": "g", "configuration": configured(text="{title}")},
            "replay",
            True,
            ['text: "{title}" → "{body}"'],
            True,
        ),
        ({"fingerprint": "g", "configuration": None}, "replay", True, [BY_OTHER_RULES], True),
        ({"fingerprint": "g"}, "replay", True, [BY_OTHER_RULES], True),
        ({"columns": (), "configuration": configured(columns=[])}, "replay", False, ["columns: tenant came"], False),
        ({"state": "paused", "reason": "the row 17 is too long"}, "resync", False, ["it was paused"], False),
        (
            {"state": "paused", "reason": f"{AWAITS_APPROVAL} 5 texts", "configuration": configured(text="{title}")},
            "resync",
            False,
            ['text: "{title}" → "{body}"'],
            True,
        ),
        (
            {"state": "paused", "reason": f"{AWAITS_APPROVAL} 5 texts"},
            "resync",
            False,
            ["it was paused for a change that is taken back"],
            False,
        ),
        ({"unfollowed_at": THEN}, "resync", False, ["it was not followed since 2026-01-01 00:00 UTC"], False),
    ],
)
def test_a_load_says_why_and_whether_the_configuration_asks_for_it(
    before: dict[str, Any] | None, kind: str, rewrite: bool, because: list[str], embeds: bool
) -> None:
    need = need_of(SPEC, None if before is None else entry(**before), Difference())
    assert need is not None
    assert (need.kind, need.rewrite, list(need.because), need.embeds) == (kind, rewrite, because, embeds)


@pytest.mark.parametrize(
    "state", [{}, {"state": "paused", "reason": "a lock"}, {"state": "paused", "reason": AWAITS_APPROVAL}]
)
@pytest.mark.parametrize("unfollowed", [{}, {"unfollowed_at": THEN}])
@pytest.mark.parametrize(
    "made", [{}, {"fingerprint": "g"}, {"configuration": configured(text="{title}")}, {"columns": ()}]
)
@pytest.mark.parametrize("found", [Difference(), Difference(reread="a type")])
@pytest.mark.parametrize("missing", [None, Missing(("articles_chunks",))])
def test_no_load_is_without_a_reason(
    state: dict[str, Any], unfollowed: dict[str, Any], made: dict[str, Any], found: Difference, missing: Missing | None
) -> None:
    need = need_of(SPEC, entry(**state, **unfollowed, **made), found, missing=missing)
    assert need is None or need.because


def test_a_table_of_the_index_that_is_lost_is_filled_again() -> None:
    need = need_of(SPEC, entry(), Difference(), missing=Missing(("articles_chunks",), ("articles_chunks_search",)))
    assert need is not None
    assert (need.kind, need.rewrite, need.because) == ("resync", True, ("missing in the target: articles_chunks",))


def test_a_table_that_changed_is_read_again() -> None:
    need = need_of(SPEC, entry(), Difference(reread="column body was changed"))
    assert need is not None
    assert (need.kind, need.because, need.embeds) == ("resync", ("column body was changed",), False)


def test_a_first_load_that_has_not_begun_is_still_the_first() -> None:
    need = need_of(SPEC, entry(state="paused", fingerprint="g"), Difference(reread="a type"), begun=False)
    assert need is not None
    assert (need.kind, need.rewrite) == ("initial", False)
