"""The sections: which keys belong together, and what they come to."""

from __future__ import annotations

import pytest

from cdcsync.errors import UsageError
from tests.unit.config.files import SECTIONS, articles, problems, read, refusal


@pytest.mark.parametrize(
    ("keys", "lines"),
    [
        ("", ["indexes.b.text: is required, unless documents names a function; it is the template of a document"]),
        (
            'documents = "m:f"',
            ["indexes.b.document_columns: names the columns of the function in documents: give both"],
        ),
        (
            'text = "{a}"\ndocuments = "m:f"\ndocument_columns = ["a", "a"]',
            [
                "indexes.b.text: must be left out where documents names a function",
                "indexes.b.document_columns: 'a' is there more than once",
            ],
        ),
        ('text = "{a}"\ndocument_columns = ["a"]', ["indexes.b.document_columns: names the columns of the function"]),
        ('documents = "f"', ['indexes.b.documents: expected a function as "package.module:function"']),
    ],
)
def test_documents_are_made_by_a_template_or_a_function(keys: str, lines: list[str]) -> None:
    found = problems(SECTIONS + f'[indexes.b]\ntable = "b"\nembedder = "test"\n{keys}\n')

    assert len(found) == len(lines)
    assert all(one.startswith(line) for one, line in zip(found, lines, strict=True)), found


def test_an_index_over_many_tables_names_them_alone() -> None:
    many = 'tables = ["tenant_*.articles"]'
    assert (
        "must be left out where tables"
        in refusal(SECTIONS.replace('table = "articles"', f'{many}\ntable = "a"')).message
    )
    assert (
        "must be left out where tables"
        in refusal(SECTIONS.replace('table = "articles"', f'{many}\nkey = ["a"]')).message
    )
    for wrong in ("articles", "Tenant.articles", "a.b.c", 'a."b"', "a.b; c"):
        error = refusal(SECTIONS.replace('table = "articles"', f"tables = ['{wrong}']"))
        assert "SCHEMA.TABLE in lower-case letters" in error.message


def test_the_tables_and_conditions_of_an_index_include_those_of_related_tables() -> None:
    index = articles(
        'where = "NOT draft"\n[indexes.articles.related.comments]\n'
        'table = "blog.comments"\non = { article_id = "id" }\n'
        'where = "NOT hidden"\norder_by = "made DESC"\ntext = "{body}"\n'
        '[indexes.articles.related.author]\ntable = "articles"\non = { id = "author_id" }\n'
    )
    assert [str(one) for one in index.followed] == ["public.articles", "blog.comments"]
    assert index.expressions == ("NOT draft", "NOT hidden", "made DESC")


@pytest.mark.parametrize(
    ("search", "column"), [("{language}", "language"), ("english", None), ("", None), ("{a b}", "a b")]
)
def test_a_language_in_braces_is_a_column(search: str, column: str | None) -> None:
    assert articles(f'columns = ["language", "a b"]\nsearch = "{search}"').search_column == column


@pytest.mark.parametrize(
    ("name", "hint"), [("artikles", "did you mean articles?"), ("x", "there are: articles"), ("articles", None)]
)
def test_an_index_that_is_not_configured_is_answered_with_those_that_are(name: str, hint: str | None) -> None:
    config = read(SECTIONS)
    if hint is None:
        assert config.index_named(name) is config.indexes[name]
        return
    with pytest.raises(UsageError, match=f"no index {name}") as refused:
        config.index_named(name)
    assert refused.value.hint == hint
