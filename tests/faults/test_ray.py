"""Embedding on a Ray cluster whose nodes, actors and head come and go.

The cluster is real, on loopback, and what its actors run asks the provider of the tests, which counts.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.to_thread
import pytest

from cdcsync.config import RayEmbedder, parse
from cdcsync.embedders import Embedder, make_embedder
from cdcsync.errors import EmbedderSetupError, EmbedError
from tests.support.provider import FakeProvider, Misdeed, slow
from tests.support.ray_clusters import RayCluster, actors, children, ray_cluster
from tests.support.servers import Database
from tests.support.workers import Pipeline, until

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(600)]

BATCH_TEXTS = 8
IN_FLIGHT = 2

PROBE = "word"
"""What a model is asked for its dimensions with, each time that it is opened."""

CONFIG = """
[source]
dsn = "{source}"
slot = "{slot}"
[worker]
listen = "127.0.0.1:0"
[embedders.fleet]
type = "ray"
{fleet}
[embedders.fleet.embedder]
type = "openai"
model = "hashing"
dimensions = 16
base_url = "{url}"
batch_texts = {batch}
{each}
[indexes.articles]
table = "articles"
text = "{{body}}"
columns = ["tenant"]
embedder = "fleet"
"""


@pytest.fixture(scope="module")
def rays() -> Iterator[RayCluster]:
    """A cluster that the tests of this file share; the last of them leaves nothing of it."""
    with ray_cluster() as made:
        yield made


@pytest.fixture
def doomed() -> Iterator[RayCluster]:
    """A cluster for one test that ends it."""
    with ray_cluster() as made:
        yield made


def gated(gate: threading.Event) -> Misdeed:
    """Answer once the gate is open."""

    def wait(exchange: Any, texts: list[str]) -> None:
        gate.wait(60)
        exchange.embed(exchange.provider.vectors(texts))

    return wait


def config_text(provider: FakeProvider, fleet: str, *, each: str = "", source: str = "", slot: str = "cdcsync") -> str:
    return CONFIG.format(source=source, slot=slot, fleet=fleet, url=provider.url, batch=BATCH_TEXTS, each=each)


def fleet_of(provider: FakeProvider, fleet: str, each: str = "") -> Embedder:
    settings = parse(config_text(provider, fleet, each=each), {}, where="test").embedders["fleet"]
    assert isinstance(settings, RayEmbedder)
    return make_embedder("fleet", settings)


def repeated(provider: FakeProvider) -> int:
    """How many times a text was embedded that had been already."""
    return sum(count - 1 for text, count in provider.embedded.items() if text != PROBE)


def backlog(pipeline: Pipeline) -> int:
    (count,) = pipeline.target.execute("SELECT count(*) FROM cdcsync.articles_backlog").fetchone() or (0,)
    return int(count)


@pytest.mark.proof
async def test_a_call_that_no_actor_survives_is_given_up_and_others_go_on(
    rays: RayCluster, provider: FakeProvider
) -> None:
    fleet = fleet_of(provider, f'address = "{rays.address}"\ntimeout_s = 2\ncpus = 0.25')
    await fleet.open()
    try:
        provider.always = slow
        with pytest.raises(EmbedError, match="3 actors ended while they embedded these texts"):
            await fleet.embed(["poison"])
        provider.always = None
        assert (await fleet.embed(["good", "also good"])).shape == (2, 16)
    finally:
        provider.released.set()
        await fleet.aclose()


@pytest.mark.proof
async def test_actors_come_with_the_queue_and_go_when_idle(rays: RayCluster, provider: FakeProvider) -> None:
    fleet = fleet_of(provider, f'address = "{rays.address}"\nactors_max = 3\nidle_s = 1\ncpus = 0.25')
    gate = threading.Event()
    provider.always = gated(gate)
    await fleet.open()
    try:
        assert len(actors(rays.head)) == 1
        async with anyio.create_task_group() as tasks:
            for number in range(3 * IN_FLIGHT):
                tasks.start_soon(fleet.embed, [f"text {number}"])
            await anyio.to_thread.run_sync(
                lambda: until(lambda: provider.most_at_once == 3 * IN_FLIGHT, "two calls of each of three actors")
            )
            gate.set()
        await anyio.to_thread.run_sync(lambda: until(lambda: len(actors(rays.head)) == 1, "idle actors to go"))
        assert set(provider.embedded.values()) == {1}
    finally:
        gate.set()
        await fleet.aclose()


@pytest.mark.proof
async def test_an_embedder_that_actors_cannot_open_says_why(rays: RayCluster, provider: FakeProvider) -> None:
    fleet = fleet_of(provider, f'address = "{rays.address}"', each='api_key_file = "/nowhere/key"')
    try:
        with pytest.raises(EmbedderSetupError, match="/nowhere/key"):
            await fleet.open()
    finally:
        await fleet.aclose()


@pytest.mark.proof
@pytest.mark.server
def test_nodes_actors_and_the_head_come_and_go_and_nothing_is_lost_or_embedded_for_nothing(
    doomed: RayCluster,
    database: Database,
    make_pipeline: Callable[[str], Pipeline],
    provider: FakeProvider,
) -> None:
    fleet = f'address = "{doomed.address}"\nactors_max = 2\ntasks_in_flight = {IN_FLIGHT}'
    pipeline = make_pipeline(config_text(provider, fleet, source=database.dsn, slot=database.name))
    pipeline.source.execute("CREATE TABLE articles (id bigint PRIMARY KEY, tenant int, body text)")
    pipeline.source.execute("INSERT INTO articles SELECT i, i % 3, 'article ' || i FROM generate_series(1, 120) AS i")
    gate = threading.Event()
    provider.always = gated(gate)

    # One processor, one actor with two calls; a node joins, and the second actor has two more.
    worker = pipeline.start()
    until(lambda: provider.most_at_once == IN_FLIGHT, "two calls of one actor")
    node = doomed.add_node()
    until(lambda: provider.most_at_once == 2 * IN_FLIGHT, "two calls of each of two actors")

    # The node dies with two calls in hand; the other actor makes them again, and all others.
    doomed.kill_node(node)
    gate.set()
    pipeline.live()
    assert sum(text != PROBE for text in provider.embedded) == 120
    assert repeated(provider) == IN_FLIGHT * BATCH_TEXTS

    # An actor dies with a call in hand; another takes its place, and the call.
    gate.clear()
    held = len(provider.requests)
    pipeline.source.execute("UPDATE articles SET body = 'changed ' || id WHERE id <= 5")
    until(lambda: len(provider.requests) > held, "a call in hand")
    (actor,) = actors(doomed.head)
    os.kill(actor, signal.SIGKILL)
    until(lambda: actors(doomed.head) not in ([], [actor]), "another actor")
    gate.set()
    until(lambda: backlog(pipeline) == 0, "the vectors")
    assert repeated(provider) <= IN_FLIGHT * BATCH_TEXTS + 5

    # The process that is connected to Ray dies: the worker starts another one.
    (driver,) = (pid for pid, title in children(worker.pid) if "ray_pool" in title)
    os.kill(driver, signal.SIGKILL)
    pipeline.source.execute("UPDATE articles SET body = 'after that ' || id WHERE id <= 5")
    until(lambda: backlog(pipeline) == 0 and "after that 1" in provider.embedded, "the vectors")
    pipeline.in_step()

    # The worker is killed: what it started ends too, and the next one goes on.
    (driver,) = (pid for pid, title in children(worker.pid) if "ray_pool" in title)
    left = [driver, *actors(doomed.head)]
    pipeline.stop(worker, signal.SIGKILL)
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in left), "the end of the driver and its actors")
    pipeline.source.execute("UPDATE articles SET body = 'another worker ' || id WHERE id <= 5")
    worker = pipeline.start()
    until(lambda: backlog(pipeline) == 0 and "another worker 1" in provider.embedded, "the vectors")

    # The whole cluster goes: vectors wait, text does not, and the worker ends in order.
    doomed.kill_node(doomed.head)
    pipeline.source.execute("UPDATE articles SET body = 'without a cluster ' || id WHERE id <= 5")
    pipeline.in_step(vectors=False)
    pipeline.event("embedder_unavailable")
    assert backlog(pipeline) == 5
    assert pipeline.stop(worker) == 0
