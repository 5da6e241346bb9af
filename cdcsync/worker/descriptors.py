"""How many files and sockets this process may have open.

Shells and service managers start processes with a soft limit of 1,024, which is for programs that use select(); the
hard limit is what the administrator allows. Connections to both servers, to providers and to clients of the endpoints
are bounded; a worker that spools many open transactions has a file for each.
"""

from __future__ import annotations

import contextlib
import resource

WANTED = 65_536
"""More than a worker ever has, and less than where tables of descriptors take memory worth mentioning."""


def raise_descriptor_limit() -> int:
    """Raise the soft limit as far as the hard one allows, and return it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
