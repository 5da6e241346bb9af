"""The demo: an index following its table, on a throwaway server, with a real model, in under two minutes.

    server ─► a table of docstrings ─► the worker, in this process ─► first load ─► searches ─► live changes, measured

    corpus        the text: the documentation inside Python's standard library
    programs      PostgreSQL's own programs
    cluster       throwaway servers
    material      what it is about: the rows, the model, the configuration, the questions and the changes
    judged        questions with known answers: first lines of docstrings
    stage         the acts: follow the load, search, change rows and watch searches follow
    performance   `run`: sets the stage, goes through the acts, and clears everything away

Only the server and the text are made for the occasion: the worker is the one that `cdcsync run` runs. Server, data,
configuration and log are in one temporary directory, which goes at the end, after Ctrl-C, and after SIGKILL too (see
`cdcsync.demo.cluster`).
"""

from __future__ import annotations

from cdcsync.demo.performance import run

__all__ = ["run"]
