"""The embedders as the worker last noted them: problems, tokens used, and whether the model still answers alike."""

from __future__ import annotations

from datetime import UTC, datetime

import msgspec

from cdcsync.config import Config, model_name
from cdcsync.model.embedding import EmbedderState, Probe
from cdcsync.postgres.sessions import Connection
from cdcsync.status.model import EmbedderStatus, WorkerStatus
from cdcsync.status.tables import Notes
from cdcsync.target import embedders as noted_embedders


async def read_embedders(
    target: Connection,
    config: Config,
    present: set[str],
    worker: WorkerStatus,
    now: datetime,
    problems: list[str],
) -> dict[str, EmbedderStatus]:
    """Return the state of each embedder, by the word of the worker that runs."""
    of = target, config.target.schema, config.source.slot

    async def read() -> tuple[dict[str, EmbedderState], dict[str, Probe]]:
        noted = await noted_embedders.read_embedders(*of) if worker.running else {}
        return noted, await noted_embedders.read_probes(*of)

    notes = Notes(target, config.target.schema, present, problems)
    noted, probes = await notes.read(noted_embedders.TABLE, read) or ({}, {})
    found = {}
    for name in config.embedders:
        state = noted.get(name, EmbedderState())
        trouble, loads = state.problem, state.loads_wait_until
        if trouble is not None:
            problems.append(f"embedder {name}: {trouble}")
        elif loads is not None and loads > now:
            until = f"{loads:%Y-%m-%d %H:%M} UTC"
            problems.append(f"embedder {name}: texts of loads wait until {until}, as tokens_per_day is nearly used up")
        probe = probes.get(name)
        if probe is not None and probe.changed:
            problems.append(f"embedder {name}: {_changed(name, probe)}")
        status = EmbedderStatus(
            tokens_today=state.tokens if state.day == now.astimezone(UTC).date() else 0,
            loads_wait_until=loads,
            model=model_name(config.embedders[name]),
            drift=None if probe is None else round(probe.drift, 6),
            probed_at=None if probe is None else probe.checked_at,
        )
        if trouble is not None:
            status = msgspec.structs.replace(
                status,
                problem=trouble.message,
                hint=trouble.hint,
                since=trouble.since,
                tried_again_at=trouble.until,
            )
        found[name] = status
    return found


def _changed(name: str, probe: Probe) -> str:
    return (
        f"it makes other vectors of the same text than on {probe.made_at:%Y-%m-%d} (cosine distance {probe.drift:.3f}),"
        " so the provider serves another model under the same name: name a fixed version of the model, or embed each of"
        ' its indexes again; docs/embedders.md, "Another model under the same name", says how'
    )
