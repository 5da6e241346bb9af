"""The chain: what continues what a worker last saw committed, and what it is told of anything else."""

from __future__ import annotations

import pytest

from cdcsync.errors import LeaseLost, TargetRewound
from cdcsync.lsn import Lsn
from cdcsync.model.chain import Chain, Lease, continued, refuse_successor

HELD = Lease(7, Lsn(100), 3)
PROPOSED = Lease(7, Lsn(200), 4)


def test_a_commit_that_was_answered_is_what_the_next_one_continues() -> None:
    chain = Chain("s", HELD)

    chain.proposed = PROPOSED
    chain.committed()

    assert chain.held == PROPOSED
    with pytest.raises(TargetRewound):
        chain.continue_with(HELD)


@pytest.mark.parametrize("found", [HELD, PROPOSED])
def test_a_commit_whose_answer_was_lost_may_have_happened_or_not(found: Lease) -> None:
    chain = Chain("s", HELD)
    chain.proposed = PROPOSED
    chain.failed(answered=False)

    chain.continue_with(found)

    assert chain.held == found
    with pytest.raises(TargetRewound):
        chain.continue_with(HELD if found == PROPOSED else PROPOSED)


def test_a_commit_that_was_undone_is_not_looked_for() -> None:
    chain = Chain("s", HELD)
    chain.proposed = PROPOSED
    chain.failed(answered=True)

    with pytest.raises(TargetRewound, match=r"at checkpoint 0/C8 \(commit 4\)"):
        chain.continue_with(PROPOSED)

    assert chain.held == HELD


@pytest.mark.parametrize(
    "found",
    [
        pytest.param(Lease(7, Lsn(90), 2), id="an earlier checkpoint"),
        pytest.param(Lease(7, Lsn(100), 2), id="the same checkpoint, before a commit that left it where it was"),
        pytest.param(Lease(7, None, 3), id="no checkpoint"),
        pytest.param(Lease(6, Lsn(100), 3), id="a fence from before this worker took over"),
        pytest.param(Lease(7, Lsn(300), 5), id="a commit that nobody knows of"),
    ],
)
def test_any_other_row_means_that_the_target_went_back(found: Lease) -> None:
    with pytest.raises(TargetRewound):
        continued("s", HELD, found, PROPOSED)


@pytest.mark.parametrize("found", [Lease(8, Lsn(100), 3), Lease(8, Lsn(300), 9)])
def test_a_higher_fence_is_another_workers_whatever_it_has_committed(found: Lease) -> None:
    with pytest.raises(LeaseLost, match="has taken over"):
        continued("s", HELD, found, PROPOSED)


def test_a_fence_that_is_not_higher_is_nobody_elses() -> None:
    refuse_successor("s", HELD, 7)
    refuse_successor("s", HELD, 6)
