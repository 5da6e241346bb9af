"""The same work by cdcsync and by pgai: rows to vectors with HNSW, through one provider that takes 20 ms a request.

- backfill: 10,000 rows that are there before the first worker starts.
- catch_up: updates in transactions of ten while no worker runs; the time begins with the worker's process.
- live: the same updates while it runs; the time from the last commit to the last vector.

- kills: rows change at an even pace while the worker runs, and it is killed with SIGKILL again and again and started
  again at once; then what is lost, what is there twice, what is wrong, and how many texts were embedded again.

Each is measured in three rounds; who begins alternates. Of times the medians count; what kills did is the sum of the
rounds. pgai puts a vector into HNSW when it
stores it. cdcsync does so later (`settle_after_s`), and searches compare until then what is not there yet. So it is
measured twice: as it is by default, until every change is found with its vector; and, named `cdcsync_settled`, with
settling that waits for nothing and takes all the time there is, until every vector is in the HNSW index too. SIDES
names those that are measured.

A kill says something only of a worker that works. So changes come until the last kill, each kill comes some time after
the first request that the worker has sent since it was started, and the figures say how many kills met documents that
waited for their vectors. Rows change for longer where a worker takes longer to start: the updates are a figure, too.

pgai keeps a queue by triggers, so the application's writes pay for it: what the updates themselves take is a figure
too. It has an environment of its own, which `make pgai` makes; PGAI names another program. Without it the script says
so, and measures one side; with --both, nothing.

    python bench/peers.py [--both] [backfill] [catch_up] [live] [kills]
                                           PGAI=/path/to/bin/pgai ROUNDS=3 SIDES=cdcsync,cdcsync_settled,pgai
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import psycopg

# A script imports from its own directory; a type checker names files by their place in the repository.
if TYPE_CHECKING:
    from bench._pipeline import PATIENCE_S, Pipeline, pipeline
    from bench.report import not_run, of_goal, report
else:
    from _pipeline import PATIENCE_S, Pipeline, pipeline
    from report import not_run, of_goal, report

OWN = Path(__file__).parents[1] / "build" / "pgai" / "bin" / "pgai"
PGAI = os.environ.get("PGAI") or (str(OWN) if OWN.exists() else shutil.which("pgai"))
ROWS = int(os.environ.get("ROWS", "5000"))
BACKFILL_ROWS = int(os.environ.get("BACKFILL_ROWS", "10000"))
GOAL_UPDATES, GOAL_ROUNDS = 20_000, 3
UPDATES = int(os.environ.get("UPDATES", str(GOAL_UPDATES)))
ROUNDS = int(os.environ.get("ROUNDS", str(GOAL_ROUNDS)))
ROWS_OF_TRANSACTION = 10
DIMENSIONS = 384
LATENCY_S = 0.02
CALLS, TEXTS = 4, 128
"""Calls at a time and texts of a call, on both sides."""
KILLS = int(os.environ.get("KILLS", "5"))
KILL_AFTER_S = (0.2, 2.0)
"""After the worker's first request since its start: by then it is past what starting does."""
KILLED_UPDATES_PER_S = 2_000
"""Less than either side can take, so that a worker which is not killed does not fall behind for good."""
STOPS_S = 10.0
"""pgai's worker, asked to end, sometimes does not. Its queue is empty by then."""
PARTS = ("backfill", "catch_up", "live", "kills")
GOALS = {"backfill": 1.5, "catch_up": 5.0, "live": 10.0}
"""How many times as fast as pgai cdcsync should be."""
NOTES = {
    "pgai_over_cdcsync_catch_up": "the clock begins with the worker's process, whose start is a part of it. pgai's"
    " triggers have queued the changes by then: the application paid for that in `pgai_updates_s`, beside"
    " `cdcsync_updates_s`",
    "pgai_over_cdcsync_settled": "both sides put the same vectors into an HNSW index. On our side no search waits for"
    " that: until then it compares the vectors that are not in the index, as in the ratios without `settled`",
}
WORDS = [f"word{number}" for number in range(500)]


class Provider(ThreadingHTTPServer):
    """Embeddings over OpenAI's route and Ollama's: each text's vector follows from the text. Counts what it embeds.

    :ivar embedded: how often each text was embedded.
    :ivar asked: set by each request for vectors.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        self.embedded: Counter[str] = Counter()
        self.asked = threading.Event()
        self._lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), _Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of a client that was killed."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]

    @property
    def url(self) -> str:
        """The address without a path."""
        return f"http://127.0.0.1:{self.server_port}"

    def vectors(self, texts: list[str]) -> list[np.ndarray[Any, Any]]:
        """Return the texts' vectors after the time that a request takes."""
        self.asked.set()
        time.sleep(LATENCY_S)
        with self._lock:
            self.embedded.update(texts)
        return [vector_of(text) for text in texts]


def vector_of(text: str) -> np.ndarray[Any, Any]:
    """Return a text's vector: made in microseconds, so that neither side waits for the provider's processor."""
    seed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "big")
    made = np.random.default_rng(seed).standard_normal(DIMENSIONS, np.float32)
    unit: np.ndarray[Any, Any] = (made / np.linalg.norm(made)).astype("<f4")
    return unit


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Provider

    def do_POST(self) -> None:
        sent = self.rfile.read(size := int(self.headers["Content-Length"]))
        if len(sent) < size:
            raise ConnectionResetError("the client was killed while it was asking")
        asked = msgspec.json.decode(sent)
        if self.path.endswith("/api/show"):
            return self._answer({"model_info": {"general.architecture": "bench", "bench.context_length": 8192}})
        texts = asked["input"] if isinstance(asked["input"], list) else [asked["input"]]
        vectors = self.server.vectors(texts)
        if self.path.endswith("/api/embed"):
            body = {
                "model": asked["model"],
                "prompt_eval_count": len(texts),
                "embeddings": [one.tolist() for one in vectors],
            }
            return self._answer(body)
        data = [
            {"object": "embedding", "index": at, "embedding": base64.b64encode(vector.tobytes()).decode()}
            for at, vector in enumerate(vectors)
        ]
        return self._answer({"object": "list", "data": data, "model": asked["model"], "usage": {}})

    def do_GET(self) -> None:
        self._answer({"models": []})

    def _answer(self, body: dict[str, Any]) -> None:
        encoded = msgspec.json.encode(body)
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(encoded)))
        self.end_headers()
        self.wfile.write(encoded)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


class Side:
    """One of the two programs on a database of its own.

    :ivar chunks: a SELECT of each stored key, text and vector.
    :ivar current: the same of keys and texts, without texts whose vector is of an earlier one.
    """

    name: str
    chunks: str
    current: str

    def __init__(self, made: Pipeline, provider: Provider) -> None:
        self.made = made
        self.provider = provider

    def start(self) -> None:
        """Start the worker."""
        raise NotImplementedError

    def begin(self) -> None:
        """Start the worker, and wait until every change is a vector."""
        self.start()
        self.wait()

    def kill(self) -> None:
        """End the worker with SIGKILL."""
        raise NotImplementedError

    def stop(self) -> None:
        """End the worker in an orderly way."""
        raise NotImplementedError

    def wait(self) -> None:
        """Wait until every change is a vector."""
        raise NotImplementedError

    def waiting(self) -> int:
        """Return how many documents are not stored as they are in the table now, each with its own vector."""
        count: int = self.made.value(
            "SELECT count(*) FROM articles AS a WHERE NOT EXISTS"
            f" (SELECT FROM ({self.current}) AS c (id, text) WHERE c.id = a.id AND c.text = a.body)"
        )
        return count

    def close(self) -> None:
        """Leave nothing running."""


class Ours(Side):
    """cdcsync."""

    name = "cdcsync"
    chunks = "SELECT id, content, embedding::text FROM articles_index"
    current = "SELECT id, content FROM articles_index WHERE NOT stale"

    def start(self) -> None:
        self.made.start()

    def kill(self) -> None:
        self.made.kill()

    def stop(self) -> None:
        self.made.stop()

    def wait(self) -> None:
        self.made.live()
        self.made.text_in_step()
        self.made.vectors_in_step(0.02)


class Settled(Ours):
    """cdcsync until every vector is in the HNSW index, which is what pgai does."""

    name = "cdcsync_settled"

    def __init__(self, made: Pipeline, provider: Provider) -> None:
        super().__init__(made, provider)
        made.configure("[worker]", "[worker]\nsettle_after_s = 0\nsettle_share = 1.0")

    def wait(self) -> None:
        super().wait()
        settled = "SELECT NOT EXISTS (SELECT FROM cdcsync.articles_vectors_1_fresh)"
        self.made.until(lambda: self.made.value(settled), "settled vectors", 0.02)


class Theirs(Side):
    """pgai's vectorizer, its queue filled by triggers."""

    name = "pgai"
    chunks = "SELECT id, chunk, embedding::text FROM articles_embedding_store"
    current = "SELECT id, chunk FROM articles_embedding_store"

    def __init__(self, made: Pipeline, provider: Provider) -> None:
        super().__init__(made, provider)
        assert PGAI is not None
        subprocess.run([PGAI, "install", "-d", made.dsn], check=True, capture_output=True)
        made.connection.execute(
            "SELECT ai.create_vectorizer('articles'::regclass, name => 'articles',"
            " loading => ai.loading_column('body'), chunking => ai.chunking_none(), scheduling => ai.scheduling_none(),"
            f" embedding => ai.embedding_ollama('bench', {DIMENSIONS}, base_url => '{provider.url}'),"
            f" processing => ai.processing_default(batch_size => {TEXTS}, concurrency => {CALLS}))"
        )
        made.connection.execute("CREATE INDEX ON articles_embedding_store USING hnsw (embedding vector_cosine_ops)")
        self._log = tempfile.TemporaryFile(prefix="cdcsync-bench-pgai-")  # noqa: SIM115  (`close` closes it)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert PGAI is not None
        command = [PGAI, "vectorizer", "worker", "-d", self.made.dsn, "-c", str(CALLS), "--poll-interval", "1"]
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
        )

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def close(self) -> None:
        self._end(signal.SIGKILL)
        self._log.close()

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            os.killpg(process.pid, number)
            try:
                process.wait(STOPS_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def wait(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.made.value("SELECT ai.vectorizer_queue_pending('articles', true)"):
            if time.monotonic() > deadline:
                self._log.seek(0)
                raise SystemExit(f"pgai does not empty its queue; it said:\n{self._log.read()[-2000:].decode()}")
            time.sleep(0.02)


WANTED = os.environ.get("SIDES", "cdcsync,cdcsync_settled,pgai").split(",")
TIMED = [side for side in (Ours, Settled, Theirs) if side.name in WANTED and (PGAI or side is not Theirs)]
KILLED = [side for side in TIMED if side is not Settled]


@contextmanager
def indexed(kind: type[Side], provider: Provider, rows: int) -> Iterator[Side]:
    """Make a database with rows, and one of the two programs for it, which does not run yet."""
    embedder = (
        f'type = "openai"\nmodel = "bench"\ndimensions = {DIMENSIONS}\nbase_url = "{provider.url}/v1"\n'
        f"batch_texts = {TEXTS}\nconcurrency = {CALLS}"
    )
    with pipeline(embedder, 'search = ""', shared_buffers="256MB", max_wal_size="4GB") as made:
        with made.connection.cursor().copy("COPY articles FROM STDIN") as copy:
            for key in range(1, rows + 1):
                copy.write_row((key, key % 50, f"the first text of article {key}"))
        side = kind(made, provider)
        provider.embedded.clear()
        try:
            yield side
        finally:
            side.close()


def transaction(connection: psycopg.Connection[Any], chance: random.Random, number: int) -> dict[int, str]:
    """Update rows at random in one transaction; returns their texts by key."""
    written = {}
    with connection.transaction():
        for key in sorted(chance.sample(range(1, ROWS + 1), ROWS_OF_TRANSACTION)):
            words = " ".join(chance.choices(WORDS, k=30))
            written[key] = f"article {key} as it was written in round {number}: {words}"
            connection.execute("UPDATE articles SET body = %s WHERE id = %s", [written[key], key])
    return written


def change(made: Pipeline) -> set[str]:
    """Update rows at random; returns the texts that they have in the end."""
    chance = random.Random(1)
    last: dict[int, str] = {}
    for number in range(UPDATES // ROWS_OF_TRANSACTION):
        last |= transaction(made.connection, chance, number)
    return set(last.values())


def change_on(dsn: str, ended: threading.Event) -> int:
    """Update rows at random at an even pace until `ended` is set; returns how many were updated."""
    chance, number, began = random.Random(1), 0, time.perf_counter()
    with psycopg.connect(dsn, autocommit=True) as connection:
        while not ended.wait(
            max(0.0, began + number * ROWS_OF_TRANSACTION / KILLED_UPDATES_PER_S - time.perf_counter())
        ):
            transaction(connection, chance, number)
            number += 1
    return number * ROWS_OF_TRANSACTION


def timed(work: Callable[[], object]) -> float:
    """Return how many seconds something takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def verify(side: Side) -> dict[str, float]:
    """Compare what is stored with the table and with the provider's vectors; returns what is not as it should be."""
    wanted: dict[int, str] = dict(side.made.connection.execute("SELECT id, body FROM articles").fetchall())
    stored: dict[int, list[tuple[str, str]]] = {}
    for key, text, vector in side.made.connection.execute(side.chunks.encode()).fetchall():
        stored.setdefault(key, []).append((text, vector))
    wrong = old = 0
    for key, found in stored.items():
        text, vector = found[0]
        if text != wanted.get(key):
            old += 1
        elif not np.allclose(json.loads(vector), vector_of(text), atol=1e-5):
            wrong += 1
    return {
        "lost_documents": len(wanted.keys() - stored.keys()),
        "doubled_documents": sum(len(found) > 1 for found in stored.values()),
        "old_texts": old,
        "wrong_vectors": wrong,
    }


def backfill(kind: type[Side], provider: Provider) -> dict[str, float]:
    """Measure the first load."""
    with indexed(kind, provider, BACKFILL_ROWS) as side:
        seconds = timed(side.begin)
        side.stop()
        return {"backfill_s": seconds, **{f"backfill_{name}": value for name, value in verify(side).items()}}


def catch_up(kind: type[Side], provider: Provider) -> dict[str, float]:
    """Measure what a worker does about the changes that came while it was away."""
    with indexed(kind, provider, ROWS) as side:
        side.begin()
        side.stop()
        provider.embedded.clear()
        texts: set[str] = set()
        writing = timed(lambda: texts.update(change(side.made)))
        seconds = timed(side.begin)
        side.stop()
        waste = sum(provider.embedded.values()) / len(texts)
        checked = {f"catch_up_{name}": value for name, value in verify(side).items()}
        return {"updates_s": writing, "catch_up_s": seconds, "embedded_over_needed": waste, **checked}


def live(kind: type[Side], provider: Provider) -> dict[str, float]:
    """Measure how late the last change is."""
    with indexed(kind, provider, ROWS) as side:
        side.begin()
        change(side.made)
        seconds = timed(side.wait)
        side.stop()
        return {"live_s": seconds, **{f"live_{name}": value for name, value in verify(side).items()}}


def kills(kind: type[Side], provider: Provider, round_: int) -> dict[str, float]:
    """Kill the worker again and again while rows change."""
    chance = random.Random(round_)
    waiting = list[int]()
    with indexed(kind, provider, ROWS) as side:
        side.begin()
        provider.embedded.clear()
        provider.asked.clear()
        ended = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(change_on, side.made.dsn, ended)
            try:
                for _ in range(KILLS):
                    if not provider.asked.wait(PATIENCE_S):
                        raise SystemExit(f"{side.name} asks for nothing although rows change")
                    time.sleep(chance.uniform(*KILL_AFTER_S))
                    waiting.append(side.waiting())
                    side.kill()
                    time.sleep(2 * LATENCY_S)  # what it had asked for has come in and been answered
                    provider.asked.clear()
                    side.start()
            finally:
                ended.set()
            updates = writing.result()
        side.wait()
        side.stop()
        return {
            "kills_workers_killed": KILLS,
            "kills_killed_with_documents_waiting": sum(map(bool, waiting)),
            "kills_median_documents_waiting": statistics.median(waiting),
            "kills_updates": updates,
            "kills_embedded_texts": sum(provider.embedded.values()),
            # A text that was embedded and changed afterwards was needed when it was embedded.
            "kills_embedded_again_texts": sum(count - 1 for count in provider.embedded.values()),
            **{f"kills_{name}": value for name, value in verify(side).items()},
        }


MEASURED = {"backfill": backfill, "catch_up": catch_up, "live": live}


def rounds(part: str, provider: Provider) -> dict[str, float]:
    """Return the medians of what each side took and the most that any round had wrong; of kills, the rounds' sums."""
    taken: dict[str, list[float]] = {}
    for round_ in range(ROUNDS):
        sides = KILLED if part == "kills" else TIMED
        measured = partial(kills, round_=round_) if part == "kills" else MEASURED[part]
        for kind in sides if round_ % 2 else reversed(sides):
            found = measured(kind, provider)
            said = ", ".join(f"{name} {value:,.2f}" for name, value in found.items())
            print(f"{part}, {kind.name}: {said}", flush=True)
            for name, value in found.items():
                taken.setdefault(f"{kind.name}_{name}", []).append(value)
    return {name: together(name)(of) for name, of in taken.items()}


def together(name: str) -> Callable[[list[float]], float]:
    """Return what makes one figure of those of all rounds."""
    if name.endswith(("_s", "_needed")) or "_median_" in name:
        return statistics.median
    return sum if "_kills" in name else max


def main() -> None:
    """Measure and report."""
    parts = [argument for argument in sys.argv[1:] if argument != "--both"] or list(PARTS)
    if unknown := set(parts) - set(PARTS):
        raise SystemExit(f"no part is called {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if PGAI is None:
        if "--both" in sys.argv[1:]:
            not_run("peers", "pgai is not installed here; `make pgai` installs it in an environment of its own")
            return
        print("peers: pgai is not installed, so one side is measured alone; `make pgai` installs it, PGAI names it")
    figures: dict[str, float] = {}
    provider = Provider()
    threading.Thread(target=provider.serve_forever, daemon=True).start()
    for part in parts:
        figures |= rounds(part, provider)
    ratios, goals, smaller = {}, {}, {}
    for part in parts:
        if part not in GOALS or Theirs not in TIMED:
            continue
        for side in (kind.name for kind in TIMED if kind is not Theirs):
            ratio = f"pgai_over_{side}_{part}"
            ratios[ratio] = figures[f"pgai_{part}_s"] / max(figures[f"{side}_{part}_s"], 1e-3)
            goals[ratio] = GOALS[part]
            size = "" if part == "backfill" else of_goal(UPDATES, GOAL_UPDATES, "updates")
            smaller[ratio] = size or of_goal(ROUNDS, GOAL_ROUNDS, "rounds")
    report("peers", figures, ratios, goals, "pgai, same run", smaller, notes=NOTES)


if __name__ == "__main__":
    main()
