"""Progress: acknowledged ≤ checkpoint ≤ received, whatever is reported in whatever order."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cdcsync.lsn import Lsn
from cdcsync.model.progress import Progress

LSNS = st.integers(min_value=0, max_value=2**64 - 1).map(Lsn)
STEPS = st.lists(st.tuples(st.sampled_from(["receive", "commit", "acknowledge"]), LSNS))


def test_a_connection_begins_with_all_positions_at_the_checkpoint() -> None:
    progress = Progress(Lsn(100))

    assert (progress.received, progress.checkpoint, progress.acknowledged) == (100, 100, 100)


def test_what_is_received_is_neither_committed_nor_acknowledged() -> None:
    progress = Progress(Lsn(100))

    progress.receive(Lsn(200))

    assert (progress.received, progress.checkpoint, progress.acknowledge()) == (200, 100, 100)


def test_what_the_target_holds_is_acknowledged_once_asked_for() -> None:
    progress = Progress(Lsn(100))

    progress.commit(Lsn(200))

    assert progress.acknowledged == 100
    assert progress.acknowledge() == 200
    assert progress.acknowledged == 200


@given(LSNS, STEPS)
def test_positions_keep_their_order_and_never_move_backwards(start: Lsn, steps: list[tuple[str, Lsn]]) -> None:
    progress = Progress(start)
    committed = [start]

    for step, lsn in steps:
        before = (progress.received, progress.checkpoint, progress.acknowledged)
        if step == "receive":
            progress.receive(lsn)
        elif step == "commit":
            progress.commit(lsn)
            committed.append(lsn)
        else:
            assert progress.acknowledge() == max(committed)
        after = (progress.received, progress.checkpoint, progress.acknowledged)

        assert progress.acknowledged <= progress.checkpoint <= progress.received
        assert all(old <= new for old, new in zip(before, after, strict=True))
        assert all(type(position) is Lsn for position in after)
