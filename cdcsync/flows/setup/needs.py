"""Decides which load an index needs to match its configuration, and why.

Asked at every start, which then asks for that load, and by `cdcsync plan`, which only tells. Nothing here reads or
writes.
"""

from __future__ import annotations

import msgspec

from cdcsync.config import Index
from cdcsync.config.differences import CONTENTS, KeyChange, index_changes
from cdcsync.model.requests import Kind
from cdcsync.model.spec import IndexSpec
from cdcsync.source.fingerprints import Difference
from cdcsync.target.ddl.missing import Missing
from cdcsync.target.entries import Entry

BY_OTHER_RULES = (
    "the same keys make other chunks: the model reads its texts in another way, or this version of cdcsync, or the"
    " function that makes them, does"
)

AWAITS_APPROVAL = "it would embed more than"
"""How the reason of a pause begins that an approval ends."""


class Need(msgspec.Struct, frozen=True):
    """A load that an index needs.

    :ivar rewrite: whether every document is cut into chunks again.
    :ivar because: the reasons.
    :ivar asked_for: whether keys of the configuration are among them.
    """

    kind: Kind
    rewrite: bool
    because: tuple[str, ...]
    asked_for: bool = True

    @property
    def embeds(self) -> bool:
        """Whether it comes of the configuration and makes texts that the index most likely has no vectors of."""
        return self.rewrite or self.asked_for


def need_of(
    spec: IndexSpec,
    before: Entry | None,
    found: Difference,
    *,
    missing: Missing | None = None,
    begun: bool = True,
) -> Need | None:
    """Return the load that brings an index to its spec; None if it needs none.

    :param before: the index as it is registered.
    :param found: how its table differs from what it was.
    :param missing: the relations that the index has lost.
    :param begun: whether the index may hold anything; if it does not, its first load is still to come.
    """
    if before is None:
        return Need("initial", False, ("the index is new",))
    if not begun:
        return Need("initial", False, ("its first load has not begun",))
    lost = missing.tables if missing is not None else ()
    changed = content_changes(before, spec.config)
    rewrite = before.fingerprint != spec.fingerprint
    asked_for = any(change.key != "columns" for change in changed)
    because = []
    if lost:
        because.append(f"missing in the target: {', '.join(lost)}")
    if rewrite or asked_for:
        because += [str(change) for change in changed] or [BY_OTHER_RULES]
    if found.reread and not asked_for:
        because.append(found.reread)
    if before.pause is not None:
        if not before.pause.reason.startswith(AWAITS_APPROVAL):
            because.append("it was paused")  # the reason may name a row, and this is for logs
        elif not (rewrite or asked_for):
            because.append("it was paused for a change that is taken back")
    if before.unfollowed_at is not None:
        because.append(f"it was not followed since {before.unfollowed_at:%Y-%m-%d %H:%M} UTC")
    if lost or found.reread or before.state == "paused" or before.unfollowed_at is not None:
        return Need("resync", rewrite or bool(lost), tuple(because), asked_for)
    if added := sorted(set(spec.shape.carried) - set(before.columns)):
        because = because or [f"columns: {', '.join(added)} came"]
    return Need("replay", rewrite, tuple(because), rewrite) if rewrite or added else None


def content_changes(before: Entry, index: Index) -> list[KeyChange]:
    """Return which keys that decide an index's chunks are others than when it was loaded, if that was stored.

    :param index: the index's section as it is now.
    """
    if before.configuration is None:
        return []
    return [one for one in index_changes(before.configuration, index) if one.key.split(".")[0] in CONTENTS]
