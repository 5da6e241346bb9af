"""DSNs of several hosts: whether every session that the worker opens by one ends on the primary.

libpq takes the first host that answers. Unless the DSN asks for more than that, sessions that are opened later, after a
host was away or a standby was promoted, may be on another server than those that are open.

Source: PostgreSQL, "libpq - C Library", "Specifying Multiple Hosts" and target_session_attrs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import psycopg
from psycopg import conninfo

from cdcsync.postgres.settings import Side, environment_options
from cdcsync.preflight.findings import Finding

PRIMARY_ONLY = ("read-write", "primary")
"""The values of target_session_attrs that let no standby in."""


def connection_options(dsn: str) -> dict[str, str]:
    """Return what libpq goes by: the DSN's own options before those of the environment; nothing of a faulty DSN.

    :raises SetupError: those of the environment cannot be read.
    """
    try:
        own = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        return {}
    return environment_options() | {key: str(value) for key, value in own.items()}


def host_faults(side: Side, options: Mapping[str, str]) -> Iterator[Finding]:
    """Say if sessions may end on a standby, although the primary can be reached."""
    hosts = max(len(options.get(key, "").split(",")) for key in ("host", "hostaddr"))
    accepted = options.get("target_session_attrs") or "any"
    if hosts > 1 and accepted not in PRIMARY_ONLY:
        yield Finding.error(
            f"{side}.dsn",
            f"names {hosts} hosts and, with target_session_attrs={accepted}, accepts whichever answers first, even if"
            " that is a standby",
            f"set target_session_attrs=read-write in {side}.dsn, so that every session is on the primary, and follows"
            " it when another server is promoted",
        )
