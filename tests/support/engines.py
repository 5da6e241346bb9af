"""A container engine: docker or podman, whichever answers first, or the command that `CDCSYNC_ENGINE` names."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess

import pytest


def engine() -> list[str]:
    """Return the command of an engine that answers."""
    named = os.environ.get("CDCSYNC_ENGINE")
    candidates = (
        [shlex.split(named)] if named else [[path] for one in ("docker", "podman") if (path := shutil.which(one))]
    )
    for command in candidates:
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.run([*command, "info"], capture_output=True, timeout=60).returncode == 0:
                return command
    pytest.skip("no container engine answers: install docker or podman, or name one in CDCSYNC_ENGINE")
