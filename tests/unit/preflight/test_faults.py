"""What facts mean: those that no server at hand shows."""

from __future__ import annotations

from typing import Any

import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import SourceUnavailable
from cdcsync.preflight import source as on_source
from cdcsync.preflight import target as on_target
from cdcsync.preflight.tables import kind_faults
from cdcsync.source.catalog import Server, Slot
from cdcsync.source.relations import Table


def server(**facts: Any) -> Server:
    sound: dict[str, Any] = {
        "version": 180006,
        "database": "shop",
        "role": "sync",
        "in_recovery": False,
        "wal_level": "logical",
        "wal_sender_timeout_s": 60.0,
        "max_slots": 10,
        "used_slots": 0,
        "max_senders": 10,
        "used_senders": 0,
        "may_replicate": True,
        "may_create": True,
        "encoding": "UTF8",
    }
    return Server(**sound | facts)


def slot(**facts: Any) -> Slot:
    sound: dict[str, Any] = {"name": "s", "plugin": "pgoutput", "database": "shop", "here": "shop", "active_pid": None}
    positions: dict[str, Any] = {"confirmed_flush": None, "restart": None, "retained_bytes": 0, "safe_bytes": None}
    return Slot(**sound | positions | {"wal_status": "reserved"} | facts)


def test_a_sound_server_has_no_fault_on_either_side() -> None:
    assert list(on_source.server_faults(server(), None)) == []
    assert list(on_target.server_faults(server())) == []


def test_a_server_before_14_is_refused_on_either_side() -> None:
    old = server(version=130022)
    for (fault,) in (list(on_source.server_faults(old, None)), list(on_target.server_faults(old))):
        assert fault.level == "error"
        assert "13.22" in fault.message
        assert "PostgreSQL 14 or later" in str(fault.hint)


@pytest.mark.parametrize(
    ("version", "fixed"), [(140017, "14.18"), (150000, "15.13"), (160002, "16.9"), (170004, "17.5")]
)
def test_a_release_that_may_not_send_a_published_table_is_to_be_upgraded(version: int, fixed: str) -> None:
    (fault,) = on_source.server_faults(server(version=version), None)
    assert fault.level == "warning"
    assert f"to PostgreSQL {fixed} or later" in str(fault.hint)
    major, minor = map(int, fixed.split("."))
    assert list(on_source.server_faults(server(version=10000 * major + minor), None)) == []


@pytest.mark.parametrize(("version", "sign"), [(150013, "cannot decode WAL before PostgreSQL 16"), (160009, "marked")])
def test_a_standby_is_refused_for_the_reason_of_its_version(version: int, sign: str) -> None:
    (fault,) = on_source.server_faults(server(version=version, in_recovery=True), None)
    assert sign in fault.message


def test_a_slot_about_to_lose_wal_is_warned_of() -> None:
    (warning,) = on_source.slot_faults(slot(wal_status="unreserved"), resync=False)
    assert warning.level == "warning"
    assert "start the worker now" in str(warning.hint)


def test_a_replication_connection_refused_by_pg_hba_says_what_the_server_said() -> None:
    refused = SourceUnavailable("no pg_hba.conf entry", hint="allow the role in pg_hba.conf")
    (fault,) = on_source.sender_faults(refused, server(), None)
    assert "no pg_hba.conf entry" in fault.message
    assert fault.hint == "allow the role in pg_hba.conf"


@pytest.mark.parametrize(
    ("facts", "signs"),
    [
        ((None, None, False, None, False), ["postgresql-18-pgvector"]),
        ((None, None, False, "0.5.1", True), ["install pgvector 0.8.4 or later on the server"]),
        (("0.5.1", "public", True, "0.5.1", False), ["install pgvector 0.8.4 or later on the server"]),
        (("0.5.1", "public", True, "0.8.6", False), ["ALTER EXTENSION vector UPDATE"]),
        ((None, None, False, "0.5.1", False), ["CREATE EXTENSION vector SCHEMA public", "install pgvector 0.8.4"]),
    ],
    ids=["absent", "old files", "old and no newer files", "old and newer files", "old and not installable"],
)
def test_pgvector_is_told_as_what_has_to_be_done(
    facts: tuple[str | None, str | None, bool, str | None, bool], signs: list[str]
) -> None:
    faults = list(on_target.pgvector_faults(on_target.Pgvector(*facts), server()))
    assert [fault.level for fault in faults] == ["error"] * len(signs)
    assert all(sign in str(fault.hint) for fault, sign in zip(faults, signs, strict=True))


def test_a_temporary_table_is_refused() -> None:
    facts: dict[str, Any] = {"oid": 1, "columns": {}, "primary_key": (), "identity_mode": "d", "identity": ()}
    facts |= {"readable": True, "owned": True, "row_security": False, "estimated_rows": 0}
    table = Table(name=QualifiedName("pg_temp_3", "t"), kind="r", persistence="t", **facts)
    assert [fault.message for fault in kind_faults("indexes.t.table", table)] == ["pg_temp_3.t is temporary"]
