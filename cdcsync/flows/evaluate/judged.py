"""Judged: how well each mode of search answers questions whose answers are known.

    questions ─► words ─┐
                 vectors ─┼─► documents, best first ─► ir-measures ─► figures with intervals ─► stored, gated, drawn
                 hybrid ─┤
                 reranked ┘

The searches are those that applications make: the same function, each document once. A document's id is its
key. Figures are means over the questions, compared question by question (`intervals`).

Source: ir-measures, "Measures"; Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques" (2002).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from itertools import count
from time import perf_counter
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import numpy.typing as npt

from cdcsync.config import Config
from cdcsync.embedders import Embedder, embedder_of
from cdcsync.embedders.reranking import Reranker, make_reranker
from cdcsync.errors import SetupError, UsageError
from cdcsync.flows.evaluate.collection import Collection
from cdcsync.flows.evaluate.intervals import difference, figure
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.target.judged_runs import MODES, Figure, JudgedMode, ModeRun, Run, Weighed
from cdcsync.target.search import FUSION, Hit, Mode, search

if TYPE_CHECKING:
    import ir_measures

DEPTH = 100
"""Documents that each search returns: as deep as the deepest usual measure looks (R@100)."""

MEASURES = ("nDCG@10", "R@100", "RR@10")
"""The measures taken by default; the first decides."""

OF_JUDGEMENTS = ("NumQ", "NumRel")
"""Measures that do not look at what was found."""

INSTALL = "pip install 'cdcsync[evaluate]'"

Find = Callable[[str], Awaitable[Sequence[str]]]
"""Returns the ids of the documents that a search finds for a question, best first; the question is named by its id."""


def parse_measures(names: Sequence[str]) -> list[ir_measures.Measure]:
    """Return the measures of these names, each once.

    :raises SetupError: ir-measures is not installed.
    :raises UsageError: there is no such measure, it cannot be taken from ranks and grades, or it looks deeper than
        searches do.
    """
    try:
        import ir_measures
    except ImportError as error:
        raise SetupError("ir-measures is not installed", where="--judged", hint=INSTALL) from error
    found = {}
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
            if (cutoff := measure.params.get("cutoff", 1)) < 1:
                raise ValueError
            # A cutoff beyond the range of a C integer would end the process.
            if cutoff <= DEPTH:
                ir_measures.evaluator([measure], [ir_measures.Qrel("q", "d", 1)])
        except Exception:
            raise UsageError(
                f"{name} is not a measure that can be taken",
                where="--measure",
                hint="give one of ir-measures, such as nDCG@10, R@100, RR@10, P@5, AP or Success@1",
            ) from None
        if cutoff > DEPTH:
            raise UsageError(
                f"{name} looks at {cutoff} documents, and searches return {DEPTH}",
                where="--measure",
                hint=f"give {measure @ DEPTH}, or another of at most {DEPTH} documents",
            )
        found[str(measure)] = measure
    return list(found.values())


async def evaluate_index(
    connection: Connection,
    config: Config,
    spec: IndexSpec,
    collection: Collection,
    *,
    measures: Sequence[str] = MEASURES,
    weights: Sequence[float] = (),
    vectors: Mapping[str, Sequence[float]] | None = None,
) -> Run:
    """Answer all questions in each mode that an index has, by its own model, and measure.

    :param connection: a session on the target, in autocommit.
    :param spec: the index as it is stored, see `stored_spec`.
    :param weights: also fuse the answers by words and by vectors with these weights of the words.
    :param vectors: the questions' vectors by that model, if they are known; else it is loaded here.
    :raises UsageError: nothing that is found is judged, or a measure or weight cannot be taken.
    :raises SetupError: the index's vectors are of another model than the configuration's.
    :raises EmbedderUnavailable: the model is away.
    """
    name = spec.config.reranker
    reranker = None if name is None else make_reranker(name, config.rerankers[name])
    async with AsyncExitStack() as stack:
        known = {query: np.asarray(vector, np.float32) for query, vector in (vectors or {}).items()}
        if vectors is None:
            embedder = embedder_of(config.embedders, spec.model, spec.config.embedder)
            stack.push_async_callback(embedder.aclose)
            await embedder.open()
            known = await embed_questions(embedder, collection.queries)
        if reranker is not None:
            stack.push_async_callback(reranker.aclose)
            await reranker.open()
        searches = Searches(connection, config.target.schema, spec, collection, known, reranker)
        with speaking_of("target", where=f"index {spec.name}"):
            return await evaluate_judged(
                spec.name,
                spec.generation,
                collection,
                searches.modes(),
                measures=measures,
                weights=weights,
                settings=_settings(spec),
            )


def _settings(spec: IndexSpec) -> dict[str, Any]:
    return {
        "model": spec.model,
        "dimensions": spec.dimensions,
        "vector_type": spec.config.vector_type,
        "hnsw": msgspec.to_builtins(spec.config.hnsw),
        "search": spec.config.search,
        "text": spec.config.text or spec.config.documents,
        "chunk_text": spec.config.chunk_text,
        "reranker": spec.config.reranker,
        "chunking": msgspec.to_builtins(spec.config.chunking),
    }


async def evaluate_judged(
    index: str,
    generation: int,
    collection: Collection,
    finders: Mapping[JudgedMode, Find],
    *,
    measures: Sequence[str] = MEASURES,
    weights: Sequence[float] = (),
    settings: Mapping[str, Any] | None = None,
) -> Run:
    """Answer all questions in each mode, and measure.

    :param finders: the modes that the index has.
    :param weights: also fuse the answers by words and by vectors with these weights of the words.
    :raises UsageError: none of a collection's answers is ever found, or a measure cannot be taken.
    """
    parsed = parse_measures(measures)
    scores: dict[JudgedMode, dict[str, dict[str, float]]] = {}
    taken: dict[JudgedMode, list[float]] = {}
    answers: dict[JudgedMode, dict[str, Sequence[str]]] = {}
    for mode in [mode for mode in MODES if mode in finders]:
        answers[mode], taken[mode] = await _answer(collection, finders[mode])
        scores[mode] = _measure(parsed, collection, answers[mode])
    known = {id_ for found in answers.values() for ids in found.values() for id_ in ids}
    judged = {id_ for grades in collection.grades.values() for id_ in grades}
    if known.isdisjoint(judged):
        raise UsageError(
            f"nothing that searches found is judged in {collection.name}",
            where=f"index {index}",
            hint=f"judgements name documents by the key of the index; it has keys such as {_some(known)}, and the"
            f" judgements name {_some(judged)}",
        )
    if weights and not answers.keys() >= {"text", "vector"}:
        raise UsageError(
            "there are not two searches to weigh",
            where="--weights",
            hint=f"index {index} has only {', '.join(answers)}",
        )
    fused = [Weighed(one, _figures(_measure(parsed, collection, _fused(answers, one)))) for one in weights]
    return Run(
        index,
        generation,
        collection.name,
        len(collection.queries),
        [str(measure) for measure in parsed],
        dict(settings or {}),
        {mode: _mode_run(mode, scores, taken[mode]) for mode in scores},
        fused,
        datetime.now(UTC),
    )


class Searches:
    """The searches of an index for the questions of a collection, as its own statement answers them.

    :param vectors: each question's vector by its id.
    :param reranker: open, if the index has one.
    """

    def __init__(
        self,
        connection: Connection,
        schema: str,
        spec: IndexSpec,
        collection: Collection,
        vectors: Mapping[str, npt.NDArray[np.float32]],
        reranker: Reranker | None,
    ) -> None:
        self._connection = connection
        self._schema = schema
        self._spec = spec
        self._collection = collection
        self._vectors = vectors
        self._reranker = reranker

    def modes(self) -> dict[JudgedMode, Find]:
        """Return the modes that the index has."""
        modes: dict[JudgedMode, Find] = {}
        if self._spec.config.search is not None:
            modes["text"] = self._find("text")
        modes["vector"] = self._find("vector")
        if len(modes) == 2:
            modes["hybrid"] = self._find("hybrid")
        if self._reranker is not None:
            modes["reranked"] = self._reranked
        return modes

    def _find(self, mode: Mode) -> Find:
        async def found(query: str) -> list[str]:
            return [document_id(hit.key) for hit in await self._hits(query, mode)]

        return found

    async def _reranked(self, query: str) -> list[str]:
        assert self._reranker is not None
        hits = await self._hits(query, "hybrid")
        best, others = hits[: self._reranker.candidates], hits[self._reranker.candidates :]
        if best:
            scores = await self._reranker.score(self._collection.queries[query], [hit.content for hit in best])
            best = [best[at] for at in np.argsort(-scores, kind="stable")]
        return [document_id(hit.key) for hit in [*best, *others]]

    async def _hits(self, query: str, mode: Mode) -> list[Hit]:
        return await search(
            self._connection,
            self._schema,
            self._spec,
            text=self._collection.queries[query],
            vector=self._vectors[query],
            k=DEPTH,
            mode=mode,
            for_json=True,
        )


async def embed_questions(embedder: Embedder, questions: Mapping[str, str]) -> dict[str, npt.NDArray[np.float32]]:
    """Return each question's vector by its id; the embedder is open."""
    vectors: dict[str, npt.NDArray[np.float32]] = {}
    waiting = list(questions.items())
    while waiting:
        count = embedder.fitting([text for _, text in waiting])
        batch, waiting = waiting[:count], waiting[count:]
        made = await embedder.embed([text for _, text in batch], kind="query")
        vectors.update(zip([query for query, _ in batch], made, strict=True))
    return vectors


def document_id(key: Mapping[str, object]) -> str:
    """Return how a collection names a document: its key as answers in JSON have it, several columns joined by commas.

    :param key: of a hit that was searched `for_json`.
    """
    values = msgspec.to_builtins(dict(key), enc_hook=str).values()
    return ",".join(value if isinstance(value, str) else msgspec.json.encode(value).decode() for value in values)


def _some(ids: set[str]) -> str:
    return ", ".join(sorted(ids)[:3]) or "none"


async def _answer(collection: Collection, find: Find) -> tuple[dict[str, Sequence[str]], list[float]]:
    found, milliseconds = {}, []
    for query in collection.queries:
        started = perf_counter()
        found[query] = await find(query)
        milliseconds.append((perf_counter() - started) * 1000)
    return found, milliseconds


def _fused(answers: Mapping[JudgedMode, Mapping[str, Sequence[str]]], weight: float) -> dict[str, Sequence[str]]:
    """Return what hybrid search finds with this weight of the words, by the ranks of both of its legs."""
    fused: dict[str, Sequence[str]] = {}
    for query in answers["text"]:
        scores: dict[str, float] = {}
        for leg, share in ((answers["vector"], 1 - weight), (answers["text"], weight)):
            for place, id_ in enumerate(leg[query] if share else (), 1):
                scores[id_] = scores.get(id_, 0.0) + share / (FUSION + place)
        fused[query] = sorted(scores, key=lambda id_: -scores[id_])[:DEPTH]
    return fused


def _measure(
    measures: Sequence[ir_measures.Measure], collection: Collection, found: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, float]]:
    """Return by measure each question's score.

    Questions and documents are numbered for it: programs that ir-measures calls take no other ids.

    :raises UsageError: a measure cannot be taken from these answers and grades.
    """
    queries = {str(number): query for number, query in enumerate(collection.queries)}
    numbers: defaultdict[str, str] = defaultdict(map(str, count()).__next__)
    judged = {
        number: {numbers[id_]: grade for id_, grade in collection.grades[query].items()}
        for number, query in queries.items()
    }
    ranked = {
        number: {numbers[id_]: float(-place) for place, id_ in enumerate(found[query])}
        for number, query in queries.items()
    }
    scores: dict[str, dict[str, float]] = {}
    for measure in measures:
        name = str(measure)
        try:
            taken = _take(measure, judged, ranked)
        except Exception as error:
            raise UsageError(
                f"{name} cannot be taken from the answers and grades of {collection.name}: ir-measures fails with"
                f" {type(error).__name__}",
                where="--measure",
                hint="leave it out. ERR, and nDCG with dcg='exp-log2', take grades from 0 to 4 only",
            ) from None
        scores[name] = {query: round(taken.get(number, 0.0), 6) for number, query in queries.items()}
    return scores


def _take(
    measure: ir_measures.Measure, judged: dict[str, dict[str, int]], ranked: dict[str, dict[str, float]]
) -> dict[str, float]:
    """Return a measure of each question for which something was found; the others have its default.

    Providers of ir-measures are not asked about a question for which nothing was found: some divide by the number of
    documents, and pytrec-eval now and then says 0 for all questions if every ranking is empty. A measure of the
    judgements alone is taken as if what they name had been found.
    """
    if measure.NAME in OF_JUDGEMENTS:
        ranked = {number: dict.fromkeys(grades, 0.0) for number, grades in judged.items()}
    ranked = {number: found for number, found in ranked.items() if found}
    return {metric.query_id: metric.value for metric in measure.iter_calc(judged, ranked)} if ranked else {}


def _figures(scores: Mapping[str, Mapping[str, float]]) -> dict[str, Figure]:
    return {measure: figure(list(of.values())) for measure, of in scores.items()}


def _mode_run(
    mode: JudgedMode, scores: Mapping[JudgedMode, dict[str, dict[str, float]]], milliseconds: Sequence[float]
) -> ModeRun:
    own, vector = scores[mode], scores.get("vector")
    ordered = sorted(milliseconds)
    return ModeRun(
        _figures(own),
        None
        if vector is None or mode == "vector"
        else {name: difference(list(of.values()), list(vector[name].values())) for name, of in own.items()},
        round(sum(ordered) / len(ordered), 3),
        round(ordered[math.ceil(0.95 * len(ordered)) - 1], 3),
        own,
    )
