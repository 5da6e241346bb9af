"""The models of generations: whether a configuration has an embedder that makes their vectors.

The worker's configuration counts: without the embedder, changed texts get no vectors in that generation, and the index
is paused if the generation is live. A command may be run with another file. So the worker notes for each generation
whether it has an embedder, and a command that switches goes by that note as well as by its own file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from cdcsync.config import Config
from cdcsync.config.names import own_name
from cdcsync.embedders import Embedder
from cdcsync.errors import SetupError
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection
from cdcsync.preflight import build_embedders
from cdcsync.preflight.findings import Finding
from cdcsync.preflight.generations import embedder_of
from cdcsync.process.crashpoints import crash_point
from cdcsync.target.generations import Generation, Generations
from cdcsync.target.registry import Registry


async def note_embedders(connection: Connection, config: Config, embedders: Mapping[str, Embedder]) -> None:
    """Note for each generation of a pipeline's indexes whether the worker has an embedder that makes its vectors.

    Paused indexes are included, because a rollback may be what resumes them. Only the holder of the pipeline's lock may
    do this.
    """
    schema = config.target.schema
    generations = Generations(schema)
    with speaking_of("target"):
        entries = await Registry(schema).all(connection)
        for name, present in (await generations.all(connection)).items():
            entry = entries.get(name)
            if entry is None or entry.slot != config.source.slot or own_name(name) not in config.indexes:
                continue
            for one in present:
                found = embedder_of(one, embedders) is not None
                if found != one.has_embedder:
                    await generations.note_embedder(connection, name, one.generation, found)
                    crash_point("embedder of a generation noted")


class Models(NamedTuple):
    """The embedders of a command's configuration, and what is wrong with those that cannot be used."""

    embedders: Mapping[str, Embedder]
    findings: Sequence[Finding]

    @classmethod
    def of(cls, config: Config) -> Models:
        """Return the embedders that a configuration has."""
        findings: list[Finding] = []
        return cls(build_embedders(config, findings), findings)

    def require(self, one: Generation, *, confirmed: bool) -> None:
        """Refuse a generation that could not be kept: the index would be paused with the switch.

        :param confirmed: whether the worker may lack its embedder.
        :raises SetupError: this configuration has no embedder that makes its vectors, or the worker's has none and may
            not lack it.
        """
        made = f"makes the vectors of generation {one.generation}, by {one.model} ({one.dimensions} dimensions)"
        where = f"index {one.index_name}"
        if embedder_of(one, self.embedders) is None:
            unusable = "".join(f"; {one.where} cannot be used: {one.message}" for one in self.findings)
            raise SetupError(
                f"no [embedders] section {made}: the index would be paused",
                where=where,
                hint=f"put its section back beside the other, under any name, and start the worker again{unusable}",
            )
        if one.has_embedder is False and not confirmed:
            raise SetupError(
                f"no [embedders] section of the configuration that the worker was last started with {made}: the index"
                " would be paused",
                where=where,
                hint="put its section back into the worker's configuration, under any name, and start the worker again;"
                " --yes switches all the same",
            )
