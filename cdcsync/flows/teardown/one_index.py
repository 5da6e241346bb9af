"""`drop`: removes one index from the target, and its tables from our publication."""

from __future__ import annotations

import contextlib

from cdcsync.config import Config
from cdcsync.config.names import beside_name
from cdcsync.errors import SetupError
from cdcsync.flows.teardown.both_servers import SourcePart, connect_source, dropped
from cdcsync.flows.teardown.publication import Step, of_tables
from cdcsync.flows.teardown.workers import hold_index, raise_fence
from cdcsync.postgres.errors import speaking_of
from cdcsync.process.crashpoints import crash_point
from cdcsync.source.families import single_names
from cdcsync.source.publications import unpublish_statement
from cdcsync.target.approvals import Approvals
from cdcsync.target.belongings import drop_relations, relations_of
from cdcsync.target.embedders import forget_embedders
from cdcsync.target.registry import Registry
from cdcsync.target.version import open_target


async def drop_index(config: Config, index: str) -> list[Step]:
    """Drop one index: its view, its tables and its entry in the target, and its table's place in our publication.

    Slot and pipeline stay. A worker that still follows the index must have released it first.

    :raises SetupError: there is no such index, a worker follows it, or something depends on it; nothing was dropped.
    :raises SourceUnavailable, TargetUnavailable: a server does not answer; dropping again continues from there.
    """
    schema = config.target.schema
    async with (
        await open_target(config.target, application_name="cdcsync drop") as target,
        contextlib.AsyncExitStack() as stack,
    ):
        source, elsewhere = await connect_source(config, target, application_name="cdcsync drop")
        await stack.enter_async_context(source)
        with speaking_of("target"):
            entries = await Registry(schema).all(target)
            entry = entries.get(index)
            if entry is None or entry.hidden or entry.slot != config.source.slot:
                owner = "" if entry is None else f" of this pipeline: it belongs to slot {entry.slot}"
                known = (
                    ", ".join(
                        name for name, one in entries.items() if one.slot == config.source.slot and not one.hidden
                    )
                    or "none"
                )
                raise SetupError(
                    f"there is no index {index}{owner}", where=f"schema {schema}", hint=f"those there are: {known}"
                )
            if await hold_index(target, config, entry, wait=True):
                await raise_fence(target, config)
            both = [index, beside_name(index)]
            relations = await relations_of(target, schema, both)
            others = {table for name, one in entries.items() if name not in both for table in one.tables}
            own = {table for name in both if name in entries for table in entries[name].tables}
        others |= {str(table) for name, one in config.indexes.items() if name != index for table in one.followed}
        with speaking_of("source"):
            others = await single_names(source, others)
            mine = await single_names(source, own)
            steps, leaving = await of_tables(source, config, mine, others, elsewhere)
        unpublish = unpublish_statement(config.source.publication, leaving) if leaving else None
        part = SourcePart(source, config.source.publication, unpublish, leaving)

        async def let_go() -> None:
            if unpublish is not None:
                with speaking_of("source", where=part.where):
                    async with source.transaction():
                        await source.execute(unpublish)
                        crash_point("table taken from its publication")
                    crash_point("publication without the table committed")

        async def drop() -> bool:
            """Drop it in the caller's transaction."""
            await drop_relations(target, schema, both, relations)
            # Last, as the tables may have been waited for: a worker may have begun to follow it meanwhile.
            now = await Registry(schema).find(target, index, lock=True)
            locked = now is not None and await hold_index(target, config, now)
            for name in both:
                await Registry(schema).remove(target, name)
            await Approvals(schema).remove(target, index)
            used = {one.embedder for name, one in config.indexes.items() if name != index}
            await forget_embedders(target, schema, config.source.slot, keep=used)
            return locked

        if await dropped(target, config, drop, let_go, part, relations=relations, where=f"index {index}"):
            await raise_fence(target, config)
        steps_in_target = [Step(f"index {index} in the target", "dropped")]
        if index in config.indexes:
            steps_in_target.append(
                Step(
                    f"[indexes.{index}] in the configuration",
                    "kept",
                    "remove it, or the next `cdcsync run` builds the index anew",
                )
            )
        return [*steps_in_target, *steps]
