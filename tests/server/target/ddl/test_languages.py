"""Keyword search in the language of each row, without accents, and in scripts without spaces."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

import msgspec
import pytest
from psycopg import sql

from cdcsync.target.ddl.languages import kept_search
from cdcsync.target.search import count_words, search
from tests.support.indexes import SCHEMA, LiveIndex, OpenIndex, changes, document, live_index, make_spec
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

ROWS = [
    ("1", "german", "Die Häuser am Fluss wurden verkauft"),
    ("2", "EN", "The houses by the river were sold"),
    ("3", "fr", "Les maisons au bord de la rivière"),
    ("4", "klingon", "the houses of Qonos"),
    ("5", None, "houses"),
]


async def found(index: LiveIndex, query: str, **more: object) -> list[object]:
    hits = await search(index.connection, SCHEMA, index.spec, text=query, vector=None, **more)  # type: ignore[arg-type]
    return [hit.key["id"] for hit in hits]


async def filled(index: LiveIndex, rows: Sequence[tuple[str, str | None, str]]) -> None:
    await index.apply(changes(*(document(key, text, carried=(language,)) for key, language, text in rows)))
    await count_words(index.connection, SCHEMA, index.spec)


@pytest.fixture
async def languages(database: Database) -> AsyncIterator[LiveIndex]:
    spec = make_spec(carried={"language": "text"}, search="{language}")
    async with live_index(database, spec) as index:
        await filled(index, ROWS)
        yield index


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ("Haus", {1}),  # each row's words are reduced as its language does
        ("house", {2}),
        ("maison", {3}),
        ("houses", {2, 4, 5}),  # an unknown language, or none, has its words as they are written
        ('"houses by the river"', {2}),
        ("house -river", set()),
    ],
)
async def test_words_are_those_of_each_rows_language(languages: LiveIndex, query: str, ids: set[int]) -> None:
    assert set(await found(languages, query)) == ids


async def test_a_row_that_changes_its_language_changes_its_words(languages: LiveIndex) -> None:
    await filled(languages, [("4", "english", "the houses of Qonos")])
    assert set(await found(languages, "house")) == {2, 4}
    assert await found(languages, "house", filter={"language": "english"}) == [4]


async def test_a_headline_marks_words_in_the_rows_language(languages: LiveIndex) -> None:
    (hit,) = await search(languages.connection, SCHEMA, languages.spec, text="Haus", vector=None, headline="")
    assert hit.headline is not None
    assert "<b>Häuser</b>" in hit.headline


async def test_a_configuration_with_unaccent_finds_words_without_their_accents(database: Database) -> None:
    if database.execute("SELECT count(*) FROM pg_available_extensions WHERE name = 'unaccent'") == [(0,)]:
        pytest.skip("this server has no extension unaccent")
    for statement in (
        "CREATE EXTENSION unaccent",
        "CREATE TEXT SEARCH CONFIGURATION public.french_unaccent (COPY = french)",
        "ALTER TEXT SEARCH CONFIGURATION public.french_unaccent ALTER MAPPING FOR hword, hword_part, word"
        " WITH unaccent, french_stem",
    ):
        database.execute(sql.SQL(statement))
    async with live_index(database, make_spec(carried={"tenant": "text"}, search="public.french_unaccent")) as index:
        await filled(index, [("1", None, "un café près de la forêt"), ("2", None, "une maison")])
        assert await found(index, "cafe") == [1]
        assert await found(index, "FORÊTS") == [1]
        assert await found(index, "foret") == [1]


@pytest.mark.parametrize(
    ("query", "ids"),
    [
        ('"東京"', [1]),  # inside of a run, which PostgreSQL's parser takes for one word
        ('"京都"', [2]),
        ("東京大学", [1, 2]),  # characters are alternatives; more of them rank higher
        ('"パスワード"', [3]),
        ('"비밀번호"', [4]),
        ("password", [3]),
        ('大学 -"京都"', [1]),
    ],
)
async def test_scripts_without_spaces_are_searched_by_their_characters(
    database: Database, query: str, ids: list[int]
) -> None:
    rows = [
        ("1", None, "東京大学は日本の大学である"),
        ("2", None, "京都の大学を訪ねた"),
        ("3", None, "パスワードを忘れた password"),
        ("4", None, "비밀번호를 잊었습니다"),
    ]
    async with live_index(database, make_spec(carried={"tenant": "text"}, search="cjk")) as index:
        await filled(index, rows)
        assert await found(index, query) == ids


@pytest.mark.parametrize("behind", ["", '"緊急会見"', " -東京", '「緊急会見」"でした"'])
async def test_a_page_without_spaces_is_long_and_quotes_and_dashes_in_it_are_punctuation(
    open_index: OpenIndex, behind: str
) -> None:
    index = await open_index(carried={"language": "text"}, search="cjk")
    await filled(index, [("1", None, "東京大学は日本の大学である"), ("2", None, "password")])
    assert await found(index, "日本の首都は東京である。" * 10 + behind) == [1]


@pytest.mark.parametrize("search", ["cjk", "{language}", "simple"])
async def test_a_phrase_of_thousands_of_words_is_searched_by_its_words(open_index: OpenIndex, search: str) -> None:
    index = await open_index(carried={"language": "text"}, search=search)
    await filled(index, [("1", "fr", "14 東京、大学 b"), ("2", "english", "14 東京、大学 b"), ("3", None, "no number")])
    for phrase in (",".join(map(str, range(15_000))), "a-b-" * 20_000, "東京、" * 30_000):
        assert set(await found(index, f'"{phrase}"')) == {1, 2}


async def test_a_headline_marks_characters_where_words_are_not_spaced(database: Database) -> None:
    async with live_index(database, make_spec(carried={"tenant": "text"}, search="cjk")) as index:
        await filled(
            index, [("1", None, "前置きの文章です。" * 20 + "東京大学は password を忘れた。" + "後書き。" * 20)]
        )
        for headline, part in (
            ("MaxFragments=1, MaxWords=8, MinWords=4", "<b>東</b><b>京</b>大学は"),
            ("StartSel=<, StopSel=>", "<東><京>大学は password"),
        ):
            (hit,) = await search(index.connection, SCHEMA, index.spec, text="東京", vector=None, headline=headline)
            assert hit.headline is not None
            assert part in hit.headline
            assert len(hit.headline) < 100
            assert hit.headline.isprintable()


async def test_a_word_of_a_language_that_looks_like_an_operator_is_a_word(database: Database) -> None:
    async with live_index(database, make_spec(carried={"tenant": "text"}, search="french")) as index:
        await filled(index, [("1", None, "des bijoux en or"), ("2", None, "des bijoux en argent")])
        assert await found(index, "or") == [1]
        assert await found(index, "OR") == [1]
        assert await found(index, "argent OR platine") == [2]
        assert await found(index, "argent OR -platine") == [2]
        assert await found(index, "-platine OR argent") == [2]


@pytest.mark.parametrize(
    ("made_by", "type_", "written"),
    [
        ("english", "text", ["pg_catalog.english", "PG_CATALOG.English"]),
        ("cjk", "text", []),
        ("{language}", "text", []),
        ('{Its "Language"}', "character varying(20)", []),
        ('public."It\'s ""mine"""', "text", []),
    ],
)
async def test_the_search_that_a_column_has_is_read_from_it_whatever_is_asked_for(
    database: Database, made_by: str, type_: str, written: list[str]
) -> None:
    database.execute("""CREATE TEXT SEARCH CONFIGURATION public."It's ""mine\""" (COPY = simple)""")
    column = made_by[1:-1] if made_by.startswith("{") else "language"
    spec = make_spec(carried={column: type_}, search=made_by)

    async def kept(search: str | None) -> str | None:
        asked = msgspec.structs.replace(spec.config, search=search)
        return await kept_search(index.connection, SCHEMA, spec.relations, asked)

    async with live_index(database, spec) as index:
        for one in ("simple", "arabic", "english", "public.simple", "cjk", "{language}", "{other}", made_by):
            assert await kept(one) == made_by
        # Other spellings of the same name are as the configuration has them.
        assert [await kept(one) for one in written] == written
        assert await kept(None) is None
        await index.connection.execute("ALTER TABLE cdcsync.articles_chunks DROP COLUMN search CASCADE")
        assert await kept("simple") == "simple"
