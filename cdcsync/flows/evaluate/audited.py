"""Questions of the tool server's record, made a judged collection: cdcsync lists what each finds, a person grades it.

    judgments.jsonl   {"query": "9f2c…", "text": "…", "document": "12", "content": "…", "grade": null} a line

Each question is asked in every mode that the index has, and what any of them finds is listed, as TREC's pools are made:
so a mode is not judged by what another one happened to find. A person sets `grade`: 0 does not answer it, 1 answers it,
2 answers it well. `read_collection` reads the graded lines. Running it again keeps grades and adds what is new.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from cdcsync.config import Config
from cdcsync.embedders import embedder_of
from cdcsync.errors import UsageError
from cdcsync.flows.evaluate.collection import JUDGMENTS, Judgment, read_judgments
from cdcsync.flows.evaluate.judged import document_id, embed_questions
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.process.files import replace_file
from cdcsync.target.calls import read_questions
from cdcsync.target.search import Mode, search

DEPTH = 10
"""Hits of each mode that are listed: the measures look at the first ten most of all."""

SHOWN = 400
"""Characters of a hit's text that are listed: enough to judge most of them without looking the document up."""


class Gathered(NamedTuple):
    """The state of the file: its path, questions, and lines with and without a grade."""

    path: Path
    questions: int
    graded: int
    ungraded: int


async def gather(connection: Connection, config: Config, spec: IndexSpec, directory: Path, *, most: int) -> Gathered:
    """Add the record's questions to a directory's judgments, with what they find.

    :param connection: a session on the target, in autocommit.
    :param most: how many questions to take, those first that were asked most often.
    :raises UsageError: the record holds no question's text, or the file cannot be written or is not one of ours.
    :raises EmbedderUnavailable: the model is away.
    """
    path = directory / JUDGMENTS
    known = read_judgments(path) if path.exists() else []
    with speaking_of("target", where=f"index {spec.name}"):
        asked = await read_questions(connection, config.target.schema, spec.name, most)
    if not asked and not known:
        raise UsageError(
            "the record of calls holds no question's text",
            where=f"{config.target.schema}.calls",
            hint="set serve.audit_queries = true, which keeps the text of queries from then on",
        )
    there = {(one.query, one.document) for one in known}
    lines = list(known)
    embedder = embedder_of(config.embedders, spec.model, spec.config.embedder)
    try:
        await embedder.open()
        vectors = await embed_questions(embedder, dict(asked))
    finally:
        await embedder.aclose()
    for query, text in asked:
        found: dict[str, str] = {}
        for mode in _modes(spec):
            hits = await search(
                connection,
                config.target.schema,
                spec,
                text=text,
                vector=vectors[query],
                k=DEPTH,
                mode=mode,
                for_json=True,
            )
            found |= {document_id(hit.key): hit.content for hit in hits}
        lines += [
            Judgment(query, text, document, content[:SHOWN])
            for document, content in found.items()
            if (query, document) not in there
        ]
    _write(path, lines)
    graded = sum(one.grade is not None for one in lines)
    return Gathered(path, len({one.query for one in lines}), graded, len(lines) - graded)


def _modes(spec: IndexSpec) -> list[Mode]:
    return ["vector"] if spec.config.search is None else ["hybrid", "vector", "text"]


def _write(path: Path, lines: Sequence[Judgment]) -> None:
    """Replace the file in one step."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, b"".join(msgspec.json.encode(one) + b"\n" for one in lines))
    except OSError as error:
        hint = "name a directory that you may write to"
        raise UsageError(f"cannot be written: {error.strerror}", where=str(path), hint=hint) from None
