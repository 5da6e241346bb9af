"""Judged collections: both layouts, and what a directory that holds none is told."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cdcsync.errors import UsageError
from cdcsync.flows.evaluate.collection import read_collection

BEIR = {
    "queries.jsonl": """{"_id": "q1", "text": "one", "metadata": {}}
{"_id": "q2", "text": "two"}
{"_id": "q3", "text": "x"}
""",
    "qrels/test.tsv": "query-id\tcorpus-id\tscore\nq1\ta b\t1\nq1\tc\t0\nq2\td\t2\nq3\tc\t0\n",
}
TREC = {"queries.tsv": "q1\tone\nq2\ttwo\r\nq3\tx\n", "qrels.txt": "q1 0 ab 1\nq1 0 c 0\nq2 Q0 d 2\nq3 0 c -1\n"}


def write(directory: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(text)
    return directory


def test_beir_and_trec_layouts_are_read_without_queries_that_nothing_answers(tmp_path: Path) -> None:
    (tmp_path / "beir").mkdir()
    beir = read_collection(write(tmp_path / "beir", BEIR))
    assert (beir.name, beir.queries) == ("beir", {"q1": "one", "q2": "two"})
    assert beir.grades == {"q1": {"a b": 1, "c": 0}, "q2": {"d": 2}}
    (tmp_path / "trec").mkdir()
    trec = read_collection(write(tmp_path / "trec", TREC))
    assert (trec.queries, trec.grades) == (beir.queries, {"q1": {"ab": 1, "c": 0}, "q2": {"d": 2}})


def test_a_line_may_stand_twice_and_an_id_be_a_number(tmp_path: Path) -> None:
    files = {"queries.jsonl": '{"_id": 7, "text": "one"}\n' * 2, "qrels/test.tsv": "7\ta\t1\n7\ta\t1\n"}
    found = read_collection(write(tmp_path, files))
    assert (found.queries, found.grades) == ({"7": "one"}, {"7": {"a": 1}})


def test_a_grade_may_be_as_far_from_0_as_the_best_one(tmp_path: Path) -> None:
    qrels = "q1\ta\t1000000\nq1\tb\t-1000000\n"
    found = read_collection(write(tmp_path, {**BEIR, "qrels/test.tsv": qrels}))
    assert found.grades == {"q1": {"a": 1_000_000, "b": -1_000_000}}


def test_a_directory_whose_name_is_no_text_names_a_collection_that_can_be_stored(tmp_path: Path) -> None:
    directory = tmp_path / "qu\udcffestions"
    directory.mkdir()
    assert read_collection(write(directory, BEIR)).name == "qu?estions"
    graded = tmp_path / "gr\udcffaded"
    graded.mkdir()
    assert read_collection(write(graded, {"judgments.jsonl": LINE % 1})).name == "gr?aded"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"queries.jsonl": None}, "there is no queries.jsonl or queries.tsv or topics.tsv"),
        ({"qrels/test.tsv": None}, "there is no qrels/test.tsv"),
        ({"qrels/test.tsv": None, "qrels/a.tsv": "x", "qrels/b.tsv": "x"}, "several files: qrels/a.tsv, qrels/b.tsv"),
        ({"queries.jsonl": '{"_id": "q1"}\n'}, "line 1: .*missing required field `text`"),
        ({"queries.jsonl": "\n{nonsense\n"}, "line 2: "),
        ({"queries.jsonl": '{"_id": "q1", "text": "t", "metadata": ' + "[" * 100_000}, "line 1: .*recursion"),
        ({"queries.jsonl": '{"_id": "other", "text": "t"}\n'}, "no query has an answer"),
        ({"qrels/test.tsv": "q1\ta\t1\nq2\tb\n"}, "line 2: expected query, document and grade"),
        ({"qrels/test.tsv": None, "qrels.txt": "q1 0 a\n"}, "line 1: expected query, 0, document and grade"),
        *(
            ({"qrels/test.tsv": f"q1\ta\t1\nq2\tb\t{grade}\n"}, "test.tsv, line 2: a grade is a whole number")
            for grade in ("--5", "-", "", "²", "٣", "1.5", "1000001", "-1000001", "9" * 20, "9" * 5000)
        ),
        *(
            ({"qrels/test.tsv": f"q1\ta\t{grade}\n"}, "test.tsv, line 1: a grade is a whole number")
            for grade in ("--5", "²", "9" * 20)
        ),
        *(
            ({"qrels/test.tsv": None, "qrels.txt": f"q1 0 a {grade}\n"}, "qrels.txt, line 1: a grade is a whole number")
            for grade in ("--5", "²", "9" * 20, "high")
        ),
        ({"queries.jsonl": None, "queries.tsv": "no tab\n"}, "line 1: expected an id, a tab and a text"),
        ({"queries.jsonl": '{"_id": "q1", "text": "a\\u0000"}\n'}, "line 1: the text of query q1.* holds NUL"),
        ({"queries.jsonl": '{"_id": "q1\\u0000", "text": "a"}\n'}, r"line 1: the text of query q1\? holds NUL"),
        (
            {"queries.jsonl": '{"_id": "q1", "text": "one"}\n{"_id": "q1", "text": "two"}\n'},
            "line 2: the text of query q1 is another one",
        ),
        ({"qrels/test.tsv": "q1\ta\t1\nq1\ta\t0\n"}, "line 2: the grade of a for query q1 is another one"),
    ],
)
def test_a_faulty_collection_is_refused_with_file_and_line(
    tmp_path: Path, change: dict[str, str | None], problem: str
) -> None:
    files = {name: text for name, text in {**BEIR, **change}.items() if text is not None}
    with pytest.raises(UsageError, match=problem) as refused:
        read_collection(write(tmp_path, files))
    assert refused.value.hint


def test_a_directory_that_is_not_there_is_a_wrong_argument(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no such directory") as refused:
        read_collection(tmp_path / "missing")
    for file in ("queries.jsonl", "queries.tsv", "judgments.jsonl"):
        assert file in str(refused.value.hint)


LINE = '{"query": "q1", "text": "one", "document": "a", "content": "A", "grade": %s}\n'


def test_graded_lines_of_judgments_are_a_collection(tmp_path: Path) -> None:
    others = [
        LINE.replace('"a"', '"b"') % 0,
        LINE.replace('"a"', '"c"') % "null",
        LINE.replace("q1", "q2") % 0,
    ]
    found = read_collection(write(tmp_path, {"judgments.jsonl": "".join([LINE % 2, *others])}))
    assert (found.name, found.queries, found.grades) == (tmp_path.name, {"q1": "one"}, {"q1": {"a": 2, "b": 0}})


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (LINE % 0, "no document answers a question"),
        (LINE % "null", "no document answers a question"),
        (LINE % 1 + LINE % '"yes"', "line 2: .*grade"),
        (LINE % 1 + LINE % "1000001", "line 2: .*grade"),
        (LINE % 1 + LINE % ("9" * 20), "line 2: .*grade"),
        (LINE % 1 + LINE % 2, "the grade of a for query q1 is another one"),
        (LINE % 1 + LINE.replace("one", "two").replace('"a"', '"b"') % 1, "the text of query q1 is another one"),
        ("nonsense", "line 1"),
    ],
)
def test_judgments_that_are_no_set_are_refused(tmp_path: Path, text: str, problem: str) -> None:
    write(tmp_path, {"judgments.jsonl": text})
    with pytest.raises(UsageError) as refused:
        read_collection(tmp_path)
    assert re.search(problem, str(refused.value), re.DOTALL)
