"""Which transactions a snapshot of the source sees, and what the stream delivered besides.

A backfill reads pages of a table while the stream continues. A page row may be applied at the page's mark
unless a transaction that the page's snapshot does *not* see has touched that key and was already delivered:
then the stream's version is newer and the page's is dropped.

The rules:

1. Compare transaction ids, never LSNs. A commit record can be in the WAL, and delivered to us, while new snapshots
   still exclude the transaction: it leaves the list of running transactions only after waiting for a
   synchronous standby.
2. While an index is *recorded*, every key the stream touches is remembered with the last transaction that did so.
3. A transaction delivered while the index was *not* recorded is a *suspect*: its keys are unknown, so no page may be
   read by a snapshot that does not see it. So is every transaction that was running when the pipeline began to
   receive, or when a table joined the publication: what it did before may never be delivered.
4. What a snapshot sees, every later snapshot sees. What the oldest snapshot that still matters sees is forgotten,
   and not remembered when it is delivered only afterwards: a stream that is hours late brings nothing else.
5. Of no more than `MOST_KEYS` keys the transactions are remembered. Beyond that they become suspects: a page that does
   not see them has to be read again, and waits until it does.
6. Which keys a change of a related row concerns is known only once the source has been asked. A page that it overtook
   until then is not dropped: its rows are read again when it is applied, by a snapshot that sees the change.
7. Of no more than `MOST_SUSPECTS` suspects each is known. Beyond that they are taken for all ids from the oldest to the
   newest of them: a page then waits for transactions of others in between, too, and for none that began before.
8. What a batch reads again may show more than was delivered. So it is remembered under which snapshot it was read: a
   page's row is older if the page's snapshot does not see all that this one sees. Of no more than `MOST_KEYS` keys that
   is remembered. Beyond that, a page has to see all that they were read under.

Source: PostgreSQL, "System Information Functions" (pg_snapshot); src/backend/access/transam/xact.c
(RecordTransactionCommit, then ProcArrayEndTransaction).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Self

import msgspec

from cdcsync.model.rows import Key

MOST_KEYS = 100_000
"""Keys remembered for an index, some 20 MB of them: more than are delivered while a page is under way, unless one
transaction changes as many."""

MOST_SUSPECTS = 100_000
"""Suspects told apart for an index, some 10 MB of them: more than come in while pages are read, unless a read waits for
a lock for long."""

MOST_EMPTIED = 1_000
"""Transactions that emptied the table, as far as they are remembered: the catalog is looked at every few seconds."""

XID_SPAN = 1 << 32
"""The stream carries transaction ids modulo this; snapshots carry them whole."""


class Snapshot(msgspec.Struct, frozen=True):
    """The result of `pg_current_snapshot()`: the 64-bit transaction ids that are finished, and those that are not.

    Everything below `xmin` is finished, everything from `xmax` on is not, and `running` lists what is not in between.
    So `running` alone does not name all that run: ids from `xmax` on can have been given out already. Whoever needs
    them all takes an id first (`pg_current_xact_id`, in a transaction of its own), which moves `xmax` past them.
    """

    xmin: int
    xmax: int
    running: frozenset[int]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read PostgreSQL's `xmin:xmax:xip,…` form.

        :raises ValueError: the text has another form.
        """
        xmin, xmax, running = text.split(":")
        return cls(int(xmin), int(xmax), frozenset(int(xid) for xid in running.split(",") if xid))

    def widen(self, xid: int) -> int:
        """Return the 64-bit id of a 32-bit `xid` from the stream: the one nearest to this snapshot's end."""
        distance = (xid - self.xmax) % XID_SPAN
        if distance >= XID_SPAN // 2:
            distance -= XID_SPAN
        return self.xmax + distance

    def sees(self, xid: int) -> bool:
        """Say whether the effects of transaction `xid` (32 or 64 bits), if it committed, are in this snapshot."""
        whole = self.widen(xid)
        return whole < self.xmin or (whole < self.xmax and whole not in self.running)

    def includes(self, other: Snapshot) -> bool:
        """Say whether it sees all that another snapshot of the same server sees."""
        return other.xmax <= self.xmax and all(xid in other.running for xid in self.running if xid < other.xmax)

    def unseen_between(self, first: int, last: int) -> list[int]:
        """Return the ids from `first` to `last` (32 or 64 bits) that this snapshot does not see.

        Of those that were not given out yet when it was taken, only the last.
        """
        first, last = self.widen(first), self.widen(last)
        found = [xid for xid in self.running if first <= xid <= last]
        return found if last < self.xmax else [*found, last]


class Deliveries:
    """The memory of what the stream delivered for one index, as far as a later page has to know it."""

    def __init__(self, most_keys: int = MOST_KEYS, most_suspects: int = MOST_SUSPECTS) -> None:
        self._most_keys = most_keys
        self._most_suspects = most_suspects
        self._suspects: set[int] = set()
        self._suspect_span: tuple[int, int] | None = None
        """The oldest and the newest of the suspects that were too many to be told apart."""
        self._keys: dict[Key, int] | None = None
        self._truncated: int | None = None
        self._cleared: dict[str, int] = {}
        """The last TRUNCATE of each of many tables."""
        self._emptied: dict[tuple[int, int | None], bool] = {}
        """The transactions that emptied the table, or the one of a link, lately, and whether they changed nothing of it
        afterwards."""
        self._emptying: int | None = None
        self._related: dict[int, int] = {}
        """While recording: transactions that changed related rows, and how many of these changes have been delivered of
        which nobody knows yet whose keys those are."""
        self._read: dict[Key, Snapshot] = {}
        """While recording: what was read again, and under which snapshot last."""
        self._read_under: Snapshot | None = None
        """The newest snapshot of those that were too many."""
        self._seen: Snapshot | None = None
        self.rewriting = False
        """Whether pages that are read now have documents chunked again: what overtakes a row then has to, too."""
        self.read_to: tuple[int, Key] | None = None
        """The request whose pages are read, and the last key that was: what is committed now, its next page sees. None
        while a page is being read, of which nobody knows what it sees and where it ends, and if none is to follow."""

    @property
    def recording(self) -> bool:
        """Whether keys are being remembered."""
        return self._keys is not None

    @property
    def suspects(self) -> frozenset[int]:
        """The transactions that a page's snapshot has to see, as 32-bit ids, as far as they are told apart."""
        return frozenset(self._suspects)

    @property
    def size(self) -> int:
        """How many keys and transactions are remembered."""
        spans = self._suspect_span is not None
        related = len(self._related) + len(self._read) + (self._read_under is not None)
        truncations = (self._truncated is not None) + len(self._cleared)
        return len(self._suspects) + spans + len(self._keys or ()) + related + truncations

    def begin_anew(self) -> None:
        """Forget everything: what follows comes from a slot, or a cluster, that the past says nothing about."""
        self._suspects.clear()
        self._suspect_span = None
        self._seen = None
        self._truncated = None
        self._cleared.clear()
        self._emptied.clear()
        self._emptying = None
        self._related.clear()
        self._read.clear()
        self._read_under = None
        if self._keys is not None:
            self._keys = {}

    def suspect(self, xids: Iterable[int]) -> None:
        """Require every later page to see these transactions (32 or 64 bits)."""
        self._suspects.update(xid % XID_SPAN for xid in xids)
        if len(self._suspects) > self._most_suspects:
            every = [*self._suspects, *(self._suspect_span or ())]
            # Ids wrap; those that matter at a time are less than half of them apart.
            before = every[0] - XID_SPAN // 2
            ages = [(xid - before) % XID_SPAN for xid in every]
            self._suspect_span = (before + min(ages)) % XID_SPAN, (before + max(ages)) % XID_SPAN
            self._suspects.clear()

    def record(self, *, rewriting: bool = False) -> None:
        """Begin to remember keys; a page's snapshot must be taken after this."""
        self.rewriting = rewriting
        if self._keys is None:
            self._keys = {}

    def stop(self) -> None:
        """End remembering keys; what was recorded and may still be unseen becomes suspect."""
        self.rewriting = False
        self.read_to = None
        if self._keys is not None:
            self.suspect(self._keys.values())
        if self._truncated is not None:
            self.suspect((self._truncated,))
        self.suspect(self._related)
        self.suspect(self._cleared.values())
        self._keys = None
        self._truncated = None
        self._cleared.clear()
        self._related.clear()
        self._read.clear()
        self._read_under = None

    def touched(self, key: Key, xid: int) -> None:
        """Note that the stream delivered a change of `key` made by `xid`."""
        if xid == self._emptying:
            self._emptied[xid, None] = False
        if self._seen is not None and self._seen.sees(xid):
            return
        if self._keys is None:
            if xid not in self._suspects:
                self.suspect((xid,))
            return
        self._keys[key] = xid
        if len(self._keys) > self._most_keys:
            self.suspect(self._keys.values())
            self._keys.clear()

    def truncated(self, xid: int, source: str | None = None) -> None:
        """Note that the stream delivered a TRUNCATE made by `xid`.

        :param source: the table, if the index is over many.
        """
        self._emptying = xid
        self._note_emptied(xid, None)
        if self._seen is not None and self._seen.sees(xid):
            return
        if self._keys is None:
            self.suspect((xid,))
        elif source is not None:
            self._cleared[source] = xid
        else:
            self._truncated = xid

    def _note_emptied(self, xid: int, place: int | None) -> None:
        self._emptied.pop((xid, place), None)
        self._emptied[xid, place] = True
        if len(self._emptied) > MOST_EMPTIED:
            del self._emptied[next(iter(self._emptied))]

    def emptied_by(self, xid: int, place: int | None = None, *, at_its_end: bool = False) -> bool:
        """Say whether the stream has delivered a TRUNCATE made by `xid`.

        :param place: of the link whose table it is about; None for the index's own.
        :param at_its_end: whether it counts only if that transaction has changed nothing of the table afterwards, which
            is known once all of it has been delivered.
        """
        return self._emptied.get((xid, place), False) or ((xid, place) in self._emptied and not at_its_end)

    def related(self, xid: int, place: int, *, emptied: bool = False) -> None:
        """Note that the stream delivered a change of a related row made by `xid`, or the TRUNCATE of its table.

        :param place: of the link that the row is in.
        """
        if emptied:
            self._note_emptied(xid, place)
        elif (xid, place) in self._emptied:
            self._emptied[xid, place] = False
        if self._seen is not None and self._seen.sees(xid):
            return
        if self._keys is None:
            self.suspect((xid,))
            return
        self._related[xid] = self._related.get(xid, 0) + 1
        if len(self._related) > self._most_suspects:
            self.suspect(self._related)
            self._related.clear()

    def resolved(self, changes: Mapping[int, int]) -> None:
        """Note that all keys that changes of related rows concern have been read again and are in the index.

        :param changes: by transaction: how many of the changes that it made.
        """
        for xid, count in changes.items():
            left = self._related.pop(xid, 0) - count
            if left > 0:
                self._related[xid] = left

    def read_again(self, keys: Iterable[Key], snapshot: Snapshot, *, rewritten: bool = False) -> None:
        """Note that what the index is to have of these keys next was read under a snapshot.

        :param rewritten: whether their documents are chunked again; those that are not may not take the place of a
            page's that are.
        """
        if self._keys is None or (self.rewriting and not rewritten):
            return
        self._read.update(dict.fromkeys(keys, snapshot))
        if len(self._read) > self._most_keys:
            # A batch reads after the one before it.
            self._read.clear()
            self._read_under = snapshot

    def overtaking(self, snapshot: Snapshot) -> frozenset[int]:
        """Return the transactions that changed related rows, were delivered, and are not in this snapshot."""
        return frozenset(xid for xid in self._related if not snapshot.sees(xid))

    def unseen(self, snapshot: Snapshot) -> list[int]:
        """Return the suspects that `snapshot` does not see: with any, the page has to be read again."""
        unseen = [xid for xid in self._suspects if not snapshot.sees(xid)]
        if self._read_under is not None and not snapshot.includes(self._read_under):
            unseen.append(self._read_under.xmax - 1)
        return unseen + (snapshot.unseen_between(*self._suspect_span) if self._suspect_span is not None else [])

    def hides(self, key: Key, snapshot: Snapshot) -> bool:
        """Say whether something newer for `key` than `snapshot` shows was already delivered, or read again."""
        if self._truncated is not None and not snapshot.sees(self._truncated):
            return True
        if self._cleared and (cleared := self._cleared.get(key[0])) is not None and not snapshot.sees(cleared):
            return True
        if self._read and (read := self._read.get(key)) is not None and not snapshot.includes(read):
            return True
        xid = None if self._keys is None else self._keys.get(key)
        return xid is not None and not snapshot.sees(xid)

    def forget_seen(self, snapshot: Snapshot) -> None:
        """Forget what `snapshot`, the oldest one a page is still to be applied under, sees already, now and later."""
        self._seen = snapshot
        self._suspects = {xid for xid in self._suspects if not snapshot.sees(xid)}
        if self._suspect_span is not None and not snapshot.unseen_between(*self._suspect_span):
            self._suspect_span = None
        if self._keys:
            hidden = {xid for xid in set(self._keys.values()) if not snapshot.sees(xid)}
            self._keys = {key: xid for key, xid in self._keys.items() if xid in hidden} if hidden else {}
        if self._truncated is not None and snapshot.sees(self._truncated):
            self._truncated = None
        self._cleared = {source: xid for source, xid in self._cleared.items() if not snapshot.sees(xid)}
        self._related = {xid: count for xid, count in self._related.items() if not snapshot.sees(xid)}
        if self._read:
            # Many keys were read under one snapshot, which takes long to hash.
            each = {id(read): read for read in self._read.values()}
            newer = {one for one, read in each.items() if not snapshot.includes(read)}
            self._read = {key: read for key, read in self._read.items() if id(read) in newer} if newer else {}
        if self._read_under is not None and snapshot.includes(self._read_under):
            self._read_under = None

    def forget_snapshot(self) -> None:
        """Go by no snapshot any more: one that grows as old as half the ids there are would seem to see new ones."""
        self._seen = None
