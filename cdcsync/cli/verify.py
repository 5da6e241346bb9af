"""`cdcsync verify`: compares an index with its source, and repairs the differences."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cdcsync.cli.commands import ConfigOption, IndexArgument, Invocation, JsonOption
from cdcsync.errors import EXIT_FAILED
from cdcsync.process.stopping import interruptible

if TYPE_CHECKING:
    from cdcsync.config import Config
    from cdcsync.flows.audit import EnsureWorker, Findings, Verification

commands = typer.Typer()

EPILOG = """Is the index what it should be? `cdcsync verify articles`

    Repair the differences: `cdcsync verify articles --repair`"""

MEANINGS = {
    "missing": "the source has the row, the index does not",
    "failed": "no document could be made of the row, or no vector of a text; `cdcsync failures` says why",
    "stale": "the index has another text",
    "orphaned": "the index has the document, the source has no row",
    "carried": "a carried column differs",
    "repeated": "the source has several rows with this key",
    "damaged": "chunks contradict their hash or each other",
    "vector_missing": "a chunk has no vector and waits for none",
    "vector_stale": "a vector is of another text, and no other is waited for",
    "vector_dimensions": "a vector has another number of dimensions",
    "vector_not_finite": "a vector holds NaN or infinity",
    "vector_twice": "a chunk has a vector in both tiers",
}


@commands.command(epilog=EPILOG)
def verify(
    context: typer.Context,
    index: IndexArgument,
    config: ConfigOption = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Read exactly the rows again that differ, then compare once more.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare an index with its source while both are in use. Exit status 1 if they differ.

    Both servers add up hashes of what they have; only where the sums differ are single documents compared, by the
    worker, as of one place in the stream. Where no worker runs, this command takes its place for that. A document that
    changes each time it is looked at stays undecided, which is no difference. With --repair
    the status is 1 only if something still differs afterwards.
    """
    import anyio

    from cdcsync import logs
    from cdcsync.cli import printing

    configuration = context.ensure_object(Invocation).load(config)
    logs.configure("error", configuration.worker.log_format)
    first, last, repaired = anyio.run(interruptible, _verify, configuration, index, repair)
    if as_json:
        import msgspec

        found = msgspec.to_builtins(first, enc_hook=str)
        after = None if last is first else msgspec.to_builtins(last, enc_hook=str)
        printing.print_json({**found, "repaired": repaired, "after_repair": after})
    else:
        _print(first)
        if last is not first:
            printing.console().print(f"repaired {repaired:,} documents; compared once more:")
            _print(last)
    if last.differs:
        raise typer.Exit(EXIT_FAILED)


async def _verify(config: Config, index: str, repair: bool) -> tuple[Verification, Verification, int]:
    """Return what was found at first, what was found last, and how many documents were repaired in between."""
    from collections.abc import AsyncIterator
    from contextlib import AsyncExitStack, asynccontextmanager, nullcontext

    import anyio
    import msgspec

    from cdcsync.flows import audit as flow
    from cdcsync.flows.replay import as_on_source, open_index
    from cdcsync.preflight.identity import connect_followed
    from cdcsync.target.version import open_target
    from cdcsync.worker.substitute import worker_ensured

    schema = config.target.schema
    async with AsyncExitStack() as stack:
        target = await stack.enter_async_context(
            await open_target(config.target, application_name="cdcsync verify", works=True)
        )
        source = await stack.enter_async_context(
            await connect_followed(config, target, application_name="cdcsync verify")
        )
        spec = await as_on_source(source, config.source.publication, await open_index(target, config, index))

        @asynccontextmanager
        async def ensure_worker() -> AsyncIterator[bool]:
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(_tell_what_may_be_in_the_way, config)
                async with worker_ensured(target, config) as ours:
                    yield ours
                tasks.cancel_scope.cancel()

        async def compare(ensure_worker: EnsureWorker = nullcontext) -> tuple[Verification, Findings | None]:
            missing = await flow.missing_of(target, schema, spec)
            lacks = tuple((*missing.tables, *missing.built))
            if missing.tables:
                return flow.Verification.of_nothing(index, lacks), None
            findings = await flow.verify(source, target, schema, spec, ensure_worker=ensure_worker)
            await flow.require_still_searched(target, schema, spec)
            equal = findings.verification.equal and not lacks
            return msgspec.structs.replace(findings.verification, missing=lacks, equal=equal), findings

        found, findings = await compare(ensure_worker)
        if findings is None or not findings.verification.differs or not repair:
            return found, found, 0
        async with ensure_worker():
            repaired = await flow.repair(target, schema, spec, findings)
            again, _ = await compare()
            return found, again, max(0, repaired - again.differences.get(flow.FAILED, 0))


async def _tell_what_may_be_in_the_way(config: Config) -> None:
    """Name the transactions that have been open for as long as a worker is waited for, which may wait for them."""
    from contextlib import suppress

    from cdcsync.cli.printing import print_warning
    from cdcsync.errors import CdcsyncError
    from cdcsync.flows.blocked import Blocked, outlast
    from cdcsync.postgres.sessions import Session
    from cdcsync.source.transactions import running_transactions

    def note(why: str | None) -> None:
        if why is not None:
            print_warning(why)

    blocked = Blocked("this takes long; the worker may have to wait for", note, lambda sessions: None, surely=False)
    with suppress(CdcsyncError):
        async with Session(config.source.dsn, "source", application_name="cdcsync verify") as session:
            source = await session.connection()
            await outlast(source, await running_transactions(source), blocked)


def _print(found: Verification) -> None:
    from rich.text import Text

    from cdcsync.cli.printing import console, plain

    out = console()
    rate = f", {found.documents / found.seconds:,.0f} a second" if found.seconds else ""
    out.print(f"{found.index}: {found.documents:,} documents in {found.seconds:,.1f} s{rate}", markup=False)
    for problem, count in found.differences.items():
        keys = ", ".join(plain(" | ".join(key)) for key in found.examples[problem][:5])
        out.print(Text.assemble(("✗ ", "bold red"), f"{count:,} {problem}: {MEANINGS[problem]}; {keys}"))
    if found.vectors_orphaned:
        out.print(
            Text.assemble(
                ("✗ ", "bold red"),
                f"{found.vectors_orphaned:,} vectors, or texts that wait for one, belong to no chunk",
            )
        )
    if found.missing:
        names = ", ".join(map(plain, found.missing))
        out.print(
            Text.assemble(("✗ ", "bold red"), f"missing in the target: {names}; the worker makes them again by itself")
        )
    if found.undecided:
        many = "documents" if found.undecided > 1 else "document"
        out.print(
            Text.assemble(("! ", "yellow"), f"{found.undecided:,} {many} changed at every look: nothing is known")
        )
    if found.waiting:
        out.print(Text.assemble(("· ", "dim"), f"{found.waiting:,} chunks wait for their vector"))
    if found.equal:
        out.print(Text.assemble(("✓ ", "green"), "the index equals the source"))
    elif not found.differs:
        out.print(
            Text.assemble(("✓ ", "green"), "everything else equals the source; start the command again for the rest")
        )
    elif found.differences.keys() == {"failed"} and not found.vectors_orphaned:
        out.print(Text(f"some rows have failed; `cdcsync failures {found.index} list` says why", "bold red"))
    elif found.differences or found.vectors_orphaned:
        out.print(Text(f"they differ; `cdcsync verify {found.index} --repair` repairs them", "bold red"))
