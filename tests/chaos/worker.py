"""The worker's processes: started, killed, frozen, and told from one another by what they logged."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
from pathlib import Path
from typing import Any

from cdcsync.process.crashpoints import VARIABLE
from tests.chaos.servers import until
from tests.support import forked


class Worker:
    """One process of `cdcsync run`."""

    def __init__(self, config: Path, log: Path, *, crash_at: str | None = None) -> None:
        self.log = log
        self.crash_at = crash_at
        armed = {VARIABLE: crash_at} if crash_at is not None else {}
        with log.open("ab") as out:
            streams = (subprocess.DEVNULL, out, out)
            self.process = forked.start("cdcsync", ["run", "-c", str(config)], streams, more=armed)
        self.killed = False
        """Whether the harness ended it."""
        self._events: list[dict[str, Any]] = []
        self._read = 0
        """How many bytes of the log have been read."""

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self.process.poll() is None

    @property
    def crashed(self) -> bool:
        """Whether it died at its crash point."""
        return self.crash_at is not None and not self.killed and self.process.poll() == -signal.SIGKILL

    @property
    def died_young(self) -> bool:
        """Whether a request to end came before the process could hear it."""
        return self.process.poll() == -signal.SIGTERM and not self.said("listening")

    def kill(self) -> bool:
        """Kill the process; returns whether it still ran."""
        alive = self.alive
        self.killed = self.killed or alive
        self.process.kill()
        self.process.wait()
        return alive

    def stop(self, patience_s: float = 120.0) -> int:
        """Ask the process to end, and return its exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(patience_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise TimeoutError(f"the worker did not stop within {patience_s:.0f} s of SIGTERM") from None

    def freeze(self) -> None:
        """Stop the process where it is."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        self.process.send_signal(signal.SIGCONT)

    def limit_files(self, size: int | None) -> None:
        """Have every write fail that would make a file larger than `size`, as on a full disk; None for no limit."""
        resource.prlimit(
            self.process.pid,
            resource.RLIMIT_FSIZE,
            (resource.RLIM_INFINITY if size is None else size, resource.RLIM_INFINITY),
        )

    def events(self) -> list[dict[str, Any]]:
        """Return what the process logged."""
        with self.log.open("rb") as log:
            log.seek(self._read)
            new = log.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        self._events += [json.loads(line) for line in whole.splitlines() if line.startswith(b"{")]
        return self._events

    def said(self, *names: str) -> bool:
        """Say whether the process has logged one of these events."""
        return any(event.get("event") in names for event in self.events())

    @property
    def streams(self) -> bool:
        """Whether it has begun to stream, and since then neither was its place taken nor had it to begin anew."""
        return self._place() == "streaming"

    @property
    def stands_by(self) -> bool:
        """Whether another worker has the pipeline, and this one knows it."""
        return self._place() in ("standby", "overtaken")

    def _place(self) -> str | None:
        places = ("streaming", "standby", "overtaken", "target_rewound")
        return next((event["event"] for event in reversed(self.events()) if event.get("event") in places), None)

    def until_said(self, *names: str, patience_s: float = 300.0) -> None:
        """Wait until the process has logged one of these events, or has ended."""
        until(lambda: self.said(*names) or not self.alive, f"the event {' or '.join(names)}", patience_s)

    def tail(self, lines: int = 8) -> str:
        """Return the end of what the process logged."""
        return "\n".join(line[:400] for line in self.log.read_text(errors="replace").splitlines()[-lines:])
