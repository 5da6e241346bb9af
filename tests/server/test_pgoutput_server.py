"""The decoder against the bytes of a real server: PostgreSQL writes, we read, and PostgreSQL says what it was."""

from __future__ import annotations

import pytest

from cdcsync.lsn import Lsn
from cdcsync.pgoutput.messages import (
    UNCHANGED,
    Begin,
    BeginPrepare,
    Column,
    Commit,
    CommitPrepared,
    Delete,
    Insert,
    Message,
    Origin,
    Prepare,
    Relation,
    RollbackPrepared,
    StreamCommit,
    StreamPrepare,
    StreamStart,
    StreamStop,
    Truncate,
    Type,
    Update,
)
from cdcsync.pgoutput.wire import to_datetime
from tests.support.decoding import DecodingSlot, inserting, of, the

pytestmark = pytest.mark.server

CARRY_XID = (Relation, Type, Insert, Update, Delete, Truncate, Message)
"""What has an xid in a streamed block and none elsewhere."""
LONG = "long " * 2_000
"""Ten thousand bytes: past the two thousand from which a value is stored out of line."""


def test_a_transaction_says_who_wrote_it_where_and_when(decoding_slot: DecodingSlot) -> None:
    with decoding_slot.connection.transaction():
        full_xid = decoding_slot.run("SELECT txid_current()")
        decoding_slot.run("INSERT INTO articles (id) VALUES (1)")
        earliest = decoding_slot.run("SELECT clock_timestamp()")
    latest = decoding_slot.run("SELECT clock_timestamp()")
    position = decoding_slot.run("SELECT pg_current_wal_flush_lsn()::text")

    messages = decoding_slot.changes()

    begin, commit = the(Begin, messages), the(Commit, messages)
    assert (messages[0], messages[-1]) == (begin, commit)
    assert isinstance(full_xid, int)
    assert begin.xid == full_xid % 2**32
    assert commit.commit_lsn == begin.final_lsn
    assert begin.final_lsn < commit.end_lsn <= Lsn.parse(str(position))
    assert commit.commit_time_us == begin.commit_time_us
    assert earliest <= to_datetime(begin.commit_time_us) <= latest


def test_a_relation_is_described_as_the_catalog_describes_it(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("INSERT INTO articles (id) VALUES (1)")

    messages = decoding_slot.changes()

    query = """
        SELECT attname = 'id', attname, atttypid::bigint, atttypmod FROM pg_attribute
        WHERE attrelid = 'articles'::regclass AND attnum > 0 ORDER BY attnum
    """
    columns = tuple(Column(*row) for row in decoding_slot.connection.execute(query).fetchall())
    oid = decoding_slot.run("SELECT 'articles'::regclass::oid::bigint")
    assert the(Relation, messages) == Relation(None, oid, "public", "articles", "d", columns)
    assert the(Insert, messages).relation_oid == oid


def test_a_type_is_named_and_a_domain_is_named_after_its_base_type(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("INSERT INTO articles (id) VALUES (1)")

    types = of(Type, decoding_slot.changes())

    mood, label = (
        decoding_slot.run("SELECT 'mood'::regtype::oid::bigint"),
        decoding_slot.run("SELECT 'label'::regtype::oid::bigint"),
    )
    assert [(each.oid, each.namespace, each.name) for each in types] == [
        (mood, "public", "mood"),
        (label, "pg_catalog", "text"),
    ]


@pytest.mark.parametrize(
    ("statement", "letter"), [("DEFAULT", "d"), ("NOTHING", "n"), ("FULL", "f"), ("USING INDEX articles_pkey", "i")]
)
def test_a_relation_says_its_replica_identity(decoding_slot: DecodingSlot, statement: str, letter: str) -> None:
    decoding_slot.run(f"ALTER TABLE articles REPLICA IDENTITY {statement}")
    decoding_slot.run("INSERT INTO articles (id) VALUES (1)")

    relation = the(Relation, decoding_slot.changes())

    assert relation.replica_identity == letter
    assert [column.name for column in relation.columns if column.key] == {
        "d": ["id"],
        "n": [],
        "f": [column.name for column in relation.columns],
        "i": ["id"],
    }[letter]


def test_values_arrive_as_the_server_renders_them(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("INSERT INTO articles VALUES (1, 'Grüße \N{ELEPHANT}', 12.5, 'cross', '', %s)", LONG)
    decoding_slot.run("INSERT INTO articles (id) VALUES (2)")

    inserts = of(Insert, decoding_slot.changes())

    assert [insert.new for insert in inserts] == [
        ("1", "Grüße \N{ELEPHANT}", "12.50", "cross", "", LONG),
        ("2", None, None, None, None, None),
    ]


def test_values_arrive_as_bytes_when_binary_is_asked_for(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("INSERT INTO articles (id, title) VALUES (258, 'é')")

    insert = the(Insert, decoding_slot.changes(binary="true"))

    assert insert.new == (b"\0\0\0\0\0\0\x01\x02", "é".encode(), None, None, None, None)


def test_an_update_leaves_out_large_values_that_it_did_not_touch(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("INSERT INTO articles (id, title, body) VALUES (1, 'before', %s)", LONG)
    decoding_slot.run("UPDATE articles SET title = 'after'")

    update = the(Update, decoding_slot.changes())

    assert (update.old_kind, update.old) == (None, None)
    assert update.new == ("1", "after", None, None, None, UNCHANGED)


def test_an_update_of_the_key_brings_the_old_key_alone(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("INSERT INTO articles (id, title) VALUES (1, 'title')")
    decoding_slot.run("UPDATE articles SET id = 2")

    update = the(Update, decoding_slot.changes())

    assert (update.old_kind, update.old) == ("K", ("1", None, None, None, None, None))
    assert update.new == ("2", "title", None, None, None, None)


def test_identity_full_brings_whole_old_rows(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("ALTER TABLE articles REPLICA IDENTITY FULL")
    decoding_slot.run("INSERT INTO articles (id, title, body) VALUES (1, 'before', %s)", LONG)
    decoding_slot.run("UPDATE articles SET title = 'after'")
    decoding_slot.run("DELETE FROM articles")

    messages = decoding_slot.changes()

    update, delete = the(Update, messages), the(Delete, messages)
    assert (update.old_kind, update.old) == ("O", ("1", "before", None, None, None, LONG))
    assert update.new == ("1", "after", None, None, None, UNCHANGED)
    assert (delete.old_kind, delete.old) == ("O", ("1", "after", None, None, None, LONG))


def test_a_delete_brings_the_key_alone(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("INSERT INTO articles (id, title) VALUES (1, 'title')")
    decoding_slot.run("DELETE FROM articles")

    delete = the(Delete, decoding_slot.changes())

    assert (delete.old_kind, delete.old) == ("K", ("1", None, None, None, None, None))


@pytest.mark.parametrize(
    ("statement", "tables", "cascade", "restart_identity"),
    [
        ("TRUNCATE notes", ["notes"], False, False),
        ("TRUNCATE notes RESTART IDENTITY", ["notes"], False, True),
        ("TRUNCATE articles RESTART IDENTITY CASCADE", ["articles", "notes"], True, True),
    ],
)
def test_a_truncate_names_its_tables_and_options(
    decoding_slot: DecodingSlot, statement: str, tables: list[str], cascade: bool, restart_identity: bool
) -> None:
    decoding_slot.run(statement)

    messages = decoding_slot.changes()

    truncate = the(Truncate, messages)
    names = {relation.oid: relation.name for relation in of(Relation, messages)}
    assert [names[oid] for oid in truncate.relation_oids] == tables
    assert (truncate.cascade, truncate.restart_identity) == (cascade, restart_identity)


def test_a_logical_message_arrives_inside_or_outside_of_a_transaction(decoding_slot: DecodingSlot) -> None:
    inside = decoding_slot.run("SELECT pg_logical_emit_message(true, 'first', 'é'::text)::text")
    outside = decoding_slot.run("SELECT pg_logical_emit_message(false, 'second', '\\x00ff'::bytea)::text")
    decoding_slot.run("INSERT INTO notes (id) VALUES (1)")

    messages = decoding_slot.changes()

    first, second = of(Message, messages)
    assert [type(message) for message in messages[:4]] == [Begin, Message, Commit, Message]
    assert first == Message(None, True, Lsn.parse(str(inside)), "first", "é".encode())
    assert second == Message(None, False, Lsn.parse(str(outside)), "second", b"\0\xff")


def test_a_replicated_transaction_names_its_origin(decoding_slot: DecodingSlot) -> None:
    origin = f"{decoding_slot.name}_origin"
    decoding_slot.run("SELECT pg_replication_origin_create(%s)", origin)
    try:
        decoding_slot.run("SELECT pg_replication_origin_session_setup(%s)", origin)
        with decoding_slot.connection.transaction():
            decoding_slot.run("SELECT pg_replication_origin_xact_setup('1/2', now())")
            decoding_slot.run("INSERT INTO notes (id) VALUES (1)")
        decoding_slot.run("SELECT pg_replication_origin_session_reset()")

        messages = decoding_slot.changes()
    finally:
        decoding_slot.run("SELECT pg_replication_origin_drop(%s)", origin)

    assert the(Origin, messages) == Origin(Lsn.parse("1/2"), origin)


def test_a_large_transaction_is_streamed_in_blocks_whose_changes_carry_their_xid(decoding_slot: DecodingSlot) -> None:
    decoding_slot.run("SET logical_decoding_work_mem = '64kB'")
    with decoding_slot.connection.transaction():
        full_xid = decoding_slot.run("SELECT txid_current()")
        decoding_slot.run(inserting(1, 1_000))
        decoding_slot.run("UPDATE articles SET id = 0 WHERE id = 1")
        decoding_slot.run("DELETE FROM articles WHERE id = 0")
        decoding_slot.run("SELECT pg_logical_emit_message(true, 'streamed', '')")
        decoding_slot.run("TRUNCATE notes")

    messages = decoding_slot.changes(streaming="on")

    assert isinstance(full_xid, int)
    xid = full_xid % 2**32
    starts = of(StreamStart, messages)
    assert len(starts) > 1
    assert [start.first_segment for start in starts] == [True] + [False] * (len(starts) - 1)
    assert {start.xid for start in starts} == {xid}
    assert len(of(StreamStop, messages)) == len(starts)
    assert [insert.new[0] for insert in of(Insert, messages)] == [str(n) for n in range(1, 1_001)]
    carriers = [message for message in messages if isinstance(message, CARRY_XID)]
    assert {type(message) for message in carriers} == set(CARRY_XID)
    assert {message.xid for message in carriers} == {xid}
    assert the(StreamCommit, messages) is messages[-1]
    assert the(StreamCommit, messages).xid == xid


def test_a_prepared_transaction_comes_whole_and_its_outcome_later(two_phase_slot: DecodingSlot) -> None:
    slot = two_phase_slot
    gids = [f"{slot.name} é {outcome}" for outcome in ("commits", "rolls back")]
    for n, gid in enumerate(gids):
        slot.run(f"BEGIN; INSERT INTO notes (id) VALUES ({n}); PREPARE TRANSACTION '{gid}'")
    slot.run(f"COMMIT PREPARED '{gids[0]}'")
    slot.run(f"ROLLBACK PREPARED '{gids[1]}'")

    messages = slot.changes(two_phase="true")

    begins, prepares = of(BeginPrepare, messages), of(Prepare, messages)
    assert [begin.gid for begin in begins] == gids
    for begin, prepare in zip(begins, prepares, strict=True):
        assert prepare == Prepare(0, begin.prepare_lsn, begin.end_lsn, begin.prepare_time_us, begin.xid, begin.gid)
    committed, undone = the(CommitPrepared, messages), the(RollbackPrepared, messages)
    assert (committed.xid, committed.gid) == (begins[0].xid, gids[0])
    assert prepares[0].end_lsn <= committed.commit_lsn < committed.end_lsn
    assert (undone.xid, undone.gid, undone.prepare_end_lsn) == (begins[1].xid, gids[1], prepares[1].end_lsn)
    assert undone.prepare_time_us == prepares[1].prepare_time_us <= undone.rollback_time_us
    assert undone.prepare_end_lsn < undone.rollback_end_lsn


def test_a_large_prepared_transaction_is_streamed(two_phase_slot: DecodingSlot) -> None:
    slot = two_phase_slot
    slot.run("SET logical_decoding_work_mem = '64kB'")
    slot.run(f"BEGIN; {inserting(1, 1_000)}; PREPARE TRANSACTION '{slot.name}'")
    try:
        messages = slot.changes(two_phase="true", streaming="on")
    finally:
        slot.run(f"COMMIT PREPARED '{slot.name}'")

    prepare = the(StreamPrepare, messages)
    assert prepare is messages[-1]
    assert prepare.gid == slot.name
    assert {start.xid for start in of(StreamStart, messages)} == {prepare.xid}
    assert prepare.prepare_lsn < prepare.end_lsn
