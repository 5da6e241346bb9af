"""`cdcsync evaluate`: measures how well an index's searches find what exact ones would."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cdcsync.cli.commands import ConfigOption, Invocation, JsonOption

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.target.evaluations import Evaluation

EPILOG = """How good is the search? `cdcsync evaluate articles`

    What does it cost to look further? `cdcsync evaluate articles --ef-search 40 --ef-search 100 --ef-search 400`"""


def evaluate(
    context: typer.Context,
    index: Annotated[str, typer.Argument(metavar="INDEX", help="The index's name in the configuration.")],
    config: ConfigOption = None,
    queries: Annotated[int, typer.Option(min=1, max=100_000, help="How many stored vectors to search with.")] = 100,
    k: Annotated[int, typer.Option("-k", min=1, max=999, help="How many neighbours to look for.")] = 10,
    ef_search: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N",
            min=1,
            max=1000,
            help="How far HNSW looks; may be given several times. Else as far as sessions do without asking.",
            show_default=False,
        ),
    ] = None,
    where: Annotated[
        str | None,
        typer.Option(
            metavar="SQL", help="Find only what meets this condition on key and carried columns.", show_default=False
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure how much of what an exact search finds is found by searches, and how long both take.

    Takes stored vectors at random as queries, leaves out the chunk that each is of, and compares distances. The exact
    searches read the whole table. The outcome is stored for the status, where the role may write; not with --where.
    """
    import anyio

    from cdcsync.cli import printing

    configuration = context.ensure_object(Invocation).load(config)
    found, note = anyio.run(_evaluate, configuration, index, queries, k, ef_search or [], where)
    if as_json:
        import msgspec

        printing.print_json({**msgspec.to_builtins(found, enc_hook=str), "where": where, "not_stored": note})
    else:
        _print(found, where)
        if note is not None:
            printing.console().print(f"not stored: {note}", markup=False)


async def _evaluate(
    config: Config, name: str, queries: int, k: int, ef_search: list[int], where: str | None
) -> tuple[Evaluation, str | None]:
    """Return what was measured, and why it was not stored, if it was not."""
    from cdcsync.flows.evaluate import recall
    from cdcsync.postgres.sessions import connect, speaking_of
    from cdcsync.target import evaluations
    from cdcsync.target.search import stored_spec

    index = config.index_named(name)
    schema = config.target.schema
    async with await connect(config.target.dsn, "target", application_name="cdcsync evaluate") as connection:
        spec = await stored_spec(connection, schema, name, index)
        found = await recall.evaluate(connection, schema, spec, queries=queries, k=k, ef_search=ef_search, where=where)
        if where is not None:
            return found, "a condition's recall is not the index's"
        with speaking_of("target", where=f"index {name}"):
            return found, await evaluations.store(connection, schema, found)


def _print(found: Evaluation, where: str | None) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console(wrap=True)
    condition = "" if where is None else f" where {plain(where)}"
    searches = "1 stored vector" if found.queries == 1 else f"{found.queries:,} stored vectors"
    out.print(Text(f"{found.index}, generation {found.generation}: the {found.k} nearest{condition} of {searches}"))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, header_style="bold")
    for heading in ("ef_search", f"recall@{found.k}", "mean ms", "p95 ms"):
        table.add_column(heading, justify="right")
    table.add_column("by")
    for one in found.measured:
        by = "HNSW" if one.by_hnsw else "whole table"
        table.add_row(str(one.ef_search), f"{one.recall:.4f}", f"{one.mean_ms:.2f}", f"{one.p95_ms:.2f}", by)
    table.add_row("exact", "1.0000", f"{found.exact_mean_ms:.2f}", f"{found.exact_p95_ms:.2f}", "whole table")
    out.print(table)
    if not all(one.by_hnsw for one in found.measured):
        out.print("where it says so, the planner found it cheaper to read the whole table: nothing is missed then")
