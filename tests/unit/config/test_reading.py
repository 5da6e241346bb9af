"""Reading a file: what it comes to, and what is said of one that cannot be read."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdcsync.config import (
    Chunking,
    Config,
    HashEmbedder,
    Hnsw,
    Index,
    QualifiedName,
    SentenceTransformersEmbedder,
    Source,
    Target,
    Worker,
    load,
)
from cdcsync.errors import ConfigError
from tests.unit.config.files import SECTIONS, articles, problems, read, refusal


def test_the_least_file_has_a_default_for_everything_else() -> None:
    assert read(SECTIONS) == Config(
        source=Source(),
        target=Target(),
        worker=Worker(),
        embedders={"test": HashEmbedder()},
        indexes={"articles": Index(table="articles", text="{title}", embedder="test", view="public.articles_index")},
    )


def test_every_key_that_is_given_is_taken() -> None:
    config = read(
        """
        [source]
        dsn = "service=app"
        slot = "slot_2"
        publication = "My Publication"
        streaming = false
        feedback_every_s = 5
        on_gap = "resync"
        [target]
        dsn = "host=h"
        schema = "My Schema"
        [worker]
        listen = "[::1]:0"
        log_level = "debug"
        log_format = "json"
        batch_rows = 1
        batch_bytes = 65536
        backfill_page_rows = 100000
        stop_timeout_s = 0.5
        ready_max_lag_s = 86400
        [embedders.a-b_C]
        type = "hash"
        dimensions = 16000
        latency_ms = 1
        [embedders.minilm]
        type = "sentence-transformers"
        model = "m"
        revision = "abc"
        device = "cuda:1"
        batch_size = 8
        [indexes.a_1]
        table = 'blog."Articles"'
        text = "{a}"
        embedder = "minilm"
        view = "blog.found"
        columns = ["b", "C d"]
        indexed = ["b"]
        search = "pg_catalog.german"
        distance = "l2"
        vector_type = "halfvec"
        inline_budget_ms = 0
        inline_max_chunks = 0
        chunking = {strategy = "markdown", max_tokens = 8, overlap_tokens = 7}
        hnsw = {m = 100, ef_construction = 200, build_memory = "2047GB"}
        """
    )

    assert config == Config(
        source=Source(
            dsn="service=app",
            slot="slot_2",
            publication="My Publication",
            streaming=False,
            feedback_every_s=5.0,
            on_gap="resync",
        ),
        target=Target(dsn="host=h", schema="My Schema"),
        worker=Worker(
            listen="[::1]:0",
            log_level="debug",
            log_format="json",
            batch_rows=1,
            batch_bytes=65536,
            backfill_page_rows=100_000,
            stop_timeout_s=0.5,
            ready_max_lag_s=86_400.0,
        ),
        embedders={
            "a-b_C": HashEmbedder(dimensions=16_000, latency_ms=1.0),
            "minilm": SentenceTransformersEmbedder(model="m", revision="abc", device="cuda:1", batch_size=8),
        },
        indexes={
            "a_1": Index(
                table='blog."Articles"',
                text="{a}",
                embedder="minilm",
                view="blog.found",
                columns=("b", "C d"),
                indexed=("b",),
                search="pg_catalog.german",
                distance="l2",
                vector_type="halfvec",
                inline_budget_ms=0.0,
                inline_max_chunks=0,
                chunking=Chunking(strategy="markdown", max_tokens=8, overlap_tokens=7),
                hnsw=Hnsw(m=100, ef_construction=200, build_memory="2047GB"),
            )
        },
    )
    assert type(config.source.feedback_every_s) is float


def test_tables_and_views_are_names() -> None:
    index = articles('view = "Blog.Found"')

    assert index.table_name == QualifiedName("public", "articles")
    assert index.view_name == QualifiedName("blog", "found")


@pytest.mark.parametrize(
    ("target", "dsn"),
    [
        ("", "service=app"),
        ('[target]\nschema = "x"', "service=app"),
        ('[target]\ndsn = ""', ""),
        ('[target]\ndsn = "service=other"', "service=other"),
    ],
)
def test_the_target_is_the_sources_database_unless_its_dsn_is_given(target: str, dsn: str) -> None:
    assert read(f'[source]\ndsn = "service=app"\n{target}{SECTIONS}').target.dsn == dsn


def test_an_index_needs_an_embedder_that_is_declared() -> None:
    assert problems(SECTIONS.replace('embedder = "test"', 'embedder = "tset"')) == [
        'indexes.articles.embedder: there is no [embedders.tset] section; did you mean "test"?'
    ]


def test_a_faulty_embedder_is_a_declared_one_all_the_same() -> None:
    assert problems(SECTIONS.replace('"hash"', '"hush"')) == [
        'embedders.test.type: unknown type "hush"; known types: hash, sentence-transformers, onnx, openai, tei, python,'
        " ray"
    ]


def test_the_tool_server_offers_indexes_that_are_declared() -> None:
    assert problems('[serve]\nindexes = ["articles", "artcles"]' + SECTIONS) == [
        'serve.indexes: there is no [indexes.artcles] section; did you mean "articles"?'
    ]


def test_a_faulty_index_is_a_declared_one_all_the_same() -> None:
    faulty = SECTIONS.replace('text = "{title}"', "")
    assert problems('[serve]\nindexes = ["articles"]' + faulty) == problems(faulty)


def test_two_indexes_cannot_share_a_view_however_it_is_spelled() -> None:
    other = '[indexes.other]\ntable = "b"\ntext = "x"\nembedder = "test"\nview = \'PUBLIC."articles_index"\''

    assert problems(SECTIONS + other) == [
        "indexes.other.view: public.articles_index is the view of index articles already"
    ]


def test_all_problems_of_a_file_are_reported_together() -> None:
    error = refusal(
        """
        [source]
        slot = "A"
        [worker]
        batch_rows = 0
        [embedders.x]
        type = "none"
        [indexes.a]
        table = "a"
        text = "x"
        embedder = "y"
        hnsw = {m = 50}
        [indexes.a.chunking]
        overlap = 1
        overlap_tokens = 300
        [indexes.b]
        """
    )

    first, *lines = error.message.split("\n")
    assert first == "8 problems"
    assert [line.split(": ")[0] for line in lines] == [
        "  source.slot",
        "  worker.batch_rows",
        "  embedders.x.type",
        "  indexes.a.hnsw.ef_construction",
        "  indexes.a.chunking.overlap",
        "  indexes.a.chunking.overlap_tokens",
        "  indexes.b.embedder",
        "  indexes.a.embedder",
    ]
    assert "config schema" in (error.hint or "")
    assert str(error).startswith("cdcsync.toml: 8 problems\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[source\n", r"is not TOML, line 1, column 8: a section's name is not closed"),
        ("a = 1\na = 2\n", r"is not TOML, line 2, column 6: this key stands there already"),
        ("a = {", r"is not TOML, line 1, column 6: "),
        ("text = {title}\n", r"is not TOML, line 1, column 14: this text is not in quotation marks"),
        ('columns = ["tenant",\nindexed = []\n', r"is not TOML, line 2, column 1: the list that begins in line 1"),
        (f"a = {'9' * 5000}", "contains a number with thousands of digits"),
        ("a = " + "[" * 5000, "is nested too deeply"),
        ("a" + ".a" * 5000 + " = 1", "is nested too deeply"),
    ],
)
def test_what_is_not_toml_is_said_with_its_place(text: str, message: str) -> None:
    assert re.match(message, refusal(text).message)


def test_a_file_is_read_with_its_environment(tmp_path: Path) -> None:
    path = tmp_path / "cdcsync.toml"
    path.write_text(SECTIONS.replace('"articles"', '"${TABLE}"'))

    assert load(path, {"TABLE": "news"}).indexes["articles"].table == "news"


def test_a_byte_order_mark_and_windows_line_ends_are_taken(tmp_path: Path) -> None:
    path = tmp_path / "cdcsync.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SECTIONS.replace("\n", "\r\n").encode())

    assert load(path, {}) == read(SECTIONS)


def test_a_problem_in_a_file_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cdcsync.toml"
    path.write_text("")

    with pytest.raises(ConfigError, match="2 problems") as refused:
        load(path, {})

    assert refused.value.where == str(path)


def test_a_file_that_cannot_be_read_is_said_with_the_fix(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"a = 1\n# \xff")
    cases = {
        tmp_path / "absent": "there is no such file",
        tmp_path: "is a directory",
        tmp_path / "file" / "below": "cannot be read: Not a directory",
        tmp_path / "file": "is not UTF-8 (byte 8, line 2)",
    }

    for path, message in cases.items():
        with pytest.raises(ConfigError) as refused:
            load(path, {})

        assert refused.value.message == message
        assert refused.value.where == str(path)
        assert refused.value.hint


SECRET_KEYS = {
    "source": ("dsn",),
    "target": ("dsn",),
    "serve": ("dsn", "jwks"),
    "embedders.hosted": (
        *("api_key", "headers.X-Key", 'headers."X Key"', "query.code", "document_body.key", "base_url"),
        *("api_kay", "token", "password"),  # which there are not
    ),
    "rerankers.fine": ("api_key", "headers.X-Key", "query.code", "base_url", "key"),
}
WRONG = {
    "with a space": '"xyzzy plugh"',
    "over two lines": '"xyzzy\\nplugh"',
    "in a list": '["xyzzy plugh"]',
    "in a list in a list": '[["xyzzy plugh"]]',
    "in a table": '{ a = "xyzzy plugh" }',
    "not closed": '"xyzzy plugh',
    "without quotation marks": "xyzzy plugh",
    "beside a variable that is not set": '"xyzzy${NOT_SET}plugh"',
    "beside a name that is none": '"xyzzy${plugh xyzzy}"',
    "in an address": '"http://xyzzy:plugh@127.0.0.1:1/?code=xyzzy#plugh"',
    "beside a number": '"xyzzy"\ndimensions = "plugh"',
}


@pytest.mark.parametrize("value", WRONG.values(), ids=WRONG)
def test_no_error_repeats_a_secret(value: str) -> None:
    refused = 0
    for section, keys in SECRET_KEYS.items():
        type_ = {"embedders.hosted": 'type = "openai"\nmodel = "m"', "rerankers.fine": 'type = "tei"'}.get(section, "")
        for key in keys:
            try:
                read(f"{SECTIONS}\n[{section}]\n{type_}\n{key} = {value}\n")
            except ConfigError as error:
                refused += 1
                told = f"{error} {error.where} {error.hint}"
                assert "xyzzy" not in told, (section, key, told)
                assert "plugh" not in told, (section, key, told)
    assert refused > 2
