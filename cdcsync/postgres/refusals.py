"""Why a connection could not be opened, in plain words: libpq's own are long, and name no fix.

Source: PostgreSQL, src/interfaces/libpq/fe-connect.c and src/backend/libpq/auth.c.
"""

from __future__ import annotations

import os
import re

import msgspec

from cdcsync.config.names import quote
from cdcsync.postgres.passfile import to_edit

TOO_MANY_CONNECTIONS = "53300"
_NOT_GRANTED = "42501"
_CLOSED = "55000"

STILL_RUNS = (TOO_MANY_CONNECTIONS, _NOT_GRANTED, _CLOSED)
"""SQLSTATEs with which a server refuses new sessions for now, and still serves those that are open."""

REPORTED = ":  "
"""What libpq writes between the severity and the message of an error that a server reported, in any language."""


def allow_replication(role: str) -> str:
    """Return the statement that lets a role replicate: the attribute, or on Amazon RDS, which refuses it, membership.

    :param role: its name as SQL writes it.
    """
    return f"ALTER ROLE {role} REPLICATION; on Amazon RDS: GRANT rds_replication TO {role}"


class Refusal(msgspec.Struct, frozen=True):
    """A failed attempt to connect; waiting helps unless it is `lasting`.

    :ivar sqlstate: PostgreSQL's code for it, which libpq does not pass on, where somebody goes by that.
    """

    message: str
    hint: str
    lasting: bool = False
    sqlstate: str | None = None


_SERVER = r'connection to server at "(?P<host>[^"]*)"(?: \([^)]*\))?, port (?P<port>\d+) failed: '
_SOCKET = r'connection to server on socket "(?P<socket>[^"]*)" failed: '
_LOGIN = r'host "[^"]*", user "[^"]*"(?:, database "[^"]*")?(?:, \w+ encryption)?'

_WORDS: tuple[tuple[str, Refusal], ...] = (
    (
        # The latter before PostgreSQL 16.
        r"^(?P<said>.*(?:permission denied to start WAL sender|must be superuser or replication role).*)$",
        Refusal("{said}", f"for the role in the DSN: {allow_replication('…')}", lasting=True),
    ),
    (
        r"no password supplied",
        Refusal(
            "no password is given for this role",
            "set PGPASSWORD, add a line to {passwords}, or put ${NAME} into the DSN",
            lasting=True,
        ),
    ),
    (
        r'password authentication failed for user "(?P<role>[^"]*)"',
        Refusal(
            "the server refuses the password of role {role}",
            "correct it in the DSN, PGPASSWORD or {passwords}",
            lasting=True,
        ),
    ),
    (
        # In the same words the server tells that the service that it asks about a login is away, or slow.
        r'(?P<method>LDAP|RADIUS|PAM|BSD|GSSAPI|SSPI|OAuth bearer) authentication failed for user "(?P<role>[^"]*)"',
        Refusal(
            "the server's {method} authentication refuses role {role}",
            "its log says why: correct that, or wait if the service that it asks is away",
        ),
    ),
    (
        r'(?P<method>\w+) authentication failed for user "(?P<role>[^"]*)"',
        Refusal(
            "the server's {method} authentication refuses role {role}",
            "its log says why: correct that, or the line of pg_hba.conf for this login",
            lasting=True,
        ),
    ),
    (
        r'role "(?P<role>[^"]*)" does not exist',
        Refusal(
            "there is no role {role}",
            "create it (`cdcsync init` and `cdcsync config roles` print the SQL), or correct the role in the DSN",
            lasting=True,
        ),
    ),
    (
        r'role "(?P<role>[^"]*)" is not permitted to log in',
        Refusal("role {role} may not log in", "ALTER ROLE {role} LOGIN, or use another role", lasting=True),
    ),
    (
        r'database "(?P<database>[^"]*)" does not exist',
        Refusal("there is no database {database}", "create it, or correct the database name in the DSN", lasting=True),
    ),
    (
        rf"no pg_hba\.conf entry for (?P<what>(?:replication connection from )?{_LOGIN})",
        Refusal(
            "pg_hba.conf of the server lets nobody in from here as {what}",
            "add a line to pg_hba.conf and reload the server",
            lasting=True,
        ),
    ),
    (
        rf"pg_hba\.conf rejects (?P<what>(?:replication )?connection for {_LOGIN})",
        Refusal(
            "a line in pg_hba.conf of the server rejects this {what}",
            "change that line, or put one that allows this login above it, and reload the server",
            lasting=True,
        ),
    ),
    (
        # In other languages: the name of the file is not translated.
        r"^(?P<said>.*pg_hba\.conf.*)$",
        Refusal("{said}", "allow this login in pg_hba.conf and reload the server", lasting=True),
    ),
    (
        _SERVER + "Connection refused",
        Refusal(
            "no server listens on {host}, port {port}", "start it, or correct host and port; see its listen_addresses"
        ),
    ),
    (
        _SERVER + "(?:timeout expired|Connection timed out)",
        Refusal("{host}, port {port}, does not answer", "check the address, and firewalls on the way"),
    ),
    (
        r"connection timeout expired",
        Refusal("the server does not answer", "check the address, and firewalls on the way"),
    ),
    (
        _SERVER + "(?:No route to host|Network is unreachable)",
        Refusal("there is no way to {host} in the network", "check the address, and the network of this machine"),
    ),
    (
        r"failed to resolve host '(?P<host>[^']*)': no name server",
        Refusal("no name server answers for {host}", "check the name servers of this machine, and the way to them"),
    ),
    (
        r"failed to resolve host '(?P<host>[^']*)'|could not translate host name \"(?P<name>[^\"]*)\"",
        Refusal("the host name {host} is not known here", "correct the host in the DSN, or the name server's answer"),
    ),
    (
        _SOCKET + "No such file or directory",
        Refusal("no server listens on the socket {socket}", "start it, or name a host in the DSN"),
    ),
    (
        _SOCKET + "Permission denied",
        Refusal("this user may not open the socket {socket}", "run as another user, or name a host in the DSN"),
    ),
    (
        r'invalid integer value "(?P<value>[^"]*)" for connection option "(?P<option>[^"]*)"',
        Refusal(
            "{option} is {value} in the DSN or the environment, and must be a whole number",
            "correct it there",
            lasting=True,
        ),
    ),
    (
        r"bad value for (?P<option>connect_timeout): '(?P<value>[^']*)'",
        Refusal(
            "{option} is {value} in the DSN or the environment, and must be a whole number",
            "correct it there",
            lasting=True,
        ),
    ),
    (
        r'invalid port number: "(?P<value>[^"]*)"',
        Refusal(
            "port is {value} in the DSN or the environment, and must be from 1 to 65535",
            "correct it there",
            lasting=True,
        ),
    ),
    (
        r'invalid sslmode value: "(?P<value>[^"]*)"',
        Refusal(
            "there is no sslmode {value}",
            "write disable, allow, prefer, require, verify-ca or verify-full",
            lasting=True,
        ),
    ),
    (
        r'invalid (?P<option>\w+) value: "(?P<value>[^"]*)"',
        Refusal("there is no {option} {value}", "correct it in the DSN or the environment", lasting=True),
    ),
    (
        r'definition of service "(?P<service>[^"]*)" not found',
        Refusal(
            "no service file defines the service {service}",
            "add it to ~/.pg_service.conf, or name its file in PGSERVICEFILE",
            lasting=True,
        ),
    ),
    (
        r'root certificate file "(?P<file>[^"]*)" does not exist',
        Refusal(
            "there is no file {file} with the authority's certificate",
            "put it there, or name another one with sslrootcert; `system` takes those that this machine trusts",
            lasting=True,
        ),
    ),
    (
        r"certificate verify failed",
        Refusal(
            "the server's certificate is not signed by an authority that is trusted here",
            "name the authority's certificate with sslrootcert",
            lasting=True,
        ),
    ),
    (
        r'server certificate for "(?P<names>[^"]*)"[^"]* does not match host name "(?P<host>[^"]*)"',
        Refusal(
            "the server's certificate is for {names}, not for {host}",
            "connect by the name in the certificate, or give the server another one",
            lasting=True,
        ),
    ),
    (
        r"server does not support SSL, but SSL was required",
        Refusal(
            "the server offers no TLS, and sslmode asks for it",
            "switch ssl on in the server, or lower sslmode",
            lasting=True,
        ),
    ),
    (
        r"too many clients already|remaining connection slots are reserved",
        Refusal(
            "all connections of the server are in use",
            "raise max_connections, or close some",
            sqlstate=TOO_MANY_CONNECTIONS,
        ),
    ),
    (
        r'too many connections for role "(?P<role>[^"]*)"',
        Refusal(
            "role {role} has as many connections as it may",
            "raise its limit, ALTER ROLE {role} CONNECTION LIMIT …, or close some",
            sqlstate=TOO_MANY_CONNECTIONS,
        ),
    ),
    (
        r'too many connections for database "(?P<database>[^"]*)"',
        Refusal(
            "database {database} has as many connections as it may",
            "raise its limit, ALTER DATABASE {database} CONNECTION LIMIT …, or close some",
            sqlstate=TOO_MANY_CONNECTIONS,
        ),
    ),
    (
        r'requested standby connections exceeds "?max_wal_senders',
        Refusal(
            "all WAL senders of the server are in use",
            "end a standby or backup that is not needed, or raise max_wal_senders and restart the server",
            sqlstate=TOO_MANY_CONNECTIONS,
        ),
    ),
    (
        r'database "(?P<database>[^"]*)" is not currently accepting connections',
        Refusal(
            "database {database} takes no connections",
            "ALTER DATABASE {database} ALLOW_CONNECTIONS true",
            sqlstate=_CLOSED,
        ),
    ),
    (
        r'cannot connect to invalid database "(?P<database>[^"]*)"',
        Refusal(
            "database {database} is invalid, as a DROP DATABASE was interrupted",
            "drop it and create it again, or correct the database name in the DSN",
        ),
    ),
    (
        r'permission denied for database "(?P<database>[^"]*)"',
        Refusal(
            "the role may not connect to database {database}",
            "GRANT CONNECT ON DATABASE {database} to the role in the DSN",
            sqlstate=_NOT_GRANTED,
        ),
    ),
    (
        r"server is not in hot standby mode|session is not read-only",
        Refusal(
            "the server takes writes, and target_session_attrs asks for one that takes none",
            "remove target_session_attrs from the DSN or the environment, or make it read-write",
        ),
    ),
    (
        r"server is in hot standby mode|session is read-only",
        Refusal(
            "the server takes only reads, and target_session_attrs asks for one that takes writes",
            "promote it, name the primary in the DSN, or remove default_transaction_read_only of server, role or"
            " database",
        ),
    ),
    (
        r"the database system is starting up",
        Refusal("the server is starting up", "wait: its log says how far it has come"),
    ),
    (
        r"the database system is shutting down",
        Refusal("the server is shutting down", "start it again, if nobody else does"),
    ),
    (
        r"the database system is (?:not (?:yet )?accepting connections|in recovery mode)",
        Refusal("the server recovers and takes no connections yet", "wait: its log says how far it has come"),
    ),
)


def explain(words: str, *, host: str | None = None) -> Refusal | None:
    """Return what libpq's words mean; None where they are not known.

    :param host: whose words they are, if it is one of several: the message names it.
    """
    text = " ".join(words.split())
    for pattern, refusal in _WORDS:
        if (match := re.search(pattern, text)) is not None:
            found = {name: value for name, value in match.groupdict().items() if value is not None}
            if "name" in found:  # two versions of libpq say the same in two ways
                found["host"] = found["name"]
            found |= {name: quote(found[name]) for name in ("role", "database") if name in found}
            found["passwords"] = to_edit(os.environ)
            message, hint = _filled(refusal.message, found), _filled(refusal.hint, found)
            if host is not None and not any(name in refusal.message for name in ("{host}", "{socket}", "{said}")):
                message += f" (host {host})"
            return msgspec.structs.replace(refusal, message=message, hint=hint)
    return None


def _filled(template: str, values: dict[str, str]) -> str:
    """Put values into the template; `${NAME}` is not one of its places."""
    return re.sub(r"(?<!\$)\{(\w+)\}", lambda match: values.get(match[1], ""), template)
