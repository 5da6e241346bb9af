"""Checking: every wrong key or value is said in plain words, and right ones come out as msgspec has them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import msgspec
import msgspec.inspect as mi
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdcsync.config import Chunking, Config, SentenceTransformersEmbedder
from cdcsync.config.checking import read_fields
from cdcsync.config.problems import Problems
from cdcsync.config.shape import Section, descriptions, summary
from cdcsync.errors import ConfigError
from tests.unit.config.files import SECTIONS, articles, problems, read, refusal


def test_an_empty_text_is_none_where_none_is_allowed() -> None:
    assert articles('search = ""').search is None
    embedder = read(SECTIONS + '[embedders.b]\ntype = "sentence-transformers"\nmodel = "m"\nrevision = ""').embedders[
        "b"
    ]
    assert isinstance(embedder, SentenceTransformersEmbedder)
    assert embedder.revision is None


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[worker]\nbatch_rows = 'x'", "worker.batch_rows: expected a whole number, got text"),
        ("[worker]\nbatch_rows = 2.0", "worker.batch_rows: expected a whole number, got 2.0"),
        ("[worker]\nbatch_rows = true", "worker.batch_rows: expected a whole number, got true"),
        ("[worker]\nbatch_rows = []", "worker.batch_rows: expected a whole number, got a list"),
        ("[worker]\nbatch_rows = {}", "worker.batch_rows: expected a whole number, got a section"),
        ("[worker]\nbatch_rows = 2026-01-01", "worker.batch_rows: expected a whole number, got a date or time"),
        ("[worker]\nstop_timeout_s = false", "worker.stop_timeout_s: expected a number, got false"),
        ("[source]\nstreaming = 1", "source.streaming: expected true or false, got 1"),
        ("[source]\nslot = 1", "source.slot: expected text, got 1"),
        ('[target]\nschema = "a%b"', 'target.schema: must have no "%", got "a%b"'),
        (
            '[target]\nschema = "pg_catalog"',
            'target.schema: must be a schema that is not the system\'s, such as cdcsync, got "pg_catalog"',
        ),
        ("source = 1", "source: expected a section, got 1"),
        ("[[source]]", "source: expected a section, got a list"),
        (
            "[worker]\nbatch_rows = 0",
            "worker.batch_rows: expected a whole number of at least 1 and at most 100000, got 0",
        ),
        (
            "[worker]\nbatch_rows = 100001",
            "worker.batch_rows: expected a whole number of at least 1 and at most 100000, got 100001",
        ),
        (
            "[worker]\nbatch_bytes = 65535",
            "worker.batch_bytes: expected a whole number of at least 65536 and at most 1073741824, got 65535",
        ),
        (
            f"[worker]\nbatch_bytes = 0x{'f' * 6000}",
            "worker.batch_bytes: expected a whole number of at least 65536 and at most 1073741824, "
            "got a very large number",
        ),
        (
            "[worker]\nstop_timeout_s = 0",
            "worker.stop_timeout_s: expected a number of at least 0.01 and at most 86400, got 0",
        ),
        (
            "[worker]\nstop_timeout_s = nan",
            "worker.stop_timeout_s: expected a number of at least 0.01 and at most 86400, got nan",
        ),
        (
            "[worker]\nready_max_lag_s = inf",
            "worker.ready_max_lag_s: expected a number of at least 0.01 and at most 86400, got inf",
        ),
        (
            "[source]\nheartbeat_every_s = 0.0001",
            "source.heartbeat_every_s: expected 0, or a number of at least 0.1 and at most 86400, got 0.0001",
        ),
        (
            "[worker]\nverify_every_s = 3_600_000",
            "worker.verify_every_s: expected 0, or a number of at least 0.1 and at most 2678400, got 3600000",
        ),
        (
            "[worker]\nevaluate_every_s = nan",
            "worker.evaluate_every_s: expected 0, or a number of at least 0.1 and at most 2678400, got nan",
        ),
        (
            "[serve]\ndeadline_s = 0.0001",
            "serve.deadline_s: expected a number of at least 0.01 and at most 600, got 0.0001",
        ),
        ("[source]\non_gap = 'go'", 'source.on_gap: expected "resync" or "stop", got "go"'),
        ("[source]\non_gap = ['stop']", 'source.on_gap: expected "resync" or "stop", got a list'),
        (
            "[worker]\nlog_level = 'loud'",
            'worker.log_level: expected "debug", "error", "info" or "warning", got "loud"',
        ),
        (
            "[source]\nslot = 'My-Slot'",
            "source.slot: expected 1 to 63 lower-case letters, digits or underscores, got 'My-Slot'",
        ),
        ("[source]\npublication = ''", "source.publication: expected a name, got nothing"),
    ],
)
def test_a_wrong_value_is_said_in_plain_words_with_its_key(text: str, line: str) -> None:
    assert problems(text + SECTIONS) == [line]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        ("columns = 'a'", "columns: expected a list, got text"),
        ("columns = ['a', 1]", "columns[1]: expected text, got 1"),
        ("columns = ['b', 'a', 'b', 'b']", "columns: 'b' is there more than once"),
        ("indexed = ['b', 'b']", "indexed: 'b' is there more than once"),
        (
            "chunking.max_tokens = 7",
            "chunking.max_tokens: expected a whole number of at least 8 and at most 1000000, got 7",
        ),
        ("chunking.overlap_tokens = 256", "chunking.overlap_tokens: must be less than max_tokens (256), got 256"),
        ("hnsw.m = 33", "hnsw.ef_construction: must be at least twice m (66), got 64"),
        ("hnsw.m = 1", "hnsw.m: expected a whole number of at least 2 and at most 100, got 1"),
        (
            "search = 'a b'",
            'search: expected a name such as articles, public.articles or "My Schema"."Tab.le", got \'a b\'',
        ),
        (
            "view = 'a.b.c'",
            'view: expected a name such as articles, public.articles or "My Schema"."Tab.le", got \'a.b.c\'',
        ),
        (f"view = '{'v' * 64}'", f"view: '{'v' * 64}' is 64 bytes long; PostgreSQL keeps 63 bytes of a name"),
    ],
)
def test_a_wrong_value_of_an_index_is_said_with_its_full_key(more: str, line: str) -> None:
    assert problems(SECTIONS + more) == [f"indexes.articles.{line}"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[sorce]", 'sorce: unknown key; did you mean "source"?'),
        ("zzz = 1", "zzz: unknown key; known here: source, target, worker, embedders, rerankers, indexes, serve"),
        ("[target]\nslot = 'x'", "target.slot: unknown key; known here: dsn, schema"),
        ('[target]\n"a.b\\"\\\\" = 1', 'target."a.b\\"\\\\": unknown key; known here: dsn, schema'),
        ("[target]\ntype = 'x'", "target.type: unknown key; known here: dsn, schema"),
    ],
)
def test_an_unknown_key_is_named_with_what_was_likely_meant(text: str, line: str) -> None:
    assert problems(text + SECTIONS) == [line]


def test_an_unknown_key_deep_in_the_file_is_named_with_its_full_path() -> None:
    assert problems(SECTIONS + "[indexes.articles.chunking]\nmax_token = 10") == [
        'indexes.articles.chunking.max_token: unknown key; did you mean "max_tokens"?'
    ]


@pytest.mark.parametrize(
    ("section", "line"),
    [
        (
            "[embedders.x]\ntype = 'hsh'",
            'embedders.x.type: unknown type "hsh"; known types: hash, sentence-transformers, onnx, openai, tei, python,'
            " ray",
        ),
        (
            "[embedders.x]\nmodel = 'm'",
            "embedders.x.type: is required; known types: hash, sentence-transformers, onnx, openai, tei, python, ray",
        ),
        ("[embedders.x]\ntype = 1", "embedders.x.type: expected text, got 1"),
        ("[embedders]\nx = 'hash'", "embedders.x: expected a section, got text"),
        ("[embedders.x]\ntype = 'hash'\ndim = 3", "embedders.x.dim: unknown key; known here: dimensions, latency_ms"),
        (
            "[embedders.x]\ntype = 'hash'\ndimensions = 16001",
            "embedders.x.dimensions: expected a whole number of at least 1 and at most 16000, got 16001",
        ),
        (
            "[embedders.x]\ntype = 'sentence-transformers'\nmodel = ' '",
            "embedders.x.model: expected some text, got none",
        ),
        (
            '[embedders."a.b"]\ntype = "hash"',
            "embedders.\"a.b\": expected at most 40 letters, digits, underscores or hyphens, got 'a.b'",
        ),
    ],
)
def test_a_wrong_embedder_is_said_with_its_key(section: str, line: str) -> None:
    assert problems(section + SECTIONS) == [line]


def test_an_empty_file_needs_an_embedder_and_an_index() -> None:
    first, second = problems("")

    assert first.startswith("embedders: at least one [embedders.NAME] section is needed (it is ")
    assert second.startswith("indexes: at least one [indexes.NAME] section is needed (it is ")


def test_empty_sections_need_an_embedder_and_an_index_too() -> None:
    assert problems("[embedders]\n[indexes]") == [
        "embedders: at least one [embedders.NAME] section is needed",
        "indexes: at least one [indexes.NAME] section is needed",
    ]


def test_a_required_key_says_what_belongs_there() -> None:
    error = refusal(SECTIONS.replace('table = "articles"', ""))

    what = "is required, unless tables names many; it is the source table, as in SQL"
    assert error.message == f"indexes.articles.table: {what}"

    error = refusal(SECTIONS.replace('embedder = "', 'embedder_ = "'))

    assert "indexes.articles.embedder: is required" in error.message


class _Everything(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One field of each type that a section may use.

    :param text: a text.
    :param whole: a whole number.
    :param number: a number.
    :param switch: yes or no.
    """

    text: str
    whole: int
    number: float
    switch: bool
    texts: tuple[str, ...] = ()
    choice: Literal["a", "b"] = "a"
    by_name: dict[str, Chunking] = msgspec.field(default_factory=dict)
    maybe: int | None = None


class _Unreadable(Section, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A section that no TOML file can fill."""

    content: bytes


# Two things are left out, because they are meant to differ: an empty text, which is None here where msgspec knows only
# null, and 2.0 for a whole number, which msgspec takes.
_WHOLE = st.integers(-(2**63), 2**63 - 1)
_NUMBERS = _WHOLE | st.floats(allow_nan=False, allow_infinity=False).filter(lambda number: not number.is_integer())
_TEXTS = st.text(min_size=1, max_size=3)
_RIGHT: dict[str, st.SearchStrategy[Any]] = {
    "text": _TEXTS,
    "whole": _WHOLE,
    "number": _NUMBERS,
    "switch": st.booleans(),
    "texts": st.lists(_TEXTS, max_size=3),
    "choice": st.sampled_from(["a", "b"]),
    "by_name": st.dictionaries(st.text(max_size=3), st.just({"max_tokens": 64}), min_size=1, max_size=2),
    "maybe": _WHOLE,
}
_ANY = st.one_of(*_RIGHT.values(), st.lists(_WHOLE), st.dictionaries(_TEXTS, _WHOLE, min_size=1))
_REQUIRED = ("text", "whole", "number", "switch")
_DATA = st.fixed_dictionaries(
    {key: _RIGHT[key] for key in _REQUIRED}, optional={key: _RIGHT[key] for key in _RIGHT if key not in _REQUIRED}
)


def _fields(section: type[Section], data: dict[str, Any]) -> tuple[dict[str, Any], Problems]:
    noted = Problems()
    kind = mi.type_info(section)
    assert isinstance(kind, mi.StructType)
    return read_fields(kind, data, "", noted), noted


@given(_DATA)
def test_right_values_are_read_as_msgspec_reads_them(data: dict[str, Any]) -> None:
    values, noted = _fields(_Everything, data)

    noted.check("here")
    assert _Everything(**values) == msgspec.convert(data, _Everything)
    assert type(values["number"]) is float


@given(_DATA, st.sampled_from(list(_RIGHT)), _ANY)
def test_any_value_is_taken_or_refused_as_msgspec_does(data: dict[str, Any], key: str, value: object) -> None:
    data[key] = value
    values, noted = _fields(_Everything, data)

    try:
        expected = msgspec.convert(data, _Everything)
    except msgspec.ValidationError:
        assert key not in values or key == "by_name"
        with pytest.raises(ConfigError, match=rf"^here: (\d+ problems\n  )?{key}"):
            noted.check("here")
    else:
        noted.check("here")
        assert _Everything(**values) == expected


def test_what_is_right_beside_a_problem_is_still_read() -> None:
    values, _ = _fields(_Everything, {"text": 1, "whole": 2, "by_name": {"a": {}, "b": 1}, "other": 1})

    assert values == {"whole": 2, "by_name": {"a": Chunking()}}


def test_a_section_cannot_have_a_type_that_no_file_can_hold() -> None:
    with pytest.raises(TypeError, match="content: a section has a type that no file can hold"):
        _fields(_Unreadable, {"content": "x"})


def _types(kind: mi.Type, within: tuple[type, ...] = ()) -> Iterator[mi.Type]:
    """Yield the type and all types in it; where a rule checks a text, not the text's own type."""
    yield kind
    match kind:
        case mi.Metadata(type=inner, extra=extra):
            if not (extra and "rule" in extra):
                yield from _types(inner, within)
        case mi.StructType(cls=cls, fields=fields) if cls not in within:  # a section may hold its like
            for field in fields:
                yield from _types(field.type, (*within, cls))
        case mi.UnionType(types=kinds):
            for each in kinds:
                yield from _types(each, within)
        case mi.DictType(key_type=key, value_type=value):
            yield from _types(key, within)
            yield from _types(value, within)
        case mi.VarTupleType(item_type=item):
            yield from _types(item, within)
        case _:
            pass


def test_the_file_has_no_constraint_that_reading_would_not_check() -> None:
    for kind in _types(mi.type_info(Config)):
        match kind:
            case mi.IntType() | mi.FloatType():
                assert (kind.ge, kind.gt) != (None, None)
                assert kind.le is not None
                assert kind.multiple_of is None
            case mi.StrType() | mi.VarTupleType():
                assert (kind.min_length, kind.max_length) == (None, None)
            case mi.DictType():
                assert kind.min_length in (None, 1)
                assert kind.max_length is None
            case _:
                pass
        assert getattr(kind, "pattern", None) is None


def test_every_key_of_every_section_is_described() -> None:
    sections = [kind.cls for kind in _types(mi.type_info(Config)) if isinstance(kind, mi.StructType)]

    assert len(sections) > 5
    for section in sections:
        assert list(descriptions(section)) == list(section.__struct_fields__)
        assert all(descriptions(section).values())
        assert summary(section).endswith(".")
