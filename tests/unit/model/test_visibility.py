"""Snapshots and deliveries: what a snapshot sees across the wrap of 32-bit ids, and what the stream's memory hides."""

from __future__ import annotations

import pytest

from cdcsync.model.rows import Key
from cdcsync.model.visibility import MOST_EMPTIED, XID_SPAN, Deliveries, Snapshot

A: Key = ("a",)
B: Key = ("b",)


@pytest.mark.parametrize(
    ("text", "snapshot"),
    [
        ("10:10:", Snapshot(10, 10, frozenset())),
        ("10:12:10", Snapshot(10, 12, frozenset({10}))),
        ("10:20:10,14,19", Snapshot(10, 20, frozenset({10, 14, 19}))),
        (
            "4294967290:4294967300:4294967290,4294967299",
            Snapshot(2**32 - 6, 2**32 + 4, frozenset({2**32 - 6, 2**32 + 3})),
        ),
    ],
)
def test_a_snapshot_reads_as_postgresql_prints_it(text: str, snapshot: Snapshot) -> None:
    assert Snapshot.parse(text) == snapshot


@pytest.mark.parametrize("text", ["", "10", "10:12", "10:12:10:11", "a:12:", "10:b:", "10:12:x", "10:12:10;11", ":12:"])
def test_what_is_no_snapshot_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Snapshot.parse(text)


@pytest.mark.parametrize("epoch", [0, 1, 7])
@pytest.mark.parametrize(
    ("offset", "seen"),
    [(-(2**31) + 20, True), (-1, True), (0, False), (1, True), (4, False), (9, True), (10, False), (2**31 - 1, False)],
)
def test_a_snapshot_sees_what_finished_before_it(epoch: int, offset: int, seen: bool) -> None:
    xmin = (epoch + 1) * XID_SPAN - 3  # ids wrap between its ends
    snapshot = Snapshot(xmin, xmin + 10, frozenset({xmin, xmin + 4}))
    xid = xmin + offset

    assert snapshot.sees(xid) is seen
    assert snapshot.sees(xid % XID_SPAN) is seen
    assert snapshot.widen(xid % XID_SPAN) == xid


def test_without_recording_every_delivery_is_a_suspect() -> None:
    deliveries = Deliveries()

    deliveries.touched(A, 10)
    deliveries.truncated(11)

    assert not deliveries.recording
    assert deliveries.suspects == {10, 11}
    assert not deliveries.hides(A, Snapshot(10, 10, frozenset()))


def test_a_page_must_see_every_suspect() -> None:
    deliveries = Deliveries()
    deliveries.suspect([10, 11 + XID_SPAN, 20 + 3 * XID_SPAN])

    assert deliveries.suspects == {10, 11, 20}
    assert sorted(deliveries.unseen(Snapshot(10, 12, frozenset({10})))) == [10, 20]
    assert deliveries.unseen(Snapshot(21, 21, frozenset())) == []


def test_recorded_keys_hide_rows_of_snapshots_that_do_not_see_their_last_change() -> None:
    deliveries = Deliveries()
    deliveries.record()
    deliveries.touched(A, 10)
    deliveries.touched(A, 12)

    assert deliveries.suspects == frozenset()
    assert deliveries.hides(A, Snapshot(12, 12, frozenset()))
    assert not deliveries.hides(B, Snapshot(12, 12, frozenset()))
    assert not deliveries.hides(A, Snapshot(13, 13, frozenset()))


def test_a_truncation_hides_every_row_of_snapshots_that_do_not_see_it() -> None:
    deliveries = Deliveries()
    deliveries.record()
    deliveries.truncated(10)

    for key in (A, B):
        assert deliveries.hides(key, Snapshot(10, 11, frozenset({10})))
        assert not deliveries.hides(key, Snapshot(11, 11, frozenset()))


def test_recording_twice_forgets_nothing() -> None:
    deliveries = Deliveries()
    deliveries.record()
    deliveries.touched(A, 10)

    deliveries.record()

    assert deliveries.recording
    assert deliveries.hides(A, Snapshot(10, 10, frozenset()))


def test_what_was_recorded_becomes_suspect_when_recording_ends() -> None:
    deliveries = Deliveries()
    deliveries.record()
    deliveries.touched(A, 10)
    deliveries.touched(B, 11)
    deliveries.truncated(12)

    deliveries.stop()

    assert not deliveries.recording
    assert deliveries.suspects == {10, 11, 12}
    deliveries.record()
    assert not deliveries.hides(A, Snapshot(10, 10, frozenset()))


def test_ending_what_never_began_changes_nothing() -> None:
    deliveries = Deliveries()
    deliveries.touched(A, 10)

    deliveries.stop()

    assert deliveries.suspects == {10}


@pytest.mark.parametrize("recording", [True, False])
def test_what_a_snapshot_sees_is_forgotten_and_the_rest_kept(recording: bool) -> None:
    deliveries = Deliveries()
    deliveries.suspect([8, 18])
    if recording:
        deliveries.record()
    deliveries.touched(A, 9)
    deliveries.touched(B, 19)
    deliveries.truncated(20)
    newest = Snapshot(10, 18, frozenset({10}))

    deliveries.forget_seen(newest)

    assert deliveries.suspects == ({18} if recording else {18, 19, 20})
    assert deliveries.hides(B, newest) is recording
    assert deliveries.size == 3
    deliveries.forget_seen(Snapshot(21, 21, frozenset()))
    assert deliveries.size == 0
    assert not deliveries.hides(A, newest)


def test_forgetting_by_a_snapshot_younger_than_a_pending_page_lets_its_old_rows_through() -> None:
    """Why the caller has to know its pending pages: nothing here could tell."""
    pending, younger = Snapshot(10, 10, frozenset()), Snapshot(11, 11, frozenset())
    deliveries = Deliveries()
    deliveries.record()
    deliveries.touched(A, 10)
    assert deliveries.hides(A, pending)

    deliveries.forget_seen(pending)
    assert deliveries.hides(A, pending)
    deliveries.forget_seen(younger)
    assert not deliveries.hides(A, pending)


def test_more_keys_than_are_remembered_make_their_transactions_suspect() -> None:
    deliveries = Deliveries(most_keys=2)
    deliveries.record()
    for number, xid in ((1, 10), (2, 10), (3, 11)):
        deliveries.touched((str(number),), xid)

    assert deliveries.suspects == {10, 11}
    assert deliveries.size == 2
    assert deliveries.unseen(Snapshot(10, 10, frozenset())) == [10, 11]
    deliveries.touched(A, 12)
    assert deliveries.hides(A, Snapshot(12, 12, frozenset()))
    deliveries.forget_seen(Snapshot(13, 13, frozenset()))
    assert deliveries.size == 0


def test_one_transaction_of_any_size_is_remembered_in_bounded_space() -> None:
    deliveries = Deliveries(most_keys=100)
    deliveries.record()
    for number in range(10_000):
        deliveries.touched((str(number),), 10)
    assert deliveries.size <= 101
    assert deliveries.unseen(Snapshot(10, 10, frozenset())) == [10]


@pytest.mark.parametrize("recording", [True, False])
def test_what_every_later_page_sees_is_not_remembered_when_a_late_stream_brings_it(recording: bool) -> None:
    deliveries = Deliveries(most_keys=100)
    if recording:
        deliveries.record()
    pending = Snapshot(10_000, 10_010, frozenset({10_000}))
    deliveries.forget_seen(pending)

    for xid in range(10, 10_000):
        deliveries.touched((str(xid),), xid)
        deliveries.truncated(xid)
    assert deliveries.size == 0

    deliveries.touched(A, 10_000)
    deliveries.touched(B, 10_010)
    assert deliveries.size == 2
    assert deliveries.hides(A, pending) is deliveries.hides(B, pending) is recording


def test_an_id_that_a_snapshot_of_another_past_sees_is_remembered() -> None:
    deliveries = Deliveries()
    for forget in (deliveries.begin_anew, deliveries.forget_snapshot):
        deliveries.forget_seen(Snapshot(20, 20, frozenset()))
        forget()
        deliveries.touched(A, 10)
        assert deliveries.suspects == {10}


@pytest.mark.parametrize("first", [10, XID_SPAN - 5_000, XID_SPAN - 1], ids=["far from the wrap", "over it", "at it"])
@pytest.mark.parametrize("recording", [True, False])
def test_transactions_beyond_number_are_remembered_in_bounded_space(first: int, recording: bool) -> None:
    """As while the read of a page waits for a lock: none of them can be forgotten before."""
    deliveries = Deliveries(most_keys=10, most_suspects=100)
    if recording:
        deliveries.record()
    last = first + 9_999
    for xid in range(first, last + 1):
        deliveries.touched((str(xid),), xid % XID_SPAN)
        assert deliveries.size <= 112

    # One that began before them all may go on, none of them may.
    begun_before = frozenset({first - 1})
    assert deliveries.unseen(Snapshot(first - 1, last + 2, begun_before)) == []
    for running in (first, first + 5_000):
        assert deliveries.unseen(Snapshot(running, last + 2, frozenset({running}))) == [running]
    assert deliveries.unseen(Snapshot(first + 5_000, first + 5_000, frozenset()))

    deliveries.forget_seen(Snapshot(last + 1, last + 1, frozenset()))
    assert deliveries.size == 0


def test_suspects_that_were_too_many_are_forgotten_with_everything_else() -> None:
    deliveries = Deliveries(most_suspects=1)
    deliveries.suspect([10, 11, 12])
    assert deliveries.unseen(Snapshot(12, 12, frozenset())) == [12]

    deliveries.begin_anew()

    assert deliveries.unseen(Snapshot(3, 3, frozenset())) == []


@pytest.mark.parametrize("recording", [False, True])
def test_transactions_that_emptied_the_table_are_told_from_those_that_filled_it_again(recording: bool) -> None:
    deliveries = Deliveries()
    if recording:
        deliveries.record()
    deliveries.touched(("1",), 10)
    deliveries.truncated(10)
    deliveries.truncated(11)
    deliveries.touched(("1",), 11)
    deliveries.touched(("1",), 12)
    deliveries.truncated(13)
    deliveries.touched(("1",), 13)
    deliveries.truncated(13)
    deliveries.touched(("1",), 14)

    assert [xid for xid in range(9, 15) if deliveries.emptied_by(xid)] == [10, 11, 13]
    assert [xid for xid in range(9, 15) if deliveries.emptied_by(xid, at_its_end=True)] == [10, 13]

    deliveries.begin_anew()
    assert not any(deliveries.emptied_by(xid) for xid in range(9, 15))


def test_a_snapshot_includes_another_of_which_it_sees_everything() -> None:
    old = Snapshot(10, 14, frozenset({10, 12}))
    for other, included in (
        (old, True),
        (Snapshot(10, 14, frozenset({10, 11, 12})), True),
        (Snapshot(11, 14, frozenset({12})), False),  # sees 10
        (Snapshot(10, 15, frozenset({10, 12})), False),  # sees 14
        (Snapshot(10, 13, frozenset({10, 12})), True),
    ):
        assert old.includes(other) is included, other
    assert Snapshot(20, 20, frozenset()).includes(old)


def test_a_row_that_was_read_again_later_hides_that_of_a_page() -> None:
    """It may show what is still to be delivered."""
    deliveries = Deliveries()
    deliveries.read_again([("1",)], Snapshot(30, 30, frozenset()))
    assert deliveries.size == 0  # nobody reads pages
    deliveries.record()
    read = Snapshot(20, 22, frozenset({20}))
    deliveries.read_again([("1",)], read)
    before, after = Snapshot(20, 20, frozenset()), Snapshot(22, 22, frozenset())

    assert [deliveries.hides(("1",), one) for one in (before, read, after)] == [True, False, False]
    assert not deliveries.hides(("2",), Snapshot(5, 5, frozenset()))
    deliveries.forget_seen(Snapshot(5, 5, frozenset()))
    assert deliveries.size == 1
    deliveries.forget_seen(after)
    assert deliveries.size == 0


def test_what_was_not_chunked_again_does_not_take_the_place_of_a_row_that_is_to_be() -> None:
    deliveries = Deliveries()
    deliveries.record(rewriting=True)
    deliveries.read_again([("1",)], Snapshot(20, 20, frozenset()))
    deliveries.read_again([("2",)], Snapshot(20, 20, frozenset()), rewritten=True)

    assert [deliveries.hides((key,), Snapshot(5, 5, frozenset())) for key in "12"] == [False, True]


def test_a_page_has_to_see_all_that_too_many_rows_were_read_under() -> None:
    deliveries = Deliveries(most_keys=2)
    deliveries.record()
    read = Snapshot(20, 20, frozenset())
    deliveries.read_again([(str(number),) for number in range(3)], read)

    assert deliveries.unseen(Snapshot(10, 10, frozenset())) == [19]
    assert deliveries.unseen(read) == []
    assert not deliveries.hides(("1",), read)
    deliveries.forget_seen(read)
    assert deliveries.size == 0


def test_changes_of_related_rows_overtake_a_page_until_their_documents_were_read_again() -> None:
    deliveries = Deliveries()
    deliveries.record()
    before = Snapshot(10, 10, frozenset())
    for xid in (11, 11, 11, 12):
        deliveries.related(xid, 0)

    deliveries.resolved({11: 2, 12: 1, 13: 5})
    assert deliveries.overtaking(before) == {11}
    deliveries.resolved({11: 1})
    assert deliveries.overtaking(before) == frozenset()


def test_each_related_table_is_emptied_by_itself() -> None:
    deliveries = Deliveries()
    deliveries.truncated(10)
    deliveries.related(11, 0, emptied=True)
    deliveries.related(11, 1)
    deliveries.related(12, 1, emptied=True)
    deliveries.related(12, 1)

    def emptied(place: int | None, *, at_its_end: bool = False) -> list[int]:
        return [xid for xid in (10, 11, 12) if deliveries.emptied_by(xid, place, at_its_end=at_its_end)]

    assert [emptied(place) for place in (None, 0, 1)] == [[10], [11], [12]]
    assert [emptied(place, at_its_end=True) for place in (None, 0, 1)] == [[10], [11], []]


def test_only_the_last_transactions_that_emptied_the_table_are_remembered() -> None:
    deliveries = Deliveries()
    for xid in range(100, 101 + MOST_EMPTIED):
        deliveries.truncated(xid)

    assert not deliveries.emptied_by(100)
    assert deliveries.emptied_by(101)
    assert deliveries.emptied_by(100 + MOST_EMPTIED)


def test_the_truncation_of_one_of_many_tables_hides_the_rows_of_that_table_alone() -> None:
    deliveries = Deliveries()
    deliveries.record()
    before = Snapshot(100, 101, frozenset({100}))
    deliveries.truncated(100, "tenant_a.articles")
    assert deliveries.hides(("tenant_a.articles", "1"), before)
    assert not deliveries.hides(("tenant_b.articles", "1"), before)
    after = Snapshot(101, 101, frozenset())
    assert not deliveries.hides(("tenant_a.articles", "1"), after)
    deliveries.forget_seen(after)
    assert deliveries.size == 0
