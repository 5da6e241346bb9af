"""The table `embedders`: what a worker knows of each embedder, for itself after a restart and for `cdcsync status`.

A note, like the evaluations: nothing that the index holds goes by it, so it needs no fence.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec
from psycopg import sql
from psycopg.types.json import Jsonb

from cdcsync.model.embedding import EmbedderState, Learnt, Probe, Problem
from cdcsync.postgres.queries import fetch_row
from cdcsync.postgres.sessions import Connection
from cdcsync.process.crashpoints import crash_point

TABLE = "embedders"


async def read_embedders(connection: Connection, schema: str, slot: str) -> dict[str, EmbedderState]:
    """Return what is noted of a pipeline's embedders, by name."""
    cursor = await connection.execute(
        sql.SQL(
            "SELECT name, call_texts, call_bytes, calls, day, tokens, problem, hint, since, tried_again_at,"
            # An earlier version's table has no such column.
            " loads_wait_until, (to_jsonb(e) ->> 'texts_per_s')::float8 FROM {} AS e WHERE slot = %s"
        ).format(sql.Identifier(schema, TABLE)),
        [slot],
    )
    found = {}
    for name, texts, size, calls, day, tokens, problem, hint, since, until, loads, rate in await cursor.fetchall():
        trouble = None if problem is None else Problem(problem, hint, since, until)
        found[name] = EmbedderState(Learnt(texts, size, calls), day, tokens, trouble, loads, rate)
    return found


async def note_embedders(connection: Connection, schema: str, slot: str, states: Mapping[str, EmbedderState]) -> None:
    """Note what is known of embedders, each in a transaction of its own if there is none around them."""
    statement = sql.SQL(
        "INSERT INTO {} AS mine (slot, name, call_texts, call_bytes, calls, day, tokens, problem, hint, since,"
        " tried_again_at, loads_wait_until, texts_per_s, updated_at)"
        " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, now())"
        " ON CONFLICT (slot, name) DO UPDATE SET (call_texts, call_bytes, calls, day, tokens, problem, hint, since,"
        " tried_again_at, loads_wait_until, texts_per_s, updated_at) = (excluded.call_texts, excluded.call_bytes,"
        " excluded.calls, excluded.day, excluded.tokens, excluded.problem, excluded.hint, excluded.since,"
        " excluded.tried_again_at, excluded.loads_wait_until, excluded.texts_per_s, excluded.updated_at)"
    ).format(sql.Identifier(schema, TABLE))
    for name, state in states.items():
        learnt, problem = state.learnt, state.problem
        trouble = [None] * 4 if problem is None else [problem.message, problem.hint, problem.since, problem.until]
        await connection.execute(
            statement,
            [
                *(slot, name, learnt.texts, learnt.bytes, learnt.calls, state.day, state.tokens),
                *(*trouble, state.loads_wait_until, state.texts_per_s),
            ],
        )
        crash_point("state of an embedder noted")


async def forget_embedders(connection: Connection, schema: str, slot: str, keep: Collection[str] = ()) -> None:
    """Forget a pipeline's embedders but for those to keep; the caller commits."""
    table = sql.Identifier(schema, TABLE)
    if await fetch_row(connection, "SELECT WHERE to_regclass(%s) IS NOT NULL", [table.as_string(connection)]) is None:
        return
    await connection.execute(
        sql.SQL("DELETE FROM {} WHERE slot = %s AND name <> ALL(%s::text[])").format(table), [slot, list(keep)]
    )


async def rate_of(connection: Connection, schema: str, slot: str, name: str) -> float | None:
    """Return how many texts a second an embedder made vectors of, as its worker last noted it; None if nobody did."""
    table = sql.Identifier(schema, TABLE)
    if await fetch_row(connection, "SELECT WHERE to_regclass(%s) IS NOT NULL", [table.as_string(connection)]) is None:
        return None
    state = (await read_embedders(connection, schema, slot)).get(name)
    return None if state is None else state.texts_per_s


async def read_probe(connection: Connection, schema: str, slot: str, name: str) -> Probe | None:
    """Return the last probe of an embedder; None if there is none."""
    statement = sql.SQL("SELECT to_jsonb(e) -> 'probe' FROM {} AS e WHERE slot = %s AND name = %s")
    row = await fetch_row(connection, statement.format(sql.Identifier(schema, TABLE)), [slot, name])
    return None if row is None or row[0] is None else msgspec.convert(row[0], Probe)


async def read_probes(connection: Connection, schema: str, slot: str) -> dict[str, Probe]:
    """Return the last probe of each embedder of a pipeline that has one, without the vectors."""
    statement = sql.SQL(
        "SELECT name, (to_jsonb(e) -> 'probe') || '{{\"vector\": []}}' FROM {} AS e"
        " WHERE slot = %s AND jsonb_typeof(to_jsonb(e) -> 'probe') = 'object'"
    )
    cursor = await connection.execute(statement.format(sql.Identifier(schema, TABLE)), [slot])
    return {name: msgspec.convert(probe, Probe) for name, probe in await cursor.fetchall()}


async def write_probe(connection: Connection, schema: str, slot: str, name: str, probe: Probe) -> None:
    """Keep a probe."""
    await connection.execute(
        sql.SQL(
            "INSERT INTO {} (slot, name, probe) VALUES (%s, %s, %s)"
            " ON CONFLICT (slot, name) DO UPDATE SET probe = excluded.probe"
        ).format(sql.Identifier(schema, TABLE)),
        [slot, name, Jsonb(msgspec.to_builtins(probe))],
    )
    crash_point("probe kept")
