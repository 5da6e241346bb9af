"""Compares one document with its row: the rendering of the source's row against the contents of the index.

The comparison is made at a mark, as every page is applied at one: the row under the page's snapshot, the index once
everything before the mark is in it. The index may be further by then. A difference therefore counts only if nothing
that the snapshot does not see has touched the key, and that is asked *after* the index was read: what the index can
hold has been delivered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio.to_thread

from cdcsync.documents.chunks import Chunker
from cdcsync.documents.chunks.sizes import WHITE_SPACE
from cdcsync.errors import DocumentError
from cdcsync.flows.backfill.pages import Entry, Page
from cdcsync.model.requests import Problem
from cdcsync.model.rows import Key, Row, Unread
from cdcsync.model.spec import IndexSpec
from cdcsync.model.visibility import Snapshot
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.target.keys import stored_documents


async def check(
    target: Connection,
    schema: str,
    spec: IndexSpec,
    chunker: Chunker,
    page: Page,
    hides: Callable[[Key, Snapshot], bool],
) -> tuple[list[tuple[Key, Problem]], list[Key]]:
    """Compare the documents of a page whose mark is in the target.

    :param chunker: what cuts documents, which can fail for one that is missing therefore.
    :param hides: whether something was delivered for a key that the snapshot does not see.
    :returns: the differences, and the keys that cannot be judged because they have changed since.
    """
    with speaking_of("target", where=f"index {spec.name}", index=spec.name):
        stored = await stored_documents(target, schema, spec, [key for key, _ in page.entries])
    found: list[tuple[Key, Problem]] = []
    changed: list[Key] = []
    for key, row in page.entries:
        problem = difference(spec, row, stored.get(key))
        if problem is None:
            continue
        if hides(key, page.snapshot):
            changed.append(key)
        else:
            found.append((key, problem))
    missing = {key for key, problem in found if problem == "missing"} if chunker.fallible else set()
    if missing:
        rows = [(key, row) for key, row in page.entries if key in missing and isinstance(row, tuple)]
        uncut = await anyio.to_thread.run_sync(_uncut, spec, chunker, rows)
        found = [(key, "failed" if key in uncut else problem) for key, problem in found]
    return found, changed


def _uncut(spec: IndexSpec, chunker: Chunker, rows: Sequence[tuple[Key, Row]]) -> set[Key]:
    """Return the keys of rows whose documents cannot be cut into chunks."""
    failed: set[Key] = set()
    chunker.split_all([spec.render(row) for _, row in rows], lambda place, _: failed.add(rows[place][0]))
    return failed


def difference(spec: IndexSpec, row: Entry, stored: tuple[Row, bytes] | None) -> Problem | None:
    """Say how the index differs for one key; a document of white space alone has no place in it.

    Nor has a row that no document can be made of: that it is not there is all that can be done, and no difference.
    """
    if isinstance(row, Unread):
        return "failed" if stored is None else "stale"
    try:
        made = None if row is None else spec.render(row)
    except DocumentError:
        return "failed" if stored is None else "stale"
    if row is None or made is None or not made.text.strip(WHITE_SPACE):
        return None if stored is None else "orphaned"
    if stored is None:
        return "missing"
    carried, hash_ = stored
    if hash_ != made.hash:
        return "stale"
    return None if carried == spec.shape.carried_of(row) else "carried"
