"""Every page of the documentation is read and typed: each command, each statement, each configuration, each program."""

from __future__ import annotations

import re
import shlex
import socket
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from cdcsync.config import parse
from cdcsync.errors import ConfigError
from tests import ROOT
from tests.support.configs import configuration
from tests.support.pages import PAGES, Machine, blocks, inline_commands, parse_command
from tests.support.servers import Database, Server, fresh_database

pytestmark = [pytest.mark.server, pytest.mark.slow]

FOLLOWED = {
    "tutorial.md": "SELECT",
    "README.md": "CREATE TABLE articles (id int PRIMARY KEY, tenant int, title text, body text);"
    " INSERT INTO articles SELECT i, 1, 'login', 'forgot it ' || i FROM generate_series(1, 20) AS i",
}
"""Pages that are typed from their beginning to their end, with what their reader has before."""

PREPARED = """
[source]
dsn = "{dsn}"
slot = "s_{name}"
[worker]
listen = "127.0.0.1:{port}"
[serve]
listen = "127.0.0.1:{served}"
tokens_file = "tokens.json"
[embedders.minilm]
type = "hash"
dimensions = 3
[indexes.articles]
table = "public.articles"
text = "{{title}}\\n\\n{{body}}"
columns = ["tenant", "status", "created_at", "body_length"]
embedder = "minilm"
[indexes.tickets]
table = "public.tickets"
text = "{{subject}}"
columns = ["tenant", "status"]
embedder = "minilm"
"""

TABLES = """
CREATE TABLE articles (id int PRIMARY KEY, tenant int, status text, title text, body text,
    created_at timestamptz DEFAULT now(), body_length int GENERATED ALWAYS AS (length(body)) STORED);
INSERT INTO articles SELECT i, 1 + i % 2, 'open', 'password ' || i, 'forgot my login ' || i
    FROM generate_series(1, 20) AS i;
CREATE TABLE tickets (id int GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant int, status text, subject text);
CREATE TABLE readings (station int NOT NULL, taken_at timestamptz NOT NULL, value float);
INSERT INTO tickets (tenant, status, subject) SELECT 1, 'open', 'forgot my login ' || i FROM generate_series(1, 20) AS i
"""


def free_ports() -> dict[str, int]:
    """Return a free port for each that pages name."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    ports = {name: one.getsockname()[1] for name, one in zip(("9477", "9478"), sockets, strict=True)}
    for one in sockets:
        one.close()
    return ports


@pytest.fixture(scope="module")
def prepared(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine where two indexes are live and a worker runs, for the pages that suppose one."""
    directory, ports = tmp_path_factory.mktemp("machine"), free_ports()
    with fresh_database(server) as database:
        database.execute(TABLES)
        machine = Machine(directory, database, ports, follow=True)
        machine.config.write_text(
            PREPARED.format(dsn=database.dsn, name=database.name, port=ports["9477"], served=ports["9478"])
        )
        questions = directory / "questions"
        (questions / "qrels").mkdir(parents=True)
        (questions / "queries.jsonl").write_text('{"_id": "q", "text": "password 3"}\n')
        (questions / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\t3\t1\n")
        machine.start(["run"])
        machine.follow = False
        try:
            yield machine
        finally:
            machine.close()


@pytest.fixture
def bare(database: Database, tmp_path: Path) -> Iterator[Machine]:
    """A machine with an empty database."""
    machine = Machine(tmp_path, database, free_ports(), follow=True)
    try:
        yield machine
    finally:
        machine.close()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in FOLLOWED], ids=lambda page: page.name)
def test_every_block_of_the_page_works_where_an_index_is_live(page: Path, prepared: Machine) -> None:
    for block in blocks(page):
        prepared.type(block)


@pytest.mark.parametrize("name", sorted(FOLLOWED))
def test_a_reader_who_types_the_page_from_its_beginning_gets_to_its_end(name: str, bare: Machine) -> None:
    page = next(page for page in PAGES if page.name == name)
    bare.database.execute(FOLLOWED[name])
    for block in blocks(page):
        bare.type(block)
    assert bare.config.exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_in_a_sentence_of_the_page_is_one_that_there_is(page: Path) -> None:
    for command in inline_commands(page):
        parse_command(shlex.split(command)[1:], whole=False)


def test_a_command_that_there_is_not_would_be_noticed() -> None:
    for wrong in (["serch"], ["search", "articles", "x", "--wher", "y"], ["status", "superfluous"]):
        with pytest.raises(typer.TyperException):
            parse_command(wrong)


def test_every_page_is_in_the_sites_table_of_contents() -> None:
    listed = (ROOT / "docs" / "index.md").read_text(encoding="utf-8").splitlines()
    assert [page.stem for page in (ROOT / "docs").glob("*.md") if page.stem not in {*listed, "index"}] == []


def test_the_reference_names_no_bound_that_is_refused() -> None:
    from docs.reference import PAGES as made

    with pytest.raises(ConfigError, match="expected a number above 0 and at most 1, got 0"):
        parse(configuration("dbname=nowhere", worker_lines="settle_share = 0"), {}, where="the test")
    assert "| `settle_share` | number above 0, to 1 |" in made["configuration.md"]()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_row_of_a_table_of_the_page_has_as_many_cells_as_its_head(page: Path) -> None:
    head: list[str] | None = None
    for line in page.read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            assert head is None or not line.strip(), f"{page.name}: a row is split before {line!r}"
            head = None
            continue
        cells = re.split(r"(?<!\\)\|", line)
        head = head or cells
        assert len(cells) == len(head), f"{page.name}: {line}"


def test_every_default_of_the_reference_is_a_value_as_the_file_has_it() -> None:
    rows = [
        line.split(" | ") for line in (ROOT / "docs/configuration.md").read_text().splitlines() if line[:3] == "| `"
    ]
    defaults = [cells[2].strip("`") for cells in rows if cells[2].startswith("`")]
    assert len(defaults) > 100
    for default in defaults:
        tomllib.loads(f"value = {default}")


def test_the_reference_is_what_the_code_says() -> None:
    from docs.reference import PAGES as made

    for name, make in made.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make(), "run `python docs/reference.py`"
