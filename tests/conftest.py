"""What every test gets. Fixtures live in `tests/fixtures/`, one file a subject; every file there is a plugin."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from hypothesis import settings

pytest_plugins = [
    f"tests.fixtures.{path.stem}"
    for path in sorted((Path(__file__).parent / "fixtures").glob("*.py"))
    if path.stem != "__init__"
]

# What a shell starts in the background cannot hear Ctrl-C, nor can what that starts in turn: and tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A slow machine is not a failing property; and a failure must be repeatable elsewhere from what it printed.
settings.register_profile("cdcsync", deadline=None, print_blob=True)
settings.load_profile("cdcsync")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    """Psycopg's async connections run on asyncio only."""
    return "asyncio"
