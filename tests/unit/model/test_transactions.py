"""The assembler: sequences of messages, and the events that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import msgspec
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import ProtocolError, SourceUnavailable
from cdcsync.lsn import Lsn
from cdcsync.model.rows import Change, Delete, Shape, Truncation, Upsert
from cdcsync.model.transactions import MARK_PREFIX, Assembler, Began, Committed, Event, Lost, Mark, Part
from cdcsync.pgoutput import messages as pg

ARTICLES = Shape(
    index="articles", table=QualifiedName("public", "articles"), key=("id",), carried=("author",), text=("title",)
)
TITLES = Shape(index="titles", table=QualifiedName("public", "articles"), key=("id",), carried=(), text=("title",))
NOTES = Shape(index="notes", table=QualifiedName("Other", "Notes"), key=("id",), carried=(), text=("title",))
TABLES = {("public", "articles"): [ARTICLES, TITLES], ("Other", "Notes"): [NOTES]}

XID = 7
COMMIT_LSN, END_LSN = Lsn(100), Lsn(130)
TIME_US = 42


def relation(
    oid: int,
    name: str,
    columns: str = "id author title",
    *,
    namespace: str = "public",
    types: Mapping[str, tuple[int, int]] | None = None,
) -> pg.Relation:
    """A table with the key `id`; its columns are text, but for those with another type and modifier in `types`."""
    return pg.Relation(
        xid=None,
        oid=oid,
        namespace=namespace,
        name=name,
        replica_identity="d",
        columns=tuple(
            pg.Column(column == "id", column, *(types or {}).get(column, (25, -1))) for column in columns.split()
        ),
    )


R_ARTICLES = relation(1, "articles")
R_NOTES = relation(2, "Notes", "id title", namespace="Other")
R_FOREIGN = relation(3, "unindexed")
R_ANOTHER = relation(4, "unindexed_too")
BEGIN = pg.Begin(final_lsn=COMMIT_LSN, commit_time_us=TIME_US, xid=XID)
COMMIT = pg.Commit(flags=0, commit_lsn=COMMIT_LSN, end_lsn=END_LSN, commit_time_us=TIME_US)
COMMITTED = Committed(END_LSN, TIME_US)
TYPE = pg.Type(xid=None, oid=9, namespace="public", name="mood")
ORIGIN = pg.Origin(lsn=Lsn(1), name="elsewhere")


def insert(oid: int, *values: str) -> pg.Insert:
    return pg.Insert(xid=None, relation_oid=oid, new=values)


def update(oid: int, *values: str, old_key: str | None = None) -> pg.Update:
    if old_key is None:
        return pg.Update(xid=None, relation_oid=oid, old_kind=None, old=None, new=values)
    old = (old_key, *[None] * (len(values) - 1))
    return pg.Update(xid=None, relation_oid=oid, old_kind="K", old=old, new=values)


def delete(oid: int, key: str, width: int = 3) -> pg.Delete:
    return pg.Delete(xid=None, relation_oid=oid, old_kind="K", old=(key, *[None] * (width - 1)))


def truncate(*oids: int) -> pg.Truncate:
    return pg.Truncate(xid=None, relation_oids=oids, cascade=False, restart_identity=False)


def logical(content: bytes, *, prefix: str = MARK_PREFIX, transactional: bool = True) -> pg.Message:
    return pg.Message(xid=None, transactional=transactional, lsn=Lsn(90), prefix=prefix, content=content)


def upsert(shape: Shape, *row: str, moved_from: str | None = None) -> Upsert:
    return Upsert(shape, row[:1], row, XID, COMMIT_LSN, None if moved_from is None else (moved_from,))


def events_of(assembler: Assembler, messages: Iterable[pg.PgoutputMessage]) -> list[Event]:
    """What follows from messages, but for the beginnings of transactions."""
    return [event for message in messages for event in assembler.feed(message) if not isinstance(event, Began)]


# What the two indexes of one table make of one row.
CHANGES: list[tuple[pg.PgoutputMessage, list[Change]]] = [
    (insert(1, "k", "A", "T"), [upsert(ARTICLES, "k", "A", "T"), upsert(TITLES, "k", "T")]),
    (update(1, "k", "A", "U"), [upsert(ARTICLES, "k", "A", "U"), upsert(TITLES, "k", "U")]),
    (
        update(1, "l", "A", "U", old_key="k"),
        [upsert(ARTICLES, "l", "A", "U", moved_from="k"), upsert(TITLES, "l", "U", moved_from="k")],
    ),
    (delete(1, "l"), [Delete(ARTICLES, ("l",), XID, COMMIT_LSN), Delete(TITLES, ("l",), XID, COMMIT_LSN)]),
    (insert(2, "n", "N"), [upsert(NOTES, "n", "N")]),
    (
        truncate(1, 3, 2),
        [
            Truncation(ARTICLES, XID, COMMIT_LSN),
            Truncation(TITLES, XID, COMMIT_LSN),
            Truncation(NOTES, XID, COMMIT_LSN),
        ],
    ),
    (insert(3, "x", "y", "z"), []),
    (update(3, "x", "y", "z"), []),
    (delete(3, "x"), []),
    (truncate(3), []),
]
DESCRIBED = [R_ARTICLES, R_NOTES, R_FOREIGN, R_ANOTHER]


@pytest.fixture
def assembler() -> Assembler:
    return Assembler(TABLES, checkpoint=Lsn(0))


@pytest.mark.parametrize(
    ("messages", "events"),
    [
        pytest.param([BEGIN, COMMIT], [COMMITTED], id="an empty transaction"),
        pytest.param([TYPE, ORIGIN, *DESCRIBED], [], id="descriptions between transactions"),
        pytest.param([BEGIN, ORIGIN, TYPE, *DESCRIBED, COMMIT], [COMMITTED], id="descriptions inside one"),
        *[
            pytest.param(
                [BEGIN, *DESCRIBED, message, COMMIT],
                [*changes, COMMITTED],
                id=f"{type(message).__name__} for {len(changes)} indexes",
            )
            for message, changes in CHANGES
        ],
        pytest.param(
            [BEGIN, *DESCRIBED, *[message for message, _ in CHANGES], COMMIT],
            [*[change for _, changes in CHANGES for change in changes], COMMITTED],
            id="everything in order",
        ),
        pytest.param(
            [BEGIN, R_ARTICLES, COMMIT, BEGIN, delete(1, "k"), COMMIT],
            [COMMITTED, *[Delete(shape, ("k",), XID, COMMIT_LSN) for shape in (ARTICLES, TITLES)], COMMITTED],
            id="a description holds for later transactions",
        ),
        pytest.param(
            [BEGIN, R_ARTICLES, relation(1, "articles", "title x id author"), insert(1, "T", "-", "k", "A"), COMMIT],
            [upsert(ARTICLES, "k", "A", "T"), upsert(TITLES, "k", "T"), COMMITTED],
            id="a new description replaces the old one",
        ),
        pytest.param(
            [BEGIN, logical(b"page 1"), COMMIT], [Mark("page 1", Lsn(90)), COMMITTED], id="a mark in its transaction"
        ),
        pytest.param([logical(b"page 1", transactional=False)], [Mark("page 1", Lsn(90))], id="a mark outside any"),
        pytest.param([BEGIN, logical(b"\xff", prefix="another"), COMMIT], [COMMITTED], id="someone else's message"),
        pytest.param([logical(b"\xff")], [Mark("\ufffd", Lsn(90))], id="someone else's message under our prefix"),
    ],
)
def test_messages_become_events(
    assembler: Assembler, messages: Sequence[pg.PgoutputMessage], events: Sequence[Event]
) -> None:
    assert events_of(assembler, messages) == events
    assert not assembler.in_transaction


def test_a_transaction_begins_with_the_place_of_its_commit_unless_it_is_skipped(assembler: Assembler) -> None:
    (began,) = assembler.feed(BEGIN)
    assert began == Began(COMMIT_LSN, TIME_US)
    assert isinstance(began, Began)
    assert began.ahead == COMMIT_LSN + 1
    assert list(Assembler(TABLES, checkpoint=END_LSN).feed(BEGIN)) == []


def test_a_transaction_lasts_from_its_begin_to_its_commit(assembler: Assembler) -> None:
    seen = []
    for message in (R_ARTICLES, BEGIN, insert(1, "k", "A", "T"), COMMIT):
        assembler.feed(message)
        seen.append(assembler.in_transaction)

    assert seen == [False, True, True, False]


@pytest.mark.parametrize("checkpoint", [COMMIT_LSN + 1, END_LSN, END_LSN + 1])
def test_a_transaction_that_ended_by_the_checkpoint_is_skipped_whole(checkpoint: int) -> None:
    assembler = Assembler(TABLES, Lsn(checkpoint))
    changes = [message for message, _ in CHANGES]

    assert events_of(assembler, [BEGIN, *DESCRIBED, *changes, logical(b"page 1"), COMMIT]) == []
    assert not assembler.in_transaction


@pytest.mark.parametrize("checkpoint", [0, COMMIT_LSN - 1, COMMIT_LSN])
def test_a_transaction_whose_commit_begins_at_the_checkpoint_or_later_is_taken_whole(checkpoint: int) -> None:
    assembler = Assembler(TABLES, Lsn(checkpoint))

    assert events_of(assembler, [BEGIN, R_NOTES, insert(2, "n", "N"), COMMIT]) == [upsert(NOTES, "n", "N"), COMMITTED]


def test_what_a_skipped_transaction_described_serves_the_next_one() -> None:
    assembler = Assembler(TABLES, checkpoint=END_LSN)
    later = pg.Begin(final_lsn=Lsn(200), commit_time_us=TIME_US, xid=XID + 1)
    end = pg.Commit(flags=0, commit_lsn=Lsn(200), end_lsn=Lsn(230), commit_time_us=TIME_US)

    events = events_of(assembler, [BEGIN, R_NOTES, insert(2, "m", "M"), COMMIT, later, insert(2, "n", "N"), end])

    assert events == [Upsert(NOTES, ("n",), ("n", "N"), XID + 1, Lsn(200)), Committed(Lsn(230), TIME_US)]


@pytest.mark.parametrize(
    ("before", "message", "problem"),
    [
        pytest.param([BEGIN], BEGIN, "began inside another", id="a second begin"),
        pytest.param([], COMMIT, "Commit message came outside", id="a commit without a begin"),
        pytest.param([BEGIN, COMMIT], COMMIT, "Commit message came outside", id="a second commit"),
        pytest.param([R_ARTICLES], insert(1, "k", "A", "T"), "Insert message came outside", id="an insert outside"),
        pytest.param([R_ARTICLES], update(1, "k", "A", "T"), "Update message came outside", id="an update outside"),
        pytest.param([R_ARTICLES], delete(1, "k"), "Delete message came outside", id="a delete outside"),
        pytest.param([R_ARTICLES], truncate(1), "Truncate message came outside", id="a truncate outside"),
        pytest.param([BEGIN, R_NOTES], insert(1, "k"), "relation 1 came before its description", id="an unknown row"),
        pytest.param([BEGIN], truncate(1), "relation 1 came before its description", id="an unknown truncate"),
        pytest.param([], pg.StreamStop(), "unexpected StreamStop", id="a block outside the spool"),
        pytest.param(
            [],
            pg.BeginPrepare(prepare_lsn=Lsn(1), end_lsn=Lsn(2), prepare_time_us=0, xid=1, gid="g"),
            "unexpected BeginPrepare",
            id="a prepared transaction",
        ),
    ],
)
def test_a_message_out_of_place_is_an_error(
    assembler: Assembler, before: Sequence[pg.PgoutputMessage], message: pg.PgoutputMessage, problem: str
) -> None:
    events_of(assembler, before)

    with pytest.raises(ProtocolError, match=problem):
        assembler.feed(message)


def test_rows_of_an_unknown_relation_are_an_error_even_in_a_skipped_transaction() -> None:
    assembler = Assembler(TABLES, checkpoint=END_LSN)
    assembler.feed(BEGIN)

    with pytest.raises(ProtocolError, match="before its description"):
        assembler.feed(insert(1, "k", "A", "T"))


def test_a_new_connection_has_forgotten_all_relations(assembler: Assembler) -> None:
    events_of(assembler, [*DESCRIBED, BEGIN, COMMIT])
    again = Assembler(TABLES, checkpoint=END_LSN)
    again.feed(pg.Begin(final_lsn=Lsn(200), commit_time_us=TIME_US, xid=XID))

    with pytest.raises(ProtocolError, match="before its description"):
        again.feed(insert(1, "k", "A", "T"))


def lost(events: Sequence[Event]) -> dict[str, str]:
    """Why indexes are lost, by index."""
    reasons = {}
    for event in events:
        assert isinstance(event, Lost)
        assert event.error.index == event.index
        reasons[event.index] = event.error.message
    assert len(reasons) == len(events)
    return reasons


def test_an_index_that_needs_a_column_which_went_away_is_lost_and_the_others_go_on(assembler: Assembler) -> None:
    events_of(assembler, [BEGIN, R_ARTICLES, insert(1, "k", "A", "T")])

    (event,) = assembler.feed(relation(1, "articles", "id title"))

    assert lost([event]) == {"articles": "column author is no longer in what the publication sends"}
    assert isinstance(event, Lost)
    assert event.error.where == "public.articles"
    assert event.error.hint is not None
    assert event.error.hint.startswith("restore the column")
    assert events_of(assembler, [insert(1, "k", "U"), delete(1, "k", 2), truncate(1), COMMIT]) == [
        upsert(TITLES, "k", "U"),
        Delete(TITLES, ("k",), XID, COMMIT_LSN),
        Truncation(TITLES, XID, COMMIT_LSN),
        COMMITTED,
    ]


def test_a_lost_index_stays_lost_when_its_column_comes_back(assembler: Assembler) -> None:
    events = events_of(assembler, [BEGIN, relation(1, "articles", "id title"), R_ARTICLES, insert(1, "k", "A", "T")])

    assert set(lost(events[:1])) == {"articles"}
    assert events[1:] == [upsert(TITLES, "k", "T")]


def test_an_index_whose_key_or_carried_column_changes_its_type_is_lost(assembler: Assembler) -> None:
    wider = relation(1, "articles", types={"author": (1043, 68)})
    events_of(assembler, [BEGIN, R_ARTICLES])

    assert lost(assembler.feed(wider)) == {"articles": "column author changed its type"}
    assert lost(assembler.feed(relation(1, "articles", types={"id": (20, -1)}))) == {
        "titles": "column id changed its type"
    }


def test_an_index_is_lost_for_now_when_the_stream_brings_an_older_type_than_the_table_had_when_looked_at() -> None:
    text, date = (25, -1), (1082, -1)
    looked_at = msgspec.structs.replace(ARTICLES, types=(text, date, text))
    assembler = Assembler({("public", "articles"): [looked_at]}, checkpoint=Lsn(0))

    (event,) = events_of(assembler, [BEGIN, R_ARTICLES, insert(1, "k", "A", "T")])

    assert lost([event]) == {"articles": "column author changed its type"}
    assert isinstance(event, Lost)
    assert event.error.passing


def test_an_index_is_not_lost_when_the_stream_brings_the_types_that_the_table_had() -> None:
    looked_at = msgspec.structs.replace(ARTICLES, types=((25, -1),) * 3)
    assembler = Assembler({("public", "articles"): [looked_at]}, checkpoint=Lsn(0))

    (event,) = events_of(assembler, [BEGIN, R_ARTICLES, insert(1, "k", "A", "T")])

    assert not isinstance(event, Lost)


def test_a_column_that_is_only_rendered_and_changes_its_type_calls_for_another_reading(assembler: Assembler) -> None:
    """What ALTER TABLE made of the old rows, with USING above all, is not in the stream."""
    retyped = relation(1, "articles", types={"title": (1043, 68)})

    events = events_of(assembler, [BEGIN, R_ARTICLES, retyped, retyped])

    assert sorted(event.index for event in events if isinstance(event, Lost)) == ["articles", "titles"]
    assert len(events) == 2


def test_the_first_description_says_what_the_types_are(assembler: Assembler) -> None:
    wider = relation(1, "articles", types={"author": (1043, 68)})

    assert events_of(assembler, [BEGIN, wider, wider]) == []


def test_all_indexes_of_a_table_that_is_renamed_are_lost(assembler: Assembler) -> None:
    events_of(assembler, [BEGIN, *DESCRIBED, COMMIT, BEGIN])
    renamed = relation(1, "articles_old")

    events = assembler.feed(renamed)

    called = "the table is called public.articles_old now"
    assert lost(events) == {"articles": called, "titles": called}
    (first, _) = events
    assert isinstance(first, Lost)
    assert first.error.where == "public.articles"
    assert first.error.hint is not None
    assert first.error.hint.startswith("give public.articles its name back")
    assert events_of(assembler, [renamed, insert(1, "k", "A", "T"), insert(2, "n", "N"), COMMIT]) == [
        upsert(NOTES, "n", "N"),
        COMMITTED,
    ]


def test_what_a_followed_table_was_sent_under_another_name_belongs_to_it() -> None:
    assembler = Assembler(TABLES, Lsn(0), known={2: ("Other", "Notes")})
    away = relation(2, "notes_away", "id title")

    events = events_of(assembler, [BEGIN, away, insert(2, "n", "N"), COMMIT])

    assert events == [upsert(NOTES, "n", "N"), COMMITTED]


def test_tables_that_had_each_others_names_for_a_while_are_told_apart_by_their_oids() -> None:
    assembler = Assembler(TABLES, Lsn(0), known={1: ("public", "articles"), 2: ("Other", "Notes")})
    exchanged = [relation(1, "Notes", namespace="Other"), relation(2, "articles", "id title")]

    events = events_of(assembler, [BEGIN, *exchanged, insert(2, "n", "N"), COMMIT])

    assert events == [upsert(NOTES, "n", "N"), COMMITTED]


def test_a_table_that_has_the_name_of_a_followed_one_for_a_while_is_of_no_index() -> None:
    told: list[None] = []
    known = {1: ("public", "articles")}
    assembler = Assembler(TABLES, Lsn(0), known=known, described=lambda: told.append(None))

    assert events_of(assembler, [BEGIN, relation(9, "articles"), insert(9, "k", "A", "T"), COMMIT]) == [COMMITTED]
    assert told == [None]


def test_a_table_that_is_described_again_is_told_of_and_one_that_is_described_first_is_not() -> None:
    told: list[None] = []
    assembler = Assembler({}, Lsn(0), described=lambda: told.append(None))

    events_of(assembler, [BEGIN, *DESCRIBED])
    assert told == []
    events_of(assembler, DESCRIBED[:1])
    assert told == [None]


def test_all_indexes_of_a_table_whose_name_another_one_takes_are_lost(assembler: Assembler) -> None:
    events_of(assembler, [BEGIN, *DESCRIBED, COMMIT, BEGIN])
    impostor = relation(4, "articles")

    taken = "another table has this name now"
    assert lost(assembler.feed(impostor)) == {"articles": taken, "titles": taken}
    assert events_of(assembler, [insert(4, "k", "A", "T"), insert(1, "k", "A", "T"), COMMIT]) == [COMMITTED]


def test_tables_that_swap_their_names_lose_the_indexes_of_both(assembler: Assembler) -> None:
    events_of(assembler, [BEGIN, *DESCRIBED])

    events = assembler.feed(relation(1, "Notes", namespace="Other"))

    assert lost(events) == {
        "articles": 'the table is called "Other"."Notes" now',
        "titles": 'the table is called "Other"."Notes" now',
        "notes": "another table has this name now",
    }
    assert assembler.feed(relation(2, "articles")) == []


def test_a_table_that_no_index_follows_may_be_renamed_and_replaced(assembler: Assembler) -> None:
    renamed_and_replaced: list[pg.PgoutputMessage] = [BEGIN, R_FOREIGN, relation(3, "other"), relation(5, "other")]

    assert events_of(assembler, [*renamed_and_replaced, insert(3, "x", "y", "z"), COMMIT]) == [COMMITTED]


def test_restored_descriptions_hold_again_and_make_no_table_a_partition(assembler: Assembler) -> None:
    wider = relation(1, "articles", "id extra author title")
    events_of(assembler, [R_NOTES, wider, BEGIN, R_ARTICLES, insert(1, "1", "A", "T"), COMMIT])

    assert list(assembler.restore([wider, R_NOTES])) == []
    assert events_of(assembler, [BEGIN, insert(1, "2", "E", "A", "T"), insert(2, "n", "N"), COMMIT]) == [
        upsert(ARTICLES, "2", "A", "T"),
        upsert(TITLES, "2", "T"),
        upsert(NOTES, "n", "N"),
        COMMITTED,
    ]


@pytest.mark.parametrize("row", [insert(1, "1", "A"), update(1, "1", "A", "T", "X"), delete(1, "1", width=2)])
def test_a_row_that_is_not_as_its_table_was_described_is_never_read(
    assembler: Assembler, row: pg.PgoutputMessage
) -> None:
    events_of(assembler, [*DESCRIBED, BEGIN])
    with pytest.raises(SourceUnavailable, match=r"a row of \d columns, and had described the table with 3"):
        assembler.feed(row)


def test_a_row_without_its_key_loses_the_indexes_of_its_table_and_no_other(assembler: Assembler) -> None:
    events_of(assembler, [BEGIN, *DESCRIBED])
    keyless = pg.Delete(xid=None, relation_oid=1, old_kind="O", old=(None, "A", "T"))

    events = assembler.feed(keyless)

    assert sorted(event.index for event in events if isinstance(event, Lost)) == ["articles", "titles"]
    assert events_of(assembler, [insert(2, "n", "N"), COMMIT]) == [upsert(NOTES, "n", "N"), COMMITTED]


def test_a_table_that_is_described_between_its_root_and_a_row_of_that_is_a_partition(assembler: Assembler) -> None:
    leaf = relation(8, "articles_2026")
    assert told(assembler, R_ARTICLES, TYPE, leaf, insert(1, "5", "a", "b")) == ["articles", "titles"]
    assert told(assembler, insert(1, "6", "a", "b"), R_FOREIGN, insert(3, "x"), R_ARTICLES, delete(1, "6")) == []
    assert told(assembler, R_ARTICLES, R_FOREIGN, truncate(1, 3), insert(1, "8", "a", "b")) == []


def test_a_partition_is_told_of_although_its_first_rows_are_skipped() -> None:
    made = Assembler(TABLES, checkpoint=END_LSN)
    assert told(made, BEGIN, R_ARTICLES, relation(8, "articles_2026"), insert(1, "5", "a", "b"), COMMIT) == [
        "articles",
        "titles",
    ]


@pytest.mark.parametrize(
    ("root", "leaf", "key", "lost"),
    [("d", "d", "id", False), ("d", "f", "id author title", False), ("f", "f", "id author title", False),
     ("f", "d", "id", True), ("d", "d", "author", True), ("i", "n", "", True), ("d", "d", "unlisted", True)],
)  # fmt: skip
def test_a_partition_that_does_not_log_what_its_root_promises_loses_the_indexes_at_its_first_row(
    assembler: Assembler, root: str, leaf: str, key: str, lost: bool
) -> None:
    described = msgspec.structs.replace(R_ARTICLES, replica_identity=root)
    if root == "f":
        described = identified(described, "id author title")
    part = identified(msgspec.structs.replace(relation(8, "leaf"), replica_identity=leaf), key)

    assert events_of(assembler, [R_NOTES, BEGIN, described, part]) == []
    events = events_of(assembler, [insert(1, "1", "A", "T"), insert(1, "2", "A", "T"), insert(2, "n", "N"), COMMIT])

    assert [event.index for event in events if isinstance(event, Part)] == ["articles", "titles"]
    errors = {event.index: event.error for event in events if isinstance(event, Lost)}
    assert sorted(errors) == (["articles", "titles"] if lost else [])
    assert all("ALTER TABLE public.leaf REPLICA IDENTITY FULL" in str(error.hint) for error in errors.values())
    assert all(error.passing for error in errors.values())
    rows = [event.shape.index for event in events if isinstance(event, Upsert)]
    assert rows == (["notes"] if lost else ["articles", "titles", "articles", "titles", "notes"])


def test_nothing_is_said_of_columns_that_a_partition_is_not_described_with(assembler: Assembler) -> None:
    """With a column list, the server counts a partition's columns by the root's numbers."""
    part = relation(8, "leaf", "other author")

    events = events_of(assembler, [BEGIN, R_ARTICLES, part, insert(1, "1", "A", "T"), COMMIT])

    assert not [event for event in events if isinstance(event, Lost)]


def identified(described: pg.Relation, key: str) -> pg.Relation:
    """Return a description of a table whose replica identity has these columns."""
    columns = [msgspec.structs.replace(one, key=one.name in key.split()) for one in described.columns]
    return msgspec.structs.replace(described, columns=tuple(columns))


def told(made: Assembler, *messages: pg.PgoutputMessage) -> list[str]:
    """Return the indexes that are told of the partition with the OID 8."""
    if not made.in_transaction and not isinstance(messages[0], pg.Begin):
        made.feed(BEGIN)
    events = [event for message in messages for event in made.feed(message)]
    parts = [event for event in events if isinstance(event, Part)]
    assert {(part.table, part.oid) for part in parts} <= {(ARTICLES.table, 8)}
    return [part.index for part in parts]
