"""Batches against a table: a batch does to the target at once what its changes do one by one.

The table writes its changes as pgoutput sends them: under the default identity or under FULL, with values that an
UPDATE did not touch left out, and with its rows' keys moving about. The changes come out of real projections.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.config import QualifiedName
from cdcsync.model.batch import IndexChanges
from cdcsync.model.rows import Change, Delete, Key, Projection, Row, Shape, Truncation, Upsert, complete
from cdcsync.pgoutput.messages import UNCHANGED, Column, Relation, Value

SHAPE = Shape(
    index="articles",
    table=QualifiedName("public", "articles"),
    key=("region", "id"),
    carried=("price",),
    text=("title", "body"),
)
COLUMNS = ("body", "id", "title", "price", "region")
KEYS: list[Key] = [(region, id) for region in ("n", "s") for id in ("1", "2")]


class Step(msgspec.Struct, frozen=True):
    """What a user (or a backfill, for a page) does next; where it does not apply, the nearest thing that does."""

    kind: str
    key: Key
    to: Key
    fresh: frozenset[str]
    """The columns outside the key that get a new value."""
    stored_apart: frozenset[str]
    """The columns whose values are so large that an UPDATE which leaves them alone does not send them."""


Table = dict[Key, dict[str, str | None]]


class Source:
    """The table, what it sends, and which rows its pages show."""

    def __init__(self, full_identity: bool) -> None:
        self.rows: Table = {}
        self.full_identity = full_identity
        keys = COLUMNS if full_identity else SHAPE.key
        columns = tuple(Column(name in keys, name, 25, -1) for name in COLUMNS)
        relation = Relation(None, 1, "public", "articles", "f" if full_identity else "d", columns)
        self.projection = Projection(SHAPE, relation)
        self.lsn = 0

    def row(self, key: Key) -> Row:
        """The row as a page shows it."""
        values = {**self.rows[key], **dict(zip(SHAPE.key, key, strict=True))}
        return tuple(values[name] for name in SHAPE.columns)

    def does(self, step: Step) -> Change | list[Upsert]:
        """Do a step; return the change that the stream brings, or the rows that a page brings."""
        self.lsn += 1
        xid = lsn = self.lsn
        if step.kind == "page":
            return [Upsert(SHAPE, key, self.row(key), 0, lsn) for key in sorted({step.key, step.to} & set(self.rows))]
        if step.kind == "truncate":
            self.rows.clear()
            return Truncation(SHAPE, xid, lsn)
        if step.kind == "delete" and step.key in self.rows:
            values = self.rows.pop(step.key)
            return self.projection.deleted(self._old(step.key, values), xid, lsn)
        if step.key not in self.rows:
            self.rows[step.key] = {name: self._value(name) for name in ("price", "title", "body")}
            return self.projection.inserted(self._tuple(step.key, self.rows[step.key]), xid, lsn)
        return self._updates(step)

    def _updates(self, step: Step) -> Change:
        to = step.to if step.kind == "move" and step.to not in self.rows else step.key
        before = self.rows.pop(step.key)
        self.rows[to] = {name: self._value(name) if name in step.fresh else value for name, value in before.items()}
        sent: dict[str, Value] = {
            name: UNCHANGED if name in step.stored_apart - step.fresh and value is not None else value
            for name, value in self.rows[to].items()
        }
        key = dict(zip(SHAPE.key, to, strict=True))
        sent.update(key)
        old_kind, old = None, None
        apart = [name for at, name in enumerate(SHAPE.key) if name in step.stored_apart and step.key[at] == to[at]]
        sent.update(dict.fromkeys(apart, UNCHANGED))
        if self.full_identity:
            old_kind, old = "O", self._old(step.key, before)
        elif to != step.key or apart:
            old_kind, old = "K", self._old(step.key, before)
        new = tuple(sent[name] for name in COLUMNS)
        return self.projection.updated(old_kind, old, new, self.lsn, self.lsn)

    def _value(self, name: str) -> str | None:
        return None if self.lsn % 7 == 0 else f"{name} {self.lsn}"

    def _tuple(self, key: Key, values: dict[str, str | None]) -> tuple[str | None, ...]:
        whole = {**values, **dict(zip(SHAPE.key, key, strict=True))}
        return tuple(whole[name] for name in COLUMNS)

    def _old(self, key: Key, values: dict[str, str | None]) -> tuple[str | None, ...]:
        whole = self._tuple(key, values)
        if self.full_identity:
            return whole
        return tuple(value if name in SHAPE.key else None for name, value in zip(COLUMNS, whole, strict=True))


steps = st.builds(
    Step,
    kind=st.sampled_from(["update", "update", "update", "move", "move", "move", "delete", "page", "page", "truncate"]),
    key=st.sampled_from(KEYS),
    to=st.sampled_from(KEYS),
    fresh=st.frozensets(st.sampled_from(["price", "title", "body"])),
    stored_apart=st.frozensets(st.sampled_from(["region", "price", "title", "body"])),
)
histories = st.lists(steps, min_size=25, max_size=25)  # left to itself, hypothesis tries mostly short ones


def one_by_one(known: dict[Key, Row], change: Change | list[Upsert]) -> None:
    """Do one change to rows of which some are not known at all, and others not in every column."""
    match change:
        case Truncation():
            known.clear()
        case Delete():
            known.pop(change.key, None)
        case Upsert():
            nothing: Row = (UNCHANGED,) * len(SHAPE.columns)
            before = known.pop(change.moved_from or change.key, nothing)
            known[change.key] = tuple(
                old if new is UNCHANGED else new for new, old in zip(change.row, before, strict=True)
            )
        case rows:
            known.update((row.key, row.row) for row in rows)


def add(batch: IndexChanges, change: Change | list[Upsert]) -> None:
    if isinstance(change, list):
        batch.add_page(change, new=True)
    else:
        batch.add(change)


def upserts(batch: IndexChanges) -> Iterator[Upsert]:
    for change in batch.live.values():
        if isinstance(change, Upsert):
            yield change
    yield from batch.filled.values()


def apply(target: dict[Key, Row], batch: IndexChanges, source: Source) -> None:
    """Bring a batch to the target: truncate, delete, upsert. What is left open is read again from the source.

    The row may have changed since, or be gone: then so says a change that is still to come.
    """
    assert not batch.live.keys() & batch.filled.keys()
    if batch.truncated:
        target.clear()
    for change in batch.live.values():
        if isinstance(change, Delete):
            target.pop(change.key, None)
    for upsert in upserts(batch):
        if complete(upsert.row):
            target[upsert.key] = upsert.row
        elif upsert.key in source.rows:
            target[upsert.key] = source.row(upsert.key)


@given(histories, st.booleans())
def test_a_batch_leaves_open_only_what_nothing_in_it_tells(history: list[Step], full_identity: bool) -> None:
    source, batch = Source(full_identity), IndexChanges(SHAPE)
    known: dict[Key, Row] = {}
    touched: set[Key] = set()
    for step in history[:10]:
        source.does(step)  # before the batch begins: nothing tells of these rows
    for step in history[10:]:
        change = source.does(step)
        add(batch, change)
        one_by_one(known, change)
        if isinstance(change, Truncation):
            touched.clear()
        elif isinstance(change, list):
            touched |= {row.key for row in change}
        else:
            touched |= {change.key} | (
                {change.moved_from} if isinstance(change, Upsert) and change.moved_from else set()
            )

    assert {upsert.key: upsert.row for upsert in upserts(batch)} == known
    assert {key for key, change in batch.live.items() if isinstance(change, Delete)} == touched - set(known)
    assert batch.rows == len(touched)
    if full_identity:
        assert all(map(complete, known.values()))


@given(histories, st.booleans(), st.sets(st.integers(0, 25)), st.sets(st.integers(0, 25)))
def test_batches_bring_the_target_to_the_source_wherever_they_are_divided(
    history: list[Step], full_identity: bool, divided_before: set[int], delayed: set[int]
) -> None:
    source, target = Source(full_identity), dict[Key, Row]()
    open_batch, closed = IndexChanges(SHAPE), list[IndexChanges]()
    for at, step in enumerate(history):
        if at in divided_before:
            closed.append(open_batch)
            open_batch = IndexChanges(SHAPE)
        if at not in delayed:  # else the source is ahead of what is applied, and is so when rows are read again
            for batch in closed:
                apply(target, batch, source)
            closed.clear()
        add(open_batch, source.does(step))
    for batch in [*closed, open_batch]:
        apply(target, batch, source)

    assert target == {key: source.row(key) for key in source.rows}


@given(histories, st.booleans(), st.integers(0, 25), st.integers(0, 25))
def test_a_batch_that_is_delivered_again_changes_nothing_in_the_end(
    history: list[Step], full_identity: bool, start: int, end: int
) -> None:
    source, target = Source(full_identity), dict[Key, Row]()
    changes = [source.does(step) for step in history]
    for delivery in (changes[:end], changes[min(start, end) :]):
        batch = IndexChanges(SHAPE)
        for change in delivery:
            add(batch, change)
        apply(target, batch, source)

    assert target == {key: source.row(key) for key in source.rows}
