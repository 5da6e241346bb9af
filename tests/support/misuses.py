"""Arguments that the calls of an index cannot use, and what their refusal says."""

from __future__ import annotations

from typing import Any

NAN = float("nan")

OPENING: tuple[tuple[dict[str, Any], str], ...] = (
    ({"config": "cdcsync.toml"}, "'cdcsync.toml' is not a configuration"),
    ({"name": 5}, "5 is not a text"),
    ({"name": ["articles"]}, "is not a text"),
    ({"name": "artikles"}, "no index artikles"),
    ({"connections": 0}, "no index has 0 connections"),
    ({"connections": 1_001}, "no index has 1001 connections"),
    ({"connections": "4"}, "'4' is not a whole number"),
    ({"model_timeout_s": NAN}, "nan is not a number of seconds"),
    ({"model_timeout_s": "5"}, "'5' is not a number of seconds"),
    ({"application_name": 5}, "5 is not a text"),
    ({"application_name": "a\0"}, "no text can hold"),
)
"""Arguments of `Index.open`."""

CALLS: tuple[tuple[str, tuple[Any, ...], dict[str, Any], str], ...] = (
    *(
        ("search", ("a cat",), named, told)
        for named, told in (
            ({"k": 2.5}, "2.5 is not a whole number"),
            ({"k": 0}, "cannot return 0 hits"),
            ({"skip": None}, "None is not a whole number"),
            ({"mode": None}, "there is no mode None"),
            ({"filter": [3]}, "the filter is"),
            ({"per_document": 3}, "3 is neither True nor False"),
            ({"weights": 1.0}, "the weights are"),
            ({"vector": 5}, "the query's vector is 5"),
            ({"vector": [NAN]}, "the query's vector is"),
            ({"headline": 5}, "5 is not a text"),
            ({"headline": "\ud800"}, "no text can hold"),
            ({"filter": {"tenant": "\0"}}, "no text can hold"),
            ({"settings": {"app.tenant": "\ud800"}}, "no text can hold"),
            ({"settings": [1]}, "the settings are"),
            ({"timeout_s": NAN}, "cannot take nan seconds"),
            ({"generation": "1"}, "'1' is not a whole number"),
            ({"after_lsn": 5}, "5 is not an LSN"),
            ({"after_lsn": "0/0", "wait_s": "x"}, "'x' is not a number of seconds"),
            ({"after_lsn": "0/0", "wait_s": NAN}, "nan is not a number of seconds"),
            ({"wait_s": None}, "None is not a number of seconds"),
        )
    ),
    ("search", (None,), {}, "None is not a text"),
    ("search", (5,), {"mode": "text"}, "5 is not a text"),
    ("rerank", (None, []), {}, "None is not a text"),
    ("rerank", ("a cat", [{"content": "a cat"}]), {}, "these are not hits"),
    ("rerank", ("a cat", 5), {}, "these are not hits"),
    *(
        (method, (text, *more), {}, "no text can hold")
        for text in ("a\0", "\ud800")
        for method, more in (("search", ()), ("rerank", ([],)))
    ),
    ("embed", ("a cat",), {}, "these are not texts"),
    ("embed", (["a cat", None],), {}, "None is not a text"),
    *(("embed", (["a cat", text],), {}, "no text can hold") for text in ("a\0", "\ud800")),
    ("wait_for", (5,), {}, "5 is not an LSN"),
    ("wait_for", ("0/0",), {"timeout_s": "x"}, "'x' is not a number of seconds"),
    ("wait_for", ("0/0",), {"timeout_s": NAN}, "nan is not a number of seconds"),
    ("wait_for", ("0/0",), {"timeout_s": 10**400}, "is not a number of seconds"),
    ("wait_for", ("0/0",), {"vectors": 3}, "3 is neither True nor False"),
)
"""Calls of an index that is open: the method, its arguments, and what the refusal says."""
