"""Search an index: calls its SQL function, with the caller's condition where there is one.

It is one call in a transaction that can only read, so a hit is never half of an old state and half of a new one.

Source: Cormack, Clarke and Büttcher, "Reciprocal Rank Fusion outperforms Condorcet and individual Rank Learning
Methods" (2009); Robertson and Zaragoza, "The Probabilistic Relevance Framework: BM25 and Beyond" (2009).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import msgspec
import psycopg
from psycopg import sql

from cdcsync.config.names import quote
from cdcsync.errors import CdcsyncError, ModelChanged, SetupError, UsageError
from cdcsync.model.spec import IndexSpec
from cdcsync.postgres.errors import first_line, passing, speaking_of, translate, unavailable, without_values
from cdcsync.postgres.sessions import Connection
from cdcsync.target.ddl.filters import FILTER_OPERATORS
from cdcsync.target.ddl.hits import OWN, attribute_of
from cdcsync.target.ddl.names import Names, function_name
from cdcsync.target.ddl.search_function import BY_WORDS_ALONE, NO_GENERATION, NOT_WHOLE, Variant, compose
from cdcsync.target.search.arguments import HINTS, Mode, check_arguments, plain_filter
from cdcsync.target.search.stored import no_index, served_now
from cdcsync.target.search.values import load_values

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

Filter = Mapping[str, Any]
"""By column: a value, a list of values, None, or values by operator, of which `FILTER_OPERATORS` are the names."""

TIMEOUT_S = 30.0
"""A search takes milliseconds; one that takes this long is not waited for any more."""


_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

NO_SETTINGS: Mapping[str, str] = {}

_ENCODER = msgspec.json.Encoder(decimal_format="number")

_LISTED = r"array_position\('\{([a-z,]+)\}'"
"""The operators of filters in the text of a search function."""

_CREATES = "`cdcsync run` of this version creates it when it starts"

_GONE = (psycopg.errors.UndefinedTable, psycopg.errors.UndefinedFunction, psycopg.errors.InvalidSchemaName)
"""The errors of a search that does not find its function, or a table of the index."""


class Hit(msgspec.Struct, frozen=True):
    """A chunk that was found, or the best chunk of a document; the first hit is the best."""

    key: dict[str, Any]
    """The key of the source row, by column."""
    carried: dict[str, Any]
    """The carried columns."""
    chunk_no: int
    """The number of the chunk in its document, from 0."""
    content: str
    """The chunk's text."""
    score: float
    """Higher is better, within one search: the sum of weight / (60 + place) over the legs that found it."""
    distance: float | None
    """Distance from the query's vector, lower is nearer; `None` if query or chunk has no vector, or one without a
    direction: by cosine, a vector of zeros."""
    text_rank: int | None
    """Its place by words, from 1; `None` if it was not found by words."""
    stale: bool
    """Whether its vector is of an older text, or there is none yet."""
    vector_rank: int | None = None
    """Its place by vector, from 1; `None` if it was not found by vector."""
    text_score: float | None = None
    """How well the words match, by BM25: higher is better, within one search."""
    headline: str | None = None
    """The parts of the text in which words were found, by `ts_headline`; `None` unless asked for."""


class Plan(msgspec.Struct, frozen=True):
    """How the server executed one statement of a search."""

    leg: str
    lines: tuple[str, ...]


async def search(
    connection: Connection,
    schema: str,
    spec: IndexSpec,
    *,
    text: str | None,
    vector: Sequence[float] | npt.NDArray[np.float32] | None,
    k: int = 10,
    mode: Mode = "hybrid",
    filter: Filter | None = None,
    per_document: bool = True,
    skip: int = 0,
    weights: tuple[float, float] = (1.0, 1.0),
    headline: str | None = None,
    where: str | None = None,
    timeout_s: float | None = TIMEOUT_S,
    settings: Mapping[str, str] = NO_SETTINGS,
    traceparent: str | None = None,
    plans: list[Plan] | None = None,
    warnings: list[str] | None = None,
    for_json: bool = False,
) -> list[Hit]:
    """Return the best hits for a query, the best first.

    A hybrid search uses the legs it can: without a vector the keywords alone, on an index without keyword search the
    vector alone.

    :param connection: a session on the target, in autocommit.
    :param schema: the schema of cdcsync's own tables.
    :param text: the query in words, which are alternatives; "quoted phrases" must occur in what the keyword leg finds,
        and nothing that is found holds a -word. None for a search by vector alone.
    :param vector: `float32[dimensions]`, the query as the model of the spec's generation embeds it.
    :param filter: values for key and carried columns.
    :param per_document: return each document once, by its best chunk.
    :param skip: leave out so many of the first hits.
    :param weights: of the vector leg and of the keyword leg.
    :param headline: options of ts_headline for `Hit.headline`; None for no headlines.
    :param where: an SQL condition on key and carried columns: the caller's own SQL, with the session's privileges.
    :param timeout_s: how long the server may take; None for any time.
    :param settings: PostgreSQL settings for this search alone, such as one that a row-level security policy reads.
    :param traceparent: the trace context of the caller's span, a comment in the statement: it leads from the server's
        log of slow statements, and from pg_stat_activity, to the trace.
    :param plans: gets how the server executed each leg.
    :param warnings: gets what the caller should know of the answer: that nothing keeps the index in step, that it is
        being built, or that the vector has no direction.
    :param for_json: return values as an answer in JSON holds them; see `load_values`.
    :raises UsageError: `k`, `mode`, `filter`, `where` or another argument cannot be used, or the vector is not of the
        index's dimension.
    :raises ModelChanged: the vectors that `vector` was made for are gone; embed the query anew.
    :raises SetupError: the index is not in this database.
    :raises TargetUnavailable: the target does not answer now, or took longer than `timeout_s`.
    """
    check_arguments(
        texts={"text": text, "headline": headline},
        k=k,
        mode=mode,
        skip=skip,
        filter=filter,
        per_document=per_document,
        weights=weights,
        vector=vector,
        timeout_s=timeout_s,
        settings=settings,
    )
    if text is not None and not text.strip():
        text = ""  # the server knows fewer characters as white space
    _check(spec, text, vector, mode)
    await check_condition(connection, schema, spec, where)
    attributes = [attribute_of(name) for name in spec.shape.key + spec.shape.carried]
    with speaking_of("target", where=f"index {spec.name}"):
        function = function_name(schema, spec.searched_as)
        if where is not None or plans is not None:
            function = await _session_function(connection, schema, spec, where, explain=plans is not None)
        # The parameters have the types that the function says.
        statement = sql.SQL("SELECT {} FROM {}($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)").format(
            sql.SQL(", ").join(map(sql.Identifier, [*attributes, *OWN])), function
        )
        if traceparent is not None and _TRACEPARENT.fullmatch(traceparent):
            statement += sql.SQL(f" /*traceparent='{traceparent}'*/")
        numbers = None if vector is None else ",".join([repr(float(value)) for value in vector])
        filter_json = _ENCODER.encode(plain_filter(filter)).decode()
        arguments: list[object] = [
            text,
            None if numbers is None else f"[{numbers}]",
            int(k),  # the driver sends numpy's integers as a type for which there is no search function
            filter_json,
            mode,
            per_document,
            int(skip),
            *map(float, weights),
            headline,
            spec.generation,
        ]
        # Placeholders of the server's kind: a percent sign in a column's name is not a placeholder.
        cursor = psycopg.AsyncRawCursor(connection)
        load_values(cursor, for_json=for_json)
        settling = _for_this_search(timeout_s, settings)
        trial = sql.SQL("SELECT pg_catalog.ts_headline('pg_catalog.simple', '', ''::pg_catalog.tsquery, {})").format(
            sql.Literal(headline)
        )
        try:
            with _noting(connection, plans, warnings):
                async with connection.transaction():
                    # Wrong options are refused whether or not anything is found.
                    await connection.execute(sql.SQL("; ").join([settling, trial] if headline else [settling]))
                    await cursor.execute(statement, arguments, prepare=False)
                    rows = await cursor.fetchall()
        except (psycopg.Error, UnicodeError) as error:
            if isinstance(error, UnicodeError) or not (passing(error) or error.sqlstate == NO_GENERATION):
                await _read_apart(
                    connection,
                    headline=trial,
                    text=sql.SQL("SELECT {}::pg_catalog.text").format(sql.Literal(text)),
                    vector=sql.SQL("SELECT {}::pg_catalog.float4[]").format(sql.Literal(f"{{{numbers or ''}}}")),
                    filter=sql.SQL("SELECT {}::pg_catalog.jsonb").format(sql.Literal(filter_json)),
                    settings=settling,  # the last one, as it changes how others are read
                )
            if isinstance(error, _GONE):
                await _refuse_dropped(connection, schema, spec)
            if isinstance(error, psycopg.errors.InvalidParameterValue):
                await _refuse_earlier(connection, schema, spec, filter)
            raise refusal(error, spec, where) from error
    return [_hit(spec, row) for row in rows]


async def _refuse_dropped(connection: Connection, schema: str, spec: IndexSpec) -> None:
    """See that an index is still there which lacks what a search reads.

    :raises SetupError: somebody has dropped it.
    """
    if await served_now(connection, schema, spec.searched_as) is None:
        raise no_index(schema, spec.searched_as)


async def _refuse_earlier(connection: Connection, schema: str, spec: IndexSpec, filter: Filter | None) -> None:
    """See that the stored search function is of a version that knows the operators of a filter.

    :raises SetupError: it is of an earlier one, as after an upgrade of this process before the worker.
    """
    asked = {name for wish in (filter or {}).values() if isinstance(wish, Mapping) for name in wish}
    cursor = await connection.execute(
        "SELECT substring(p.prosrc FROM %s) FROM pg_catalog.pg_proc p"
        " JOIN pg_catalog.pg_namespace n ON n.oid = p.pronamespace WHERE n.nspname = %s AND p.proname = %s",
        [_LISTED, schema, f"{spec.searched_as}_search"],
    )
    for (listed,) in await cursor.fetchall():
        new = [name for name in FILTER_OPERATORS if name in asked and name not in str(listed).split(",")]
        if listed is not None and new:
            raise SetupError(
                f"the target has the search function of an earlier version, without {' and '.join(new)}",
                where=f"index {spec.name}",
                hint=_CREATES,
            )


async def _read_apart(connection: Connection, **arguments: sql.Composed) -> None:
    """Have the server read each argument of a search that failed by itself.

    :param arguments: by its name, a statement that reads an argument and does nothing else.
    :raises UsageError: it cannot read one of them.
    """
    async with connection.transaction():
        for name, statement in arguments.items():
            try:
                await connection.execute(statement)
            except (psycopg.Error, UnicodeError) as error:
                if isinstance(error, psycopg.Error) and passing(error):
                    raise
                raise UsageError(f"the {name} cannot be used: {_said(error)}", where=name, hint=HINTS[name]) from error


def _said(error: psycopg.Error | UnicodeError) -> str:
    return first_line(error) if isinstance(error, psycopg.Error) else str(error)


def _for_this_search(timeout_s: float | None, settings: Mapping[str, str]) -> sql.Composed:
    """Return the statements that make a transaction read only, and set what holds while it lasts."""
    ours = {} if timeout_s is None else {"statement_timeout": str(max(1, round(timeout_s * 1000)))}
    return sql.SQL("; ").join(
        [
            sql.SQL("SET TRANSACTION READ ONLY"),
            *(
                sql.SQL("SELECT pg_catalog.set_config({}, {}, true)").format(sql.Literal(name), sql.Literal(value))
                for name, value in (ours | dict(settings)).items()
            ),
        ]
    )


async def check_condition(connection: Connection, schema: str, spec: IndexSpec, where: str | None) -> None:
    """Have the server plan a condition alone: in brackets and without them, so that it can only be one expression.

    :param where: the condition; nothing is asked for None.
    :raises UsageError: it is not one condition on the index's columns.
    """
    if where is None:
        return
    if not where.strip():
        raise UsageError("the condition is empty", where="--where", hint="give one SQL condition, or leave it out")
    # On lines of its own, so that nothing of ours can become part of a comment.
    places = (
        sql.SQL("EXPLAIN SELECT FROM {} AS c WHERE (\n{}\n)"),
        sql.SQL("EXPLAIN SELECT CASE WHEN\n{1}\nTHEN true END FROM {0} AS c"),
    )
    with speaking_of("target", where=f"index {spec.name}"):
        try:
            async with connection.transaction():
                await connection.execute("SET TRANSACTION READ ONLY")
                await connection.execute("SET LOCAL statement_timeout = '5s'")
                await connection.execute("SET LOCAL search_path TO DEFAULT")
                for place in places:
                    await _execute_one(connection, place.format(Names(schema, spec.relations).chunks, sql.SQL(where)))
        except psycopg.Error as error:
            # By a pooler, this is FATAL, and of its own faults.
            if isinstance(error, psycopg.errors.ProtocolViolation) and error.diag.severity_nonlocalized == "ERROR":
                raise UsageError(
                    "a condition has no parameters", where=f"--where {where}", hint="write the value in place of each"
                ) from None
            raise refusal(error, spec, where) from error


async def _execute_one(connection: Connection, statement: sql.Composed) -> None:
    """Execute what holds a condition. Asked for binary results, the server takes a single statement only."""
    await psycopg.AsyncRawCursor(connection).execute(statement, prepare=False, binary=True)


def _check(
    spec: IndexSpec, text: str | None, vector: Sequence[float] | npt.NDArray[np.float32] | None, mode: Mode
) -> None:
    """Refuse what the index cannot do, in the words of those who configure it.

    :raises UsageError: it cannot.
    """
    where = f"index {spec.name}"
    if vector is not None and len(vector) != spec.dimensions:
        raise UsageError(
            f"the query's vector has {len(vector)} dimensions, the index has {spec.dimensions}",
            where=where,
            hint=f"embed the query with {spec.model}",
        )
    searchable = spec.config.search is not None
    if mode == "text" and not searchable:
        raise UsageError(
            "this index has no keyword search",
            where=where,
            hint=f'search by vector, or give [indexes.{spec.name}] a search = "english" and run the worker',
        )
    if vector is not None or text == "":
        return
    if mode == "vector":
        raise UsageError("a search by vector needs the query's vector", where=where, hint="embed the query first")
    if not searchable:
        raise UsageError(
            "the query has no vector, and the index has no keyword search", where=where, hint="embed the query first"
        )


async def _session_function(
    connection: Connection, schema: str, spec: IndexSpec, where: str | None, *, explain: bool
) -> sql.Identifier:
    """Create the index's search function in this session's own schema, with what it has more; returns its name.

    :raises UsageError: the server or the session takes only reads.
    """
    async with connection.transaction():
        await connection.execute("SET LOCAL search_path TO DEFAULT")
        cursor = await connection.execute(
            "SELECT pg_catalog.current_setting('search_path'), pg_catalog.current_setting('transaction_read_only')"
        )
        path, reads_only = map(str, await cursor.fetchone() or ("", "off"))
    if reads_only == "on":
        raise UsageError(
            "a search with --where or --explain makes a function for its session, and this server, such as a standby,"
            " or this session takes only reads",
            where="--explain" if where is None else "--where",
            hint="point target.dsn at the primary for this search; --filter works with any server",
        )
    statement = await compose(connection, schema, spec, variant=Variant(where=where, path=path, explain=explain))
    await _execute_one(connection, statement)
    return sql.Identifier("pg_temp", "search")


@contextmanager
def _noting(connection: Connection, plans: list[Plan] | None, warnings: list[str] | None) -> Iterator[None]:
    """Take in what the search function raises: plans, in their order, and what the caller should know of the answer."""
    lines: list[tuple[str, str]] = []

    def note(diagnostic: psycopg.errors.Diagnostic) -> None:
        if diagnostic.sqlstate in (NOT_WHOLE, BY_WORDS_ALONE):
            if warnings is not None:
                warnings.append(f"{diagnostic.message_primary}. {diagnostic.message_hint}")
        elif diagnostic.severity_nonlocalized == "INFO":
            lines.append((diagnostic.message_hint or "", diagnostic.message_primary or ""))

    connection.add_notice_handler(note)
    try:
        yield
    finally:
        connection.remove_notice_handler(note)
    if plans is not None:
        found: list[Plan] = []
        for leg, line in lines:
            if found and found[-1].leg == leg and not line.startswith("Aggregate"):
                found[-1] = Plan(leg, (*found[-1].lines, line))
            else:
                found.append(Plan(leg, (line,)))
        plans.extend(found)


def refusal(error: psycopg.Error | UnicodeError, spec: IndexSpec, where: str | None) -> CdcsyncError:
    """Return what a failed search means: most often that an argument is wrong, or the condition."""
    if isinstance(error, UnicodeError):  # the texts are such as can be encoded, unless a setting says how
        return UsageError(f"the settings cannot be used: {_said(error)}", where="settings", hint=HINTS["settings"])
    if error.sqlstate == "22023":  # raised by the search function, which names argument and remedy
        return UsageError(first_line(error), where=f"index {spec.name}", hint=error.diag.message_hint)
    if error.sqlstate == NO_GENERATION:
        return ModelChanged(first_line(error), where=f"index {spec.name}", hint=error.diag.message_hint)
    if error.sqlstate == "57014":
        return unavailable(
            "target",
            "the search took too long, so the server cancelled it",
            where=f"index {spec.name}",
            hint="see with `cdcsync search --explain` what takes the time; filters on a column that is listed under"
            " `indexed` are quick",
            sqlstate=error.sqlstate,
        )
    if error.sqlstate == "42883" and where is None and not error.diag.context:  # not raised in the function
        return SetupError(
            "the target has no search function for this index, or that of an earlier version",
            where=f"index {spec.name}",
            hint=_CREATES,
        )
    if where is None and (error.sqlstate or "").startswith("22"):
        return UsageError(
            f"the server refuses a value: {without_values(error)}",
            where=f"index {spec.name}",
            hint="give a vector as the index's model makes them, and settings that the policies of its tables can read",
        )
    reads_only = error.sqlstate == "25006"
    if where is None or error.sqlstate is None or (passing(error) and not reads_only):
        return translate(error, "target", where=f"index {spec.name}")
    columns = ", ".join(map(quote, spec.shape.key + spec.shape.carried))
    hint = f"a condition may only read; the index has the columns {columns}"
    return UsageError(first_line(error), where=f"--where {where}", hint=error.diag.message_hint or hint)


def _hit(spec: IndexSpec, row: Sequence[Any]) -> Hit:
    key, carried = spec.shape.key, spec.shape.carried
    values = len(key) + len(carried)
    return Hit(
        dict(zip(key, row[: len(key)], strict=True)),
        dict(zip(carried, row[len(key) : values], strict=True)),
        **dict(zip(OWN, row[values:], strict=True)),
    )
