"""Documents of several tables: what related rows come to, as SQL that a server renders together with a row.

An index's configuration names *relations*. Each is a path of *steps* from the index's table to the related one, two
steps where a table lies between, and may have relations of its own. In the templates of the table that it is related to
it stands for

    {comments}       the texts of all related rows, in their order
    {customer.name}  a value of the one related row

and to a function of the user's, `comments` is the list of the related rows. All of it is *computed columns* of the row:
the server renders them in the statement that reads the row, so that a document is of one snapshot of all its tables.
Nothing is joined here.

The rendering is determined by what the tables hold: related rows are ordered by the configured order, then by their
primary key or, without one, by their text.

Source: PostgreSQL, "Queries" (LATERAL Subqueries), "Aggregate Functions", "JSON Functions" (json_object).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import msgspec

from cdcsync.config import QualifiedName, Related
from cdcsync.config.names import MAX_NAME_BYTES, WHOLE_ROW
from cdcsync.config.names import quote as _name
from cdcsync.documents.lexer import ROW, Token, Unreadable, names, reads_row, tokens
from cdcsync.documents.templates import Template, sql_text
from cdcsync.errors import ConfigError

VIA = "via"
"""The name of the table between in conditions."""

TEXT, ROWS, PLACE = "cdcsync text", "cdcsync rows", "cdcsync place"
"""Names of our own in the statement, which no column of a related table is likely to have."""

ONE = "."
"""Stands between a relation's name and the column of its only row."""

LISTED = "[]"
"""Follows a relation's name where it stands for the list of its rows."""


class Step(msgspec.Struct, frozen=True):
    """A table, and which of its rows belong to a row of the table before it.

    :ivar on: pairs of columns that are equal: one of this table, one of the table before it.
    """

    table: QualifiedName
    on: tuple[tuple[str, str], ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that tell which rows of the table before it a row belongs to."""
        return tuple(mine for mine, _ in self.on)


class TableFacts(msgspec.Struct, frozen=True):
    """Facts about a related table from the catalog, for the statement.

    :ivar key: the columns that identify a row; none if nothing does.
    :ivar columns: the columns that statements may use, and the role may read: what `columns_read` names, and the key.
    :ivar row_filter: the condition of the rows that the publication sends.
    :ivar types: of the columns, as format_type prints them.
    :ivar inheritable: see `Shape.inheritable`.
    """

    key: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    row_filter: str | None = None
    types: dict[str, str] = {}
    inheritable: bool = False


Facts = Mapping[QualifiedName, TableFacts]
Equal = Callable[[str, str], str]
"""Returns the operator that compares values of two types for equality, as SQL."""


class RelatedRows(msgspec.Struct, frozen=True):
    """The rows of one relation.

    :ivar path: its name, after the names of the relations that it is within.
    :ivar steps: the tables from the one that it is related to.
    :ivar text: the template of one row; None if no text of it is used.
    :ivar listed: the columns of the rows that a function gets; none if no function gets them.
    :ivar values: the columns that are used of its only row.
    """

    path: tuple[str, ...]
    steps: tuple[Step, ...]
    text: Template | None
    listed: tuple[str, ...]
    values: tuple[str, ...]
    order_by: str
    limit: int
    separator: str
    where: str
    related: tuple[RelatedRows, ...] = ()

    @property
    def name(self) -> str:
        """Its name in templates."""
        return self.path[-1]

    @property
    def table(self) -> QualifiedName:
        """The related table."""
        return self.steps[-1].table

    @property
    def computed(self) -> dict[str, str]:
        """Its computed columns, with SQL of each."""
        columns = {}
        if self.text is not None:
            columns[self.name] = f"{_id(self.name)}.{_id(TEXT)}"
        if self.listed:
            columns[self.name + LISTED] = f"{_id(self.name)}.{_id(ROWS)}"
        for column in self.values:
            columns[f"{self.name}{ONE}{column}"] = f"{_id(self.name)}.{_id(column)}"
        return columns

    @property
    def needed(self) -> tuple[str, ...]:
        """The columns of the related table that its output is made of, or its own relations are found by."""
        named = [*(self.text.columns if self.text is not None else ()), *self.listed, *self.values]
        below = computed_columns(self.related)
        outward = [theirs for one in self.related for _, theirs in one.steps[0].on]
        return tuple(dict.fromkeys([one for one in named if one not in below] + outward))

    @property
    def condition(self) -> str:
        """The beginning of a condition on a row `t` that there are related rows, as people write it."""
        last = f"{self.table} AS {_name(self.name)}"
        if len(self.steps) == 1:
            return f"EXISTS (SELECT FROM {last} WHERE {_equal(self.name, self.steps[0], 't')}"
        between = self.steps[0]
        joined = f"{between.table} AS {VIA} JOIN {last} ON {_equal(self.name, self.steps[-1], VIA)}"
        return f"EXISTS (SELECT FROM {joined} WHERE {_equal(VIA, between, 't')}"

    def walk(self) -> Iterator[RelatedRows]:
        """Yield it, and the relations within it."""
        yield self
        for one in self.related:
            yield from one.walk()

    @property
    def definition(self) -> str:
        """Says all that decides what its rows come to."""
        template = None if self.text is None else self.text.text
        own = (self.path, template, self.listed, self.order_by, self.limit, self.separator, self.where)
        steps = [(str(step.table), step.on) for step in self.steps]
        return repr((own, steps, [one.definition for one in self.related]))

    def lateral(self, parent: str, facts: Facts, types: Mapping[str, str], equal: Equal, *, apart: bool) -> str:
        """Return SQL that joins what its rows come to for each row of `parent`; none makes the texts NULL.

        :param parent: what the statement calls the table that it is related to.
        :param types: of that table's columns.
        :param apart: whether the condition is not even asked of rows that do not belong to one of `parent`, for which
            it may fail.
        """
        name = _id(self.name)
        mine = facts.get(self.table, TableFacts())
        columns = ", ".join(f"{name}.{_id(column)}" for column in self.needed)
        order = ", ".join(filter(None, (self.order_by, self._ties(mine))))
        below = computed_columns(self.related)

        def quote(column: str) -> str:
            return below[column] if column in below else f"{name}.{_id(column)}"

        rows = (
            f"SELECT {columns}{', ' if columns else ''}pg_catalog.row_number() OVER (ORDER BY {order}) AS {_id(PLACE)}"
            f" FROM {self._tables(facts, equal, self._belongs(parent, facts, types, equal), apart=apart)}"
            + f" ORDER BY {_id(PLACE)} LIMIT {1 if self.values else self.limit}"
        )
        made = [f"{name}.{_id(PLACE)}", *(f"{name}.{_id(column)}" for column in self.values)]
        if self.text is not None:
            made.append(f"{self.text.sql(quote)} AS {_id(TEXT)}")
        if self.listed:
            made.append(f"{_row_sql(self.listed, quote)} AS {_id(ROWS)}")
        within = " ".join(one.lateral(self.name, facts, mine.types, equal, apart=apart) for one in self.related)
        one_by_one = f"SELECT {', '.join(made)} FROM ({rows}) AS {name} {within}"
        if not self.values:
            gathered = []
            if self.text is not None:
                gathered.append(
                    f"pg_catalog.string_agg(r.{_id(TEXT)}, {sql_text(self.separator)} ORDER BY r.{_id(PLACE)})"
                    f" AS {_id(TEXT)}"
                )
            if self.listed:
                gathered.append(f"pg_catalog.json_agg(r.{_id(ROWS)} ORDER BY r.{_id(PLACE)})::text AS {_id(ROWS)}")
            one_by_one = f"SELECT {', '.join(gathered)} FROM ({one_by_one}) AS r"
        elif self.listed:
            others = [f"r.{_id(column)}" for column in self.values]
            others += [f"r.{_id(TEXT)}"] if self.text is not None else []
            one_by_one = (
                f"SELECT {', '.join(others)}, pg_catalog.json_build_array(r.{_id(ROWS)})::text AS {_id(ROWS)}"
                f" FROM ({one_by_one}) AS r"
            )
        return f"LEFT JOIN LATERAL ({one_by_one}) AS {name} ON true"

    def _tables(self, facts: Facts, equal: Equal, belongs: str, *, apart: bool) -> str:
        """Return SQL of the related table, joined to the one between if there is one, and of which rows belong."""
        last = self.steps[-1]
        known = facts.get(last.table, TableFacts())
        apart = apart and bool(self.where)
        tables = _rows_of(last.table, self.name, facts, "" if apart else self.where)
        for step in self.steps[:-1]:
            on = _on(last, self.name, facts, VIA, facts.get(step.table, TableFacts()).types, equal)
            tables = f"{_rows_of(step.table, VIA, facts)} JOIN {tables} ON {on}"
        if not apart:
            return f"{tables} WHERE {belongs}"
        name = _id(self.name)
        columns = ", ".join(f"{name}.{_id(column)}" for column in known.columns)
        # No planner moves a condition over OFFSET.
        rows = f"SELECT * FROM (SELECT {columns} FROM {tables} WHERE {belongs} OFFSET 0) AS t WHERE ({self.where})"
        return f"({rows}) AS {name}"

    def _belongs(self, parent: str, facts: Facts, types: Mapping[str, str], equal: Equal) -> str:
        alias = self.name if len(self.steps) == 1 else VIA
        return _on(self.steps[0], alias, facts, parent, types, equal)

    def _ties(self, mine: TableFacts) -> str:
        """Return what orders rows that the configured order does not tell apart."""
        name = _id(self.name)
        if mine.key:
            return ", ".join(f"{name}.{_id(column)}" for column in mine.key)
        columns = ", ".join(f"{name}.{_id(column)}" for column in self.needed)
        return f'ROW({columns})::text COLLATE pg_catalog."C"'


def columns_read(related: Iterable[RelatedRows]) -> dict[QualifiedName, tuple[str, ...]]:
    """Return by table the names of what is read of it, some of which may be none of its columns.

    Conditions and orders are the user's: whatever word of theirs is a column's name counts as that column, and what may
    be the name of the row as all columns (`WHOLE_ROW`).
    """
    found: dict[QualifiedName, list[str]] = {}
    for top in related:
        for one in top.walk():
            where, order = _words(one.where), _words(one.order_by)
            words = names((*where, *order))
            if reads_row(where, ROW) or any(reads_row(order, called) for called in (one.name, VIA)):
                words.append(WHOLE_ROW)
            for at, step in enumerate(one.steps):
                theirs = [their for _, their in one.steps[at + 1].on] if at + 1 < len(one.steps) else one.needed
                found.setdefault(step.table, []).extend([*step.columns, *theirs, *words])
    return {table: tuple(dict.fromkeys(columns)) for table, columns in found.items()}


def _words(sql: str) -> Sequence[Token]:
    """Return the words of a condition or an order; none of one that is refused when it is examined."""
    try:
        return tokens(sql)
    except Unreadable:
        return ()


def computed_columns(related: Iterable[RelatedRows]) -> dict[str, str]:
    """Return the computed columns of a table with these relations, with SQL of each."""
    return {name: sql for one in related for name, sql in one.computed.items()}


def make_related(
    related: Mapping[str, Related], used: Sequence[str], listed: Sequence[str], *, where: str
) -> tuple[RelatedRows, ...]:
    """Read the relations of an index.

    :param used: the names in its templates, and its carried columns.
    :param listed: the columns that a function gets.
    :param where: the config section, for errors.
    :raises ConfigError: a template cannot be read, or uses what is not there.
    """
    place = f"{where}.document_columns" if listed else f"{where}.text"
    return _make(related, used, listed, (), where, place)


def _make(
    related: Mapping[str, Related],
    used: Sequence[str],
    listed: Sequence[str],
    path: tuple[str, ...],
    where: str,
    place: str,
    besides: str = "",
) -> tuple[RelatedRows, ...]:
    """Read the relations of one table.

    :param place: the key that is to name them: a text, or a list of columns.
    :param besides: what else has to be so that what is named there is read.
    """
    made = []
    for name, config in related.items():
        section = f"{where}.related.{name}"
        if name in path:
            raise ConfigError(
                "is within a section of the same name", where=section, hint="give one of them another name"
            )
        values = [one.split(ONE, 1)[1] for one in (*used, *listed) if one.startswith(f"{name}{ONE}")]
        for value in values:
            inner, dot, column = value.partition(ONE)
            if dot and inner in config.related:
                raise ConfigError(
                    f"{{{name}{ONE}{value}}} is used, and a template reads the rows of its own table's sections alone",
                    where=section,
                    hint=f"use {{{inner}{ONE}{column}}} in {section}.text, and {{{name}}} in its place",
                )
        text = None
        if config.text:
            text = Template.parse(config.text, where=f"{section}.text")
        elif name in used:
            raise ConfigError(
                f"{{{name}}} is used, but its section does not define the text of a row",
                where=f"{section}.text",
                hint=f"give a template of the row's columns, or use one value: {{{name}.COLUMN}}",
            )
        columns: tuple[str, ...] = ()
        if name in listed:
            columns = config.columns or (text.columns if text is not None else ())
            if not columns:
                raise ConfigError(
                    "the section does not say which columns the function gets",
                    where=f"{section}.columns",
                    hint="name them, or give a text whose columns they are",
                )
        if not (values or columns or name in used):
            raise ConfigError(
                "no template uses this section",
                where=section,
                hint=f"{_use(name, place)}{besides}, or remove the section",
            )
        for column in values:
            if len(f"{name}{ONE}{column}".encode()) > MAX_NAME_BYTES:
                raise ConfigError(
                    f"{name}{ONE}{column} is longer than {MAX_NAME_BYTES} bytes, the most that a name has",
                    where=section,
                    hint="give the section a shorter name",
                )
        if name not in used:
            text = None
        below = [*(text.columns if text is not None else ()), *columns]
        steps = [Step(QualifiedName.parse(config.table), tuple(config.on.items()))]
        if config.via is not None:
            steps.insert(0, Step(QualifiedName.parse(config.via.table), tuple(config.via.on.items())))
        made.append(
            RelatedRows(
                path=(*path, name),
                steps=tuple(steps),
                text=text,
                listed=columns,
                values=tuple(dict.fromkeys(values)),
                order_by=config.order_by,
                limit=config.limit,
                separator=config.separator,
                where=config.where,
                related=_make(
                    config.related,
                    below,
                    (),
                    (*path, name),
                    section,
                    f"{section}.{'columns' if config.columns and columns else 'text'}",
                    "" if columns or name in used else f", and {_named(name, place)} in {place}{besides}",
                ),
            )
        )
    return tuple(made)


def _use(name: str, place: str) -> str:
    value = f" or {_named(f'{name}{ONE}COLUMN', place)}"
    return f"use {_named(name, place)}{value} in {place}"


def _named(name: str, place: str) -> str:
    """Return a name as a text or a list of columns has it."""
    return f'"{name}"' if place.endswith("columns") else f"{{{name}}}"


def own_rows(table: QualifiedName, *, inheritable: bool) -> str:
    """Return a table as SQL names it after FROM, without the rows of tables that inherit from it.

    Their changes come under other names, and the table may be read before the watch sees that they exist. The rows of a
    partitioned table are those of its partitions.
    """
    return f"{'ONLY ' if inheritable else ''}{_id(table.schema)}.{_id(table.name)}"


def _rows_of(table: QualifiedName, alias: str, facts: Facts, where: str = "") -> str:
    """Return SQL of the rows that the publication sends of a table, those that fulfil a condition."""
    known = facts.get(table, TableFacts())
    source = own_rows(table, inheritable=known.inheritable)
    conditions = [f"({one})" for one in (known.row_filter, where) if one]
    if not conditions:
        return f"{source} AS {_id(alias)}"
    # Apart, so that the conditions' names can be those of no other table.
    columns = ", ".join(f"t.{_id(column)}" for column in known.columns)
    rows = f"SELECT {columns} FROM {source} AS t WHERE {' AND '.join(conditions)}"
    return f"({rows}) AS {_id(alias)}"


def _on(step: Step, alias: str, facts: Facts, parent: str, types: Mapping[str, str], equal: Equal) -> str:
    mine = facts.get(step.table, TableFacts()).types
    return " AND ".join(
        f"{_id(alias)}.{_id(column)} {equal(mine.get(column, ''), types.get(theirs, ''))} {_id(parent)}.{_id(theirs)}"
        for column, theirs in step.on
    )


def _row_sql(columns: Sequence[str], quote: Callable[[str], str]) -> str:
    """Return SQL of a JSON object with the text of each value, as output functions write it, or null."""
    names = ", ".join(sql_text(column) for column in columns)
    values = ", ".join(
        f"CASE WHEN pg_catalog.num_nonnulls({quote(one)}) = 1 THEN pg_catalog.concat({quote(one)}) END"
        for one in columns
    )
    return f"pg_catalog.json_object(ARRAY[{names}]::text[], ARRAY[{values}]::text[])"


def _equal(alias: str, step: Step, before: str) -> str:
    return " AND ".join(f"{_name(alias)}.{_name(mine)} = {_name(before)}.{_name(theirs)}" for mine, theirs in step.on)


def _id(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'
