"""libpq's password file, where systemd hands it over (`LoadCredential`).

The credential is readable for nobody but the service. Recent versions of systemd see to that by an access control list,
whose mask looks like access for the file's group, and libpq ignores a password file that a group may read.

Source: systemd.exec(5), "Credentials"; libpq, "The Password File".
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from pathlib import Path

VARIABLE = "PGPASSFILE"

_HANDED_OVER = re.compile(r"/run/credentials/[^/]+/(?P<name>[^/]+)|/proc/\d+/fd/\d+")
"""Where systemd puts a credential, and where `take_credential` puts the copy of one."""


def take_credential(environment: MutableMapping[str, str]) -> None:
    """Have libpq read a password file that is a credential of this service, whatever its mode seems to be.

    It gets a copy in the memory of this process, which is named in the environment instead.
    """
    credentials, name = environment.get("CREDENTIALS_DIRECTORY"), environment.get(VARIABLE)
    if not credentials or not name or Path(name).parent != Path(credentials):
        return
    try:
        if not Path(name).stat().st_mode & 0o077:
            return
        content = Path(name).read_bytes()
    except OSError:
        return  # there need not be one; one that cannot be read is a wrong password, as libpq says
    copy = os.memfd_create(Path(name).name)
    os.fchmod(copy, 0o600)
    os.write(copy, content)
    # Under its own number: a session opens it anew, and so from its beginning.
    environment[VARIABLE] = f"/proc/{os.getpid()}/fd/{copy}"


def to_edit(environment: Mapping[str, str]) -> str:
    """Return the password file to which a person adds a line: the one that libpq reads, or that systemd copied."""
    name = environment.get(VARIABLE) or "~/.pgpass"
    handed_over = _HANDED_OVER.fullmatch(name)
    if handed_over is None:
        return name
    credential = handed_over["name"]
    if credential is None:
        try:
            credential = os.readlink(name).removeprefix("/memfd:").removesuffix(" (deleted)")
        except OSError:
            return name
    return f"/etc/credstore/{credential}"
