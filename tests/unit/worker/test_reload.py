"""What a new configuration changes in a running worker, and what it says of the rest."""

from __future__ import annotations

import json
import logging
import re
import signal
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from types import SimpleNamespace
from typing import Any, NoReturn

import anyio
import anyio.to_thread
import msgspec
import pytest
import structlog

from cdcsync import logs
from cdcsync.config import Config, Worker, parse
from cdcsync.errors import ConfigError
from cdcsync.process.stopping import PutOff
from cdcsync.worker.reload import LIVE, differences, merged, reload_on_signal, take_over
from tests import ROOT

TEXT = """
[source]
dsn = "postgresql://me:{password}@host/shop"
[worker]
{worker}
[embedders.words]
type = "hash"
[indexes.articles]
table = "articles"
text = "{{title}}"
embedder = "words"
"""


def config(worker: str = "", password: str = "secret") -> Config:
    return parse(TEXT.format(worker=worker, password=password), {}, where="test")


class Running:
    """A worker that only has a configuration."""

    def __init__(self, in_effect: Config) -> None:
        self.config = in_effect
        self.told = anyio.Event()

    def reconfigure(self, config: Config) -> None:
        self.config = config
        self.told.set()


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """What is logged from here on, however often logging is configured."""
    before, handlers, level = structlog.get_config(), logging.root.handlers[:], logging.root.level
    logging.root.handlers.clear()  # or they would be closed
    stream = StringIO()
    # Not the one of the interpreter, which is another one in a test than in its fixtures.
    monkeypatch.setattr(logs, "sys", SimpleNamespace(stderr=stream))
    logs.configure("info", "json")
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    structlog.configure(**before)
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


def events(lines: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    return [(line["event"], line["keys"]) for line in lines]


def test_a_difference_is_named_by_its_key() -> None:
    one, other = config(), config('listen = "127.0.0.1:1"\nbatch_rows = 7', password="other")
    # The target is the source's database, unless it is named.
    assert set(differences(one, other)) == {"source.dsn", "target.dsn", "worker.listen", "worker.batch_rows"}
    assert list(differences(one, config())) == []


def test_an_index_that_is_new_or_gone_is_a_difference() -> None:
    one = config()
    other = msgspec.structs.replace(one, indexes={"notes": one.indexes["articles"]})
    assert set(differences(one, other)) == {"indexes.articles", "indexes.notes"}


def test_only_live_keys_are_taken_over() -> None:
    new = config('listen = "127.0.0.1:1"\nbatch_rows = 7', password="other")
    taken = merged(config(), new)
    assert taken.worker == msgspec.structs.replace(Worker(), batch_rows=7)
    assert taken.source == config().source


async def test_the_log_names_what_took_effect_and_what_needs_a_restart_and_no_values(
    logged: Callable[[], list[dict[str, Any]]],
) -> None:
    running = Running(config())
    await take_over(running, lambda: config("batch_rows = 7\nverify_every_s = 60", password="hunter2"))
    assert running.config.worker.batch_rows == 7
    assert running.config.worker.verify_every_s == 0
    assert events(logged()) == [
        ("reloaded", ["worker.batch_rows"]),
        ("restart_needed", ["source.dsn", "target.dsn", "worker.verify_every_s"]),
    ]
    assert "hunter2" not in str(logged())


async def test_what_needs_a_restart_is_named_each_time_until_then(logged: Callable[[], list[dict[str, Any]]]) -> None:
    running = Running(config())
    for _ in range(2):
        await take_over(running, lambda: config("verify_every_s = 60"))
    assert events(logged()) == [("reloaded", []), ("restart_needed", ["worker.verify_every_s"])] * 2


async def test_a_new_level_holds_for_the_next_line(logged: Callable[[], list[dict[str, Any]]]) -> None:
    running = Running(config())
    await take_over(running, lambda: config('log_level = "error"'))
    structlog.get_logger().warning("unheard")
    await take_over(running, lambda: config('log_level = "debug"'))
    structlog.get_logger().debug("heard")
    assert [line["event"] for line in logged()] == ["reloaded", "heard"]


async def test_a_wrong_configuration_changes_nothing_and_is_told(logged: Callable[[], list[dict[str, Any]]]) -> None:
    def wrong() -> NoReturn:
        raise ConfigError("unknown key worker.batchrows", where="cdcsync.toml", hint="did you mean batch_rows?")

    running = Running(config())
    await take_over(running, wrong)
    (line,) = logged()
    assert (line["event"], line["level"]) == ("reload_failed", "error")
    assert (line["where"], line["fix"]) == ("cdcsync.toml", "did you mean batch_rows?")
    assert not running.told.is_set()


async def test_the_signal_has_it_read_again_however_often(logged: Callable[[], list[dict[str, Any]]]) -> None:
    running = Running(config())
    with anyio.fail_after(60):
        async with anyio.create_task_group() as tasks:
            configs = iter([config("batch_rows = 7"), config("batch_rows = 8")])
            await tasks.start(reload_on_signal, running, lambda: next(configs), None)
            for rows in (7, 8):
                running.told = anyio.Event()
                signal.raise_signal(signal.SIGHUP)
                await running.told.wait()
                assert running.config.worker.batch_rows == rows
            tasks.cancel_scope.cancel()


async def test_a_signal_that_came_during_the_start_is_obeyed_after_it(
    logged: Callable[[], list[dict[str, Any]]],
) -> None:
    before = signal.signal(signal.SIGHUP, PutOff())
    try:
        signal.raise_signal(signal.SIGHUP)
        running = Running(config())
        with anyio.fail_after(60):
            async with anyio.create_task_group() as tasks:
                await tasks.start(reload_on_signal, running, lambda: config("batch_rows = 7"), None)
                await running.told.wait()
                tasks.cancel_scope.cancel()
        assert running.config.worker.batch_rows == 7
    finally:
        signal.signal(signal.SIGHUP, before)


async def test_a_file_that_cannot_be_read_now_keeps_neither_the_worker_nor_its_end_waiting(
    logged: Callable[[], list[dict[str, Any]]],
) -> None:
    asked, answers = threading.Event(), threading.Event()

    def stalled() -> Config:
        asked.set()
        assert answers.wait(10), "the worker waits for the file"
        return config("batch_rows = 7")

    running = Running(config())
    try:
        async with anyio.create_task_group() as tasks:
            await tasks.start(reload_on_signal, running, stalled, None)
            signal.raise_signal(signal.SIGHUP)
            await anyio.to_thread.run_sync(asked.wait)
            tasks.cancel_scope.cancel()
        assert running.config == config()
    finally:
        answers.set()


def test_no_page_says_of_another_key_that_a_signal_has_it_read_again() -> None:
    keys = {
        (path.name, key)
        for path in (ROOT / "docs").rglob("*.md")
        for sentence in re.split(r"\. |\.?\n\n", path.read_text())
        if "SIGHUP" in sentence or "systemctl reload" in sentence
        for key in re.findall(r"`(?:worker\.)?(\w+)[^`]*`", sentence)
        if key in Worker.__struct_fields__
    }
    assert ("operations.md", "settle_connections") in keys
    assert {key for _, key in keys} <= set(LIVE)


def test_the_operations_page_lists_the_live_keys() -> None:
    page = (ROOT / "docs" / "operations.md").read_text()
    paragraph = next(part for part in page.split("\n\n") if part.startswith("On SIGHUP"))
    listed, _, _ = paragraph.partition("The log names")
    assert set(re.findall(r"`(\w+)`", listed)) == set(LIVE)
