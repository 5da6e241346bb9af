"""What is fuzzed: each target takes any bytes and fails only by an error that the product promises.

Each is the door of the product to bytes that somebody else wrote: the source, a provider, an operator, an agent.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec
import numpy as np
from starlette.requests import Request

from cdcsync.config import Chunking, HashEmbedder, OpenAIEmbedder, QualifiedName, TeiEmbedder, parse, redact_dsn
from cdcsync.config.serving import Serve
from cdcsync.documents.chunks import make_chunker
from cdcsync.documents.chunks.sizes import WHITE_SPACE
from cdcsync.documents.lexer import Token, Unreadable, tokens
from cdcsync.embedders import foreign
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.embedders.openai import OpenAIEmbedder as OpenAI
from cdcsync.embedders.pacing import MOST_ASKED_S, Pace, retry_after_s
from cdcsync.embedders.tei import TeiEmbedder as Tei
from cdcsync.errors import CdcsyncError
from cdcsync.malformed import MALFORMED
from cdcsync.model.conditions import ColumnKind, Where, understood
from cdcsync.model.visibility import Snapshot
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import decode_frame
from cdcsync.pgoutput.messages import UNCHANGED, Value
from cdcsync.serve import http, offered
from cdcsync.serve.messages import EmbedRequest, SearchRequest
from cdcsync.serve.problems import Problem
from cdcsync.source.spool import Spool
from cdcsync.target.search.arguments import plain_filter

warnings.simplefilter("error")

Target = Callable[[bytes], None]


def _decode(data: bytes) -> None:
    """The first byte chooses how the message is read."""
    how = data[0] if data else 0
    try:
        message = decode(data[1:], streamed=bool(how & 1), abort_info=bool(how & 2))
    except CdcsyncError:
        return
    repr(message)


def _frame(data: bytes) -> None:
    with contextlib.suppress(CdcsyncError):
        decode_frame(data)


def _spool(data: bytes) -> None:
    """The bytes are operations on a spool; what it replays is what was appended and not aborted."""
    spool = Spool("", 4_096)
    kept: dict[int, list[tuple[int, bytes]]] = {}
    current: int | None = None
    try:
        for at in range(0, len(data) - 1, 2):
            operation, xid = data[at] % 6, data[at + 1] % 4
            sub = 100 + data[at + 1] % 8
            match operation:
                case 0:
                    spool.enter(xid)
                    current = xid
                    kept.setdefault(xid, [])
                case 1 if current is not None:
                    payload = data[at : at + 2 + operation]
                    spool.append(sub, payload)
                    kept[current].append((sub, payload))
                case 2:
                    spool.leave()
                    current = None
                case 3 if current is None and xid in kept:
                    spool.abort(xid, sub)
                    first = next((place for place, (one, _) in enumerate(kept[xid]) if one == sub), None)
                    if first is not None:
                        kept[xid] = kept[xid][:first]
                case 4 if current is None:
                    assert list(spool.replay(xid)) == [payload for _, payload in kept.get(xid, [])]
                case 5 if current is None:
                    spool.drop(xid)
                    kept.pop(xid, None)
    except CdcsyncError:
        pass
    finally:
        spool.clear()
    assert spool.bytes == 0


def _config(data: bytes) -> None:
    try:
        parse(data.decode("utf-8", "replace"), {"HOME": "/", "A": "b"}, where="file")
    except CdcsyncError as error:
        str(error)


def _names(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    try:
        name = QualifiedName.parse(text)
    except CdcsyncError:
        return
    assert QualifiedName.parse(str(name)) == name


def _dsn(data: bytes) -> None:
    """A secret that stands where a password does is never shown."""
    text = data.decode("utf-8", "replace").replace("\0", "")
    redact_dsn(text)
    if all(character.isalnum() for character in text):
        assert "s3cr3t" not in redact_dsn(f"postgresql://u{text}:s3cr3t@h/{text}")
        assert "s3cr3t" not in redact_dsn(f"host=h{text} password=s3cr3t")


def _filters(data: bytes) -> None:
    """A filter of an agent is passed on as it was sent."""
    try:
        sent = msgspec.json.decode(data)
    except MALFORMED:
        return
    with contextlib.suppress(CdcsyncError):
        assert plain_filter(sent) == (sent or {})


def _snapshot(data: bytes) -> None:
    try:
        snapshot = Snapshot.parse(data.decode("ascii", "replace"))
    except ValueError:
        return
    for xid in (0, 1, 3, 2**32 - 1, 2**31):
        snapshot.sees(xid)


_OPENAI = OpenAI("far", OpenAIEmbedder(model="m", dimensions=4, base_url="http://127.0.0.1:1/v1"))
_TEI = Tei("near", TeiEmbedder(model="m", dimensions=4, base_url="http://127.0.0.1:1"))


def _answers(data: bytes) -> None:
    """Answers of providers, good ones and errors."""
    for embedder in (_OPENAI, _TEI):
        try:
            for vector in embedder._read(data, 10.0, 40):
                assert vector.dtype == np.float32
        except CdcsyncError:
            continue
    said = foreign.reason(data, ["a text that was sent"])
    assert "\0" not in said
    assert len(said) <= foreign.REASON_CHARACTERS + 2


_TOKENIZER = Hashing("h", HashEmbedder(dimensions=4))
_CHUNKERS = [
    make_chunker(Chunking(strategy=strategy, max_tokens=8, overlap_tokens=overlap), _TOKENIZER.tokenizer_json, None)
    for strategy in ("tokens", "characters", "markdown", "code", "none")
    for overlap in (0, 3)
]


def _chunks(data: bytes) -> None:
    """Cutting loses nothing but white space, and never fails for a text."""
    text = data.decode("utf-8", "replace").replace("\0", "")
    for chunker in _CHUNKERS:
        try:
            chunks = chunker.split(text)
        except CdcsyncError:
            continue
        assert [chunk.number for chunk in chunks] == list(range(len(chunks)))
        assert all(chunk.text.strip(WHITE_SPACE) for chunk in chunks)


def _lengths(data: bytes) -> None:
    """A batch of messages, each with its length before it, as the spool keeps them."""
    at = 0
    while at + 2 <= len(data):
        (length,) = struct.unpack_from("!H", data, at)
        _decode(data[at + 2 : at + 2 + length])
        at += 2 + length


def _words(data: bytes, vocabulary: Sequence[str]) -> str:
    """Return the words of a vocabulary that the bytes choose, so that few of them make up a sentence."""
    return " ".join(vocabulary[one % len(vocabulary)] for one in data)


_COLUMNS: dict[str, ColumnKind] = {"s": "text", "n": "integer", "b": "boolean", "p": "plain", "r": "row", "A b": "text"}
_CONDITION = (
    *("s", "n", "b", "p", "r", '"A b"', '"s"', "t", "lower", "current_date"),
    *("=", "<>", "!=", "<", "-", "+", "::", "||", "(", ")", ",", ".", ";", "--", "/*"),
    *("AND", "or", "NOT", "IS", "IN", "NULL", "DISTINCT", "FROM", "UNKNOWN", "TRUE", "FALSE", "COLLATE"),
    *("'a'", "''", "'it''s'", "'ä'", "1", "-0", "007", "1.5", "9223372036854775808", "E'\\''", "$$x$$", "B'1'"),
)
"""Words of conditions."""
_ROWS: tuple[Mapping[str, Value], ...] = (
    dict.fromkeys(_COLUMNS),
    dict.fromkeys(_COLUMNS, UNCHANGED),
    {"s": "a", "n": "1", "b": "t", "p": "x", "r": "(1,2)", "A b": "it's"},
    {"s": "", "n": "-9223372036854775808", "b": "f", "p": "", "r": "(,)", "A b": "\u00e4"},
)


def _conditions(data: bytes) -> None:
    """A condition is read word by word: its words written again are the same words, and parentheses change nothing.

    With a first byte that is odd, the others choose the words.
    """
    text = _words(data[1:], _CONDITION) if data[:1] and data[0] & 1 else data[1:].decode("utf-8", "replace")
    try:
        words = tokens(text)
    except Unreadable:
        return
    assert tokens(" ".join(map(_written, words))) == words
    utf8 = not (data[:1] and data[0] & 2)
    where = understood(text, words, _COLUMNS, utf8=utf8)
    assert set(where.deciding) <= set(where.columns)
    around = [Token("mark", "("), *words, Token("mark", ")")]
    for row in _ROWS:
        holds = _holds(where, row)
        if where.terms is not None:
            assert _holds(understood(f"({text})", around, _COLUMNS, utf8=utf8), row) is holds
            assert UNCHANGED in row.values() or holds is not None


def _written(word: Token) -> str:
    match word.kind:
        case "string":
            return "'" + word.text.replace("'", "''") + "'"
        case "quoted":
            return '"' + word.text.replace('"', '""') + '"'
        case _:
            return word.text


def _holds(where: Where, row: Mapping[str, Value]) -> bool | None:
    return where.holds([row[column] for column in where.deciding])


_HEADERS = (
    *("retry-after", "retry-after-ms", "x-ratelimit-remaining-requests", "x-ratelimit-reset-requests"),
    *("x-ratelimit-remaining-tokens", "x-ratelimit-reset-tokens"),
)


def _waits(data: bytes) -> None:
    """Headers of a provider, a value on each line, make nobody wait for more than is believed."""
    values = data.decode("latin-1").split("\n")
    headers = dict(zip(_HEADERS, values, strict=False))
    asked = retry_after_s(headers, datetime(2026, 11, 30, tzinfo=UTC))
    assert asked is None or 0 <= asked <= MOST_ASKED_S
    pace = Pace(0.0, requests_per_minute=60, tokens_per_minute=None)
    pace.heard(0.0, headers)
    if asked is not None:
        pace.hold(0.0, asked)
    assert 0 <= pace.wait_s(0.0, 1.0) <= MOST_ASKED_S
    pace.take(MOST_ASKED_S, 1.0)


_CALL = Request({"type": "http", "headers": []})
_SERVE = Serve()
_MEMBERS = (*SearchRequest.__struct_fields__, *EmbedRequest.__struct_fields__, "other")
_VALUES = (
    *("null", "true", "0", "1", "-1", "1e3", "1e999", "9223372036854775808", '""', '"a"', '"0/16B3748"', '"hybrid"'),
    *("[]", "[1]", "[1.5,null]", '["a"]', "{}", '{"a":1}', '{"a":{"in":[1]}}', '"\\u0000"', '"\\ud800"', "["),
)


def _requests(data: bytes) -> None:
    """The body of a call becomes a request or a problem; a request that is sent again is the same.

    With a first byte that is odd, the others choose the members and their values.
    """
    body = data[1:]
    if data[:1] and data[0] & 1:
        pairs = zip(body[::2], body[1::2], strict=False)
        members = (f'"{_MEMBERS[name % len(_MEMBERS)]}":{_VALUES[value % len(_VALUES)]}' for name, value in pairs)
        body = f"{{{','.join(members)}}}".encode()
    with contextlib.suppress(Problem):
        embed = http._decoded(_CALL, body, EmbedRequest)
        assert http._decoded(_CALL, msgspec.json.encode(embed), EmbedRequest) == embed
    with contextlib.suppress(Problem, CdcsyncError):
        search = http._decoded(_CALL, body, SearchRequest)
        assert http._decoded(_CALL, msgspec.json.encode(search), SearchRequest) == search
        offered._refuse_costly(search, _SERVE)
        plain_filter(search.filter)


def _paths(data: bytes) -> None:
    """The path of a document, and an If-None-Match on the line after it."""
    raw, _, condition = data.partition(b"\n")
    with contextlib.suppress(Problem):
        http._key_of(Request({"type": "http", "headers": [], "raw_path": b"/v1/indexes/" + raw}))
    http._matches(condition.decode("latin-1"), '"a"')


TARGETS: dict[str, Target] = {
    "answers": _answers,
    "chunks": _chunks,
    "conditions": _conditions,
    "config": _config,
    "decode": _decode,
    "dsn": _dsn,
    "filters": _filters,
    "frame": _frame,
    "messages": _lengths,
    "names": _names,
    "paths": _paths,
    "requests": _requests,
    "snapshot": _snapshot,
    "spool": _spool,
    "waits": _waits,
}
"""All targets by name."""
