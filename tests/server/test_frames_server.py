"""Frames of a real walsender, and the messages that only a transaction in progress brings about."""

from __future__ import annotations

import select

import psycopg
import pytest
from psycopg.conninfo import make_conninfo
from psycopg.pq import ExecStatus

from cdcsync.lsn import INVALID_LSN, Lsn
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import Keepalive, XLogData, decode_frame, encode_status_update
from cdcsync.pgoutput.messages import (
    Begin,
    Commit,
    Insert,
    PgoutputMessage,
    Relation,
    StreamAbort,
    StreamCommit,
    StreamStart,
    StreamStop,
)
from cdcsync.pgoutput.wire import to_datetime
from tests.support.decoding import DecodingSlot, Kind, inserting, of, still_streamed, the
from tests.support.servers import Database

pytestmark = pytest.mark.server

GIVE_UP_AFTER_S = 60.0
"""How long a silent walsender is waited for; it sends a keepalive at least every 30 s, so silence is a fault."""


CONFIRMED = "SELECT confirmed_flush_lsn::text FROM pg_replication_slots WHERE slot_name = %s"


class Walsender:
    """A replication connection read frame by frame; `messages` is what has come so far."""

    def __init__(self, database: Database, slot: DecodingSlot, **options: str) -> None:
        settings = {"proto_version": str(slot.protocol), "publication_names": "p"} | options
        listed = ", ".join(f"{name} '{value}'" for name, value in settings.items())
        conninfo = make_conninfo(database.dsn, replication="database", options="-c logical_decoding_work_mem=64kB")
        self.connection = psycopg.connect(conninfo, autocommit=True)
        result = self.connection.pgconn.exec_(f"START_REPLICATION SLOT {slot.name} LOGICAL 0/0 ({listed})".encode())
        assert result.status == ExecStatus.COPY_BOTH, result.error_message.decode()
        self.abort_info = settings.get("streaming") == "parallel"
        self.streamed = False
        self.messages: list[PgoutputMessage] = []

    def __enter__(self) -> Walsender:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    def frame(self) -> XLogData | Keepalive:
        """Wait for the next frame."""
        pgconn = self.connection.pgconn
        while True:
            size, data = pgconn.get_copy_data(1)
            if size > 0:
                return decode_frame(data)
            assert size == 0, "the walsender ended the stream"
            readable, _, _ = select.select([pgconn.socket], [], [], GIVE_UP_AFTER_S)
            assert readable, "the walsender is silent"
            pgconn.consume_input()

    def until(self, kind: type[Kind]) -> tuple[XLogData, Kind]:
        """Read up to and including the next message of `kind`, and return it with its frame."""
        while True:
            frame = self.frame()
            if isinstance(frame, XLogData):
                message = decode(frame.payload, streamed=self.streamed, abort_info=self.abort_info)
                self.streamed = still_streamed(message, self.streamed)
                self.messages.append(message)
                if isinstance(message, kind):
                    return frame, message

    def keepalive(self) -> Keepalive:
        """Return the next keepalive; messages before it are dropped."""
        while not isinstance(frame := self.frame(), Keepalive):
            pass
        return frame

    def acknowledge(self, lsn: Lsn) -> None:
        """Tell the server that everything up to `lsn` is safe, and ask it to answer."""
        update = encode_status_update(received=lsn, flushed=lsn, applied=lsn, at_us=0, reply_requested=True)
        self.connection.pgconn.put_copy_data(update)
        while self.connection.pgconn.flush():
            select.select([], [self.connection.pgconn.socket], [], GIVE_UP_AFTER_S)


def test_frames_bear_positions_and_times_and_the_server_heeds_status_updates(
    database: Database, decoding_slot: DecodingSlot
) -> None:
    decoding_slot.run("INSERT INTO notes (id) VALUES (1)")
    earliest = decoding_slot.run("SELECT clock_timestamp()")

    with Walsender(database, decoding_slot) as walsender:
        begin_frame, begin = walsender.until(Begin)
        relation_frame, _ = walsender.until(Relation)
        insert_frame, _ = walsender.until(Insert)
        commit_frame, commit = walsender.until(Commit)

        # The server answers before it moves the slot, so one answer is not enough to see it moved.
        keepalive = None
        while decoding_slot.run(CONFIRMED, decoding_slot.name) != str(commit.end_lsn):
            walsender.acknowledge(commit.end_lsn)
            keepalive = walsender.keepalive()

    assert begin_frame.wal_start == begin_frame.wal_end <= insert_frame.wal_start < begin.final_lsn
    assert relation_frame.wal_start == relation_frame.wal_end == INVALID_LSN
    assert commit_frame.wal_start == commit_frame.wal_end == commit.end_lsn
    assert to_datetime(begin_frame.sent_at_us) >= earliest
    assert keepalive is not None
    assert keepalive.wal_end >= commit.end_lsn
    assert to_datetime(keepalive.sent_at_us) >= earliest


@pytest.mark.parametrize("streaming", ["on", "parallel"])
def test_a_subtransaction_that_rolls_back_is_taken_back_from_the_stream(
    database: Database, decoding_slot: DecodingSlot, streaming: str
) -> None:
    if streaming == "parallel" and decoding_slot.protocol < 4:
        pytest.skip("streaming 'parallel' needs PostgreSQL 16")
    with Walsender(database, decoding_slot, streaming=streaming) as walsender, psycopg.connect(database.dsn) as other:
        other.execute(inserting(1, 10))
        other.execute("SAVEPOINT undone")
        other.execute(inserting(11, 1_000))
        flush_log(decoding_slot)
        walsender.until(StreamStop)
        other.execute("ROLLBACK TO undone")
        other.execute(inserting(1_001, 1_010))
        other.commit()
        _, commit = walsender.until(StreamCommit)

    abort = the(StreamAbort, walsender.messages)
    inserts = of(Insert, walsender.messages)
    kept = [insert for insert in inserts if insert.xid != abort.subxid]
    undone = [insert for insert in inserts if insert.xid == abort.subxid]
    assert abort.xid == commit.xid != abort.subxid
    # What follows ROLLBACK TO is in the savepoint's next subtransaction, which nothing announces.
    assert len({insert.xid for insert in kept}) == 2
    assert [insert.new[0] for insert in kept] == [str(n) for n in (*range(1, 11), *range(1_001, 1_011))]
    assert undone
    assert {insert.new[0] for insert in undone} <= {str(n) for n in range(11, 1_001)}
    if streaming == "parallel":
        assert abort.abort_lsn is not None
        assert abort.abort_time_us is not None
        assert abort.abort_lsn < commit.commit_lsn
        assert abort.abort_time_us <= commit.commit_time_us
    else:
        assert (abort.abort_lsn, abort.abort_time_us) == (None, None)


def test_a_transaction_that_rolls_back_is_taken_back_whole(database: Database, decoding_slot: DecodingSlot) -> None:
    with Walsender(database, decoding_slot, streaming="on") as walsender, psycopg.connect(database.dsn) as other:
        other.execute(inserting(1, 1_000))
        flush_log(decoding_slot)
        _, start = walsender.until(StreamStart)
        walsender.until(StreamStop)
        other.rollback()
        flush_log(decoding_slot)
        _, abort = walsender.until(StreamAbort)

    assert abort.xid == abort.subxid == start.xid


def flush_log(slot: DecodingSlot) -> None:
    """Let the walsender see what is still open elsewhere: a commit flushes the log up to itself."""
    slot.run("SELECT pg_logical_emit_message(true, 'flush', '')")
