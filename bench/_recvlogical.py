"""PostgreSQL's own client of a slot, asked for the same messages as a worker asks for."""

from __future__ import annotations

from cdcsync.demo.programs import embedded_bin_dir


def recvlogical(dsn: str, slot: str, publication: str) -> list[str]:
    """Return the command that receives a slot and writes what comes to /dev/null."""
    options = ("proto_version=4", f"publication_names={publication}", "messages=true")
    return [
        str(embedded_bin_dir() / "pg_recvlogical"),
        *("--dbname", dsn, "--slot", slot, "--start", "--file", "/dev/null"),
        *(part for option in options for part in ("--option", option)),
    ]
