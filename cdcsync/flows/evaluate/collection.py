"""Judged collections: questions, and which documents answer them, from a directory.

Three layouts are read. BEIR's:

    queries.jsonl     {"_id": "1", "text": "…"} a line
    qrels/test.tsv    query-id, corpus-id and score, tab-separated, under a heading (qrels/*.tsv if there is only one)

and that of TREC's tools:

    queries.tsv       a query's id, a tab, its text       (or topics.tsv)
    qrels.txt         query, 0, document, grade           (or any one file *.qrels)

And our own, which `evaluate --from-audit` writes and a person grades:

    judgments.jsonl   {"query": "9f2c…", "text": "…", "document": "12", "content": "…", "grade": 1} a line

A document's id is its key in the index; the values of a key of several columns are joined by commas. Documents
themselves are not read: the index has them.

Source: the file formats of BEIR (Thakur et al., 2021) and trec_eval.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec

from cdcsync.errors import UsageError
from cdcsync.malformed import MALFORMED
from cdcsync.postgres.texts import is_text, storable

MOST = 1_000_000
"""The best grade: what measures nDCG takes memory for each grade up to the best one."""

Value = TypeVar("Value", str, int)

_GRADE = re.compile(r"-?[0-9]{1,7}")

JUDGMENTS = "judgments.jsonl"

HINT = (
    "give a directory with queries.jsonl and qrels/test.tsv (BEIR), with queries.tsv and qrels.txt (TREC), or with the"
    f" {JUDGMENTS} that --from-audit writes"
)


class Judgment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One document's grade for a question.

    :ivar content: the passage that was found, for the person who grades it.
    :ivar grade: None if nobody has judged it; 0 if it does not answer the question.
    """

    query: str
    text: str
    document: str
    content: str = ""
    grade: Annotated[int, msgspec.Meta(ge=-MOST, le=MOST)] | None = None


class Collection(msgspec.Struct, frozen=True):
    """Questions with judged answers.

    :ivar name: the directory's name, by which runs over the same collection are recognised.
    :ivar queries: texts by id; only those that at least one document answers.
    :ivar grades: for each query the judged documents' grades; 0 is "does not answer it".
    """

    name: str
    queries: Mapping[str, str]
    grades: Mapping[str, Mapping[str, int]]


def read_collection(directory: Path) -> Collection:
    """Read a collection.

    :raises UsageError: the directory holds none, or a file is not in its format.
    """
    if not directory.is_dir():
        raise UsageError("there is no such directory", where=f"--judged {directory}", hint=HINT)
    if (directory / JUDGMENTS).exists():
        return _judged(directory / JUDGMENTS)
    queries = _only(directory, "queries.jsonl", "queries.tsv", "topics.tsv")
    judgements = _only(directory, "qrels/test.tsv", "qrels/*.tsv", "qrels.txt", "*.qrels")
    grades: dict[str, dict[str, int]] = {}
    for number, query, document, grade in _judgements(judgements):
        _put(
            grades.setdefault(query, {}),
            document,
            grade,
            f"the grade of {document} for query {query}",
            judgements,
            number,
        )
    answered = {query for query, judged in grades.items() if any(grade > 0 for grade in judged.values())}
    texts: dict[str, str] = {}
    for number, query, text in _queries(queries):
        _put(texts, query, text, f"the text of query {query}", queries, number)
    texts = {query: text for query, text in texts.items() if query in answered}
    if not texts:
        raise UsageError(
            "no query has an answer in the judgements", where=str(queries), hint="check that the ids agree"
        )
    return Collection(_name(directory), texts, {query: grades[query] for query in texts})


def _name(directory: Path) -> str:
    return storable(directory.resolve().name)


def _judged(path: Path) -> Collection:
    grades: dict[str, dict[str, int]] = {}
    texts: dict[str, str] = {}
    for one in read_judgments(path):
        if one.grade is not None:
            judged = grades.setdefault(one.query, {})
            _put(judged, one.document, one.grade, f"the grade of {one.document} for query {one.query}", path)
            _put(texts, one.query, one.text, f"the text of query {one.query}", path)
    answered = {query: judged for query, judged in grades.items() if any(grade > 0 for grade in judged.values())}
    if not answered:
        raise UsageError(
            "no document answers a question", where=str(path), hint="set the grade of those that do to 1 or 2"
        )
    return Collection(_name(path.parent), {query: texts[query] for query in answered}, answered)


def _put(into: dict[str, Value], name: str, value: Value, what: str, path: Path, number: int | None = None) -> None:
    """Add what a line says, which no other line may contradict, and which is stored with the run.

    :param what: names it to people.
    """
    where = str(path) if number is None else f"{path}, line {number}"
    if not is_text(name) or not is_text(str(value)):
        raise UsageError(f"{storable(what)} holds NUL, which no text can hold", where=where, hint="leave it out")
    if into.setdefault(name, value) != value:
        raise UsageError(f"{what} is another one than in a line before", where=where, hint="keep one of both lines")


def read_judgments(path: Path) -> list[Judgment]:
    """Read the lines of a file of judgments.

    :raises UsageError: it cannot be read, or a line is not in its format.
    """
    judgments: list[Judgment] = []
    for number, line in _lines(path):
        try:
            judgments.append(msgspec.json.decode(line, type=Judgment))
        except MALFORMED as error:
            raise UsageError(
                str(error), where=f"{path}, line {number}", hint="grade is null, 0, 1 or 2; leave the rest as it was"
            ) from None
    return judgments


def _only(directory: Path, *patterns: str) -> Path:
    """Return the one file that the first pattern with a match names."""
    for pattern in patterns:
        found = sorted(directory.glob(pattern))
        if len(found) > 1:
            names = ", ".join(str(path.relative_to(directory)) for path in found)
            raise UsageError(
                f"there are several files: {names}", where=f"--judged {directory}", hint="keep one of them"
            )
        if found:
            return found[0]
    raise UsageError(f"there is no {' or '.join(patterns)}", where=f"--judged {directory}", hint=HINT)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot be read: {error}", where=str(path), hint="save it as UTF-8") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.rstrip("\r")


def _queries(path: Path) -> Iterator[tuple[int, str, str]]:
    for number, line in _lines(path):
        if path.suffix == ".jsonl":
            try:
                query = msgspec.json.decode(line, type=_Query)
            except MALFORMED as error:
                raise _malformed(path, number, str(error)) from None
            yield number, str(query.id), query.text
        else:
            id_, separator, text = line.partition("\t")
            if not separator:
                raise _malformed(path, number, "expected an id, a tab and a text")
            yield number, id_.strip(), text.strip()


class _Query(msgspec.Struct, frozen=True):
    id: str | int = msgspec.field(name="_id")
    text: str


def _judgements(path: Path) -> Iterator[tuple[int, str, str, int]]:
    beir = path.suffix == ".tsv"
    for number, line in _lines(path):
        fields = line.split("\t") if beir else line.split()
        if beir and number == 1 and any(one.isalpha() for one in fields[-1]):
            continue  # the heading
        if beir and len(fields) == 3:
            fields.insert(1, "0")
        if len(fields) != 4:
            expected = "query, document and grade" if beir else "query, 0, document and grade"
            raise _malformed(path, number, f"expected {expected}")
        yield number, fields[0].strip(), fields[2].strip(), _grade(fields[3].strip(), path, number)


def _grade(text: str, path: Path, number: int) -> int:
    if _GRADE.fullmatch(text) is None or abs(int(text)) > MOST:
        raise _malformed(path, number, f"a grade is a whole number, at most {MOST:,}")
    return int(text)


def _malformed(path: Path, number: int, problem: str) -> UsageError:
    return UsageError(problem, where=f"{path}, line {number}", hint=HINT)
