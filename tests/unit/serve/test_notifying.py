"""The tool server as a process, started as systemd starts it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest

from tests.support.configs import NO_SERVER
from tests.unit.worker.test_systemd import Manager


@pytest.mark.timeout(120)
async def test_systemd_hears_when_calls_are_accepted_and_when_that_ends(tmp_path: Path) -> None:
    path = tmp_path / "cdcsync.toml"
    path.write_text(f'{NO_SERVER}[serve]\nlisten = "127.0.0.1:0"\nanonymous = true\n')
    manager = Manager(str(tmp_path / "notify"), patience_s=90)
    process = await anyio.open_process(
        [sys.executable, "-m", "cdcsync", "serve", "-c", str(path)],
        env={**os.environ, "NOTIFY_SOCKET": manager.address},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        await manager.hear(lambda message: message.get("READY") == "1")
        said = await manager.hear(lambda message: "STATUS" in message)
        assert said["STATUS"].startswith("searches articles on port ")
        process.send_signal(signal.SIGTERM)
        await manager.hear(lambda message: message.get("STOPPING") == "1")
        with anyio.fail_after(60):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
        await process.aclose()
        manager.close()
