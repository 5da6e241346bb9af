"""The replay flow: what is asked for is checked, written down as a request, and followed until it has been served.

    arguments ─► checked against both servers ─► request row + NOTIFY ─► whichever worker runs ─► followed

A request needs nothing but the target. The source is asked only where there is a condition to check. A key is given as
its column's text; the key of several columns is a JSON array of their texts, in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from typing import cast

import anyio
import msgspec
import psycopg
from psycopg import sql

from cdcsync.config import Config
from cdcsync.config.names import beside_name, quote
from cdcsync.errors import SetupError, UsageError
from cdcsync.model.pauses import Pause
from cdcsync.model.requests import Request, RequestAction
from cdcsync.model.rows import Key
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import first_line, speaking_of, translate
from cdcsync.postgres.queries import fetch_one
from cdcsync.postgres.sessions import Connection
from cdcsync.postgres.texts import is_text
from cdcsync.preflight import build_embedders, examine
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.catalog import facts_of, read_catalog
from cdcsync.source.conditions import Refused, try_condition
from cdcsync.source.families import rows_sent
from cdcsync.target.ddl.relations import MAX_ATTEMPTS, Names
from cdcsync.target.keys import canonical
from cdcsync.target.pipelines import Pipelines
from cdcsync.target.registry import Registry
from cdcsync.target.requests.history import History
from cdcsync.target.requests.submission import Requests
from cdcsync.target.search import stored_spec
from cdcsync.target.version import require_ours

KEYS_AT_ONCE = 10_000
"""Keys in one query."""

FOLLOW_S = 0.2
"""How often a request is looked at."""


class Replay(msgspec.Struct, frozen=True):
    """The rows to read again: all rows, those that `where` holds for, or those of `keys`."""

    where: str | None = None
    keys: tuple[Key, ...] | None = None
    force_embed: bool = False
    rewrite: bool = False
    max_rows_per_s: int | None = None


# -- what is there ----------------------------------------------------------------------------------------------


async def open_index(target: Connection, config: Config, name: str, *, even_paused: bool = False) -> IndexSpec:
    """Return an index as the target holds it.

    :param even_paused: for what changes only requests.
    :raises UsageError: the configuration has no such index.
    :raises SetupError: the target holds no such index, or it is paused.
    """
    with speaking_of("target"):
        await require_ours(target, config.target.schema)
    spec = await stored_spec(target, config.target.schema, name, config.index_named(name))
    with speaking_of("target", where=f"index {name}"):
        entry = await Registry(config.target.schema).find(target, name)
    if entry is None:
        raise SetupError(
            "the index is being dropped", where=f"index {name}", hint="`cdcsync status` shows what is there"
        )
    if entry.slot != config.source.slot:
        raise SetupError(
            f"the index belongs to the pipeline of slot {entry.slot}",
            where=f"index {name}",
            hint="use its configuration",
        )
    if entry.pause is not None and not even_paused and not await _mended(target, config, name):
        raise _paused("the index", entry.pause, where=f"index {name}")
    return spec


async def require_followed(target: Connection, config: Config, beside: IndexSpec) -> None:
    """Refuse to have rows read again for chunks that stand beside an index, and that nobody follows now.

    :raises SetupError: they are paused, or gone.
    """
    where = f"index {beside.searched_as}, generation {beside.generation}"
    with speaking_of("target", where=where):
        entry = await Registry(config.target.schema).find(target, beside.name)
    if entry is None:
        raise SetupError("the generation is gone", where=where, hint="`cdcsync status` shows what is there")
    if entry.pause is not None:
        raise _paused("the generation", entry.pause, where=where)


def _paused(what: str, pause: Pause, *, where: str) -> SetupError:
    """Return the refusal to read rows again for an index or a generation that is paused."""
    if pause.needs_a_start:
        return SetupError(f"{what} is paused: {pause.reason}", where=where, hint=pause.remedy)
    hint = f"correct that; the worker then reads the whole table again and resumes {what} by itself"
    return SetupError(f"{what} is paused: {pause}", where=where, hint=hint)


async def _mended(target: Connection, config: Config, name: str) -> bool:
    """Say whether a worker that began now would resume a paused index; one that runs has the old configuration."""
    with speaking_of("target"):
        holder = await Pipelines(config.target.schema, config.source.slot).holder(target)
    return holder is None and name not in (await examine(config, build_embedders(config, []))).broken


async def as_on_source(source: Connection, publication: str, spec: IndexSpec) -> IndexSpec:
    """Return the index with what only the source knows: its key's types there, and the publication's row filter.

    :raises SetupError: the table or a column of its key is not there.
    """
    name = spec.shape.table
    with speaking_of("source", where=str(name)):
        catalog = await read_catalog(source, publication, spec.tables)
    if spec.members:
        catalog = catalog.limited(name, spec.members)
    table, published = catalog.tables.get(name), catalog.publication
    missing = [column for column in spec.shape.own if table is None or column not in table.columns]
    gone = [str(one) for one in spec.tables if one not in catalog.tables]
    if table is None or missing or gone:
        what = f"there is no table {gone[0]}" if gone else f"columns are missing: {', '.join(missing)}"
        raise SetupError(what, where=f"source, table {name}", hint="`cdcsync check` says what the index needs")
    sent = published.tables.get(name) if published is not None else None
    return msgspec.structs.replace(
        spec,
        source_key_types=tuple(table.columns[column].value_type for column in spec.shape.key),
        row_filter=sent.row_filter if sent is not None else None,
        members=rows_sent(published, catalog.members.get(name, ())),
        facts=facts_of(catalog, table, spec.documents.related),
    )


# -- what is asked for ------------------------------------------------------------------------------------------


def parse_key(text: str, spec: IndexSpec) -> Key:
    """Read a key as it is typed: a single column's text as it is, several as a JSON array.

    :raises UsageError: it has another number of columns, or one of them is NULL.
    """
    names = spec.shape.key
    if len(names) == 1:
        return (text,)
    example = json.dumps([f"<{name}>" for name in names], ensure_ascii=False)
    hint = f"the key is ({', '.join(map(quote, names))}): give a JSON array such as '{example}'"
    try:
        values = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        raise UsageError(f"{text!r} is not a JSON array", where="--key", hint=hint) from None
    if not isinstance(values, list) or len(values) != len(names):
        raise UsageError(f"{text} does not have {len(names)} values", where="--key", hint=hint)
    if not all(isinstance(value, str | bool) and is_text(str(value)) for value in values):
        raise UsageError(f"{text} contains something that cannot be part of a key", where="--key", hint=hint)
    return tuple(value if isinstance(value, str) else str(value).lower() for value in values)


async def canonical_keys(target: Connection, spec: IndexSpec, given: Iterable[str]) -> tuple[Key, ...]:
    """Return the keys as the server renders them, each once, in the order given.

    :raises UsageError: one is not a value of the key's type, or there are none.
    """
    types = ", ".join(f"{quote(name)} {type_}" for name, type_ in zip(spec.shape.key, spec.key_types, strict=True))
    parsed = [parse_key(text, spec) for text in given]
    if not parsed:
        raise UsageError("there is no key", where="--key", hint="give at least one, or leave the option out")
    found: dict[Key, None] = {}
    for start in range(0, len(parsed), KEYS_AT_ONCE):
        try:
            rendered = await canonical(target, spec, parsed[start : start + KEYS_AT_ONCE])
        except psycopg.DataError as error:
            raise UsageError(first_line(error), where="--key", hint=f"the key is ({types})") from None
        except psycopg.Error as error:
            raise translate(error, "target", where=f"index {spec.name}") from error
        found.update(dict.fromkeys(rendered))
    return tuple(found)


async def check_where(source: Connection, spec: IndexSpec, where: str) -> None:
    """Ask the source to parse the condition and to try it on some rows, in a transaction that cannot write.

    :raises UsageError: it is none, or does not work.
    """
    tried = spec.each[0].shape  # of many equal tables, the first
    try:
        await try_condition(source, tried.table, where, source=tried.source)
    except Refused as error:
        named = next((one for one in spec.documents.related if re.search(rf"\b{re.escape(one.name)}\b", where)), None)
        # A value of a related row is a column of the index, and none of its table.
        hint = error.hint if named is None else f"ask for related rows by a query: {named.condition} AND …)"
        raise UsageError(error.message, where=f"--where {where}", hint=hint) from None


async def ask(target: Connection, schema: str, spec: IndexSpec, replay: Replay) -> int:
    """Write the request down and wake the worker, if one runs; returns the request's number.

    :raises SetupError: the index has been dropped meanwhile; or vectors of equal texts would be taken over from the
        chunks beside it, of which nobody makes new ones.
    """
    with speaking_of("target", where=f"index {spec.name}"):
        async with target.transaction():
            if replay.force_embed:
                await _require_alone(target, schema, spec.name)
            id_ = await Requests(schema).add(
                target,
                spec.name,
                "replay",
                rewrite=replay.rewrite,
                filter_=replay.where,
                force_embed=replay.force_embed,
                keys=replay.keys,
                max_rows_per_s=replay.max_rows_per_s,
            )
            crash_point("replay asked for")
        crash_point("request for a replay committed")
        return id_


async def _require_alone(target: Connection, schema: str, index: str) -> None:
    """See that no chunks stand beside an index, and that none will until the caller's transaction ends.

    :raises SetupError: some do; or the index has been dropped meanwhile.
    """
    registry = Registry(schema)
    if await registry.find(target, index, lock=True) is None:
        raise SetupError(
            "the index is being dropped", where=f"index {index}", hint="`cdcsync status` shows what is there"
        )
    if await registry.find(target, beside_name(index)) is not None:
        raise SetupError(
            "a migration to other chunks is under way, whose vectors would not be made anew",
            where=f"index {index}",
            hint=f"end it first: cdcsync migrate {index} drop",
        )


async def change(target: Connection, schema: str, index: str, action: RequestAction) -> tuple[list[int], list[int]]:
    """Pause, resume or cancel the requests of an index; return their numbers, and of those that cannot be cancelled.

    :raises UsageError: there is none of which that can be said.
    """
    with speaking_of("target", where=f"index {index}"):
        changed = await Requests(schema).action(target, index, action)
        kept = await Requests(schema).owed(target, index) if action == "cancel" else []
    if kept and not changed:
        raise UsageError(
            f"request {', '.join(map(str, kept))} cannot be cancelled: without it documents would stay out of date",
            where=f"index {index}",
            hint=f"let it end; or have it wait: cdcsync replay {index} --pause",
        )
    if not changed:
        raise UsageError(
            f"there is nothing to {action}", where=f"index {index}", hint="`cdcsync status` shows what is under way"
        )
    return changed, kept


async def follow(target: Connection, schema: str, id_: int, show: Callable[[Request], None]) -> Request:
    """Return the request once it has ended, showing it meanwhile.

    :raises SetupError: it went with its index.
    """
    history = History(schema)
    while True:
        with speaking_of("target"):
            request = await history.one(target, id_)
        if request is None:
            raise SetupError(
                "the index was dropped", where=f"request {id_}", hint="`cdcsync status` shows what is there"
            )
        show(request)
        if request.ended:
            return request
        await anyio.sleep(FOLLOW_S)


async def backlog_left(target: Connection, schema: str, spec: IndexSpec) -> int:
    """Return how many chunks wait for a vector."""
    with speaking_of("target", where=f"index {spec.name}"):
        row = await fetch_one(
            target,
            sql.SQL("SELECT count(*) FROM {} WHERE generation = {} AND attempts < {}").format(
                Names(schema, spec.relations).backlog, sql.Literal(spec.generation), sql.Literal(MAX_ATTEMPTS)
            ),
        )
    return cast(int, row[0])
