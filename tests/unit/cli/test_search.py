"""`cdcsync search`: filters as words of the command line, and how hits are shown."""

from __future__ import annotations

import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from cdcsync.cli import main
from cdcsync.cli.printing import MARKS, matched, print_hits, print_plan, shares
from cdcsync.cli.search import check_operators, parse_filters
from cdcsync.errors import UsageError
from cdcsync.target import search as target_search
from cdcsync.target.ddl.filters import FILTER_OPERATORS, Column
from cdcsync.target.search import Hit


def make_hit(**more: Any) -> Hit:
    facts: dict[str, Any] = {"key": {"id": 7}, "carried": {}, "chunk_no": 0, "content": "a text", "score": 0.03}
    return Hit(**facts | {"distance": None, "text_rank": None, "stale": False} | more)


def _contain(**wanted: Any) -> dict[str, Any]:
    return {column: {"contains": value} for column, value in wanted.items()}


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["tenant=3"], {"tenant": {"in": ["3"]}}),
        (["status=open", "status=new"], {"status": {"in": ["open", "new"]}}),
        (["made>=2026-01-01", "made < 2026-02-01"], {"made": {"gte": "2026-01-01", "lt": "2026-02-01"}}),
        (["title~%a=b%", "n!=4"], {"title": {"like": "%a=b%"}, "n": {"ne": "4"}}),
        (["name="], {"name": {"in": [""]}}),
        (["n<>4", "tenant==3"], {"n": {"ne": "4"}, "tenant": {"in": ["3"]}}),
        (["closed is null", "opened IS NOT NULL"], {"closed": {"null": True}, "opened": {"null": False}}),
        (["author.name=Ann", "net price<4"], {"author.name": {"in": ["Ann"]}, "net price": {"lt": "4"}}),
        (["net price is null", "a b is not null"], {"net price": {"null": True}, "a b": {"null": False}}),
        (['"author.name"=Ann', '"author.name" = "Bob"'], {"author.name": {"in": ["Ann", '"Bob"']}}),
        (['"a <= ""b""" <= 4', '"a b" is null'], {'a <= "b"': {"lte": "4"}, "a b": {"null": True}}),
        (['say "hi"=4'], {'say "hi"': {"in": ["4"]}}),
        (["tags@>urgent", "author_id=3"], {"tags": {"contains": "urgent"}, "author_id": {"in": ["3"]}}),
        (['tags @> ["a", "b"]', 'tags&&["c"]'], {"tags": {"contains": ["a", "b"], "overlaps": ["c"]}}),
        (['extra@>{"n": [1.50, null]}'], {"extra": {"contains": {"n": [Decimal("1.50"), None]}}}),
        (["tags@>{a,b}", "n@>3", 'text@>"3"'], _contain(tags="{a,b}", n=3, text="3")),
        (["tags@>12e4567", "hash&&1e3"], {**_contain(tags="12e4567"), "hash": {"overlaps": "1e3"}}),
        (["n@>-0", "m@>1.50", "l@>[1e3]"], _contain(n="-0", m=Decimal("1.50"), l=[Decimal("1e3")])),
        (["tags@>", '"a@">3', "mail=a@>b"], {**_contain(tags=""), "a@": {"gt": "3"}, "mail": {"in": ["a@>b"]}}),
        (
            ["title=this is null", "body~%this is not null"],
            {"title": {"in": ["this is null"]}, "body": {"like": "%this is not null"}},
        ),
    ],
)
def test_filters_are_columns_operators_and_values(given: list[str], wanted: dict[str, Any]) -> None:
    assert parse_filters(given) == wanted


@pytest.mark.parametrize(
    "given", [["tenant"], ["=3"], ["n>1", "n>2"], ["n is null", "n is not null"], ["tags@>a", "tags@>b"]]
)
def test_what_is_not_a_filter_is_refused_with_the_form_of_one(given: list[str]) -> None:
    with pytest.raises(UsageError) as refused:
        parse_filters(given)
    assert refused.value.hint


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("js=1", "a filter on js cannot use ="),
        ("js!=1", "a filter on js cannot use !="),
        ("js>=1", "a filter on js cannot use >="),
        ("js@>1", "a filter on js cannot use @>"),
        ("js&&1", "a filter on js cannot use &&"),
    ],
)
def test_an_operator_that_a_column_lacks_is_told_as_it_is_written_here(given: str, told: str) -> None:
    columns = {"js": Column("pg_catalog.json", "json", {"like": "", "null": ""})}
    with pytest.raises(UsageError, match=re.escape(told)) as refused:
        check_operators(parse_filters([given]), columns)
    assert refused.value.hint == "a column of the type json takes ~, is null"


def test_every_operator_of_a_filter_can_be_written_here() -> None:
    written = ["a=1", "a!=1", "a<1", "a<=1", "a>1", "a>=1", "a~1", "a@>1", "a&&1", "a is null"]
    assert {*parse_filters(written)["a"], "eq"} == set(FILTER_OPERATORS)  # a list of one value is equality
    check_operators(parse_filters(written), {"a": Column("t", "t", dict.fromkeys(FILTER_OPERATORS, ""))})


@pytest.mark.parametrize(
    ("arguments", "where"), [(["a \udcff"], "[INDEX]... TEXT"), (["a", "--filter", "b=\udcff"], "--filter")]
)
def test_bytes_that_are_not_text_are_refused_by_where_they_are(
    arguments: list[str], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["search", "articles", *arguments])
    assert ended.value.code == UsageError.exit_code
    assert f"Invalid value for '{where}': it is not valid text" in capsys.readouterr().err


def test_a_text_that_begins_with_a_dash_is_told_how_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["search", "articles", "-word another"])
    assert ended.value.code == UsageError.exit_code
    assert "articles -- '-word another'" in capsys.readouterr().err


@pytest.mark.parametrize(("more", "where"), [(["-k", "1000", "--skip", "1"], "--skip"), (["-k", "1001"], "-k")])
def test_hits_past_the_thousandth_are_refused_before_anything_is_asked(
    more: list[str], where: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cdcsync.toml"
    file.write_text(
        '[source]\ndsn = "postgresql://127.0.0.1:1/db"\n[embedders.words]\ntype = "hash"\n'
        '[indexes.a]\ntable = "a"\ntext = "{t}"\nembedder = "words"\n'
    )
    with pytest.raises(SystemExit) as ended:
        main(["search", "a", "word", *more, "-c", str(file)])
    assert ended.value.code == UsageError.exit_code
    assert where in capsys.readouterr().err


def test_a_vector_in_a_plan_does_not_fill_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    print_plan("articles: vector leg", [f"Sort Key: (v.embedding <=> '[{','.join(['-0.0123'] * 384)}]'::vector)"])
    assert capsys.readouterr().out.splitlines()[-1].strip() == "Sort Key: (v.embedding <=> '[…]'::vector)"


def test_words_that_matched_are_bold_and_nothing_else_of_the_text_acts_on_a_terminal() -> None:
    opening, closing = MARKS
    text = matched(make_hit(headline=f"forgot my {opening}login{closing}\x1b[2J now"))
    assert text.plain == "     forgot my login·[2J now"
    assert [text.plain[span.start : span.end] for span in text.spans if "bold" in str(span.style)] == ["login"]
    assert matched(make_hit(headline="no mark")).plain == "     a text"


def test_the_bar_shows_how_much_each_leg_gave() -> None:
    assert shares(make_hit(text_rank=1)) == []
    bar = shares(make_hit(text_rank=1, vector_rank=1))
    assert [part for part in bar if isinstance(part, tuple)] == [("█" * 5, "blue"), ("▒" * 5, "magenta")]


def test_the_bar_goes_by_the_constant_that_the_score_is_made_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_search, "FUSION", 0)
    bar = shares(make_hit(text_rank=9, vector_rank=1))
    assert [part for part in bar if isinstance(part, tuple)] == [("█" * 9, "blue"), ("▒", "magenta")]


def test_hits_after_others_have_their_places(capsys: pytest.CaptureFixture[str]) -> None:
    print_hits([make_hit(), make_hit()], indexes=["notes", "pages"], first=6)
    lines = [line for line in capsys.readouterr().out.splitlines() if "score" in line]
    assert [line.split()[:2] for line in lines] == [["6", "notes"], ["7", "pages"]]


def test_hits_of_several_indexes_say_which(capsys: pytest.CaptureFixture[str]) -> None:
    print_hits([make_hit(vector_rank=2, text_score=1.5)], indexes=["notes"], explain=True)
    assert capsys.readouterr().out.splitlines()[0] == "  1  notes id=7  score 0.0300  vector rank 2  text score 1.500"
