"""What is said of builds that are under way."""

from __future__ import annotations

import pytest

from cdcsync.status.builds import Build, waits

OF_OTHERS = {"notes_chunks": Build(waits_for=7)}

HELD = "the build waits for the open transaction of the target's session with pid 8; end that transaction, or wait"


@pytest.mark.parametrize(
    ("builds", "noted", "why"),
    [
        (OF_OTHERS, None, None),
        (OF_OTHERS, "no memory", "no memory"),
        ({"articles_chunks": Build()}, "no memory", None),
        ({"articles_chunks": Build((1, 2)), "articles_vectors_1_settled": Build(waits_for=8)}, "no memory", HELD),
    ],
)
def test_a_build_that_is_under_way_is_past_what_was_noted(
    builds: dict[str, Build], noted: str | None, why: str | None
) -> None:
    said = waits(builds, ["articles_vectors_1_settled", "articles_chunks"], noted)
    assert said == why or (why == HELD and said is not None and said.startswith(HELD))
