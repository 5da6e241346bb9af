"""Ask the worker in this container whether it is alive; exit with 0 if it is, with 1 if not.

`CDCSYNC_HEALTH` is the port, where `worker.listen` of the configuration names another one than 9477.
"""

from __future__ import annotations

import http.client
import os
import sys

TIMEOUT_S = 3


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
    sys.exit(0 if alive(int(os.environ.get("CDCSYNC_HEALTH", "9477"))) else 1)
