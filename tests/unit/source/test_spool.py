"""The spool: blocks of open transactions in, whole transactions without their aborted parts out."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest

from cdcsync.errors import ProtocolError, SpoolUnusable
from cdcsync.source.spool import Spool

LIMIT_BYTES = 1000
RECORD_BYTES = 4
"""What a message takes on disk besides itself."""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path


@pytest.fixture
def spool(directory: Path) -> Iterator[Spool]:
    spool = Spool(str(directory), LIMIT_BYTES)
    yield spool
    spool.clear()


def receive(spool: Spool, xid: int, *messages: tuple[int, bytes]) -> None:
    """Receive a block of `xid`: messages, each with the (sub)transaction that it belongs to."""
    spool.enter(xid)
    for subxid, payload in messages:
        spool.append(subxid, payload)
    spool.leave()


def replayed(spool: Spool, xid: int) -> list[bytes]:
    return list(spool.replay(xid))


def test_a_transaction_comes_back_as_it_was_received(spool: Spool) -> None:
    receive(spool, 1, (1, b"one"), (1, b""))
    receive(spool, 1, (1, b"\x00\xff" * 100))

    assert replayed(spool, 1) == [b"one", b"", b"\x00\xff" * 100]


def test_a_transaction_can_be_replayed_again(spool: Spool) -> None:
    receive(spool, 1, (1, b"one"), (1, b"two"))

    assert replayed(spool, 1) == replayed(spool, 1) == [b"one", b"two"]


def test_blocks_of_open_transactions_may_alternate(spool: Spool) -> None:
    receive(spool, 1, (1, b"a1"))
    receive(spool, 2, (2, b"b1"), (3, b"b2"))
    receive(spool, 1, (4, b"a2"))

    assert spool.transactions == 2
    assert replayed(spool, 1) == [b"a1", b"a2"]
    assert replayed(spool, 2) == [b"b1", b"b2"]


def test_the_spool_is_receiving_from_the_start_of_a_block_to_its_stop(spool: Spool) -> None:
    states = [spool.receiving]
    spool.enter(1)
    states.append(spool.receiving)
    spool.append(1, b"one")
    states.append(spool.receiving)
    spool.leave()
    states.append(spool.receiving)

    assert states == [False, True, True, False]


def test_a_block_inside_another_is_an_error(spool: Spool) -> None:
    spool.enter(1)

    with pytest.raises(ProtocolError, match="began inside another"):
        spool.enter(2)


def test_a_stop_without_a_start_is_an_error(spool: Spool) -> None:
    receive(spool, 1)

    with pytest.raises(ProtocolError, match="ended that had not begun"):
        spool.leave()


def test_an_aborted_subtransaction_takes_its_part_and_no_more(spool: Spool) -> None:
    receive(spool, 1, (1, b"kept"), (2, b"gone"), (2, b"gone too"))
    size = spool.bytes

    spool.abort(1, 2)
    receive(spool, 1, (1, b"after"), (3, b"last"))

    assert replayed(spool, 1) == [b"kept", b"after", b"last"]
    assert size == 4 + 4 + 8 + 3 * RECORD_BYTES
    assert spool.bytes == 4 + 5 + 4 + 3 * RECORD_BYTES


@pytest.mark.parametrize("order", [[2, 3, 4], [4, 3, 2], [3, 4, 2]])
def test_a_parent_takes_its_children_whatever_the_order_of_the_aborts(spool: Spool, order: list[int]) -> None:
    # 3 and 4 were released into 2, which wrote its own first row between them.
    receive(spool, 1, (1, b"kept"), (3, b"child"), (2, b"parent"), (4, b"other child"), (2, b"parent"))

    for subxid in order:
        spool.abort(1, subxid)
    receive(spool, 1, (1, b"after"))

    assert replayed(spool, 1) == [b"kept", b"after"]
    assert spool.bytes == 4 + 5 + 2 * RECORD_BYTES


def test_a_second_abort_of_a_subtransaction_takes_nothing_of_what_came_after_the_first(spool: Spool) -> None:
    receive(spool, 1, (101, b"kept"), (100, b"gone"))
    spool.abort(1, 100)
    receive(spool, 1, (104, b"after"))

    spool.abort(1, 100)

    assert replayed(spool, 1) == [b"kept", b"after"]


def test_a_subtransaction_whose_part_an_abort_took_begins_anew_wherever_its_id_is_among_the_others(
    spool: Spool,
) -> None:
    receive(spool, 1, (103, b"first"), (101, b"aborted"), (100, b"goes with it"))
    spool.abort(1, 101)
    receive(spool, 1, (103, b"second, and longer than both"), (100, b"begins anew"))
    spool.abort(1, 100)

    assert replayed(spool, 1) == [b"first", b"second, and longer than both"]


def test_an_aborted_transaction_leaves_nothing(spool: Spool) -> None:
    receive(spool, 1, (1, b"one"), (2, b"two"))

    spool.abort(1, 1)

    assert (spool.transactions, spool.bytes) == (0, 0)
    assert replayed(spool, 1) == []


def test_an_abort_of_what_sent_nothing_changes_nothing(spool: Spool) -> None:
    receive(spool, 1, (1, b"one"))
    size = spool.bytes

    spool.abort(1, 2)
    spool.abort(3, 3)
    spool.abort(3, 4)

    assert replayed(spool, 1) == [b"one"]
    assert (spool.transactions, spool.bytes) == (1, size)


def test_the_numbers_of_descriptions_go_with_what_is_rolled_back(spool: Spool) -> None:
    spool.enter(1)
    for subxid, payload, number in ((1, b"R1", 4), (1, b"I", None), (2, b"R2", 7), (3, b"R3", 8)):
        spool.append(subxid, payload, description=number)
    spool.leave()

    spool.abort(1, 2)

    assert (replayed(spool, 1), spool.descriptions(1), spool.descriptions(9)) == ([b"R1", b"I"], [4], [])


def test_an_unknown_transaction_replays_as_nothing_and_can_be_dropped(spool: Spool) -> None:
    spool.drop(9)

    assert replayed(spool, 9) == []


def test_a_dropped_transaction_frees_its_space(spool: Spool) -> None:
    receive(spool, 1, (1, b"one"))
    receive(spool, 2, (2, b"two"))

    spool.drop(1)

    assert spool.bytes == 3 + RECORD_BYTES
    assert replayed(spool, 2) == [b"two"]


def test_the_limit_counts_all_open_transactions_and_names_the_settings(spool: Spool, directory: Path) -> None:
    receive(spool, 1, (1, bytes(600 - RECORD_BYTES)))
    receive(spool, 2, (2, bytes(400 - RECORD_BYTES)))
    spool.enter(1)

    with pytest.raises(SpoolUnusable, match="more than 1,000 bytes of spool") as caught:
        spool.append(1, b"")

    assert spool.bytes == LIMIT_BYTES
    assert caught.value.where == str(directory)
    assert caught.value.hint is not None
    assert "source.spool_bytes" in caught.value.hint
    assert "the source keeps them" in caught.value.hint


def test_a_message_beyond_the_limit_leaves_the_spool_as_it_was(spool: Spool) -> None:
    receive(spool, 1, (1, b"kept"))
    size = spool.bytes
    spool.enter(1)
    with pytest.raises(SpoolUnusable):
        spool.append(2, bytes(LIMIT_BYTES))
    spool.leave()

    spool.abort(1, 2)  # of which nothing was kept
    assert spool.bytes == size
    receive(spool, 1, (3, b"small"))

    assert replayed(spool, 1) == [b"kept", b"small"]


def test_clearing_throws_away_open_transactions_and_the_block_in_hand(spool: Spool) -> None:
    receive(spool, 1, (1, b"one"))
    spool.enter(2)

    spool.clear()

    assert (spool.receiving, spool.transactions, spool.bytes) == (False, 0, 0)
    receive(spool, 1, (1, b"again"))
    assert replayed(spool, 1) == [b"again"]


def test_what_is_kept_has_no_name_that_could_outlive_the_process(spool: Spool, directory: Path) -> None:
    receive(spool, 1, (1, b"one"))
    spool.enter(2)
    spool.append(2, b"two")

    assert list(directory.iterdir()) == []


def test_very_many_subtransactions_take_little_memory() -> None:
    spool = Spool("", limit_bytes=10**9)
    spool.enter(1)
    tracemalloc.start()
    try:
        for subxid in range(2, 50_002):
            spool.append(subxid, b"")
        grown, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    spool.clear()

    assert grown < 50_000 * 20


def test_transaction_ids_may_wrap_around_within_a_transaction(spool: Spool) -> None:
    last = 2**32 - 1
    receive(spool, last, (last, b"kept"), (3, b"kept too"), (4, b"gone"), (5, b"gone"))

    spool.abort(last, 4)

    assert replayed(spool, last) == [b"kept", b"kept too"]


def test_a_directory_that_cannot_be_used_is_an_error_that_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    for directory in (tmp_path / "file", tmp_path / "nowhere"):
        spool = Spool(str(directory), LIMIT_BYTES)
        with pytest.raises(SpoolUnusable, match=r"cannot be kept on disk: (Not a directory|No such file)") as caught:
            spool.enter(1)
        assert caught.value.where == str(directory)
        assert caught.value.hint is not None
        assert "source.spool_directory" in caught.value.hint
        assert (spool.receiving, spool.transactions) == (False, 0)


def test_what_cannot_be_read_any_more_is_an_error_and_no_end_of_the_transaction(spool: Spool) -> None:
    receive(spool, 1, (1, b"one"), (1, bytes(100)))
    file = spool._open[1].file
    replay = spool.replay(1)
    assert next(replay) == b"one"
    file.truncate(20)
    with pytest.raises(SpoolUnusable, match="cannot be kept on disk: Input/output error"):
        list(replay)
    assert not spool.usable


def test_a_full_disk_is_an_error_wherever_it_shows_and_the_spool_can_be_cleared(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Path("/dev/full")
    if not full.is_char_device():
        pytest.skip("this system has no /dev/full")
    spool = Spool(str(directory), limit_bytes=10**6)
    with monkeypatch.context() as patched:
        patched.setattr("cdcsync.source.spool.TemporaryFile", lambda **_: full.open("w+b"))
        for write in (
            lambda: spool.append(1, bytes(100_000)),  # more than is buffered
            lambda: spool.abort(1, 2),
            lambda: replayed(spool, 1),
        ):
            spool.begin()
            spool.enter(1)
            spool.append(1, b"buffered")
            spool.append(2, b"buffered")
            with pytest.raises(SpoolUnusable, match="cannot be kept on disk: No space left on device"):
                write()
        spool.clear()

    receive(spool, 1, (1, b"again"))
    assert replayed(spool, 1) == [b"again"]
    spool.clear()
