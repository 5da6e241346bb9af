"""Requests that are made from the API's own description, right and wrong ones: each answer is one that it describes."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import anyio.from_thread
import anyio.lowlevel
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from cdcsync.config import Config
from cdcsync.serve import run as running
from tests.fixtures.serving import Office

pytestmark = [pytest.mark.server, pytest.mark.filterwarnings("ignore")]

EXAMPLES = 25
"""Requests for each operation: some 2 s."""


@pytest.fixture(scope="module")
def address(tickets: Office) -> Iterator[str]:
    """The address of a server in a thread of its own."""
    config: Config = tickets.serving(anonymous=True, requests_per_s=10**6, burst=10**6)
    ports: list[int] = []
    listening = threading.Event()
    stop = anyio.Event()
    token: list[anyio.lowlevel.EventLoopToken] = []

    async def serve() -> None:
        token.append(anyio.lowlevel.current_token())

        def bound(port: int) -> None:
            ports.append(port)
            listening.set()

        async with anyio.create_task_group() as tasks:

            async def run() -> None:
                await running.run(config, started=bound, handle_signals=False)

            tasks.start_soon(run)
            await stop.wait()
            tasks.cancel_scope.cancel()

    thread = threading.Thread(target=anyio.run, args=(serve,))
    thread.start()
    assert listening.wait(60)
    yield f"http://127.0.0.1:{ports[0]}"
    anyio.from_thread.run_sync(stop.set, token=token[0])
    thread.join(30)


def test_every_answer_is_one_that_the_description_names(address: str) -> None:
    schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
    operations: list[Any] = [result.ok() for result in schema.get_all_operations()]  # type: ignore[union-attr]
    assert len(operations) == 4
    for operation in operations:

        @given(case=operation.as_strategy())
        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.explicit, Phase.generate],
        )
        def answered(case: Any) -> None:
            # A filter of the right form may still name no column; the description cannot know.
            case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

        answered()
