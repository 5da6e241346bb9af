"""What a session is opened with, and set to, on either server.

Source: PostgreSQL, "Client Connection Defaults"; "Database Connection Control Functions".
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from typing import Any, Literal, LiteralString

import psycopg
from psycopg import conninfo, pq

from cdcsync.config import redact_dsn
from cdcsync.config.redaction import dsn_fault, dsn_parameters
from cdcsync.errors import SetupError
from cdcsync.postgres.liveness import TCP_USER_TIMEOUT_MS

Side = Literal["source", "target"]

RENDERING: LiteralString = (
    "SET datestyle = 'ISO, MDY'; SET intervalstyle = 'postgres'; SET extra_float_digits = 3; SET bytea_output = 'hex';"
    " SET timezone = 'UTC'; SET search_path = ''; SET xmloption = 'content';"
    " SET lc_monetary = 'C'; SET array_nulls = on; SET standard_conforming_strings = on;"
    " SET lc_time = 'C'; SET lc_numeric = 'C'; SET transform_null_equals = off;"
    " SET quote_all_identifiers = off"
)
"""Settings by which values and names are written and read. An empty search_path makes names in values (regclass, say)
come out qualified. In another `lc_monetary` an amount of money would be another number to a reader, and conditions may
write numbers and days, or compare with NULL. The driver writes bytes as the server reads them only where strings are
standard."""

SAFETY: LiteralString = (
    "SELECT set_config(name, setting, false) FROM (VALUES ('statement_timeout', '0'), ('lock_timeout', '0'),"
    " ('transaction_timeout', '0'), ('idle_in_transaction_session_timeout', '120s'), ('idle_session_timeout', '0'),"
    " ('tcp_keepalives_idle', '30'), ('tcp_keepalives_interval', '10'), ('tcp_keepalives_count', '3'),"
    " ('tcp_user_timeout', '60000'), ('default_transaction_isolation', 'read committed'), ('jit', 'off'))"
    " AS ours (name, setting)"
    " WHERE current_setting(name, true) IS NOT NULL"
)
"""A role's own limits are for its queries: a build, a slot or a large page takes the time that it takes. And a server
whose client is gone without a word ends the session within a minute, rather than keep its locks for two hours. If the
client's machine still answers, because the process is frozen or a proxy keeps its session open, what was begun ends
after two minutes, and with it locks and the horizon of vacuum: no transaction of ours waits for anything but a server.
Each statement is planned anew for the rows of its batch or page, and compiling it would take longer than running it.
Not every version has all of these."""

LEAVING: LiteralString = (
    "SELECT set_config('client_connection_check_interval', '1s', false)"
    " WHERE current_setting('client_connection_check_interval', true) IS NOT NULL"
)
"""A session whose client is gone ends within a second even while it waits for a lock: otherwise what a killed worker
asked for would still be in the queue, and hold up everybody behind it. Not every version and operating system can
tell."""

TABLES_ONLY: LiteralString = (
    "SELECT set_config('restrict_nonsystem_relation_kind', 'view, foreign-table', false)"
    " WHERE current_setting('restrict_nonsystem_relation_kind', true) IS NOT NULL"
)
"""The source's tables are read by name. If their owner replaces one by a view, the view's functions would run with our
role's privileges; the server then refuses the statement instead. Supported since the minor releases of August 2024."""

ALWAYS_BRIEFLY: LiteralString = "SET lock_timeout = '400ms'"
"""In all of a session. Less than PostgreSQL's default `deadlock_timeout`, 1 s: so that the server never breaks a circle
by failing somebody's statement, we give up."""

DURABILITY: dict[Side, LiteralString] = {
    # Our writes on the source are marks and publications: flushed at commit, waiting for no standby.
    # And a table of an application may be locked for hours, which must not hold up what is for another index.
    "source": "SET synchronous_commit = local; " + ALWAYS_BRIEFLY,
    # Changes acknowledged to the source must survive a crash of the target, whatever the role's default is.
    # PostgreSQL creates no partitioned table if `default_tablespace` names what is the database's tablespace anyway.
    "target": "SET synchronous_commit = on;"
    " SELECT set_config('default_tablespace', '', false) FROM pg_database AS d JOIN pg_tablespace AS t"
    " ON t.oid = d.dattablespace WHERE d.datname = current_database()"
    " AND t.spcname = current_setting('default_tablespace')",
}
"""Settings that only one side's sessions need."""

WORKING: LiteralString = (
    "SET row_security = off; SELECT set_config('random_page_cost',"
    " least(current_setting('random_page_cost')::float8, 1.1 * current_setting('seq_page_cost')::float8)::text, false)"
)
"""What keeps an index in step sees every row: what a policy hides would be neither changed nor deleted nor compared, so
such a policy makes the statement fail. And it looks up the rows of a batch or page by their keys. At the cost that a
page has on a rotating disk, the server would read a table of a hundred thousand rows for two thousand of them."""

CONNECT_TIMEOUT_S = 10
"""Long enough for a server that is starting, short enough that an operator waits for the message."""

_DEAD_PEER = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": TCP_USER_TIMEOUT_MS,
}
"""A peer that vanished without a word is noticed within a minute, not after the kernel's two hours."""


def describe(dsn: str) -> str:
    """Return a DSN as it may be shown: without secrets; libpq's own settings when it is empty."""
    return redact_dsn(dsn) if dsn else "libpq's environment (PGHOST, PGSERVICE, …)"


def environment_options(service: str | None = None) -> dict[str, str]:
    """Return libpq's settings of the environment and of the service file, and what it takes where nothing is said.

    :param service: what a DSN names, in place of the environment's; there are none if no file defines it.
    :raises SetupError: one of them is not UTF-8.
    """
    found = {}
    for option in pq.Conninfo.get_defaults() if service is None else _of_a_service(service):
        try:
            if option.val is not None:
                found[option.keyword.decode()] = option.val.decode()
        except UnicodeDecodeError:
            variable = (option.envvar or b"PGSERVICE").decode()
            raise SetupError(
                f"the {option.keyword.decode()} of libpq's environment is not UTF-8",
                where=variable if variable in os.environ else "the service file",
                hint="write it in UTF-8",
            ) from None
    return found


def options_with(own: Mapping[str, Any]) -> dict[str, str]:
    """Return what libpq goes by: a DSN's own options before those of the service that it names, and the environment's.

    :raises SetupError: one of these is not UTF-8.
    """
    return environment_options(own.get("service")) | {key: str(value) for key, value in own.items()}


def _of_a_service(service: str) -> list[pq.ConninfoOption]:
    """Return libpq's settings if a DSN names this service: what its file says, and the environment where it is silent.

    Only a connection has them. This one is refused for its sslmode before any host is asked for.
    """
    refused = pq.PGconn.connect_start(conninfo.make_conninfo("", service=service, sslmode="none").encode())
    try:
        return [option for option in refused.info if option.keyword != b"sslmode"]
    finally:
        refused.finish()


def conninfo_for(dsn: str, **settings: str | int) -> str:
    """Return `dsn` with our settings added where it does not say otherwise itself.

    The encoding is always ours: the stream and texts are read as UTF-8. So is the protocol: statements with parameters
    cannot be sent over a connection for replication.

    :raises SetupError: it is not a DSN, a host of it cannot exist, or libpq's environment cannot be read.
    """
    if fault := dsn_fault(dsn):
        raise SetupError(fault, where=describe(dsn), hint="correct the DSN")
    environment_options()
    try:
        own = conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:
        # libpq's own words would repeat the part that it stumbled over, which may be the password.
        known = {option.keyword.decode() for option in pq.Conninfo.get_defaults()}
        unknown = [name for name in dsn_parameters(dsn) if name not in known]
        meant = [close[0] for one in unknown if (close := difflib.get_close_matches(one, known, n=1, cutoff=0.7))]
        raise SetupError(
            f"libpq knows no parameter {', '.join(unknown)}" if unknown else "not a connection string",
            where=describe(dsn),
            hint=f"did you mean {', '.join(meant)}?"
            if meant
            else "remove it: another library's DSN has some that libpq has not"
            if unknown
            else "write postgresql://user@host/database, or key=value pairs",
        ) from None
    _refuse_impossible_hosts(dsn, options_with(own))
    defaults = {"connect_timeout": CONNECT_TIMEOUT_S, **_DEAD_PEER}
    merged: dict[str, Any] = {**defaults, **own, "client_encoding": "UTF8", "replication": "", **settings}
    return conninfo.make_conninfo("", **merged)


def _refuse_impossible_hosts(dsn: str, options: Mapping[str, Any]) -> None:
    """Refuse a host that no name server could be asked for, such as `db..example.org`, whose middle is missing.

    :raises SetupError: there is one.
    """
    for host in str(options.get("host") or "").split(","):
        try:
            if not host.startswith("/") and not options.get("hostaddr"):
                host.encode("idna")
        except UnicodeError:
            raise SetupError(
                f"{host} cannot be a host name: each part between its dots has 1 to 63 letters, digits and hyphens",
                where=describe(dsn),
                hint="correct the host in the DSN or in PGHOST; of a ${NAME} in it, see that it is set",
            ) from None
