"""A provider that serves another model under the same name is noticed by the vector of a fixed text."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import anyio
import numpy as np
import pytest
from prometheus_client import generate_latest
from structlog.testing import capture_logs

from cdcsync.config import HashEmbedder
from cdcsync.embedders import Kind, Vectors
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.errors import EmbedError
from cdcsync.flows.embed import BacklogPool, Dispatcher, probe_for_ever
from cdcsync.metrics import Metrics
from cdcsync.model.embedding import TOLERANCE, Probe, Problem, cosine_distance
from cdcsync.postgres.sessions import Connection
from cdcsync.target.embedders import note_embedders, read_embedders, read_probe, read_probes, write_probe
from tests.support.indexes import SCHEMA, OpenIndex, until
from tests.support.servers import Database

pytestmark = [pytest.mark.server, pytest.mark.anyio]

LONG_AGO = timedelta(days=3)


class Provider(Hashing):
    """An embedder whose vectors turn by an angle, as if another model answered."""

    angle = 0.0
    fails = False
    asked = 0

    async def embed(self, texts: Sequence[str], *, kind: Kind = "document") -> Vectors:
        self.asked += 1
        if self.fails:
            raise EmbedError("no")
        vectors = await super().embed(texts, kind=kind)
        turned = np.roll(vectors, 1, axis=1)
        made: Vectors = (vectors * np.cos(self.angle) + turned * np.sin(self.angle)).astype(np.float32)
        return made


@pytest.fixture
async def connection(open_index: OpenIndex, connect_target: Callable[[], Awaitable[Connection]]) -> Connection:
    await open_index()
    return await connect_target()


@asynccontextmanager
async def probing(target: Database, provider: Provider) -> AsyncIterator[Dispatcher]:
    """Probe without waiting for a minute."""
    metrics, pool = Metrics(), BacklogPool(target.dsn, SCHEMA, 1)
    dispatcher = Dispatcher(provider, metrics, anyio.current_time)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(dispatcher.run)
        tasks.start_soon(lambda: probe_for_ever(pool, SCHEMA, "s", {provider.name: dispatcher}, metrics, look_s=0.01))
        yield dispatcher
        tasks.cancel_scope.cancel()
    await pool.aclose()


def named() -> Provider:
    return Provider("hosted", HashEmbedder(dimensions=8))


async def age(connection: Connection, by: timedelta = LONG_AGO) -> None:
    """Have the last probe be days old, or still to come if the clock went back."""
    probe = await read_probe(connection, SCHEMA, "s", "hosted")
    assert probe is not None
    then = Probe(probe.identity, probe.vector, probe.made_at - LONG_AGO, probe.checked_at - by, probe.drift)
    await write_probe(connection, SCHEMA, "s", "hosted", then)


async def probed(connection: Connection) -> Probe | None:
    return (await read_probes(connection, SCHEMA, "s")).get("hosted")


async def recent(connection: Connection) -> Probe | None:
    """Return the last probe if it is of today."""
    probe = await probed(connection)
    return probe if probe is not None and abs(datetime.now(UTC) - probe.checked_at) < timedelta(hours=1) else None


@pytest.mark.parametrize(
    ("angle", "changed", "by"),
    [(0.0, False, LONG_AGO), (0.01, False, LONG_AGO), (0.5, True, LONG_AGO), (0.5, True, -LONG_AGO)],
)
async def test_a_provider_is_probed_once_a_day_and_known_by_its_first_vector(
    connection: Connection, target: Database, angle: float, changed: bool, by: timedelta
) -> None:
    provider = named()
    async with probing(target, provider):
        first = await until(lambda: probed(connection))
    assert first is not None
    assert (first.drift, first.changed, provider.asked) == (0.0, False, 1)
    provider.angle = angle
    async with probing(target, provider):
        await anyio.wait_all_tasks_blocked()
    assert provider.asked == 1

    await age(connection, by)
    with capture_logs() as logs:
        async with probing(target, provider) as dispatcher:
            again = await until(lambda: recent(connection))
            assert again is not None
            drift = again.drift
            await until(lambda: _gauge(dispatcher._metrics, drift))
    assert (again.changed, provider.asked) == (changed, 2)
    assert [one["event"] for one in logs if one["event"] == "model_changed"] == ["model_changed"] * changed
    assert again.made_at < again.checked_at - LONG_AGO / 2


async def _gauge(metrics: Metrics, drift: float) -> bool:
    return f'cdcsync_embedder_drift{{embedder="hosted"}} {drift}'.encode() in generate_latest(metrics.registry)


async def test_a_provider_that_fails_is_a_problem_though_nothing_else_uses_it_and_is_probed_once_it_works(
    connection: Connection, target: Database
) -> None:
    provider = named()
    provider.fails = True
    async with probing(target, provider) as dispatcher:
        problem = await until(lambda: _problem(dispatcher))
        assert problem is not None
        assert problem.message == "no"
        assert await probed(connection) is None
        provider.fails = False
        await until(lambda: probed(connection))
        provider.angle = 1.0
        await connection.execute("UPDATE cdcsync.embedders SET probe = NULL")
        again = await until(lambda: probed(connection))
    assert again is not None
    assert again.drift == 0.0


async def _problem(dispatcher: Dispatcher) -> Problem | None:
    return dispatcher.problem


async def test_another_configured_model_begins_anew(connection: Connection, target: Database) -> None:
    now = datetime.now(UTC)
    await write_probe(connection, SCHEMA, "s", "hosted", Probe("another", (1.0, 0.0), now, now, 0.9))
    await note_embedders(connection, SCHEMA, "s", {"hosted": (await read_embedders(connection, SCHEMA, "s"))["hosted"]})
    kept = await probed(connection)
    assert kept is not None
    assert (kept.identity, kept.vector, kept.changed) == ("another", (), True)
    provider = named()
    async with probing(target, provider):
        await until(lambda: _by(connection, provider.identity))
    probe = await probed(connection)
    assert probe is not None
    assert probe.drift == 0.0


async def _by(connection: Connection, identity: str) -> bool:
    probe = await probed(connection)
    return probe is not None and probe.identity == identity


def test_distances_are_of_directions() -> None:
    assert cosine_distance((1, 0), (2, 0)) == 0.0
    assert cosine_distance((1, 0), (0, 3)) == 1.0
    assert cosine_distance((1, 0), (1, 0, 0)) == cosine_distance((0, 0), (1, 0)) == 2.0
    assert 0 < TOLERANCE < 0.1
