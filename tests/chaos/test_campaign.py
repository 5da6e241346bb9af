"""The end of a campaign that is interrupted."""

from __future__ import annotations

import subprocess
import sys

from tests.chaos.campaign import end_with_descendants

JOB = """
import subprocess
near = subprocess.Popen(["sleep", "600"])
far = subprocess.Popen(["sleep", "600"], start_new_session=True)
print("started", flush=True)
near.wait()
"""
"""A process of its own and one that leads a session, as workers are; all have the same standard output."""


def test_a_job_that_does_not_end_by_itself_is_ended_with_all_that_it_started() -> None:
    with subprocess.Popen([sys.executable, "-c", JOB], stdout=subprocess.PIPE) as job:
        assert job.stdout is not None
        assert job.stdout.readline() == b"started\n"

        end_with_descendants(job.pid)

        assert job.stdout.read() == b"", "the end of the output comes when nobody holds it any more"
    assert job.returncode == -9
