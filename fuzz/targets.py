"""What is fuzzed: each target takes any bytes and fails only by an error that the product promises.

Each is the door of the product to bytes that somebody else wrote: the source, a provider, an operator, an agent.
"""

from __future__ import annotations

import contextlib
import struct
import warnings
from collections.abc import Callable

import msgspec
import numpy as np

from cdcsync.config import Chunking, HashEmbedder, OpenAIEmbedder, QualifiedName, TeiEmbedder, parse, redact_dsn
from cdcsync.documents.chunks import make_chunker
from cdcsync.documents.chunks.sizes import WHITE_SPACE
from cdcsync.embedders import foreign
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.embedders.openai import OpenAIEmbedder as OpenAI
from cdcsync.embedders.tei import TeiEmbedder as Tei
from cdcsync.errors import CdcsyncError
from cdcsync.malformed import MALFORMED
from cdcsync.model.visibility import Snapshot
from cdcsync.pgoutput.decode import decode
from cdcsync.pgoutput.frames import decode_frame
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


TARGETS: dict[str, Target] = {
    "answers": _answers,
    "chunks": _chunks,
    "config": _config,
    "decode": _decode,
    "dsn": _dsn,
    "filters": _filters,
    "frame": _frame,
    "messages": _lengths,
    "names": _names,
    "snapshot": _snapshot,
    "spool": _spool,
}
"""All targets by name."""
