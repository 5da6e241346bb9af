"""Relations as templates use them: what they compute, what they need, and what is refused."""

from __future__ import annotations

import msgspec
import pytest

from cdcsync.config import QualifiedName, Related
from cdcsync.config.names import WHOLE_ROW
from cdcsync.documents.related import columns_read, computed_columns, make_related
from cdcsync.errors import ConfigError

WHERE = "indexes.posts"
COMMENTS = QualifiedName("public", "comments")


def relation(**keys: object) -> Related:
    return msgspec.convert({"table": "comments", "on": {"post_id": "id"}} | keys, Related)


TAGS = relation(table="tags", on={"id": "tag_id"}, via={"table": "post_tags", "on": {"post_id": "id"}}, text="{label}")
AUTHOR = relation(table="people", on={"id": "author_id"})


def test_texts_values_and_lists_of_rows_are_columns_of_names_that_no_table_has() -> None:
    made = make_related(
        {"tags": TAGS, "author": AUTHOR, "comments": relation(columns=["body"])},
        ["title", "tags", "author.name", "author.name", "author.town"],
        ["comments"],
        where=WHERE,
    )
    assert set(computed_columns(made)) == {"tags", "author.name", "author.town", "comments[]"}
    tags, author, comments = made
    assert [str(step.table) for step in tags.steps] == ["public.post_tags", "public.tags"]
    assert author.values == ("name", "town")
    assert comments.listed == ("body",)


def test_a_relation_needs_what_its_text_and_the_relations_within_it_read() -> None:
    (comments,) = make_related(
        {"comments": relation(text="{body} by {author.name}", related={"author": AUTHOR}, where="approved")},
        ["comments"],
        [],
        where=WHERE,
    )
    assert comments.needed == ("body", "author_id")
    assert [one.path for one in comments.walk()] == [("comments",), ("comments", "author")]
    read = columns_read([comments])
    assert read[COMMENTS] == ("post_id", "body", "author_id", "approved")
    assert read[QualifiedName("public", "people")] == ("id", "name")


@pytest.mark.parametrize(
    ("where", "order_by", "columns"),
    [
        ("NOT Hidden", "RANK DESC", {"hidden", "rank"}),
        ('NOT "is bad"', '"Second Rank", "a""b"', {"is bad", "Second Rank", 'a"b'}),
        ("price$ > 0 AND \u00c4B", "id", {"price$", "\u00c4b", "id"}),
    ],
)
def test_columns_of_a_condition_or_order_are_found_as_postgresql_reads_names(
    where: str, order_by: str, columns: set[str]
) -> None:
    settings = {"text": "{body}", "where": where, "order_by": order_by}
    (made,) = make_related({"comments": relation(**settings)}, ["comments"], [], where=WHERE)
    assert columns <= set(columns_read([made])[COMMENTS])
    between = {"table": "between", "on": {"a": "id"}}
    (made,) = make_related({"comments": relation(**settings, via=between)}, ["comments"], [], where=WHERE)
    read = columns_read([made])
    assert len(read) == 2
    for found in read.values():
        assert columns <= set(found), "the condition may name columns of both tables"


@pytest.mark.parametrize(
    ("keys", "whole"),
    [
        ({"where": "to_jsonb(t) ->> 'a' = 'b'"}, True),
        ({"where": "t.* IS NOT NULL"}, True),
        ({"where": "t.hidden OR tt OR not_t OR flag = 't' OR word = 'it''s t'"}, False),
        ({"order_by": "comments"}, True),
        ({"order_by": '"comments" DESC'}, True),
        ({"order_by": "comments.id, t"}, False),
    ],
)
def test_a_condition_or_order_that_names_the_row_reads_all_its_columns(keys: dict[str, str], whole: bool) -> None:
    (made,) = make_related({"comments": relation(text="{body}", **keys)}, ["comments"], [], where=WHERE)
    assert (WHOLE_ROW in columns_read([made])[COMMENTS]) is whole


def test_whatever_decides_the_text_is_part_of_the_definition() -> None:
    def definition(**keys: object) -> str:
        (made,) = make_related({"comments": relation(**({"text": "{body}"} | keys))}, ["comments"], [], where=WHERE)
        return made.definition

    changes: list[dict[str, object]] = [
        {},
        {"text": "{body}!"},
        {"table": "notes"},
        {"on": {"id": "id"}},
        {"order_by": "id DESC"},
        {"limit": 3},
        {"separator": " "},
        {"where": "approved"},
        {"via": {"table": "between", "on": {"a": "id"}}},
        {"text": "{body}{author.name}", "related": {"author": {"table": "people", "on": {"id": "author_id"}}}},
    ]
    assert len({definition(**one) for one in changes}) == len(changes)


REGION = {"region": relation(table="regions", on={"id": "region_id"}, text="{name}")}


@pytest.mark.parametrize(
    ("text", "columns", "used", "listed", "fix", "typed"),
    [
        ("{name}", [], ["customer"], [], "or {region.COLUMN} in W.text", ("{name} {region}", [], ["customer"])),
        ("", [], ["customer.name"], [], "and {customer} in indexes.posts.text", ("{region}", [], ["customer"])),
        ("{name}", [], ["customer.region.name"], [], "{region.name} in W.text", ("{region.name}", [], ["customer"])),
        ("", ["name"], [], ["customer"], 'use "region" or "region.COLUMN" in W.columns', ("", ["name", "region"], [])),
        ("{name}", [], [], ["customer"], "or {region.COLUMN} in W.text", ("{region}", [], [])),
    ],
    ids=["not in the text above", "no text above", "named through it", "not in the columns above", "a function"],
)  # fmt: skip
def test_the_remedy_for_a_section_within_a_section_names_the_text_that_it_belongs_into(
    text: str, columns: list[str], used: list[str], listed: list[str], fix: str, typed: tuple[str, list[str], list[str]]
) -> None:
    def make(text: str, columns: list[str], used: list[str]) -> None:
        customer = relation(table="customers", text=text, columns=columns, related=REGION)
        make_related({"customer": customer}, used, listed, where=WHERE)

    with pytest.raises(ConfigError) as caught:
        make(text, columns, used)
    assert fix.replace("W.", "indexes.posts.related.customer.") in str(caught.value.hint)
    make(*typed)


def test_the_remedy_for_a_section_of_an_index_names_what_the_index_has() -> None:
    for listed, key in (([], "text"), (["subject"], "document_columns")):
        with pytest.raises(ConfigError) as caught:
            make_related({"tags": TAGS}, [], listed, where=WHERE)
        assert f"in indexes.posts.{key}, or remove the section" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("related", "used", "listed", "where", "message"),
    [
        ({"tags": TAGS}, [], [], "related.tags", "no template uses this section"),
        ({"comments": relation()}, ["comments"], [], "related.comments.text", "does not define the text of a row"),
        ({"comments": relation()}, [], ["comments"], "related.comments.columns", "which columns"),
        (
            {"a": relation(text="{a}", related={"a": relation(text="{b}")})},
            ["a"],
            [],
            "related.a.related.a",
            "of the same name",
        ),
        ({"author": AUTHOR}, ["author." + "x" * 60], [], "related.author", "longer than 63 bytes"),
        ({"comments": relation(text="{body")}, ["comments"], [], "related.comments.text", ""),
    ],
    ids=["unused", "no text", "no columns", "within itself", "long name", "broken template"],
)
def test_a_relation_that_nothing_can_be_made_of_is_refused_at_its_section(
    related: dict[str, Related], used: list[str], listed: list[str], where: str, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        make_related(related, used, listed, where=WHERE)
    assert caught.value.where == f"{WHERE}.{where}"
    assert message in caught.value.message
    assert caught.value.hint
