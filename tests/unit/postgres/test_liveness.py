"""What proves that a session has lost its statement, and what proves nothing."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from cdcsync.postgres.liveness import Backend, Seen, lost, same_server

BACKEND = Backend(pid=7, started=1, standby=False, system="a")
SEEN = Seen(started=1, standby=False, exists=True, state="active", system="a")


@pytest.mark.parametrize(
    ("seen", "expected"),
    [
        ({}, False),
        ({"wait_event": "relation"}, False),
        ({"state": "fastpath function call"}, False),
        ({"state": None}, False),
        ({"state": "disabled"}, False),
        ({"exists": False, "state": None}, True),
        ({"state": "idle"}, True),
        ({"state": "idle in transaction (aborted)"}, True),
        ({"wait_event": "ClientRead"}, True),
        ({"state": "disabled", "wait_event": "ClientRead"}, True),
    ],
)
def test_the_session_s_own_server_tells_what_it_knows(seen: dict[str, Any], expected: bool) -> None:
    assert lost(BACKEND, replace(SEEN, **seen)) is expected


@pytest.mark.parametrize(
    ("ours", "seen", "expected"),
    [
        ({}, {}, True),
        ({}, {"standby": True}, False),
        ({"standby": True}, {}, False),
        ({}, {"system": "b"}, False),
        ({"system": None}, {"system": None}, False),
    ],
    ids=["restarted or promoted", "a standby answers", "ours is a standby", "another cluster", "unknown clusters"],
)
def test_another_server_proves_a_loss_only_if_it_took_the_place_of_the_session_s(
    ours: dict[str, Any], seen: dict[str, Any], expected: bool
) -> None:
    elsewhere = replace(SEEN, started=2, exists=False, state=None)
    assert lost(replace(BACKEND, **ours), replace(elsewhere, **seen)) is expected


def test_two_sessions_are_of_one_server_if_it_was_started_once_and_a_copy_of_its_cluster_is_another_one() -> None:
    assert same_server(BACKEND, replace(BACKEND, pid=8))
    assert not same_server(BACKEND, replace(BACKEND, started=2))
    assert not same_server(BACKEND, None)
    assert not same_server(None, BACKEND)
