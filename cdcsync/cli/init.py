"""`cdcsync init`: from a table to a configuration file, and the SQL that prepares the database for it."""

from __future__ import annotations

import re
import sys
import unicodedata
from collections.abc import Collection
from enum import StrEnum
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cdcsync.cli.commands import DEFAULT_CONFIG
from cdcsync.errors import SetupError, UsageError
from cdcsync.process.files import write_files
from cdcsync.process.stopping import interruptible
from cdcsync.process.terminals import harmless

if TYPE_CHECKING:
    from cdcsync.config import QualifiedName
    from cdcsync.preflight.administration import Prepared
    from cdcsync.preflight.proposal import Look, Proposal

commands = typer.Typer()

EPILOG = """In a terminal, with questions: `cdcsync init postgresql://postgres@localhost/shop --table articles`

    In a script: `cdcsync init postgresql://postgres@localhost/shop --table articles --text '{title}' > prepare.sql`"""

SLOT, PUBLICATION, SCHEMA, VIEW_SCHEMA, WORKER_ROLE = "cdcsync", "cdcsync", "cdcsync", "public", "cdcsync"
"""The configuration's defaults, which the written file keeps."""


class Model(StrEnum):
    """The source of the vectors."""

    local = "local"
    onnx = "onnx"
    openai = "openai"
    hash = "hash"


_EMBEDDERS = {
    Model.local: """# A model on this machine: pip install 'cdcsync[local]'
[embedders.local]
type = "sentence-transformers"
model = "sentence-transformers/all-MiniLM-L6-v2"
""",
    Model.onnx: """# A model on this machine, without torch: pip install 'cdcsync[onnx]'
[embedders.onnx]
type = "onnx"
model = "sentence-transformers/all-MiniLM-L6-v2"
""",
    Model.openai: """# The key is read from the environment, so that it is not in this file.
[embedders.openai]
type = "openai"
model = "text-embedding-3-small"
dimensions = 1536
api_key = "${OPENAI_API_KEY}"
""",
    Model.hash: """# Feature hashing needs no download, and finds equal words but not meaning. For a trial only.
[embedders.hash]
type = "hash"
""",
}


@commands.command(epilog=EPILOG)
def init(
    dsn: Annotated[
        str, typer.Argument(metavar="DSN", help="The database with the table, as someone who may see its catalog.")
    ],
    table: Annotated[str, typer.Option("--table", metavar="TABLE", help="The table to index, as in SQL.")],
    text: Annotated[
        str | None,
        typer.Option(metavar="TEMPLATE", help="What is embedded and searched: columns in braces.", show_default=False),
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Columns carried along, to filter by; '' for none.", show_default=False),
    ] = None,
    indexed: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Those of them that get a b-tree; '' for none.", show_default=False),
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", help="The index's name; else the table's.", show_default=False)
    ] = None,
    embedder: Annotated[
        Model,
        typer.Option(help="A model on this machine (by torch, or by ONNX Runtime), OpenAI's, or hashing for a trial."),
    ] = Model.local,
    role: Annotated[str, typer.Option(help="The role that the worker will use; it need not exist yet.")] = WORKER_ROLE,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The file to write.")] = Path(
        DEFAULT_CONFIG
    ),
    yes: Annotated[bool, typer.Option("--yes", help="Ask nothing; take what is proposed.")] = False,
) -> None:
    """Look at a table and write a configuration for it, with the SQL that prepares the database.

    Proposes which columns are text, which are carried along to filter by, and what names a row. In a terminal it asks
    about each; otherwise options say what differs from the proposal. Writes the file, prints on standard output the SQL
    that is left for an administrator to run, and changes nothing in the database.
    """
    import anyio

    if output.exists():
        raise UsageError(
            "the file exists already", where=str(output), hint="name another one with --output, or move it away"
        )
    index = _named(name) if name else _index_name(table)
    seen, prepared, slot = anyio.run(interruptible, _look, dsn, table, role)
    chosen = _choose(seen, text, _split(columns), _split(indexed), ask=sys.stdin.isatty() and not yes)
    content = _render(dsn, role, slot, index, seen, chosen, embedder)
    _check(content, seen, index)
    _write(output, content)
    print(harmless(f"wrote {output}: index {index} of {seen.table.name}"), file=sys.stderr)
    _print_sql(seen, prepared, chosen, role)
    print(
        "\nThen: cdcsync check, and cdcsync run" + ("" if output.name == DEFAULT_CONFIG else f" (-c {output})"),
        file=sys.stderr,
    )


async def _look(dsn: str, table: str, role: str) -> tuple[Look, Prepared, str]:
    from cdcsync.config import QualifiedName
    from cdcsync.errors import ConfigError
    from cdcsync.postgres.sessions import connect
    from cdcsync.preflight.administration import read_prepared
    from cdcsync.preflight.proposal import look
    from cdcsync.source.catalog import slot_names

    try:
        name = QualifiedName.parse(table)
    except ConfigError as error:
        raise UsageError(error.message, where="--table", hint=error.hint) from error
    async with await connect(dsn, "source", application_name="cdcsync init") as connection:
        seen = await look(connection, name)
        prepared = await read_prepared(
            connection, seen.table, role, publication=PUBLICATION, schema=SCHEMA, view_schema=VIEW_SCHEMA
        )
        slot = _free_slot(await slot_names(connection), connection.info.dbname)
    return seen, prepared, slot


def _free_slot(taken: Collection[str], database: str) -> str:
    """Return a slot's name that nothing on the server has yet: each pipeline needs one of its own."""
    stem = f"{SLOT}_{re.sub(r'[^a-z0-9_]', '_', database.lower())}"[:56]
    names = chain([SLOT, stem], (f"{stem}_{number}" for number in count(2)))
    return next(name for name in names if name not in taken)


def _choose(
    seen: Look, text: str | None, columns: list[str] | None, indexed: list[str] | None, *, ask: bool
) -> Proposal:
    """Return what the index is made of: options first, then answers, then what is proposed."""
    from cdcsync.preflight.proposal import propose

    proposal = propose(seen, text=text, columns=columns, indexed=indexed)
    if not ask:
        return proposal
    named = harmless(f"{seen.table.name}: a row is named by {', '.join(proposal.key)}.")
    print(f"{named} Enter keeps what is in brackets.", file=sys.stderr)
    if text is None:
        shown = proposal.text.replace("\n", "\\n")
        text = _ask("What is embedded and searched, with columns in braces", shown).replace("\\n", "\n")
        proposal = propose(seen, text=text, columns=columns, indexed=indexed)
    if columns is None:
        columns = _split(_ask("Columns carried along, to filter by (- for none)", ",".join(proposal.columns)))
        proposal = propose(seen, text=text, columns=columns, indexed=indexed)
    if indexed is None:
        indexed = _split(_ask("Those that searches often filter by (- for none)", ",".join(proposal.indexed)))
    return propose(seen, text=text, columns=columns, indexed=indexed)


def _ask(question: str, proposed: str) -> str:
    """Ask on standard error: standard output is for the SQL.

    :raises typer.Abort: the input ended.
    """
    print(f"{question} [{harmless(proposed)}]: ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise typer.Abort
    return line.strip() or proposed


def _split(names: str | None) -> list[str] | None:
    if names is None:
        return None
    return [] if names.strip() == "-" else [name.strip() for name in names.split(",") if name.strip()]


_LATIN = str.maketrans({"æ": "ae", "œ": "oe", "ø": "o", "đ": "d", "ð": "d", "þ": "th", "ł": "l", "ı": "i", "ŋ": "n"})
"""Letters that Unicode does not decompose, after `casefold`, which makes ss of ß."""


def _index_name(table: str) -> str:
    """Return the table's name as an index's may be: lower case, digits and single underscores, at most 40.

    Letters lose their accents; a name without Latin letters and digits gives `documents`.
    """
    last = re.sub(r"^.*\.(?=[^.]+$)", "", table).strip('"')
    latin = unicodedata.normalize("NFKD", last).casefold().translate(_LATIN)
    plain = re.sub(r"[^a-z0-9]+", "_", re.sub(r"[\u0300-\u036f]", "", latin))[:40].strip("_") or "documents"
    return plain if plain[0].isalpha() else f"_{plain}"[:40]


def _named(name: str) -> str:
    """Return the name that `--name` gives.

    :raises UsageError: no index can have it.
    """
    from msgspec import inspect

    from cdcsync.config.values import RULE, IndexName

    kind = inspect.type_info(IndexName)
    assert isinstance(kind, inspect.Metadata)
    assert kind.extra is not None
    if fault := kind.extra[RULE](name):
        raise UsageError(fault, where="--name", hint="leave it out, and the index is named after the table")
    return name


def _render(dsn: str, role: str, slot: str, index: str, seen: Look, chosen: Proposal, embedder: Model) -> str:
    """Return the file's text."""
    from cdcsync.config.rendering import toml_text

    address, secrets = _address(dsn, role)
    left_out = (
        f"# {', '.join(secrets)}: left out of this; add ${{NAME}} of the environment for each.\n" if secrets else ""
    )
    named = "" if slot == SLOT else f"# The server has a slot {SLOT} already.\nslot = {toml_text(slot)}\n"
    listed = [f"[{', '.join(map(toml_text, names))}]" for names in (chosen.columns, chosen.indexed)]
    return f"""# Written by `cdcsync init`. `cdcsync config example` explains every key; omitted keys have defaults.

[source]
# The password: PGPASSWORD, ~/.pgpass, or ${{NAME}} of the environment in here.
{left_out}dsn = {toml_text(address)}
{named}
# The index is kept in the same database, schema {SCHEMA}. For another one, which needs pgvector:
# [target]
# dsn = "postgresql://{harmless(role)}@host/database"

{_EMBEDDERS[embedder]}
[indexes.{index}]
table = {toml_text(str(seen.table.name))}
# The text to embed and search. NULL renders as nothing. The key of a row: {harmless(", ".join(chosen.key))}.
text = {toml_text(chosen.text)}
# Carried along as they are, to filter by.
columns = {listed[0]}
# Those that get a b-tree: if a filter is selective, PostgreSQL then compares the few matching rows exactly.
indexed = {listed[1]}
embedder = "{embedder.value}"
"""


def _address(dsn: str, role: str) -> tuple[str, list[str]]:
    """Return a DSN with the worker's role and without secrets, and which it had besides a password.

    A URI stays one, unless it has parameters, or a password that would end a URI of other schemes.
    """
    from urllib.parse import quote, urlsplit

    from psycopg import conninfo

    from cdcsync.config.redaction import REDACTED, redact_dsn

    parts = urlsplit(dsn)
    if parts.scheme in ("postgresql", "postgres") and not (parts.query or parts.fragment):
        return f"{parts.scheme}://{quote(role)}@{parts.netloc.rpartition('@')[2]}{parts.path}", []
    settings = conninfo.conninfo_to_dict(redact_dsn(dsn))
    secrets = [name for name, value in settings.items() if value == REDACTED]
    kept = {name: value for name, value in settings.items() if name not in secrets}
    return conninfo.make_conninfo("", **{**kept, "user": role}), [name for name in secrets if name != "password"]


def _check(content: str, seen: Look, index: str) -> None:
    """Refuse what `check` would refuse of the file.

    :raises UsageError: a column that was named does not exist, or an option has no meaning.
    """
    from cdcsync.config import parse
    from cdcsync.documents.documents import make_documents
    from cdcsync.errors import ConfigError
    from cdcsync.preflight.tables import column_faults

    environ = dict.fromkeys(re.findall(r"\$\{(\w+)\}", content), "x")
    try:
        section = parse(content, environ, where="the options").indexes[index]
        documents = make_documents(section, where=f"indexes.{index}")
    except ConfigError as error:
        raise UsageError(error.message, where=error.where, hint=error.hint) from error
    if fault := next(iter(column_faults(index, section, documents, seen.table)), None):
        raise UsageError(fault.message, where=fault.where, hint=fault.hint)


def _write(output: Path, content: str) -> None:
    try:
        write_files({output: (content.encode(), None)})
    except OSError as error:
        raise SetupError(
            f"cannot be written: {error.strerror}", where=str(output), hint="name another file with --output"
        ) from error


def _print_sql(seen: Look, prepared: Prepared, chosen: Proposal, role: str) -> None:
    from cdcsync.preflight.administration import statements
    from cdcsync.preflight.proposal import identity_statement

    name: QualifiedName = seen.table.name
    left = [
        *filter(None, [identity_statement(chosen, name)]),
        *statements(prepared, name, role, publication=PUBLICATION, schema=SCHEMA, view_schema=VIEW_SCHEMA),
    ]
    database = harmless(prepared.database)  # a comment, which must not end before its line does
    if left:
        print(f"-- For an administrator of the database {database}, before the worker's first start.")
        sql = "\n".join(left)
        # Exactly as it is for psql; on a terminal nothing acts on it, and a name that would is not found.
        print(harmless(sql, lines=True) if sys.stdout.isatty() else sql)
    else:
        print(f"-- The database {database} is prepared: there is nothing left to run.")
