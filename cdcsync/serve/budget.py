"""Keeps the answers to agents within their budget of tokens: cuts long values, and leaves out what does not fit then.

Everything that an agent reads counts: names, keys and columns as well as text. Keys are never cut, because a document
is fetched by them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cdcsync.serve.messages import Answer, Document, Found

CHARACTERS_PER_TOKEN = 4
"""The assumed length of a token: budgets are about orders of magnitude, and no model is asked for them."""

BYTES_PER_TOKEN = 4 * CHARACTERS_PER_TOKEN
"""The most bytes of a token, in UTF-8: a text that is longer than a budget of them does not fit."""

COLUMN_SHARE = 16
"""The part of an answer that a column of one hit may take, so that one long column does not displace other hits."""

LEAST = 40
"""Characters of a column that are always kept: dates, numbers and states are never cut."""

CUT = " […]"


def tokens(value: object) -> int:
    """Return about how many tokens a value takes in an answer."""
    return len(_json(value)) // CHARACTERS_PER_TOKEN + 1


def shortened(value: Any, most: int) -> Any:
    """Return a value, or the beginning of its text if it takes more than `most` characters."""
    if len(text := _json(value)) <= most:
        return value
    return _beginning(value if isinstance(value, str) else text, most) + CUT


def cut_answer(answer: Answer, budget: int) -> Answer:
    """Return the answer with as many of the first hits as fit; the first one is cut rather than left out."""
    whole, kept = budget, list[Found]()
    for hit in answer.hits:
        hit = msgspec.structs.replace(hit, columns=_cut_columns(hit.columns, whole))
        if tokens(hit) > budget:
            if kept:
                break
            others = len(_json(msgspec.structs.replace(hit, content="")))
            room = budget * CHARACTERS_PER_TOKEN - others
            hit = msgspec.structs.replace(hit, content=_beginning(hit.content, room) + CUT)
        kept.append(hit)
        budget -= tokens(hit)
    return msgspec.structs.replace(answer, hits=kept, left_out=len(answer.hits) - len(kept))


def cut_document(document: Document, budget: int) -> Document:
    """Return the document with as many of the first chunks as fit; the first one is cut rather than left out."""
    document = msgspec.structs.replace(document, columns=_cut_columns(document.columns, budget))
    budget -= tokens(msgspec.structs.replace(document, chunks=[]))
    kept: list[str] = []
    for chunk in document.chunks:
        if tokens(chunk) > budget:
            if not kept:
                kept.append(_beginning(chunk, budget * CHARACTERS_PER_TOKEN) + CUT)
            break
        kept.append(chunk)
        budget -= tokens(chunk)
    left_out = document.left_out + len(document.chunks) - len(kept)
    return msgspec.structs.replace(document, chunks=kept, left_out=left_out)


def _cut_columns(columns: Mapping[str, Any], budget: int) -> dict[str, Any]:
    """Return columns of which each takes its share at most, and all of them half of the budget."""
    most = max(LEAST, budget * CHARACTERS_PER_TOKEN // max(COLUMN_SHARE, 2 * len(columns)))
    return {name: shortened(value, most) for name, value in columns.items()}


def _beginning(text: str, room: int) -> str:
    """Return as much of a text as takes `room` characters in JSON, in which some take several."""
    text = text[: max(0, room)]
    while text and (takes := len(_json(text)) - 2) > room:
        text = text[: len(text) * room // takes]
    return text


def _json(value: object) -> str:
    return msgspec.json.encode(value, enc_hook=str).decode()
