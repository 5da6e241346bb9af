"""Commit times by place in the WAL: of what, and for how long."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from cdcsync.flows.embed.commits import KEPT, Commits

NOON = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


def at(second: int) -> datetime:
    return NOON + timedelta(seconds=second)


@pytest.fixture
def commits() -> Commits:
    made = Commits()
    made.note(100, 200, at(1))
    made.note(250, 300, at(2))  # an idle checkpoint lies between
    return made


@pytest.mark.parametrize(
    ("commit_lsn", "second"),
    # A commit record may begin where the one before it ends.
    [(99, None), (100, 1), (199, 1), (200, 2), (299, 2), (300, None)],
)
def test_a_commit_belongs_to_the_batch_that_ends_after_it(
    commits: Commits, commit_lsn: int, second: int | None
) -> None:
    assert commits.of(commit_lsn) == (None if second is None else at(second))


def test_before_any_batch_nothing_is_known() -> None:
    assert Commits().of(1) is None


def test_of_a_source_that_went_back_the_former_places_mean_nothing(commits: Commits) -> None:
    commits.note(150, 160, at(9))
    assert [commits.of(lsn) for lsn in (120, 155, 260)] == [None, at(9), None]


def test_the_latest_batches_are_remembered_and_the_others_forgotten() -> None:
    commits = Commits()
    for number in range(3 * KEPT):
        commits.note(number, number + 1, at(number))
    known = [commits.of(number) for number in range(3 * KEPT)]
    assert known[:KEPT] == [None] * KEPT
    assert known[2 * KEPT :] == [at(number) for number in range(2 * KEPT, 3 * KEPT)]
    assert len(commits._ends) == len(commits._times) < 2 * KEPT
