"""Environment variables in texts: what is replaced, what is left alone, and what an absent one says."""

from __future__ import annotations

import pytest

from tests.unit.config.files import SECTIONS, articles, problems, read


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("${TABLE}", "news"),
        ("a${TABLE}b${TABLE}", "anewsbnews"),
        ("${TABLE:-other}", "news"),
        ("${ABSENT:-other}", "other"),
        ("${EMPTY:-other}", "other"),
        ("a${EMPTY}b", "ab"),
        ("a${ABSENT:-}b", "ab"),
        ("$$", "$"),
        ("$${TABLE}", "${TABLE}"),
        ("$$${TABLE}", "$news"),
        ("$5 and $TABLE and 5$", "$5 and $TABLE and 5$"),
        ("{title} $", "{title} $"),
        # What a variable holds is not looked through again.
        ("${DOLLARS}", "$$ ${TABLE}"),
        ("${ABSENT:-$$}", "$$"),
    ],
)
def test_references_in_a_text_are_replaced(text: str, expanded: str) -> None:
    file = SECTIONS.replace("{title}", text)

    config = read(file, TABLE="news", EMPTY="", DOLLARS="$$ ${TABLE}")

    assert config.indexes["articles"].text == expanded


def test_texts_are_replaced_at_every_depth_but_keys_are_not() -> None:
    config = read(
        '[embedders.test]\ntype = "${TYPE}"\n[indexes.a]\ntable = "a"\ntext = "x"\nembedder = "test"\n'
        'columns = ["${A}", "b${A}"]\n[indexes.a.hnsw]\nbuild_memory = "${MEMORY}"\n',
        TYPE="hash",
        A="tenant",
        MEMORY="1GB",
    )

    assert config.indexes["a"].columns == ("tenant", "btenant")
    assert config.indexes["a"].hnsw.build_memory == "1GB"
    assert problems(SECTIONS + '"${KEY}" = 1', KEY="view")[0].startswith('indexes.articles."${KEY}": unknown key')


def test_values_that_are_no_texts_stay_as_they_are() -> None:
    assert articles("inline_max_chunks = 3\n").inline_max_chunks == 3


def test_an_absent_variable_is_named_with_its_key_and_the_fix() -> None:
    [line] = problems('[source]\ndsn = "postgresql://u:${PGPASS}@h/db"' + SECTIONS)

    assert line == "source.dsn: environment variable PGPASS is not set"


def test_the_fix_for_an_absent_variable_is_to_set_it_to_default_it_or_to_escape_it() -> None:
    first, second = problems('[source]\nslot = "${SLOT}"\n[target]\nschema = "${SCHEMA}"' + SECTIONS)

    assert first.startswith("source.slot: environment variable SLOT is not set (set it, write ${SLOT:-value}")
    assert "$${SCHEMA} for the text itself" in second


def test_all_absent_variables_of_a_text_are_named_once() -> None:
    [line] = problems('[source]\ndsn = "${A} ${B} ${A}"' + SECTIONS)

    assert line == "source.dsn: environment variable A is not set; environment variable B is not set"


def test_an_absent_variable_in_a_list_is_named_with_its_place() -> None:
    [line] = problems(SECTIONS + 'columns = ["a", "${B}"]')

    assert line.startswith("indexes.articles.columns[1]: environment variable B is not set")


def test_what_follows_from_an_absent_variable_is_not_reported_again() -> None:
    [line] = problems('[worker]\nlisten = "${LISTEN}"' + SECTIONS)

    assert line.startswith("worker.listen: environment variable")


@pytest.mark.parametrize("text", ["${", "${}", "${1A}", "${A B}", "a ${A", "${A-b}", "${A:b}"])
def test_a_reference_that_cannot_be_read_is_a_problem_and_not_a_text(text: str) -> None:
    [line] = problems(f"[source]\ndsn = '{text}'" + SECTIONS, A="a")

    assert line == "source.dsn: ${ is not followed by NAME} or NAME:-default}"


def test_a_variable_that_is_not_utf_8_is_a_problem() -> None:
    # The interpreter stands in lone surrogates for bytes of the environment that it cannot decode.
    [line] = problems('[source]\nslot = "${SLOT}"' + SECTIONS, SLOT=b"\xff".decode("utf-8", "surrogateescape"))

    assert line == "source.slot: environment variable SLOT is not valid UTF-8"
