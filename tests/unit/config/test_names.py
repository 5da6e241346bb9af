"""Names: SQL's rules for reading them, the fewest quotes for writing them, and PostgreSQL's length."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdcsync.config import QualifiedName
from cdcsync.config.names import MAX_NAME_BYTES, MAX_NAMES, RESERVED_WORDS, named, plain_name_fault, quote
from cdcsync.errors import ConfigError

PARTS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=15)
NAMES = st.builds(QualifiedName, schema=PARTS, name=PARTS)


@given(NAMES)
@example(QualifiedName("user", "table"))
@example(QualifiedName('a"."b', '"'))
@example(QualifiedName(" ", "\n"))
def test_parsing_what_was_printed_gives_the_same_name(name: QualifiedName) -> None:
    assert QualifiedName.parse(str(name)) == name


@given(st.text(max_size=30))
def test_any_text_is_a_name_or_is_refused(text: str) -> None:
    try:
        name = QualifiedName.parse(text)
    except ConfigError:
        return

    assert name.schema
    assert name.name


@pytest.mark.parametrize(
    ("text", "schema", "name"),
    [
        ("articles", "public", "articles"),
        ("blog.articles", "blog", "articles"),
        ("  blog.articles\n", "blog", "articles"),
        ("blog . articles", "blog", "articles"),
        ('"My Schema"."Tab.le"', "My Schema", "Tab.le"),
        ('"say ""hi"""', "public", 'say "hi"'),
        ('blog."Articles"', "blog", "Articles"),
        ("_a$1.b_2", "_a$1", "b_2"),
        ("bücher.größe", "bücher", "größe"),
    ],
)
def test_a_name_is_read_as_sql_reads_it(text: str, schema: str, name: str) -> None:
    assert QualifiedName.parse(text) == QualifiedName(schema, name)


def test_only_ascii_letters_outside_quotes_are_folded() -> None:
    assert QualifiedName.parse('Blog."Blog"') == QualifiedName("blog", "Blog")
    assert QualifiedName.parse("BÜCHER") == QualifiedName("public", "bÜcher")


@pytest.mark.parametrize(
    "text", ["", " ", ".", "a.", ".a", "a.b.c", "a b", "1a", 'a"b', '"a', '""', '"".a', "a. b.c", "a;b", "a-b", "a'b"]
)
def test_what_is_no_name_is_refused_with_examples_of_names(text: str) -> None:
    with pytest.raises(ConfigError, match="expected a name such as") as refused:
        QualifiedName.parse(text)

    assert repr(text) in refused.value.message
    assert refused.value.hint


@pytest.mark.parametrize("template", ["{}", "{}.a", "a.{}"])
def test_a_name_that_postgresql_would_cut_is_refused(template: str) -> None:
    whole, cut = "ä" * 31 + "a", "ä" * 32

    assert len(whole.encode()) == MAX_NAME_BYTES
    assert str(QualifiedName.parse(template.format(whole)))
    with pytest.raises(ConfigError, match="is 64 bytes long; PostgreSQL keeps 63"):
        QualifiedName.parse(template.format(cut))


def test_a_quoted_name_cannot_hold_a_zero_byte() -> None:
    with pytest.raises(ConfigError, match="zero byte"):
        QualifiedName.parse('"a\0b"')


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("articles", "articles"),
        ("_a$1", "_a$1"),
        ("Articles", '"Articles"'),
        ("1a", '"1a"'),
        ("$a", '"$a"'),
        ("größe", '"größe"'),
        ('a"b', '"a""b"'),
        ("user", '"user"'),
        ("name", "name"),
    ],
)
def test_quotes_are_written_only_where_sql_needs_them(name: str, text: str) -> None:
    assert quote(name) == text
    assert str(QualifiedName(name, name)) == f"{text}.{text}"


def test_reserved_words_are_lower_case_words() -> None:
    assert all(word.replace("_", "").isalpha() and word.islower() for word in RESERVED_WORDS)
    assert {"select", "user", "left"} < RESERVED_WORDS


def test_names_sort_by_schema_first_and_can_be_keys() -> None:
    names = {QualifiedName("b", "a"), QualifiedName("a", "b"), QualifiedName("a", "b")}

    assert sorted(names) == [QualifiedName("a", "b"), QualifiedName("b", "a")]


@pytest.mark.parametrize("name", ["a", "My Column", "a.b", '"', " "])
def test_a_plain_name_may_hold_anything(name: str) -> None:
    assert plain_name_fault(name) is None


def test_a_plain_name_is_neither_empty_nor_too_long() -> None:
    assert plain_name_fault("") == "expected a name, got nothing"
    assert "PostgreSQL keeps 63 bytes" in (plain_name_fault("x" * 64) or "")


def test_long_lists_of_names_are_cut() -> None:
    assert named("ab") == "a, b"
    assert named(str(number) for number in range(MAX_NAMES + 2)).endswith(f"{MAX_NAMES - 1} and 2 more")
