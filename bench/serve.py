"""What does the tool server cost over the bare statement, and what does one tenant's storm cost another?

One index of 20,000 documents with words and vectors. The same hybrid searches, each with its query's vector, are made
in two ways in turn, by 1, 8 and 64 clients that ask one after the other: the statement that calls the index's search
function, through a pool of as many connections as the tool server has, and `POST /v1/indexes/articles/search`. Clients
of the pool are tasks of one process, and so are those of HTTP; the tool server is a process of its own.

The storm: 1,000 clients of one tenant connect and call at the same time, and call again at once, whatever they are
told. Meanwhile one client of another tenant asks one search after the other; its p99, from the moment when the storm
begins, is compared to that of the same client before the storm. It is measured too where the 1,000 clients call again
when `Retry-After` says so. The storm's clients have a lower priority than the server: elsewhere they run on other
machines.

Arguments choose parts: `python bench/serve.py rates storm`. Without any, both are done.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import secrets
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import anyio
import psycopg

from cdcsync.config import HashEmbedder
from cdcsync.embedders.hashing import HashEmbedder as Hashing
from cdcsync.serve.identity import new_token

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import Pipeline, percentile, pipeline
    from bench.report import report
else:
    from _pipeline import Pipeline, percentile, pipeline
    from report import report

ROWS = int(os.environ.get("ROWS", "20000"))
DIMENSIONS = 384
CONNECTIONS = 8
"""Of the pool and of the tool server."""
CLIENTS = (1, 8, 64)
JUDGED_CLIENTS = 8
MEASURED_S = float(os.environ.get("MEASURED_S", "5"))
ROUNDS = 3
"""Both ways take turns; the medians of their rounds are compared."""
STORM_CALLS = 1_000
BELOW_RATE_S = 0.06
"""What the quiet tenant waits after an answer, so that it stays below its 20 calls a second."""
STORM_S = float(os.environ.get("STORM_S", "15"))

GOAL_OVER_BARE = 0.5
GOAL_STORM = 0.5

BODY = "'article ' || i || ' tells of word' || i % 500 || ' and word' || i % 37 || ' and thing' || i % 1009"
SERVE = """
[serve]
listen = "127.0.0.1:0"
tokens_file = "{tokens}"
tenant = {{ column = "tenant", claim = "tenant" }}
connections = {connections}
{limits}
"""
NO_LIMITS = "requests_per_s = 1000000.0\nburst = 1000000\nconcurrency = 10000\nwaiting = 10000"

Ask = Callable[[int], Awaitable[int]]
"""Makes the search of a number; returns the seconds to wait before the next one, 0 for an answer."""


def made_queries() -> list[tuple[str, list[float]]]:
    """Return queries, each with the vector that the index's model makes of it."""
    chance = random.Random(1)
    texts = [f"word{chance.randrange(500)} and thing{chance.randrange(1009)}" for _ in range(200)]
    vectors = Hashing("model", HashEmbedder(dimensions=DIMENSIONS)).vectors(texts)
    return [(text, [round(float(one), 6) for one in vector]) for text, vector in zip(texts, vectors, strict=True)]


QUERIES = made_queries()
BODIES = [json.dumps({"query": words, "vector": vector}).encode() for words, vector in QUERIES]


class Client:
    """A connection that speaks just enough HTTP to cost little itself."""

    def __init__(self, port: int, token: str) -> None:
        self._port = port
        self._head = (
            "POST /v1/indexes/articles/search HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
            f"authorization: Bearer {token}\r\n"
        )
        self._stream: Any = None

    async def ask(self, number: int) -> int:
        """Make one search; returns the seconds that a refusal asks to wait."""
        try:
            return await self._ask(number)
        except (anyio.EndOfStream, anyio.BrokenResourceError):
            await self.aclose()  # idle for too long: the server has closed it
            return await self._ask(number)

    async def _ask(self, number: int) -> int:
        if self._stream is None:
            self._stream = await anyio.connect_tcp("127.0.0.1", self._port)
        body = BODIES[number % len(BODIES)]
        await self._stream.send(f"{self._head}content-length: {len(body)}\r\n\r\n".encode() + body)
        received = b""
        while b"\r\n\r\n" not in received:
            received += await self._stream.receive(65_536)
        head, _, rest = received.partition(b"\r\n\r\n")
        lines = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        missing = int(lines[b"content-length"]) - len(rest)
        while missing > 0:
            missing -= len(await self._stream.receive(65_536))
        status = int(head.split(b" ", 2)[1])
        if status in (429, 503, 504):
            return int(lines[b"retry-after"])
        if status != 200:
            raise SystemExit(f"an answer of {status}: {rest[:300]!r}")
        return 0

    async def aclose(self) -> None:
        """Close the connection."""
        if self._stream is not None:
            await self._stream.aclose()
            self._stream = None


async def timed(asks: list[Ask], seconds: float, warm_up_s: float = 1.0) -> tuple[float, list[float]]:
    """Have clients ask one search after the other; returns answers a second and the time of each (ms)."""
    taken: list[float] = []
    begin = anyio.current_time() + warm_up_s
    end = begin + seconds

    async def client(ask: Ask, place: int) -> None:
        number = place * 7
        while (asked := anyio.current_time()) < end:
            await ask(number)
            number += 1
            if asked >= begin:
                taken.append((anyio.current_time() - asked) * 1000)

    async with anyio.create_task_group() as tasks:
        for place, ask in enumerate(asks):
            tasks.start_soon(client, ask, place)
    return len(taken) / seconds, taken


STATEMENT = """
SELECT id, tenant, chunk_no, content, score, distance, vector_rank, text_rank, text_score, headline, stale
FROM cdcsync.articles_search($1, $2, 10, '{"tenant": "1"}', headline => NULL)
"""


@contextlib.asynccontextmanager
async def bare(dsn: str) -> AsyncIterator[Ask]:
    """Yield the bare statement, through a pool."""
    room = anyio.CapacityLimiter(CONNECTIONS)
    idle: list[psycopg.AsyncConnection[Any]] = []
    bodies = [(words, "[" + ",".join(map(str, vector)) + "]") for words, vector in QUERIES]
    for _ in range(CONNECTIONS):
        connection = await psycopg.AsyncConnection.connect(dsn, autocommit=True)
        connection.prepare_threshold = 0
        idle.append(connection)

    async def ask(number: int) -> int:
        async with room:
            connection = idle.pop()
            try:
                cursor = psycopg.AsyncRawCursor(connection)
                await cursor.execute(STATEMENT, bodies[number % len(bodies)])
                await cursor.fetchall()
            finally:
                idle.append(connection)
        return 0

    try:
        yield ask
    finally:
        for connection in idle:
            await connection.close()


@contextlib.contextmanager
def served(made: Pipeline, limits: str) -> Iterator[tuple[int, list[str]]]:
    """Run the tool server; yields its port and a token for each of two tenants."""
    tokens = made._config.parent / f"tokens-{secrets.token_hex(4)}.json"
    callers = [new_token(tokens, f"caller {tenant}", {"tenant": str(tenant)}, None) for tenant in (1, 2)]
    config = made._config.with_name("serve.toml")
    section = SERVE.format(tokens=tokens, connections=CONNECTIONS, limits=limits)
    config.write_text(made._config.read_text() + section)
    log = made._config.with_name("serve.log")
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sys.executable, "-m", "cdcsync", "serve", "-c", str(config)], stdout=stream, stderr=stream
        )

    def port() -> int | None:
        if process.poll() is not None:
            raise SystemExit(f"the tool server ended:\n{log.read_text()[-2000:]}")
        lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
        return next((int(line["port"]) for line in lines if line.get("event") == "serving"), None)

    try:
        yield made.until(port, "tool server"), callers
    finally:
        process.terminate()
        if process.wait(30):
            raise SystemExit(f"the tool server failed:\n{log.read_text()[-2000:]}")


def rates(made: Pipeline) -> tuple[dict[str, float], dict[str, float]]:
    """Return searches a second and their times, both ways."""

    async def measure(port: int, token: str) -> dict[str, float]:
        figures: dict[str, float] = {}
        for clients in CLIENTS:
            found: dict[str, list[tuple[float, list[float]]]] = {"bare": [], "serve": []}
            for _ in range(ROUNDS):
                async with bare(made.dsn) as ask:
                    found["bare"].append(await timed([ask] * clients, MEASURED_S))
                asking = [Client(port, token) for _ in range(clients)]
                found["serve"].append(await timed([one.ask for one in asking], MEASURED_S))
                for one in asking:
                    await one.aclose()
            for way, rounds in found.items():
                taken = [each for _, times in rounds for each in times]
                figures[f"{way}_{clients}_clients_per_s"] = statistics.median(rate for rate, _ in rounds)
                figures[f"{way}_{clients}_clients_p50_ms"] = statistics.median(taken)
                figures[f"{way}_{clients}_clients_p99_ms"] = percentile(taken, 0.99)
        return figures

    with served(made, NO_LIMITS) as (port, (token, _)):
        figures = anyio.run(measure, port, token)
    ratio = {
        f"serve_over_bare_{n}": figures[f"serve_{n}_clients_per_s"] / figures[f"bare_{n}_clients_per_s"]
        for n in CLIENTS
    }
    return figures | {name: value for name, value in ratio.items() if name != "serve_over_bare_8"}, {
        "serve_over_bare_8": ratio["serve_over_bare_8"]
    }


def storm(made: Pipeline) -> tuple[dict[str, float], dict[str, float]]:
    """Return the p99 of one tenant without and within the storm of another."""
    with served(made, "") as (port, (stormy, other)):
        return _storm(port, stormy, other)


def _storm(port: int, stormy: str, other: str) -> tuple[dict[str, float], dict[str, float]]:
    async def quiet() -> list[float]:
        client = Client(port, other)

        taken: list[float] = []
        end = anyio.current_time() + STORM_S
        number = 0
        while anyio.current_time() < end:
            asked = anyio.current_time()
            if await client.ask(number):
                raise SystemExit("the quiet tenant was refused")
            taken.append((anyio.current_time() - asked) * 1000)
            number += 1
            await anyio.sleep(BELOW_RATE_S)
        await client.aclose()
        return taken

    figures: dict[str, float] = {}
    p99 = {}

    def measure(name: str) -> None:
        taken = anyio.run(quiet)
        p99[name] = percentile(taken, 0.99)
        figures[f"{name}_p50_ms"], figures[f"{name}_p99_ms"] = statistics.median(taken), p99[name]

    measure("alone")
    for name in ("storm", "polite_storm"):
        storming = subprocess.Popen(
            [sys.executable, __file__, "storming", name, str(port), stormy], stdout=subprocess.PIPE, text=True
        )
        assert storming.stdout is not None
        if storming.stdout.readline() != "storming\n":
            raise SystemExit("there is no storm")
        measure(f"within_{name}")
        answered, refused = map(int, storming.communicate(timeout=120)[0].split())
        figures |= {f"{name}_answered_calls": answered, f"{name}_refused_calls": refused}
    return figures, {
        f"alone_over_{name}_p99": p99["alone"] / p99[f"within_{name}"] for name in ("storm", "polite_storm")
    }


async def storming(port: int, token: str, *, polite: bool) -> None:
    """Be the storm, for a little longer than it is measured."""
    os.nice(10)
    counts = [0, 0]
    end = anyio.current_time() + STORM_S + 1

    async def client(number: int) -> None:
        one = Client(port, token)
        while anyio.current_time() < end:
            wait_s = await one.ask(number)
            counts[wait_s > 0] += 1
            if polite:
                await anyio.sleep(wait_s)
            number += 1
        await one.aclose()

    print("storming", flush=True)
    async with anyio.create_task_group() as tasks:
        for number in range(STORM_CALLS):
            tasks.start_soon(client, number)
        await anyio.sleep(STORM_S + 1)
        tasks.cancel_scope.cancel()
    print(*counts, flush=True)


PARTS = {"rates": rates, "storm": storm}
GOALS = {
    "serve_over_bare_8": GOAL_OVER_BARE,
    "alone_over_storm_p99": GOAL_STORM,
    "alone_over_polite_storm_p99": GOAL_STORM,
}
AGAINST = {
    "serve_over_bare_8": "the bare statement, same run",
    "alone_over_storm_p99": "our own alone, same run",
    "alone_over_polite_storm_p99": "our own alone, same run",
}


def main() -> None:
    """Measure and report."""
    if sys.argv[1:2] == ["storming"]:
        anyio.run(partial(storming, int(sys.argv[3]), sys.argv[4], polite=sys.argv[2] == "polite_storm"))
        return
    figures: dict[str, float] = {}
    ratios: dict[str, float] = {}
    with pipeline(f'type = "hash"\ndimensions = {DIMENSIONS}') as made:
        made._config.write_text(made._config.read_text() + 'search = "english"\n')
        made.connection.execute(
            f"INSERT INTO articles SELECT i, 1 + i % 2, {BODY} FROM generate_series(1, {ROWS}) AS i".encode()
        )
        made.start()
        made.live()
        made.vectors_in_step()
        made.stop()
        made.connection.execute("VACUUM ANALYZE")
        for name in sys.argv[1:] or PARTS:
            more, ratio = PARTS[name](made)
            figures |= more
            ratios |= ratio
    report("serve", figures, ratios, {name: GOALS[name] for name in ratios}, {name: AGAINST[name] for name in ratios})


if __name__ == "__main__":
    main()
