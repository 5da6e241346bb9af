"""Whatever is wrong with what others wrote, one list of errors covers it."""

from __future__ import annotations

import base64
import json
import tomllib
from typing import Any

import msgspec
import pytest

from cdcsync.malformed import MALFORMED

ODD = [
    *(b"", b"{", b"\xff", b'"\x80"', b'{"a": "\x80"}', b'{"\x80": 1}', b"[" * 100_000, b'{"a": ' * 100_000),
    *(b"9" * 5_000 + b"x", b'{"a": 1e9999, }', b"nul"),
]
TYPES: list[Any] = [Any, str, dict[str, Any], list[float], int]


@pytest.mark.parametrize("content", ODD, ids=lambda content: repr(content)[:32])
def test_whatever_is_wrong_is_one_of_the_list(content: bytes) -> None:
    for type_ in TYPES:
        with pytest.raises(MALFORMED):
            msgspec.json.decode(content, type=type_)
    with pytest.raises(MALFORMED):
        json.loads(content)
    with pytest.raises(MALFORMED):
        tomllib.loads(content.decode() or "=")
    with pytest.raises(MALFORMED):
        base64.b64decode(content or b"=x=", validate=True)
