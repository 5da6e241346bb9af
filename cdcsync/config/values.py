"""The types of single values: they carry their range, or a rule that says in plain words what is wrong.

msgspec holds a rule in the type (`Meta.extra`), where the file's reader finds it; its own pattern and range
checks say the same in the JSON schema.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from cdcsync.config.names import QualifiedName, plain_name_fault
from cdcsync.config.redaction import dsn_fault
from cdcsync.errors import ConfigError

Distance = Literal["cosine", "l2", "inner_product"]
"""How nearness of vectors is measured."""

Rule = Callable[[str], str | None]
"""Says what is wrong with a text, without a final full stop, or None when nothing is."""

RULE = "rule"
"""The key of a rule in `Meta.extra`."""

MAX_DURATION_S = 86_400
"""A day. Nothing in this program waits longer by intent: a larger number was meant in milliseconds."""

SHORTEST_S = 0.01
"""The least time that is given to anything: a shorter one is over before a request has reached another machine."""

SHORTEST_INTERVAL_S = 0.1
"""What is repeated more often than this does little else, and writes or reads as much each time."""

MONTH_S = 31 * MAX_DURATION_S
"""The most between two repetitions of what reads whole indexes."""

_ADDRESS = re.compile(r"(?:\[(?P<v6>[^]]+)\]|(?P<host>[A-Za-z0-9._-]+)):(?P<port>[0-9]{1,5})")
_VISIBLE = re.compile(r"[!-~]+")
"""ASCII without spaces and control characters."""
_MEMORY = re.compile(r"([0-9]{1,10}) ?(kB|MB|GB|TB)")
_KB_PER_UNIT = {"kB": 1, "MB": 1024, "GB": 1024**2, "TB": 1024**3}
_MIN_MEMORY_KB = 1024
"""The least maintenance_work_mem that every supported PostgreSQL takes (64 kB came with 17)."""
_MAX_MEMORY_KB = 2**31 - 1
"""The most it holds anywhere: the setting is an int32 of kilobytes."""


def is_address(host: str) -> bool:
    """Say whether a host is written as an address, without brackets."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine alone; a name other than `localhost` may be anything."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)


def parse_address(text: str) -> tuple[str, int]:
    """Read `host:port` into the host, an IPv6 one without its brackets, and the port.

    :raises ConfigError: the text is neither name:port, IPv4:port nor [IPv6]:port, or the port is above 65535.
    """
    match = _ADDRESS.fullmatch(text)
    if match is not None and int(match["port"]) <= 65_535 and (match["v6"] is None or _is_ipv6(match["v6"])):
        return match["v6"] or match["host"], int(match["port"])
    raise ConfigError(
        f'expected host:port such as "127.0.0.1:9477" or "[::1]:9477", got {text!r}',
        hint='name the interface too: "0.0.0.0:9477" listens on all of them, "127.0.0.1:0" on any free port',
    )


def _is_ipv6(text: str) -> bool:
    try:
        ipaddress.IPv6Address(text)
    except ValueError:
        return False
    return True


def _checked_by(rule: Rule) -> Meta:
    return Meta(extra={RULE: rule})


def _read_by(parse: Callable[[str], object]) -> Meta:
    """Ask of a text that `parse` can read it."""

    def fault(text: str) -> str | None:
        try:
            parse(text)
        except ConfigError as error:
            return error.message
        return None

    return _checked_by(fault)


def _matching(expression: str, expected: str) -> Meta:
    """Ask of a text that it matches; `expected` says the same to people."""
    compiled = re.compile(expression)

    def fault(text: str) -> str | None:
        return None if compiled.fullmatch(text) else f"expected {expected}, got {text!r}"

    return Meta(pattern=expression, extra={RULE: fault})


def _blank_fault(text: str) -> str | None:
    return None if text.strip() else "expected some text, got none"


def _url_fault(text: str) -> str | None:
    try:
        url = urlsplit(text)
        port_is_fine = url.port is None or url.port > 0
    except ValueError:
        return "expected a URL such as http://127.0.0.1:8080/v1"
    if url.username is not None or url.password is not None or url.query or url.fragment:
        # A URL is shown in messages and logs.
        return "expected a URL without user, password, query and fragment; a key goes into api_key or api_key_file"
    if url.scheme not in ("http", "https") or not url.hostname or not port_is_fine or not _VISIBLE.fullmatch(text):
        return "expected a URL such as http://127.0.0.1:8080/v1"
    return None


def _key_fault(text: str) -> str | None:
    if not text or _VISIBLE.fullmatch(text):
        return None
    return "expected a key of visible ASCII characters without spaces, as it goes into an HTTP header"


def _cluster_fault(text: str) -> str | None:
    if text == "auto":
        return None
    if text.startswith("ray://"):
        return "expected host:port of the cluster's head without ray://: the worker's machine has to be a node of it"
    try:
        host, port = parse_address(text)
    except ConfigError:
        host, port = "", 0
    return None if host and port else 'expected "auto" or host:port, such as 10.0.0.5:6379'


def _memory_fault(text: str) -> str | None:
    size = _MEMORY.fullmatch(text)
    if size is not None and _MIN_MEMORY_KB <= int(size[1]) * _KB_PER_UNIT[size[2]] <= _MAX_MEMORY_KB:
        return None
    return f'expected a memory size from "1MB" to "2047GB" in kB, MB, GB or TB, got {text!r}'


def _header_name_fault(text: str) -> str | None:
    if not re.fullmatch(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}", text):
        return "expected the name of an HTTP header"
    if text.lower() in ("host", "content-type", "content-length", "transfer-encoding", "connection", "accept-encoding"):
        return f"{text} is set by the request itself"
    return None


def _header_fault(text: str) -> str | None:
    if re.fullmatch(r"[!-~](?:[ -~]*[!-~])?", text):
        return None
    return "expected the value of an HTTP header: ASCII without control characters, and without spaces at its ends"


def _expression_fault(text: str) -> str | None:
    if ";" in text or "--" in text or "/*" in text or "\0" in text:
        return "expected one SQL expression, without a semicolon, comment or zero byte"
    return None


SEARCH_COLUMN = re.compile(r"\{([^{}]+)\}")
"""A column of the row that names the language of its text, in place of the name of a configuration."""


def _read_searched(text: str) -> object:
    return text if SEARCH_COLUMN.fullmatch(text) else QualifiedName.parse(text)


def interval(most_s: int) -> Meta:
    """Ask of a number that it is an interval in seconds, up to `most_s`, or 0 for what is not to be repeated."""

    def fault(value: float) -> str | None:
        if value == 0 or SHORTEST_INTERVAL_S <= value <= most_s:
            return None
        return f"expected 0, or a number of at least {SHORTEST_INTERVAL_S} and at most {most_s}, got {value:.15g}"

    bounds = {"type": "number", "minimum": SHORTEST_INTERVAL_S, "maximum": most_s}
    return Meta(extra={RULE: fault}, extra_json_schema={"anyOf": [{"enum": [0]}, bounds]})


Text = Annotated[str, _checked_by(_blank_fault)]
Expression = Annotated[str, _checked_by(_expression_fault)]
HeaderName = Annotated[str, _checked_by(_header_name_fault)]
Header = Annotated[str, _checked_by(_header_fault)]
Dsn = Annotated[str, _checked_by(dsn_fault)]
Url = Annotated[str, _checked_by(_url_fault)]
ApiKey = Annotated[str, _checked_by(_key_fault)]
Name = Annotated[str, _checked_by(plain_name_fault)]
TablePattern = Annotated[
    str,
    _matching(
        r"[a-z_*][a-z0-9_$*]*\.[a-z_*][a-z0-9_$*]*",
        "SCHEMA.TABLE in lower-case letters, in which * stands for any others, such as tenant_*.articles",
    ),
]
Relation = Annotated[str, _read_by(QualifiedName.parse)]
Searched = Annotated[str, _read_by(_read_searched)]
Address = Annotated[str, _read_by(parse_address)]
ClusterAddress = Annotated[str, _checked_by(_cluster_fault)]
MemorySize = Annotated[str, _checked_by(_memory_fault)]
SlotName = Annotated[str, _matching("^[a-z0-9_]{1,63}$", "1 to 63 lower-case letters, digits or underscores")]
IndexName = Annotated[
    str,
    # Table names begin with it (NAME_vectors_12), and PostgreSQL cuts those at 63 bytes.
    _matching("^[a-z_][a-z0-9_]{0,39}$", "at most 40 lower-case letters, digits or underscores, no digit first"),
]
RelationName = Annotated[
    str,
    # It stands for a table in SQL, where `t` is the index's own table and `via` a table between.
    _matching(
        "^(?!(t|via)$)[a-z_][a-z0-9_]{0,39}$",
        "at most 40 lower-case letters, digits or underscores, no digit first, and neither t nor via",
    ),
]
_OBJECT = r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$"
FunctionPath = Annotated[str, _matching(_OBJECT, 'a function as "package.module:function"')]
ClassPath = Annotated[str, _matching(_OBJECT, 'a class as "package.module:Name"')]


def _option_fault(value: str | float | bool) -> str | None:
    plain = isinstance(value, (str, bool)) or abs(value) <= MAX_OPTION
    return None if plain else "expected a number between -10^15 and 10^15"


MAX_OPTION = 10**15
Option = Annotated[str | int | float | bool, _checked_by(_option_fault)]
"""A keyword argument for a class of the user's."""
EmbedderName = Annotated[
    str,
    # Metrics carry it as a label and messages as part of a key path: short, and no dots.
    _matching("^[A-Za-z0-9_-]{1,40}$", "at most 40 letters, digits, underscores or hyphens"),
]
Share = Annotated[float, Meta(ge=0, le=10_000)]
Seconds = Annotated[float, Meta(ge=SHORTEST_S, le=MAX_DURATION_S)]
Every = Annotated[float, interval(MONTH_S)]
Milliseconds = Annotated[float, Meta(ge=0, le=MAX_DURATION_S * 1000)]
Rows = Annotated[int, Meta(ge=1, le=100_000)]
SpoolBytes = Annotated[int, Meta(ge=1024**2, le=1024**5)]
BatchBytes = Annotated[int, Meta(ge=64 * 1024, le=1024**3)]
