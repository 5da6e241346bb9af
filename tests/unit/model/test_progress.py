"""Progress: acknowledged ≤ kept ≤ checkpoint ≤ received, whatever is reported in whatever order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcsync.lsn import INVALID_LSN, Lsn
from cdcsync.model.progress import Progress

LSNS = st.integers(min_value=0, max_value=2**64 - 1).map(Lsn)
STEPS = st.lists(st.tuples(st.sampled_from(["receive", "commit", "sent", "acknowledge"]), LSNS, st.none() | LSNS))


def test_a_connection_begins_with_all_positions_at_the_checkpoint() -> None:
    progress = Progress(Lsn(100))

    assert (progress.received, progress.checkpoint, progress.kept, progress.acknowledged) == (100, 100, 100, 100)


def test_what_is_received_is_neither_committed_nor_acknowledged() -> None:
    progress = Progress(Lsn(100))

    progress.receive(Lsn(200))

    assert (progress.received, progress.checkpoint, progress.acknowledge()) == (200, 100, 100)


def test_what_the_target_holds_is_acknowledged_once_asked_for() -> None:
    progress = Progress(Lsn(100))

    progress.commit(Lsn(200))

    assert progress.unacknowledged
    assert progress.acknowledged == 100
    assert progress.acknowledge() == 200
    assert progress.acknowledged == 200
    assert not progress.unacknowledged


def test_a_checkpoint_in_the_same_wal_is_acknowledged_once_the_source_has_sent_what_is_beyond_its_commit() -> None:
    progress = Progress(Lsn(100), committed_before=Lsn(150))
    progress.sent(Lsn(149))
    assert (progress.unacknowledged, progress.acknowledge()) == (False, INVALID_LSN)
    progress.sent(Lsn(150))
    assert (progress.unacknowledged, progress.acknowledge()) == (True, 100)

    progress.commit(Lsn(200), wal_end=Lsn(210))
    progress.sent(Lsn(1000))
    assert progress.acknowledge() == 100  # where its commit ended nobody knows before the next one is written
    progress.commit(None, wal_end=Lsn(300))
    progress.commit(Lsn(250), wal_end=Lsn(320))
    progress.sent(Lsn(299))
    assert progress.acknowledge() == 100
    progress.sent(Lsn(300))
    assert progress.acknowledge() == 200
    progress.commit(Lsn(260), wal_end=Lsn(400))
    progress.sent(Lsn(400))
    assert progress.acknowledge() == 250


def test_checkpoints_in_the_same_wal_are_let_go_of_one_after_the_other_however_late_the_source_sends_on() -> None:
    progress = Progress(Lsn(100), committed_before=Lsn(100))
    for number in range(1, 5):
        progress.commit(Lsn(100 + number), wal_end=Lsn(200 + number))

    progress.sent(Lsn(203))

    assert (progress.checkpoint, progress.acknowledge()) == (104, 102)
    progress.sent(Lsn(204))
    assert progress.acknowledge() == 103


def test_once_the_target_is_elsewhere_nothing_is_waited_for() -> None:
    progress = Progress(Lsn(100), committed_before=Lsn(150))
    progress.commit(Lsn(200), wal_end=Lsn(210))

    progress.commit(Lsn(300))

    assert progress.acknowledge() == 300


@given(LSNS, st.none() | LSNS, STEPS)
def test_positions_keep_their_order_and_never_move_backwards(
    start: Lsn, committed_before: Lsn | None, steps: list[tuple[str, Lsn, Lsn | None]]
) -> None:
    progress = Progress(start, committed_before=committed_before)
    committed, elsewhere = [start], committed_before is None

    for step, lsn, wal_end in steps:
        before = (progress.received, progress.checkpoint, progress.kept, progress.acknowledged)
        if step == "receive":
            progress.receive(lsn)
        elif step == "commit":
            progress.commit(lsn, wal_end=wal_end)
            committed.append(lsn)
            elsewhere = wal_end is None
        elif step == "sent":
            progress.sent(lsn)
        elif elsewhere:
            assert progress.acknowledge() == max(committed)
        else:
            assert progress.acknowledge() in (INVALID_LSN, *committed)
        after = (progress.received, progress.checkpoint, progress.kept, progress.acknowledged)

        assert progress.acknowledged <= progress.kept <= progress.checkpoint <= progress.received
        assert all(old <= new for old, new in zip(before, after, strict=True))
        assert all(type(position) is Lsn for position in after)
