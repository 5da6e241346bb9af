"""Documents of several tables: whatever is written to any of them, each is what one SQL statement says at rest.

A seed makes a schema of two to four tables that are related in some way (children, parents, tables between, relations
of relations), writers that change it at random in transactions with savepoints, cascades, moves, truncates and DDL,
beside the first load or after it, and kills of the worker. The statement that says what the documents are is written
here, in other SQL than the product's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import msgspec
import psycopg
import pytest

from tests import ROOT
from tests.support.configs import configuration
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.server, pytest.mark.faults, pytest.mark.timeout(300)]

IDS = 12
"""Keys are few, so that changes meet."""

FEW = """
import cdcsync.flows.follow.related as related, cdcsync.flows.follow.prepare as prepare
import cdcsync.target.requests.rebuilds as rebuilds
related.MOST_OF_ONE, related.MOST_OF_A_BATCH, related.VALUES_AT_FIRST, related.VALUES_AT_ONCE = 2, 6, 2, 3
prepare.READ_AT_ONCE, prepare.MOST_BYTES_READ, rebuilds.MOST_REBUILDS = 3, 300, 3
"""
"""Runs in a worker whose bounds are to be met all the time."""


class Node(msgspec.Struct):
    """A table, and how it is related to the one above it: its "many" children, its "one" parent, or "via" another."""

    name: str
    kind: str
    order_by: str
    limit: int
    where: str
    below: list[Node]

    def walk(self) -> Iterator[Node]:
        yield self
        for one in self.below:
            yield from one.walk()

    @property
    def is_value(self) -> bool:
        """Whether templates use a value of its row, and not a text of it."""
        return self.kind == "one" and not self.below

    @property
    def between(self) -> str:
        return f"between_{self.name}"

    def template(self) -> str:
        parts = [f"{{{one.name}.word}}" if one.is_value else f"[{{{one.name}}}]" for one in self.below]
        return " ".join(["{word}", *parts])

    def section(self, path: str) -> str:
        """Return the sections of what is below, as the configuration has them."""
        lines = []
        for one in self.below:
            here = f"{path}.related.{one.name}"
            on = {"many": "{ up = 'id' }", "one": f"{{ id = 'to_{one.name}' }}", "via": "{ id = 'b' }"}[one.kind]
            lines += [f"[{here}]", f'table = "{one.name}"', f"on = {on}", f"text = {json.dumps(one.template())}"]
            lines += [f"limit = {one.limit}", 'separator = ", "']
            if one.kind == "via":
                lines.append(f'via = {{ table = "{one.between}", on = {{ a = "id" }} }}')
            lines += [f"order_by = {json.dumps(one.order_by)}"] if one.order_by else []
            lines += [f"where = {json.dumps(one.where)}"] if one.where else []
            lines.append(one.section(here))
        return "\n".join(lines)

    def rows(self, above: str, said: str) -> str:
        """Return SQL of the related rows of a row of `above`: what is `said` of each, in their order."""
        x = f"x_{self.name}"
        joins = {
            "many": f"{self.name} {x} WHERE {x}.up = {above}.id",
            "one": f"{self.name} {x} WHERE {x}.id = {above}.to_{self.name}",
            "via": f"{self.between} b JOIN {self.name} {x} ON {x}.id = b.b WHERE b.a = {above}.id",
        }[self.kind]
        where = f" AND ({x}.word <> 'x')" if self.where else ""
        order = f"{x}.rank DESC NULLS FIRST, " if self.order_by else ""
        return f"SELECT {said} FROM {joins}{where} ORDER BY {order}{x}.id LIMIT {self.limit}"

    def gathered(self, above: str) -> str:
        x = f"x_{self.name}"
        parts = [
            f"' ' || coalesce(({one.rows(x, f'x_{one.name}.word')}), '')"
            if one.is_value
            else f"' [' || {one.gathered(x)} || ']'"
            for one in self.below
        ]
        said = " || ".join([f"coalesce({x}.word, '')", *parts])
        return f"array_to_string(ARRAY({self.rows(above, said)}), ', ')"

    def view(self) -> str:
        columns = [
            f'({one.rows("t", f"x_{one.name}.word")}) AS "{one.name}.word"'
            if one.is_value
            else f'{one.gathered("t")} AS "{one.name}"'
            for one in self.below
        ]
        return f"CREATE VIEW expected AS SELECT {', '.join(['t.*', *columns])} FROM {self.name} t"


def made_schema(chance: random.Random) -> Node:
    """Return a random schema: its root is the index's own table."""
    root = Node("docs", "", "", 0, "", [])
    known = [root]
    for number in range(chance.randint(1, 3)):
        kind = chance.choice(("many", "many", "one", "via"))
        node = Node(
            f"r{number}",
            kind,
            chance.choice(("", "rank DESC")) if kind != "via" else chance.choice(("", f"r{number}.rank DESC")),
            1 if kind == "one" else chance.choice((2, 1000)),
            chance.choice(("", "word <> 'x'")),
            [],
        )
        chance.choice(known).below.append(node)
        known.append(node)
    return root


def statements(root: Node, chance: random.Random) -> Iterator[str]:
    """Yield the DDL of a schema, with or without foreign keys, under replica identities that do."""
    key = chance.choice(("int", "bigint", "text"))
    above = {one.name: node for node in root.walk() for one in node.below}
    for node in root.walk():
        outward = "".join(f", to_{one.name} {key}" for one in node.below if one.kind == "one")
        parted = chance.random() < 0.2
        yield f"CREATE TABLE {node.name} (id {key} PRIMARY KEY, up {key}, word text, rank int{outward})" + (
            " PARTITION BY HASH (id)" if parted else ""
        )
        if parted:
            for part in range(2):
                values = f"WITH (MODULUS 2, REMAINDER {part})"
                yield f"CREATE TABLE {node.name}_{part} PARTITION OF {node.name} FOR VALUES {values}"
        names = [f"{node.name}_0", f"{node.name}_1"] if parted else []
        if node.kind == "many":
            for name in [node.name, *names]:
                yield f"ALTER TABLE {name} REPLICA IDENTITY FULL"
        if node.kind == "via":
            yield f"CREATE TABLE {node.between} (a {key}, b {key}, PRIMARY KEY (a, b))"
        if node.kind == "many" and chance.random() < 0.6:
            action = chance.choice(("CASCADE", "SET NULL"))
            yield (
                f"ALTER TABLE {node.name} ADD FOREIGN KEY (up) REFERENCES {above[node.name].name}"
                f" ON DELETE {action} ON UPDATE CASCADE DEFERRABLE INITIALLY DEFERRED"
            )
    yield root.view()


class Writer:
    """Changes everything at random."""

    def __init__(self, dsn: str, root: Node, seed: int, *, ddl: bool = False) -> None:
        self._dsn = dsn
        self._root = root
        self._nodes = list(root.walk())
        self._chance = random.Random(seed)
        self._ddl = ddl

    def one_definition(self, connection: psycopg.Connection) -> None:
        """Change a table in a way that an index of it allows."""
        chance = self._chance
        name, part = chance.choice(self._nodes).name, chance.randint(0, 1)
        bounds = f"FOR VALUES WITH (MODULUS 2, REMAINDER {part})"
        changes = (
            [f"ALTER TABLE {name} ADD COLUMN more int DEFAULT 7"],
            [f"ALTER TABLE {name} DROP COLUMN more"],
            [f"CREATE INDEX ON {name} (up)"],
            [f"ALTER TABLE {name} RENAME word TO other", f"ALTER TABLE {name} RENAME other TO word"],
            # A view stands in the way of another type.
            ["DROP VIEW expected", f"ALTER TABLE {name} ALTER word TYPE {chance.choice(('text', 'varchar'))}"],
            [f"ALTER TABLE IF EXISTS {one} REPLICA IDENTITY FULL" for one in (name, f"{name}_0", f"{name}_1")],
            [f"ALTER TABLE {name} DETACH PARTITION {name}_{part}"],
            [f"ALTER TABLE {name} ATTACH PARTITION {name}_{part} {bounds}"],
        )
        chosen = chance.choice(changes)
        for statement in chosen:
            connection.execute(statement)
        if "DROP VIEW expected" in chosen:
            connection.execute(self._root.view())

    def one_change(self, connection: psycopg.Connection) -> None:
        chance = self._chance
        node = chance.choice(self._nodes)
        name, id_, other = node.name, str(chance.randint(1, IDS)), str(chance.randint(1, IDS))
        word = chance.choice(("x", "alpha", "beta", "gamma", None)) if node.kind else f"doc {chance.randint(1, 99)}"
        if self._ddl and chance.random() < 0.03:
            self.one_definition(connection)
            return
        match chance.randint(0, 10):
            case 0 | 1 | 2:
                connection.execute(
                    f"INSERT INTO {name} (id, up, word, rank) VALUES (%s, %s, %s, %s) ON CONFLICT DO NOTHING",
                    [id_, other, word, chance.choice((1, 2, None))],
                )
            case 3 | 4:
                connection.execute(f"UPDATE {name} SET word = %s WHERE id = %s", [word, id_])
            case 5:
                connection.execute(
                    f"UPDATE {name} SET up = %s, rank = %s WHERE id = %s", [other, chance.randint(1, 3), id_]
                )
            case 6:
                connection.execute(f"DELETE FROM {name} WHERE id = %s", [id_])
            case 7:
                connection.execute(f"UPDATE {name} SET id = %s WHERE id = %s", [other, id_])
            case 8:
                connection.execute(f"UPDATE {name} SET word = word || '!' WHERE length(word) < 12")
            case 9 if chance.random() < 0.1:
                connection.execute(f"TRUNCATE {name} CASCADE")
            case _:
                outward = [one for one in node.below if one.kind == "one"]
                if outward:
                    connection.execute(
                        f"UPDATE {name} SET to_{chance.choice(outward).name} = %s WHERE id = %s", [other, id_]
                    )
                elif node.kind == "via" and chance.random() < 0.7:
                    connection.execute(
                        f"INSERT INTO {node.between} VALUES (%s, %s) ON CONFLICT DO NOTHING", [id_, other]
                    )
                elif node.kind == "via":
                    connection.execute(f"DELETE FROM {node.between} WHERE a = %s OR b = %s", [id_, other])

    def transaction(self, connection: psycopg.Connection, most: int) -> None:
        """Make some changes at once; what the server refuses is undone."""
        with contextlib.suppress(psycopg.Error), connection.transaction(force_rollback=self._chance.random() < 0.05):
            for _ in range(self._chance.randint(1, most)):
                with contextlib.suppress(psycopg.Error):
                    undone = self._chance.random() < 0.1
                    with connection.transaction(force_rollback=undone):
                        for _ in range(self._chance.randint(1, 3)):
                            self.one_change(connection)

    def run(self, transactions: int, most: int) -> None:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '2s'")
            for _ in range(transactions):
                self.transaction(connection, most)


def documents_follow(
    make_pipeline: Callable[[str], Pipeline], database: Database, directory: Path, seed: int, transactions: int
) -> None:
    chance = random.Random(seed)
    root, ddl = made_schema(chance), chance.random() < 0.5
    text = configuration(
        database.dsn,
        worker_lines=f'batch_rows = {chance.choice((7, 200))}\nbackfill_page_rows = 3\nlog_level = "debug"',
        indexes={"docs": {"text": root.template()}},
    )
    pipeline = make_pipeline(text + root.section("indexes.docs"))
    for statement in statements(root, chance):
        pipeline.source.execute(statement)
    Writer(database.dsn, root, seed).run(20, 20)
    environment = {}
    if chance.random() < 0.5:
        (directory / "sitecustomize.py").write_text(FEW)
        environment["PYTHONPATH"] = os.pathsep.join((str(directory), str(ROOT)))
    index = msgspec.structs.replace(pipeline.config.indexes["docs"], table="expected")
    pipeline.config = msgspec.structs.replace(pipeline.config, indexes={"docs": index})
    worker = pipeline.start(**environment)
    if chance.random() < 0.5:
        pipeline.live()
    writers = [Writer(database.dsn, root, seed * 10 + number, ddl=ddl) for number in range(2)]
    threads = [
        threading.Thread(target=one.run, args=(transactions, most)) for one, most in zip(writers, (3, 25), strict=True)
    ]
    for thread in threads:
        thread.start()
    for _ in range(chance.randint(0, 2)):
        pipeline.event("batch_applied")
        pipeline.stop(worker, signal.SIGKILL)
        worker = pipeline.start(**environment)
    for thread in threads:
        thread.join()
    pipeline.live()
    # A column's other type may pause the index still; the worker resumes it by itself.
    until(
        partial(pipeline.reached, "docs", pipeline.position()),
        pipeline.tail,
        progress=partial(pipeline.times, "batch_applied"),
    )
    until(pipeline.in_step_now, lambda: f"seed {seed}: {pipeline.difference}; {pipeline.tail()}")
    if not ddl:
        assert pipeline.times("index_paused") == 0, f"seed {seed}: {pipeline.tail()}"


@pytest.mark.proof_from(1)
@pytest.mark.parametrize("seed", range(3))
def test_documents_are_what_one_statement_says(
    make_pipeline: Callable[[str], Pipeline], database: Database, tmp_path: Path, seed: int
) -> None:
    documents_follow(make_pipeline, database, tmp_path, seed, 40)


@pytest.mark.proof
@pytest.mark.parametrize("seed", range(100, 140))
def test_documents_are_what_one_statement_says_for_many_seeds(
    make_pipeline: Callable[[str], Pipeline], database: Database, tmp_path: Path, seed: int
) -> None:
    documents_follow(make_pipeline, database, tmp_path, seed, 150)
