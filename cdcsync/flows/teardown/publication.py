"""What becomes of a publication, or of an index's tables in it: dropped, or kept for a reason that is told."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import msgspec

from cdcsync.config import Config, QualifiedName
from cdcsync.config.names import quote
from cdcsync.errors import AnotherServer
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.source.catalog import other_readers
from cdcsync.source.families import single_names
from cdcsync.source.publications import (
    Publication,
    named_tables,
    published_names,
    read_publication,
    unpublish_statement,
)
from cdcsync.target.belongings import Belongings


class Step(msgspec.Struct, frozen=True):
    """The outcome of a teardown for one object. `note` says why it was kept, and what to do."""

    what: str
    outcome: Literal["dropped", "absent", "kept"]
    note: str | None = None


async def of_publication(
    source: Connection, config: Config, publication: Publication | None, belongings: Belongings, sharing: list[str]
) -> Step:
    """Return what is to become of the publication.

    :param sharing: the other pipelines of the schema that use it.
    """
    name = config.source.publication
    what = f"publication {name}"
    if publication is None:
        return Step(what, "absent")
    by_hand = f"if nothing needs it, as its owner: DROP PUBLICATION {quote(name)}"
    ours = {str(table) for index in config.indexes.values() for table in index.followed} | set(belongings.source_tables)
    if sharing:
        return Step(what, "kept", f"the pipeline {', '.join(sharing)} uses it too")
    others, readers = set[str](), list[str]()
    if publication.made:
        with speaking_of("source", where=what):
            ours = await single_names(source, ours)
            others = {str(table) for table in await published_names(source, name)} - set(ours)
            readers = await other_readers(source, config.source.slot)
    if (why := _not_ours(publication, others, readers)) is not None:
        return Step(what, "kept", f"it {why}; {by_hand}")
    return Step(what, "dropped")


async def of_tables(
    source: Connection,
    config: Config,
    tables: set[str],
    others: set[str],
    elsewhere: AnotherServer | None = None,
) -> tuple[list[Step], list[QualifiedName]]:
    """Return what is to become of an index's tables in the publication, and those that are to leave it.

    :param others: the tables that other indexes need there.
    :param elsewhere: why this is not the server that was followed: no slot is ours there, of whatever name.
    """
    name = config.source.publication
    with speaking_of("source", where=f"publication {name}"):
        publication = await read_publication(source, name)
        listed = {} if publication is None else {str(one): one for one in await published_names(source, name)}
        named = {str(one) for one in await named_tables(source, name)}
        readers = await other_readers(source, config.source.slot if elsewhere is None else None)
    unneeded = listed.keys() & tables - others
    foreign = None if publication is None else _not_ours(publication, listed.keys() - others - unneeded, readers)
    steps, leaving = list[Step](), list[QualifiedName]()
    for table in sorted(tables):
        what = f"{table} in the publication {name}"
        if table not in listed:
            steps.append(Step(what, "absent"))
        elif table in others:
            steps.append(Step(what, "kept", "another index is of the same table"))
        elif foreign is not None or len(listed) == len(unneeded):
            why = "it is the last one there" if len(listed) == 1 else "no table would be left there"
            if foreign is not None:
                why = f"the publication {foreign}"
            if elsewhere is not None:
                why = f"{elsewhere.message}; {why}"
            by_hand = unpublish_statement(name, [listed[table]]).as_string(source)
            steps.append(Step(what, "kept", f"{why}; if nothing needs it, as its owner: {by_hand}"))
        elif table not in named:
            steps.append(Step(what, "kept", "it is sent with its schema"))
        else:
            leaving.append(listed[table])
            steps.append(Step(what, "dropped"))
    return steps, leaving


def _not_ours(publication: Publication, others: Collection[str], readers: Sequence[str]) -> str | None:
    """Say in a predicate why a publication is not changed; None if it may be.

    :param others: the tables in it that nothing of this pipeline is about.
    :param readers: the other slots that may read it: their streams would fail for good without it.
    """
    if not publication.made:
        return "was not made by a worker"
    if others:
        return f"also sends {', '.join(sorted(others)[:3])}, which is not indexed"
    if readers:
        return f"may be read through {', '.join(readers[:3])}, too"
    return None if publication.owned else "belongs to another role"
