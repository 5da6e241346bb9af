"""What a server can lack: a disk that is full, as tables lie on a small file system of their own; and memory."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import psycopg
import pytest
from psycopg import sql

from cdcsync.demo.cluster import Cluster

NAME = "tight"
SIZE = "16m"
BLOCK = bytes(65_536)


LACKS_MEMORY = """
CREATE FUNCTION public.lacks_memory() RETURNS event_trigger LANGUAGE plpgsql AS $f$
BEGIN
    IF pg_catalog.current_query() LIKE '%articles_vectors_1_hnsw%' THEN
        RAISE EXCEPTION 'out of memory' USING ERRCODE = '53200';
    END IF;
END $f$;
CREATE EVENT TRIGGER lacks_memory ON ddl_command_start WHEN TAG IN ('CREATE INDEX')
    EXECUTE FUNCTION public.lacks_memory()
"""
"""The server runs out of memory whenever the HNSW index of `articles` is built, however little it is given."""


LACK_MEMORY = """
COPY (SELECT) TO PROGRAM
'prlimit --pid $PPID --as=$(($(cut -d " " -f 1 /proc/$PPID/statm) * $(getconf PAGESIZE) + 4000000)):'
"""
"""The session that executes this gets no memory any more, beyond some 4 MB. Linux only, and for superusers."""


class CannotMount(Exception):
    """This process may not mount file systems."""


class Disk:
    """The file system; made by `tight_disk`."""

    def __init__(self, directory: Path) -> None:
        self._ballast = directory / "ballast"

    def fill(self) -> None:
        """Leave no room."""
        with self._ballast.open("ab", buffering=0) as ballast:
            try:
                while True:
                    ballast.write(BLOCK)
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    def free(self) -> None:
        """Make room again."""
        self._ballast.unlink(missing_ok=True)


@contextlib.contextmanager
def tight_disk(cluster: Cluster, database: str, tables: Sequence[str]) -> Iterator[Disk]:
    """Put tables on a small disk for the length of the block, and back afterwards.

    :raises CannotMount: this process may not.
    """
    with contextlib.ExitStack() as stack:
        admin = stack.enter_context(psycopg.connect(cluster.dsn(database), autocommit=True))
        admin.execute("SET allow_in_place_tablespaces = on")
        admin.execute(sql.SQL("CREATE TABLESPACE {} LOCATION ''").format(sql.Identifier(NAME)))
        stack.callback(admin.execute, sql.SQL("DROP TABLESPACE {}").format(sql.Identifier(NAME)))
        found = admin.execute("SELECT oid FROM pg_tablespace WHERE spcname = %s", [NAME]).fetchone()
        assert found is not None
        directory = cluster.data / "pg_tblspc" / str(found[0])
        owner = directory.stat()
        (inside,) = [path.name for path in directory.iterdir()]
        options = f"size={SIZE},mode=700,uid={owner.st_uid},gid={owner.st_gid}"
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", directory], capture_output=True)
        if mounted.returncode:
            raise CannotMount(mounted.stderr.decode(errors="replace").strip())
        stack.callback(lambda: subprocess.run(["umount", "--lazy", directory], check=True))
        (directory / inside).mkdir(mode=0o700)
        os.chown(directory / inside, owner.st_uid, owner.st_gid)
        disk = Disk(directory)
        for table in tables:
            admin.execute(sql.SQL("ALTER TABLE {} SET TABLESPACE {}").format(_name(table), sql.Identifier(NAME)))
            back = sql.SQL("ALTER TABLE IF EXISTS {} SET TABLESPACE pg_default").format(_name(table))
            stack.callback(admin.execute, back)
        stack.callback(disk.free)
        yield disk


def _name(table: str) -> sql.Identifier:
    return sql.Identifier(*table.split("."))


@contextlib.contextmanager
def tight_disk_or_skip(cluster: Cluster, database: str, tables: Sequence[str]) -> Iterator[Disk]:
    """The same, for tests that make no sense without one."""
    with contextlib.ExitStack() as stack:
        try:
            disk = stack.enter_context(tight_disk(cluster, database, tables))
        except CannotMount as error:
            pytest.skip(f"no file system can be mounted here: {error}")
        yield disk
