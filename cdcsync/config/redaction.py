"""Secrets and what may be shown of them: passwords in connection strings, values under secret-sounding keys.

A connection string has two forms, `postgresql://user:password@host/db?password=…` and
`host=… password='…'`. One that libpq would refuse is hidden whole: refused strings are the ones that end up
in error messages, and a stray space or slash in the password is the usual reason for the refusal.

Source: PostgreSQL, "Connection Strings"; src/interfaces/libpq/fe-connect.c, conninfo_parse,
conninfo_uri_parse_options and conninfo_uri_parse_params.
"""

from __future__ import annotations

import re
from urllib.parse import unquote, unquote_to_bytes, urlsplit, urlunsplit

REDACTED = "***"
"""Stands for a secret. It needs no quoting in a URI, in key=value form or in TOML."""

_SECRET_KEY = re.compile(
    r"key|secret|token|password|passwd|authorization|credential|^(?:code|sig|signature)$", re.IGNORECASE
)
_SECRET_PARAMETER = re.compile(r"password|secret|token|scram_\w+_key")
"""libpq's own secrets. `sslkey` and `passfile` are paths, and worth seeing when one is wrong."""

_SCHEME = re.compile(r"postgres(?:ql)?://")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})|%00")
_HOST = r"(?:\[[^][@/?]*\]|[^][:@/?#&=,\s]*)(?::[0-9]*)?"
_HOSTS = re.compile(rf"{_HOST}(?:,{_HOST})*")
_KEYWORD = re.compile(r"[a-z0-9_]+")
"""All of libpq's keywords look like this, so anything else is likely the rest of a value with a stray space or `&`."""
_PAIR = re.compile(
    # Possessive, so that a value which cannot be read is not read again as something shorter.
    r"""\s*+ (?P<key>[a-z0-9_]++) \s*+ = \s*+ (?P<value> '(?:[^'\\]|\\.)*+' | (?!')(?:[^\s\\]|\\.|\\\Z)*+ ) \s*+""",
    re.VERBOSE | re.DOTALL | re.ASCII,
)


def redact_dsn(dsn: str) -> str:
    """Return the connection string with its passwords replaced by `***`.

    All of it becomes `***` when it is in neither of libpq's two forms. Redacting twice changes nothing.
    """
    readable = _redacted(dsn)
    return REDACTED if readable is None else readable


def redact_url(url: str) -> str:
    """Return the address without user and password, and without those values of its query that may be secrets.

    Anything but an HTTP address is returned as it is.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        return url
    query = [
        f"{name}={REDACTED}" if value and is_secret_key(unquote(name)) else f"{name}{equals}{value}"
        for name, equals, value in (one.partition("=") for one in parts.query.split("&"))
    ]
    _, at, host = parts.netloc.rpartition("@")
    return urlunsplit(parts._replace(netloc=f"{REDACTED if at else ''}{at}{host}", query="&".join(query)))


def dsn_fault(dsn: str) -> str | None:
    """Say what keeps the text from being a connection string, or None when it is one; never quotes the text."""
    if _redacted(dsn) is not None:
        try:
            # Of key=value pairs nothing is unescaped, but there are surrogates for bytes of the environment.
            (unquote_to_bytes(dsn) if _SCHEME.match(dsn) else dsn.encode()).decode()
        except UnicodeError:
            return "expected a connection string in UTF-8, in a URI once its percent escapes are read (ä is %C3%A4)"
        return None
    return (
        "expected a connection string, either postgresql://user@host/database or key=value pairs; "
        "in a URI, special characters of a password are percent-encoded (% itself is %25), "
        "in a pair it stands in single quotes"
    )


def dsn_parameters(dsn: str) -> list[str]:
    """Return the names of a connection string's parameters, in their order; of a URI those of its query."""
    if scheme := _SCHEME.match(dsn):
        _, _, query = _before_query(dsn[scheme.end() :])
        return [unquote(one.partition("=")[0]) for one in query.split("&") if one]
    return [pair["key"] for pair in _PAIR.finditer(dsn)]


def is_secret_key(key: str) -> bool:
    """Tell whether a text under this key is taken to be a secret, going by the key's name; the path of one is none."""
    return _SECRET_KEY.search(key) is not None and not key.endswith("_file")


def _redacted(dsn: str) -> str | None:
    """Return the string without its secrets, or None when libpq could not read it."""
    if scheme := _SCHEME.match(dsn):
        rest = _redacted_uri(dsn[scheme.end() :])
        return None if rest is None else scheme[0] + rest
    return _redacted_pairs(dsn)


def _redacted_uri(rest: str) -> str | None:
    """Redact what follows the scheme.

    The credentials end at the last `@` before the query: rather a hidden host than half a password.
    """
    if _BAD_ESCAPE.search(rest):
        return None
    before_query, question, query = _before_query(rest)
    credentials, at, hosts_and_path = before_query.rpartition("@")
    # libpq ends the credentials at the first `@`: what follows would be a host, and shown in its error message.
    if "@" in credentials or not _HOSTS.fullmatch(hosts_and_path.partition("/")[0]):
        return None
    user, colon, password = credentials.partition(":")
    shown = [_redacted_parameter(parameter) for parameter in query.split("&")] if query else []
    if None in shown:
        return None
    parameters = "&".join(filter(None, shown))
    return f"{user}{colon}{REDACTED if password else ''}{at}{hosts_and_path}{question}{parameters}"


def _redacted_parameter(parameter: str) -> str | None:
    encoded, equals, value = parameter.partition("=")
    name = unquote(encoded)
    if not equals or "=" in value or not _KEYWORD.fullmatch(name):
        return None
    return f"{encoded}={REDACTED}" if value and _SECRET_PARAMETER.search(name) else parameter


def _before_query(rest: str) -> tuple[str, str, str]:
    """Partition what follows the scheme at the question mark of its query: a password may hold one as well."""
    first_at, first_slash = rest.find("@"), rest.find("/")
    start = first_at if first_at >= 0 and (first_slash < 0 or first_at < first_slash) else 0
    head, question, query = rest[start:].partition("?")
    return rest[:start] + head, question, query


def _redacted_pairs(dsn: str) -> str | None:
    shown: list[str] = []
    position = 0
    while dsn[position:].strip():
        pair = _PAIR.match(dsn, position)
        if pair is None:
            return None
        text = pair[0]
        if pair["value"] not in ("", "''") and _SECRET_PARAMETER.search(pair["key"]):
            hidden = f"'{REDACTED}'" if pair["value"].startswith("'") else REDACTED
            text = f"{dsn[position : pair.start('value')]}{hidden}{dsn[pair.end('value') : pair.end()]}"
        shown.append(text)
        position = pair.end()
    return "".join(shown) + dsn[position:]
