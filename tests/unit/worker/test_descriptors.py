"""The limit of open files, in a process of its own: a limit that was lowered cannot be raised again."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource
from cdcsync.worker.descriptors import raise_descriptor_limit
resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))
print(raise_descriptor_limit())
"""


@pytest.mark.parametrize(("soft", "hard", "after"), [(256, 4096, 4096), (256, 256, 256), (512, 512, 512)])
def test_the_soft_limit_is_raised_to_what_the_hard_one_allows(soft: int, hard: int, after: int) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", CODE.format(soft=soft, hard=hard)], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) == after
