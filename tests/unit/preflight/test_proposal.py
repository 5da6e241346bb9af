"""What is proposed for a table: text that people would search, columns to filter by, and a key."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cdcsync.config import QualifiedName
from cdcsync.errors import SetupError, UsageError
from cdcsync.preflight.proposal import Look, Sampled, identity_statement, propose
from cdcsync.source.columns import Column
from cdcsync.source.relations import Table

NAME = QualifiedName("public", "posts")
PROSE, LABEL = Sampled(characters=300, different=0.99), Sampled(characters=8, different=0.01)


def look(columns: dict[str, str], *, sampled: dict[str, Sampled] | None = None, **facts: Any) -> Look:
    """Return a table with these columns and types, keyed by `id` unless `key` says otherwise."""
    key = facts.pop("key", ("id",))
    of_table = {"id": "bigint", **columns}
    table = Table(
        oid=1,
        name=NAME,
        kind="r",
        persistence="p",
        columns={name: Column(name, type_, True, "", number=at) for at, (name, type_) in enumerate(of_table.items())},
        primary_key=key,
        identity_mode="d",
        identity=key,
        readable=True,
        owned=True,
        row_security=False,
        estimated_rows=0,
    )
    found: dict[str, Any] = {"filtered": (), "identity_index": None, "identity_columns": (), "sampled": sampled or {}}
    return Look(table=table, **found | facts)


def test_titles_come_first_and_then_prose_in_the_order_of_the_table() -> None:
    seen = look({"body": "text", "remark": "text", "title": "text"}, sampled={"remark": PROSE})
    assert propose(seen).text == "{title}\n\n{body}\n\n{remark}"


@pytest.mark.parametrize(
    ("column", "type_", "sampled"),
    [
        ("state", "text", LABEL),
        ("code", "text", Sampled(characters=6, different=1.0)),
        ("note", "text", Sampled(characters=300, different=0.2)),
        ("size", "integer", PROSE),
        ("password_hash", "text", PROSE),
        ("email", "character varying(200)", PROSE),
        ("a {b}", "text", PROSE),
        ("unseen", "text", None),
    ],
)
def test_labels_codes_numbers_and_secrets_are_no_text_to_search(
    column: str, type_: str, sampled: Sampled | None
) -> None:
    seen = look({"title": "text", column: type_}, sampled={} if sampled is None else {column: sampled})
    assert propose(seen).text == "{title}"


@pytest.mark.parametrize(
    ("generated", "sends_stored", "proposed"),
    [("s", True, True), ("s", False, False), ("v", True, False), ("v", False, False)],
)
def test_generated_columns_are_proposed_if_the_server_can_send_them(
    generated: str, sends_stored: bool, proposed: bool
) -> None:
    seen = look({"body": "text", "summary": "text", "size": "integer"}, sends_stored=sends_stored)
    columns = {
        name: msgspec.structs.replace(column, generated=generated if name in ("summary", "size") else "")
        for name, column in seen.table.columns.items()
    }
    table = msgspec.structs.replace(seen.table, columns=columns)
    proposal = propose(msgspec.structs.replace(seen, table=table))
    assert (proposal.text, proposal.columns) == (("{summary}\n\n{body}", ("size",)) if proposed else ("{body}", ()))


def test_plain_values_and_labels_are_carried_and_those_that_queries_filter_by_indexed() -> None:
    seen = look(
        {
            "title": "text",
            "tenant": "integer",
            "state": "text",
            "made": "timestamp with time zone",
            "place": "point",
            "iban": "text",
        },
        sampled={"state": LABEL, "iban": LABEL},
        filtered=("tenant", "title", "place"),
    )
    proposal = propose(seen)
    assert proposal.columns == ("tenant", "state", "made")
    assert proposal.indexed == ("tenant",)
    assert proposal.key == ("id",)
    assert identity_statement(proposal, NAME) is None


def test_columns_named_like_ours_are_not_carried() -> None:
    assert propose(look({"title": "text", "chunk_no": "integer", "content": "integer"})).columns == ()


def test_what_is_given_goes_before_what_would_be_proposed() -> None:
    seen = look({"title": "text", "tenant": "integer", "size": "integer"}, filtered=("tenant", "size"))
    proposal = propose(seen, text="{tenant}: {title}", columns=["size"])
    assert (proposal.text, proposal.columns, proposal.indexed) == ("{tenant}: {title}", ("size",), ("size",))
    assert propose(seen, indexed=[]).indexed == ()


@pytest.mark.parametrize(
    ("columns", "sampled", "hint"),
    [
        ({"size": "integer"}, {}, "such as --text '{id}'"),
        ({"size": "integer", "Name": "text", "code": "text", "email": "text"}, {"code": LABEL}, None),
        ({"status": "text"}, {"status": LABEL}, "such as --text '{status}'; its columns of text are status"),
        ({"one": "text", "Two": "text"}, {}, "such as --text '{one}'; its columns of text are one, \"Two\""),
        ({"code": "text", "email": "text"}, {"code": LABEL}, "such as --text '{code}'; its columns of text are code"),
    ],
)
def test_a_table_without_prose_is_told_its_columns_of_text_and_how_to_name_some(
    columns: dict[str, str], sampled: dict[str, Sampled], hint: str | None
) -> None:
    if hint is None:
        assert propose(look(columns, sampled=sampled)).text == "{Name}"
        return
    with pytest.raises(UsageError, match="looks like text") as refused:
        propose(look(columns, sampled=sampled))
    assert str(refused.value.hint).endswith(hint)
    assert propose(look(columns), text="{size}").text == "{size}"


def test_the_only_column_of_text_is_chosen_while_no_row_tells_what_it_holds() -> None:
    assert propose(look({"size": "integer", "remark": "text", "email": "text"})).text == "{remark}"


def test_a_unique_index_stands_in_for_a_missing_key_once_it_is_the_identity() -> None:
    seen = look({"title": "text"}, key=(), identity_index="by slug", identity_columns=("slug",))
    proposal = propose(seen)
    assert proposal.key == ("slug",)
    assert identity_statement(proposal, NAME) == 'ALTER TABLE public.posts REPLICA IDENTITY USING INDEX "by slug";'


def test_a_table_whose_rows_nothing_identifies_is_refused() -> None:
    with pytest.raises(SetupError):
        propose(look({"title": "text"}, key=()))
