"""This machine: where large transactions are spooled, and who can reach the worker's endpoints.

Source: Python, `tempfile`; RFC 5735, RFC 4291, loopback addresses.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cdcsync.config import Config
from cdcsync.config.values import is_loopback
from cdcsync.preflight.findings import Finding


def machine_findings(config: Config) -> Iterator[Finding]:
    """Say what keeps the worker from running here, or may surprise."""
    if config.source.streaming and config.source.spool_directory:
        yield from spool_faults(Path(config.source.spool_directory))
    host, _ = config.worker.listen_address
    if not is_loopback(host):
        yield Finding.warning(
            "worker.listen",
            f"{host} is reachable from other machines: anyone who connects sees names of tables and counts, without a"
            " login",
            "listen on 127.0.0.1 behind a proxy, or let only the scraper and probes through",
        )


def spool_faults(directory: Path) -> Iterator[Finding]:
    """Say whether files can be made in the directory of the spool."""
    where = "source.spool_directory"
    if not directory.exists():
        yield Finding.error(where, f"there is no directory {directory}", f"mkdir -p {directory}, for the worker's user")
    elif not directory.is_dir():
        yield Finding.error(
            where, f"{directory} is not a directory", "name a directory with space for large transactions"
        )
    elif not os.access(directory, os.W_OK | os.X_OK):
        yield Finding.error(
            where,
            f"this user may not create files in {directory}",
            "give it to the worker's user, or name another directory",
        )
