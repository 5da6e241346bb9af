"""The checks of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from cdcsync.config import Config, HashEmbedder, Index, Source, Worker
from cdcsync.config.values import is_loopback
from cdcsync.preflight.machine import machine_findings, spool_faults

CONFIG = Config(
    embedders={"words": HashEmbedder()}, indexes={"articles": Index(table="articles", text="{title}", embedder="words")}
)


def test_the_defaults_are_sound() -> None:
    assert list(machine_findings(CONFIG)) == []


def test_a_spool_directory_has_to_be_there_and_writable(tmp_path: Path) -> None:
    assert list(spool_faults(tmp_path)) == []
    (absent,) = spool_faults(tmp_path / "absent")
    (tmp_path / "file").touch()
    (file,) = spool_faults(tmp_path / "file")
    assert (absent.level, file.level) == ("error", "error")
    assert f"mkdir -p {tmp_path / 'absent'}" in str(absent.hint)
    assert "is not a directory" in file.message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_spool_directory_of_someone_else_is_refused() -> None:
    (fault,) = spool_faults(Path("/"))
    assert "may not create files" in fault.message


def test_without_streaming_nothing_is_spooled() -> None:
    source = Source(streaming=False, spool_directory="/nonexistent")
    assert list(machine_findings(msgspec.structs.replace(CONFIG, source=source))) == []


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost"])
def test_loopback_is_this_machine_alone(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "db.example.org"])
def test_an_address_that_others_reach_is_warned_of(host: str) -> None:
    listen = f"[{host}]:9477" if ":" in host else f"{host}:9477"
    (warning,) = machine_findings(msgspec.structs.replace(CONFIG, worker=Worker(listen=listen)))
    assert (warning.level, warning.where) == ("warning", "worker.listen")
    assert "127.0.0.1" in str(warning.hint)
