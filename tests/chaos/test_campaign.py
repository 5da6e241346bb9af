"""The end of a campaign: when it is interrupted, and when its checks saw too little."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.chaos.campaign import end_with_descendants
from tests.chaos.coverage import KINDS, OUTCOMES, Outcome, commit, forget, note, read, record, recorded, unseen
from tests.chaos.provider import Held, Loss, Provider

JOB = """
import subprocess
near = subprocess.Popen(["sleep", "600"])
far = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("started", flush=True)
near.wait()
"""
"""A process of its own and one that leads a session, as workers are; all have the same standard output."""


def test_a_job_that_does_not_end_by_itself_is_ended_with_all_that_it_started() -> None:
    with subprocess.Popen([sys.executable, "-c", JOB], stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"started\n"

        end_with_descendants(job.pid)

        assert job.stdout.read() == b"", "the end of the output comes when nobody holds it any more"
    assert job.returncode == -9


LOST, SEEN = "a text that was lost", "a text that was seen in the target"


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Provider:
    """A provider that was asked for two texts, of which one was in the target when the worker was killed."""
    provider = Provider()
    ticks = itertools.count()
    monkeypatch.setattr("tests.chaos.provider.time.monotonic", lambda: float(next(ticks)))
    provider.answered([LOST, SEEN], provider.vectors([LOST, SEEN]))
    return provider


def killed(provider: Provider) -> Loss:
    """Lose what the target does not have."""
    loss = Loss()
    provider.held.append(Held(loss.since + 0.5, {SEEN}))
    return loss


def test_only_a_text_that_the_target_lacked_may_be_embedded_again(provider: Provider) -> None:
    loss = killed(provider)
    for _ in range(2):
        provider.answered([LOST, SEEN], provider.vectors([LOST, SEEN]))

    assert {one.text for one in provider.repeated([loss], set(), within_s=20.0)} == {SEEN}
    assert {one.text for one in provider.repeated([], set(), within_s=20.0)} == {LOST, SEEN}
    assert provider.covered() == (2, 1)


def test_an_answer_that_was_spoiled_is_no_call(provider: Provider) -> None:
    vectors = provider.vectors([LOST, SEEN])
    for spoiled in (vectors[:-1], [[*row, 0.5] for row in vectors], [[float("nan")] * len(row) for row in vectors]):
        provider.answered([LOST, SEEN], spoiled)

    assert len(provider.calls) == 1


def test_an_overtaken_worker_may_still_ask_for_what_its_successor_has_embedded(provider: Provider) -> None:
    loss = killed(provider)
    rivals = Loss()
    provider.answered([SEEN], provider.vectors([SEEN]))
    rivals.prolong()
    provider.rivals.append(rivals)

    assert not provider.repeated([loss], set(), within_s=20.0)


def outcome(seed: int, embedded: int, covered: int, **kinds: int) -> Outcome:
    """Return the outcome of a history in which nothing went wrong."""
    return Outcome(
        seed, 1.0, ["", "kill -9"], {"kill -9": 1}, set(), 9, kinds=kinds, embedded=embedded, covered=covered
    )


def test_a_campaign_fails_whose_checks_saw_too_little() -> None:
    kinds = dict.fromkeys(KINDS, 1)

    assert not unseen([outcome(3, 100, 90, **kinds), outcome(4, 100, 60)], whole=True)
    assert unseen([outcome(3, 100, 90), outcome(4, 100, 0)]) == [
        "only 90 of 200 embedded texts were seen in the target before the end"
    ]
    assert unseen([outcome(3, 0, 0)]) == ["only 0 of 0 embedded texts were seen in the target before the end"]
    assert unseen([outcome(3, 100, 90, streamed=1, truncated=2)], whole=True) == ["no transaction was prepared"]


def test_a_record_says_which_seeds_ran_on_which_commit_and_how_much_was_checked(tmp_path: Path) -> None:
    record([outcome(3, 100, 90, streamed=1), outcome(7, 50, 40, streamed=2)], tmp_path / "kept.json")

    kept = json.loads((tmp_path / "kept.json").read_bytes())
    assert kept["commit"] == commit()
    assert {name: kept[name] for name in ("seeds", "kinds", "embedded", "covered")} == {
        "seeds": [3, 7],
        "kinds": {"streamed": 3},
        "embedded": 150,
        "covered": 130,
    }
    assert recorded(tmp_path / "kept.json").histories == 2


def test_outcomes_of_an_earlier_version_can_be_read(tmp_path: Path) -> None:
    earlier = {"seed": 3, "seconds": 7.0, "plan": ["batch committed"], "fired": {}, "hit": [], "transactions": 50}
    (tmp_path / OUTCOMES).write_text(json.dumps(earlier) + "\n")

    assert [(one.seed, one.transactions, one.embedded) for one in read(tmp_path)] == [(3, 50, 0)]


def test_what_was_checked_is_kept_when_other_seeds_are_run_again(tmp_path: Path) -> None:
    for seed in (3, 4):
        note(tmp_path, outcome(seed, 100, 90, streamed=1))
    forget(tmp_path, [4])

    assert read(tmp_path) == [outcome(3, 100, 90, streamed=1)]


def test_a_record_says_how_many_histories_failed_before_they_were_run_again(tmp_path: Path) -> None:
    failed = outcome(4, 100, 90)
    failed.problem = "orphans"
    for one in (outcome(3, 100, 90), failed):
        note(tmp_path, one)
    for seed in (3, 4):
        forget(tmp_path, [seed])
        note(tmp_path, outcome(seed, 100, 90))

    record(read(tmp_path), tmp_path / "kept.json")
    kept = recorded(tmp_path / "kept.json")
    assert (kept.histories, kept.failures, kept.again) == (2, 0, 1)
