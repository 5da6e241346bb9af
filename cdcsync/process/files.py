"""Files that are written whole or not at all: a fault, or a crash, leaves no half of one behind."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path


def real(path: Path) -> Path:
    """Return the file that a path leads to. Renaming another file to a symbolic link would replace the link alone."""
    return Path(os.path.realpath(path))  # Path.resolve fails at a loop of links, before Python 3.13


def replace_file(path: Path, content: bytes, *, mode: int = 0o666) -> None:
    """Replace a file in one step. An existing one keeps its owner, group and mode, as far as this user may set them.

    :param mode: that of a new file, before the umask.
    :raises OSError: it cannot be written, and is as it was.
    """
    path = real(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    before = None
    try:
        with contextlib.suppress(FileNotFoundError):
            before = path.stat()
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode if before is None else 0o600)
        with os.fdopen(descriptor, "wb") as file:
            if before is not None:
                _keep_access(file.fileno(), before)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        _tidy(temporary.unlink)
        raise


def _keep_access(descriptor: int, before: os.stat_result) -> None:
    """Give a file the owner, group and mode of the one that it replaces.

    Root may change a file for a server that runs as another user. A user who may not give files away keeps the new one,
    and a group that it cannot have gets no access by way of another one.
    """
    mode = before.st_mode & 0o777
    now = os.fstat(descriptor)
    if now.st_gid != before.st_gid:
        try:
            os.fchown(descriptor, -1, before.st_gid)
        except PermissionError:
            mode &= ~0o070
    os.fchmod(descriptor, mode)
    if now.st_uid != before.st_uid:
        with contextlib.suppress(PermissionError):
            os.fchown(descriptor, before.st_uid, -1)


def write_files(files: Mapping[Path, tuple[bytes, int | None]]) -> None:
    """Write new files, with the directories that they need: all of them, or none.

    :param files: the content and the mode of each; None leaves the mode to the umask.
    :raises FileExistsError: a file is there already.
    :raises OSError: one cannot be written. `filename` says which, in both cases.
    """
    with contextlib.ExitStack() as written:
        for path, (content, mode) in files.items():
            try:
                for directory in reversed([one for one in path.parents if not one.exists()]):
                    directory.mkdir()
                    written.callback(_tidy, directory.rmdir)
                with path.open("xb") as file:
                    written.callback(_tidy, path.unlink)
                    file.write(content)
                if mode is not None:
                    path.chmod(mode)
            except OSError as error:
                error.filename = error.filename or str(path)
                raise
        written.pop_all()


def _tidy(remove: Callable[[], None]) -> None:
    """Remove a file or a directory, if it is there and nothing has been put into it since."""
    with contextlib.suppress(OSError):
        remove()
