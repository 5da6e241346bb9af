"""Everything that comes in from a provider passes through here: bytes that are decoded, and text that is repeated.

A provider may send any bytes and any words. `Body` takes bytes in, and no more than an answer may have; `decoded` turns
them into a value or fails with an `EmbedError`; `repeatable` turns words into one line that may go to a log or a table:
no control characters (PostgreSQL stores no NUL, and a terminal obeys escape sequences), a bounded length, nothing of
what was sent, which providers like to quote, and no login, which addresses may hold. Words of libraries take the same
way.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import msgspec

from cdcsync.errors import EmbedError
from cdcsync.malformed import MALFORMED

REASON_CHARACTERS = 300
QUOTE_CHARACTERS = 12
"""A message that has this many characters in a row in common with a text may quote it, and is not repeated."""
SHORT_TEXT = 3
"""Texts of so few characters are in every message, and tell nothing."""

_LOGIN = re.compile(r"(?<=//)[^/\s'\"]*@")
"""The login in an address: `robot:secret@` of `https://robot:secret@hub.internal/api`."""

HIDDEN = "(its message repeats what was sent, and is not shown)"

PACKED = "gzip"
"""The compression that requests ask for. The other ones that HTTP knows save no more on numbers."""


class Body:
    """The body of an answer while it comes in.

    A few compressed bytes can stand for gigabytes, all the more if they are compressed several times. So nothing is
    unpacked beyond what an answer may have, and nothing that was not asked for.

    :param coding: what the answer says it is compressed by.
    :param at_most: how many bytes it may have, unpacked.
    :raises EmbedError: it is compressed in another way than was asked for.
    """

    def __init__(self, coding: str, at_most: int) -> None:
        if coding.strip().lower() not in ("", "identity", PACKED):
            raise EmbedError("the provider's answer is compressed in a way that was not asked for")
        self._unpacker = zlib.decompressobj(zlib.MAX_WBITS | 16) if coding.strip().lower() == PACKED else None
        self._at_most = at_most
        self.received = bytearray()

    def add(self, part: bytes) -> bool:
        """Take the next bytes in; False once there are too many.

        :raises EmbedError: they are not what the answer says.
        """
        room = self._at_most - len(self.received)
        if self._unpacker is None:
            self.received += part[: room + 1]
        else:
            try:
                self.received += self._unpacker.decompress(part, room + 1)
            except zlib.error:
                raise EmbedError("the provider's answer is not compressed as it says") from None
        return len(self.received) <= self._at_most


T_co = TypeVar("T_co", covariant=True)


class Decoder(Protocol[T_co]):
    """Reads bytes, as msgspec's decoders do."""

    def decode(self, body: bytes, /) -> T_co:
        """Return the value that the bytes stand for."""
        ...


def decoded(body: bytes, decoder: Decoder[T_co], expected: str) -> T_co:
    """Return the value of an answer's bytes.

    :param expected: what the answer should be, for the message.
    :raises EmbedError: it is something else. The decoder's own words could quote the answer, so they are not repeated.
    """
    try:
        return decoder.decode(body)
    except MALFORMED:
        raise EmbedError(f"the provider's answer is not {expected}") from None


def reason(body: bytes, sent: Sequence[str]) -> str:
    """Return what the body of an error says, fit to be repeated; nothing when it is not JSON or has no message.

    :param sent: texts and keys that the message must not contain.
    """
    try:
        message = _message(msgspec.json.decode(body))
    except MALFORMED:
        return ""
    return repeatable(message, sent)


def repeatable(words: str, sent: Sequence[str] = ()) -> str:
    """Return foreign words as one line that may be logged and stored.

    :param sent: texts and keys; words that contain a part of one are replaced as a whole.
    """
    printable = "".join(character if character.isprintable() else " " for character in words[: 20 * REASON_CHARACTERS])
    line = _LOGIN.sub("***@", " ".join(printable.split()))[:REASON_CHARACTERS]
    pieces = {line[at : at + QUOTE_CHARACTERS] for at in range(len(line) - QUOTE_CHARACTERS + 1)}
    for text in sent:
        if len(text) > SHORT_TEXT and (text in line or any(piece in text for piece in pieces)):
            return HIDDEN
    return line


def first_line(error: BaseException, sent: Sequence[str] = ()) -> str:
    """Return what a library's error says, as `repeatable` does; the lines after the first are advice."""
    return repeatable(str(error).strip().partition("\n")[0], sent)


def _message(answer: Any) -> str:
    """Return the message in the forms that providers give it: OpenAI, text-embeddings-inference, FastAPI."""
    match answer:
        case str():
            return answer
        case {"error": {"message": str(message), "code": str(code)}}:
            return f"{code}: {message}"
        case {"error": {"message": str(message)}} | {"error": str(message)} | {"message": str(message)}:
            return message
        case {"detail": str(message)} | {"detail": [{"msg": str(message)}, *_]}:
            return message
        case _:
            return ""
