"""An index whose search function is called: its rows, and the words that they hold."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from cdcsync.postgres.sessions import Connection
from cdcsync.target.search import count_words
from tests.support.indexes import SCHEMA, LiveIndex, changes, document

CARRIED = {
    "tenant": "integer",
    "state": "text",
    "made": "timestamp with time zone",
    "score": "numeric(6,2)",
    "code": "character(4)",
    "open": "boolean",
    "extra": "json",
}


async def find(connection: Connection, query: str | None, **arguments: Any) -> list[str]:
    """Return the ids that the function finds, best first."""
    if "filter" in arguments:
        arguments["filter"] = json.dumps(arguments["filter"])
    names = "".join(f", {name} => %({name})s" for name in arguments)
    cursor = await connection.execute(
        f"SELECT id FROM cdcsync.articles_search(%(query)s{names})".encode(), {"query": query, **arguments}
    )
    return [str(row[0]) for row in await cursor.fetchall()]


async def filled(
    index: LiveIndex, texts: Sequence[str | Sequence[str]], carried: Sequence[tuple[Any, ...]] = ()
) -> None:
    """Put documents into an index, by ids from 1, and count their words; a list is a document of several chunks."""
    await index.apply(
        changes(
            *(
                document(
                    str(id_),
                    *((text,) if isinstance(text, str) else text),
                    carried=tuple(carried[id_ - 1]) if carried else ("1",),
                )
                for id_, text in enumerate(texts, 1)
            )
        )
    )
    await count_words(index.connection, SCHEMA, index.spec)


async def filled_with_rows(index: LiveIndex) -> None:
    """Write `ROWS`, all of one text, with their vectors."""
    await filled(index, ["a page"] * len(ROWS), ROWS)
    await index.embed()


SHELF = (
    "the printer says E-716 and stops",
    "how to reset a forgotten password of the printer",
    "the printer prints, the printer hums, what does a printer mean?",
    "resetting the password policy",
    "forgotten things and a policy for the password reset",
)

ROWS = (
    ("3", "open", "2026-01-05 10:00:00+00", "1.50", "ab  ", "t", '{"a": 1}'),
    ("3", "new", "2026-02-05 10:00:00+00", "10.00", "b   ", "f", None),
    ("4", "closed'; --", "2026-03-05 10:00:00+00", "1.51", "abcd", None, None),
    ("5", None, None, None, None, "t", None),
)
