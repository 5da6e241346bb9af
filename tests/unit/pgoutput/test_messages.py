from __future__ import annotations

import gc
from typing import assert_never

import pytest

from cdcsync.lsn import Lsn
from cdcsync.pgoutput.messages import (
    TOO_LARGE,
    UNCHANGED,
    Begin,
    Column,
    Delete,
    Insert,
    Message,
    Relation,
    Tuple,
    Update,
    Value,
)

SECRETS: Tuple = ("a secret", b"\x00\x01", None, UNCHANGED)
SHOWN = "(text[8], binary[2], None, UNCHANGED)"


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        (Insert(None, 16385, SECRETS), f"Insert(xid=None, relation_oid=16385, new={SHOWN})"),
        (
            Update(7, 16385, "O", SECRETS, ("more",)),
            f"Update(xid=7, relation_oid=16385, old_kind='O', old={SHOWN}, new=(text[4],))",
        ),
        (
            Update(None, 16385, None, None, SECRETS),
            f"Update(xid=None, relation_oid=16385, old_kind=None, old=None, new={SHOWN})",
        ),
        (Delete(None, 16385, "K", SECRETS), f"Delete(xid=None, relation_oid=16385, old_kind='K', old={SHOWN})"),
        (
            Message(None, True, Lsn(255), "cdcsync", b"a secret"),
            "Message(xid=None, transactional=True, lsn=Lsn('0/FF'), prefix='cdcsync', content=binary[8])",
        ),
    ],
    ids=["Insert", "Update with an old tuple", "Update without", "Delete", "Message"],
)
def test_users_data_prints_as_kinds_and_lengths(message: Insert | Update | Delete | Message, shown: str) -> None:
    assert repr(message) == shown
    assert "secret" not in repr(message.__rich_repr__())


def test_what_holds_no_users_data_prints_in_full() -> None:
    relation = Relation(None, 16385, "public", "articles", "d", (Column(True, "id", 20, -1),))

    assert "public" in repr(relation)
    assert "Column(key=True, name='id', type_oid=20, typmod=-1)" in repr(relation)


def test_messages_cannot_be_changed() -> None:
    message = Begin(Lsn(1), 2, 3)

    with pytest.raises(AttributeError):
        message.xid = 4  # type: ignore[misc]


def test_the_garbage_collector_does_not_follow_messages() -> None:
    assert not gc.is_tracked(Insert(None, 16385, SECRETS))
    assert not gc.is_tracked(Begin(Lsn(1), 2, 3))


def test_unchanged_is_neither_null_nor_text() -> None:
    others: Tuple = (None, "", "unchanged", b"", b"u")

    assert UNCHANGED not in others
    assert repr(UNCHANGED) == "UNCHANGED"


@pytest.mark.parametrize(
    ("value", "kind"),
    [("t", "text"), (b"b", "binary"), (None, "null"), (UNCHANGED, "unchanged"), (TOO_LARGE, "too large")],
)
def test_a_type_checker_tells_the_kinds_of_value_apart(value: Value, kind: str) -> None:
    def kind_of(value: Value) -> str:
        if value is UNCHANGED:
            return "unchanged"
        if value is TOO_LARGE:
            return "too large"
        if value is None:
            return "null"
        if isinstance(value, str):
            return "text"
        if isinstance(value, bytes):
            return "binary"
        assert_never(value)

    assert kind_of(value) == kind
