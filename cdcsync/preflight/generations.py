"""The vectors that an index has, and those that the configuration asks for: two things, until a migration is done.

The configuration says what an index should be; the target says what it is. While they differ, the index keeps
the vectors that it has, as long as the configuration still has the embedder that makes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import msgspec

from cdcsync.config.sections import Chunking
from cdcsync.documents.chunks import make_chunker
from cdcsync.embedders.protocol import Distance, Embedder
from cdcsync.errors import ConfigError
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.indexes import Plan, WantedVectors, distance_of, fingerprint
from cdcsync.target.entries import Entry
from cdcsync.target.generations import Generation


def live_generation(stored: Entry, generations: Sequence[Generation]) -> Generation:
    """Return the generation that searches use."""
    for one in generations:
        if one.generation == stored.generation:
            return one
    return Generation(
        *(stored.name, stored.generation, None, stored.model, stored.dimensions),
        *(stored.vector_type, stored.distance, "ready"),
    )


def embedder_of(one: Generation, embedders: Mapping[str, Embedder], *first: str) -> str | None:
    """Return the name of an embedder that makes the vectors of a generation; None if the configuration has none.

    :param first: names that are looked at first.
    """
    for name in dict.fromkeys([one.embedder or "", *first, *embedders]):
        embedder = embedders.get(name)
        if embedder is not None and (embedder.identity, embedder.dimensions) == (one.model, one.dimensions):
            return name
    return None


def follow_generations(
    plan: Plan, stored: Entry, generations: Sequence[Generation], embedders: Mapping[str, Embedder]
) -> None:
    """Base a plan on the vectors that the index has, and keep what the configuration asks for in `plan.wanted`.

    The plan stays as it is where the configuration has no embedder for the vectors that searches use.
    """
    live = live_generation(stored, generations)
    plan.generations = [
        msgspec.structs.replace(one, embedder=embedder_of(one, embedders) or one.embedder)
        for one in generations
        if one is not live
    ]
    if plan.embedder is None:
        return
    wanted = WantedVectors(plan.index, plan.embedder, distance_of(plan.index, plan.embedder))
    name = embedder_of(live, embedders, plan.index.embedder)
    plan.wanted = None if wanted.is_met_by(live) else wanted
    if name is None:
        return
    plan.embedder = embedders[name]
    plan.index = msgspec.structs.replace(live, embedder=name).settings(plan.index)
    if distance_of(plan.index, plan.embedder) != live.distance:
        plan.index = msgspec.structs.replace(plan.index, distance=cast(Distance, live.distance))
    _recognise_chunks(plan, stored, wanted, embedders)


def _recognise_chunks(plan: Plan, stored: Entry, wanted: WantedVectors, embedders: Mapping[str, Embedder]) -> None:
    """Find the embedder whose tokens the stored chunks are measured in; else they are cut anew, by the live one's."""
    if plan.documents is None:
        return
    found: dict[str, str] = {}
    names = [plan.index.embedder, wanted.index.embedder]
    for name, own in cuts(plan.documents.fingerprint, plan.index.chunking, embedders, *names):
        found[name] = own
        if own == stored.fingerprint:
            plan.cutter, plan.fingerprint = name, own
            return
    plan.cutter, plan.fingerprint = None, found.get(plan.index.embedder, plan.fingerprint)


def cuts(
    documents: str, chunking: Chunking, embedders: Mapping[str, Embedder], *first: str
) -> Iterator[tuple[str, str]]:
    """Yield the names of embedders, with the fingerprint of an index whose chunks are measured in that one's tokens.

    :param documents: the fingerprint of the index's documents.
    :param first: names that come first.
    """
    for name in dict.fromkeys([*first, *embedders]):
        embedder = embedders[name]
        try:
            chunker = make_chunker(chunking, embedder.tokenizer_json, embedder.max_input_tokens)
        except ConfigError:
            continue
        yield name, fingerprint(documents, chunker.fingerprint)


def vector_findings(plan: Plan, live: Generation) -> Iterator[Finding]:
    """Say that an index has other vectors than the configuration asks for, and how it gets them.

    :param live: the generation that searches use.
    """
    wanted, where = plan.wanted, f"indexes.{plan.name}"
    if wanted is None:
        return
    hnsw = wanted.index.hnsw
    described = f"{wanted.embedder.dimensions} dimensions, {wanted.index.vector_type}, {wanted.distance}"
    asked = f"{wanted.index.embedder} ({described})"
    has = f"{live.model} ({live.dimensions} dimensions, {live.vector_type}, {live.distance})"
    if wanted.made_by == live.made_by:
        asked, has = (
            f"{asked} with hnsw.m {hnsw.m}, hnsw.ef_construction {hnsw.ef_construction}, hnsw.quantise {hnsw.quantise}",
            f"{has} with {live.m}, {live.ef_construction}, {live.quantise}",
        )
    met = next((one for one in plan.generations if wanted.is_met_by(one)), None)
    if met is not None:
        if met.state == "filling":
            yield Finding.ok(where, f"generation {met.generation}, by {asked}, is being filled beside the live one")
        else:
            yield Finding.warning(
                where,
                f"the configuration asks for vectors by {asked}, which generation {met.generation} has, and"
                f" generation {live.generation} is live",
                f"to switch: cdcsync migrate {plan.name} activate",
            )
        return
    yield Finding.warning(
        where,
        f"the configuration asks for vectors by {asked}; the index keeps those that it has, by {has}",
        f"to exchange the vectors without an interruption of searches: cdcsync migrate {plan.name} start",
    )
