"""Indexes with chunks of two generations: the one that is searched, and the one that stands beside it.

A migration to other chunks makes an index of its own, under a name that no configuration has, `articles~other`. All
that loads, follows, compares and rebuilds an index does so for it: it stands in the configuration by which the worker
works, among those of the file. Its section, and that of the index that is searched, are the file's in all but the keys
that make a generation what it is: these are as they are stored (decision 0012).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cdcsync.config import Config, Index
from cdcsync.config.differences import BOUND_TOGETHER, contents_of, made_as
from cdcsync.config.names import beside_name
from cdcsync.target.entries import Entry


def with_beside(config: Config, stored: Mapping[str, Entry]) -> Config:
    """Return the configuration with the indexes that stand beside those of the file."""
    indexes: dict[str, Index] = {}
    for name, section in config.indexes.items():
        own, other = stored.get(name), stored.get(beside_name(name))
        made = {name: as_kept(section, own, other)}
        if other is not None and other.configuration is not None:
            made[other.name] = made_by(section, other)
        for one, kept in made.items():
            # One whose embedder the file does not have any more is reported as it is without a migration.
            lost = kept.embedder not in config.embedders
            indexes[one] = msgspec.structs.replace(kept, embedder=section.embedder) if lost else kept
    return msgspec.structs.replace(config, indexes=indexes)


def as_kept(section: Index, own: Entry | None, other: Entry | None) -> Index:
    """Return the section of an index, with the chunks that it keeps where the file asks for others.

    :param own: the index as it is stored.
    :param other: the one that stands beside it.
    """
    if own is None or own.configuration is None:
        return section
    return without_declined(section, own) if other is None else made_by(section, own)


def made_by(section: Index, one: Entry | None) -> Index:
    """Return the section of an index, with the keys that make a generation what it is as they are stored."""
    return section if one is None or one.configuration is None else made_as(section, one.configuration)


def without_declined(section: Index, own: Entry) -> Index:
    """Return the section of an index, with the keys as it has them that ask again for what `cdcsync migrate` dropped.

    Keys that ask for something else since then are as the file has them: only those were given up that were asked for
    at that time. Keys that this version of cdcsync has and an earlier one had not say nothing of that.
    """
    kept, has = section, own.configuration
    for dropped in own.declined or () if has is not None else ():
        for keys in BOUND_TOGETHER:
            asked, as_it_is = made_as(section, dropped, keys), made_as(section, has or {}, keys)
            if asked == section != as_it_is:
                kept = made_as(kept, has or {}, keys)
    return kept


def asks_for_others(section: Index, own: Entry) -> bool:
    """Say whether the file asks for other chunks than a stored index has."""
    return own.configuration is not None and made_as(section, contents_of(own.configuration)) != section


def contents_asked_for(one: Entry) -> dict[str, Any] | None:
    """Return what the chunks of a stored index are made of, as `Entry.declined` holds it."""
    return None if one.configuration is None else contents_of(one.configuration)


def is_met_by(section: Index, one: Entry) -> bool:
    """Say whether an index that is stored has the chunks and the vectors that the file asks for."""
    kept = made_by(section, one)
    # What a build may use of memory and processors is nothing of the result.
    built = msgspec.structs.replace(
        kept.hnsw, build_memory=section.hnsw.build_memory, build_workers=section.hnsw.build_workers
    )
    return one.configuration is not None and msgspec.structs.replace(kept, hnsw=built) == section
