"""Ask the worker or the tool server of this container whether it is alive; exit with 0 if it is, with 1 if not.

Process 1 says which of them runs here, and so its port: 9477 for the worker, 9478 for `cdcsync serve`. `CDCSYNC_HEALTH`
is the port where the configuration names another one (`worker.listen`, `serve.listen`), or where process 1 is neither.
With `serve --stdio` nothing listens: the process is all that can be asked about, and it is there as long as its
container.
"""

from __future__ import annotations

import http.client
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

TIMEOUT_S = 3

WORKER, SERVER = 9477, 9478
"""The default ports. Both are not tried: with the host's network the other one may be another container's."""

SERVING = re.compile(r"\bcdcsync['\"]?(?:\s+-\S+)*\s+serve(?![\w.-])(?P<rest>[^;&|]*)")
"""The command `serve`, also in a script of a shell, where more may follow it."""


def port(environment: Mapping[str, str], line: str) -> int | None:
    """Return the port to ask, or None if this command listens on none.

    :param line: the command line of the container's process.
    """
    serving = SERVING.search(line)
    if serving and "--stdio" in serving["rest"]:
        return None
    named = environment.get("CDCSYNC_HEALTH")
    return int(named) if named else SERVER if serving else WORKER


def command_line() -> str:
    """Return the command line of process 1, or nothing where it may not be read, as under `hidepid`."""
    try:
        return Path("/proc/1/cmdline").read_text(errors="replace").replace("\0", " ")
    except OSError:
        return ""


def alive(port: int) -> bool:
    """Whether /livez says yes."""
    # Not urllib: it would ask the proxy that the environment names.
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
    try:
        connection.request("GET", "/livez")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


if __name__ == "__main__":
    asked = port(os.environ, command_line())
    sys.exit(0 if asked is None or alive(asked) else 1)
