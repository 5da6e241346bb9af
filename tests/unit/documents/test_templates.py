"""Templates and hashes: what a template may say, what it renders to, and the SQL that says the same."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cdcsync.documents.templates import CONCAT_ARGUMENTS, Template, hash_text, sql_hash
from cdcsync.errors import ConfigError

TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\0"))
NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1)


def identifier(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def braced(name: str) -> str:
    return '{"' + name.replace('"', '""') + '"}'


def escaped(literal: str) -> str:
    return literal.replace("{", "{{").replace("}", "}}")


@pytest.mark.parametrize(
    ("text", "columns", "values", "document"),
    [
        ("{title}", ["title"], ["T"], "T"),
        ("{title}\n\n{body}", ["title", "body"], ["T", "B"], "T\n\nB"),
        ("{title}\n\n{body}", ["title", "body"], [None, "B"], "\n\nB"),
        ("{title}\n\n{body}", ["title", "body"], [None, None], "\n\n"),
        ("{ first name }", ["first name"], ["F"], "F"),
        ("{b}{a}{b}", ["b", "a"], ["1", "2"], "121"),
        ("{b}{a}{b}", ["b", "a"], ["1", None], "11"),
        ("{{{a}}}", ["a"], ["x"], "{x}"),
        ("{{a}} {a}", ["a"], ["x"], "{a} x"),
        ("100 %s %% {a}%", ["a"], ["%d"], "100 %s %% %d%"),
        ('{"Odd {Name}"}', ["Odd {Name}"], ["x"], "x"),
        ('{ " kept " }', [" kept "], ["x"], "x"),
        ('{"say ""hi"""}', ['say "hi"'], ["x"], "x"),
        ('{5" disk}', ['5" disk'], ["x"], "x"),
        ("{über\nzwei}", ["über\nzwei"], ["x"], "x"),
    ],
)
def test_a_template_renders_columns_between_literals(
    text: str, columns: list[str], values: list[str | None], document: str
) -> None:
    template = Template.parse(text)

    assert template.text == text
    assert template.columns == tuple(columns)
    assert template.render(values) == document
    assert template.render(tuple(values)) == document


@given(st.lists(st.tuples(TEXTS, NAMES), min_size=1), TEXTS, st.data())
def test_any_text_can_be_a_literal_a_name_or_a_value(
    pairs: list[tuple[str, str]], end: str, data: st.DataObject
) -> None:
    template = Template.parse("".join(escaped(literal) + braced(name) for literal, name in pairs) + escaped(end))
    values = {name: data.draw(st.none() | TEXTS) for _, name in pairs}

    assert template.columns == tuple(values)
    assert template.render(tuple(values.values())) == "".join(text + (values[name] or "") for text, name in pairs) + end


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{title", "the brace at character 1 of the template is not matched by another"),
        ("title}", "the brace at character 6 of the template is not matched by another"),
        ("{a} {b{c}}", "the brace at character 5 of the template is not matched by another"),
        ("{a}}", "the brace at character 4 of the template is not matched by another"),
        ('{"a}', "the brace at character 1 of the template is not matched by another"),
        ('{"a" b}', "the brace at character 1 of the template is not matched by another"),
        ("{a}{}", "the braces at character 4 of the template hold no column name"),
        ("{ \t}", "the braces at character 1 of the template hold no column name"),
        ('{""}', "the braces at character 1 of the template hold no column name"),
        ("", "the template names no column"),
        ("{{title}}", "the template names no column"),
        ("{a}\0", "the template holds a NUL character"),
    ],
)
def test_a_faulty_template_says_what_is_wrong_and_where(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Template.parse(text, where="indexes.articles.text")

    assert caught.value.message == message
    assert caught.value.where == "indexes.articles.text"
    assert caught.value.hint


@given(st.text(st.sampled_from('{}" ab%')))
@example("{{{")
def test_any_text_is_a_template_or_a_config_error(text: str) -> None:
    try:
        template = Template.parse(text)
    except ConfigError:
        return
    assert template.render(["x"] * len(template.columns)).count("x") == len(template.slots)


@pytest.mark.parametrize("template", ["{a}{b}", "{a}{b}{a}"])
@pytest.mark.parametrize("values", [[], ["x"], ["x", "y", "z"]])
def test_values_must_be_as_many_as_columns(template: str, values: list[str | None]) -> None:
    with pytest.raises(ValueError, match=f"{len(values)} values for 2 columns"):
        Template.parse(template).render(values)


@pytest.mark.parametrize(
    ("text", "sql"),
    [
        ("{a}", 'pg_catalog.concat("a")'),
        ("{title}\n\n{body}", """pg_catalog.concat("title", E'\\n\\n', "body")"""),
        ("it's {a}.", """pg_catalog.concat('it''s ', "a", '.')"""),
        ("\\'{a}{a}", """pg_catalog.concat(E'\\\\''', "a", "a")"""),
    ],
)
def test_sql_is_one_concatenation_with_quoted_literals(text: str, sql: str) -> None:
    assert Template.parse(text).sql(identifier) == sql


def test_sql_of_a_long_template_stays_below_the_servers_limit_of_arguments() -> None:
    template = Template.parse("".join(f"{{c{n}}}, " for n in range(100)))

    calls = template.sql(identifier).strip("()").split(" || ")

    assert len(calls) == 3
    assert all(call.startswith("pg_catalog.concat(") and call.count('"') <= 2 * CONCAT_ARGUMENTS for call in calls)


@given(TEXTS)
def test_a_hash_is_half_of_the_sha256_of_the_utf8(text: str) -> None:
    assert hash_text(text) == hashlib.sha256(text.encode()).digest()[:16]


def test_the_hash_never_changes() -> None:
    """Hashes are stored: another function would embed everything anew."""
    assert hash_text("Zürich").hex() == "4251685e06cab635578c72b1f5f221e9"


def test_sql_hash_names_the_same_function() -> None:
    assert sql_hash("x") == "pg_catalog.substring(pg_catalog.sha256(pg_catalog.convert_to(x, 'UTF8')), 1, 16)"
