"""A password file that systemd hands over is read by libpq, whatever its mode seems to be."""

from __future__ import annotations

import os
from pathlib import Path

import psycopg
import pytest
from psycopg import conninfo

from cdcsync.postgres.passfile import VARIABLE, take_credential, to_edit
from cdcsync.postgres.refusals import explain
from tests.support.preflight import LOCKED
from tests.support.servers import Server


@pytest.fixture
def credential(tmp_path: Path) -> Path:
    """The password of the locked role as systemd 257 hands it over: the list's mask is in the place of the group."""
    file = tmp_path / "cdcsync.pgpass"
    file.write_text(f"*:*:*:{LOCKED}:right\n")
    file.chmod(0o440)
    return file


@pytest.mark.server
def test_libpq_reads_a_credential_each_time_that_it_connects(
    lone_server: Server, credential: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(credential))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credential.parent))
    take_credential(os.environ)
    dsn = conninfo.make_conninfo(lone_server.dsn, user=LOCKED)
    for _ in range(2):
        with psycopg.connect(dsn) as session:
            assert session.execute("SELECT current_user").fetchone() == (LOCKED,)
    copy = os.environ[VARIABLE]
    take_credential(os.environ)
    assert os.environ[VARIABLE] == copy


@pytest.mark.parametrize("case", ["private", "missing", "elsewhere", "no service"])
def test_any_other_password_file_is_left_to_libpq(credential: Path, case: str) -> None:
    if case == "private":
        credential.chmod(0o400)
    if case == "missing":
        credential.unlink()
    directory = credential.parent.parent if case == "elsewhere" else credential.parent
    environment = {VARIABLE: str(credential)} | (
        {"CREDENTIALS_DIRECTORY": str(directory)} if case != "no service" else {}
    )
    before = dict(environment)
    take_credential(environment)
    assert environment == before


@pytest.mark.parametrize(
    ("file", "named"),
    [
        (None, "~/.pgpass"),
        ("", "~/.pgpass"),
        ("/root/passwords", "/root/passwords"),
        ("/run/credentials/cdcsync@a.service/cdcsync-a.pgpass", "/etc/credstore/cdcsync-a.pgpass"),
        ("/proc/1/fd/1000000", "/proc/1/fd/1000000"),
    ],
    ids=str,
)
def test_the_fix_names_the_file_that_is_read(monkeypatch: pytest.MonkeyPatch, file: str | None, named: str) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if file is not None:
        monkeypatch.setenv(VARIABLE, file)
    for words in ("fe_sendauth: no password supplied", 'password authentication failed for user "ann"'):
        refusal = explain(words)
        assert refusal is not None
        assert named in (refusal.hint or "")


def test_the_fix_names_the_credential_of_which_the_worker_made_a_copy(credential: Path) -> None:
    environment = {VARIABLE: str(credential), "CREDENTIALS_DIRECTORY": str(credential.parent)}
    take_credential(environment)
    assert environment[VARIABLE] != str(credential)
    assert to_edit(environment) == "/etc/credstore/cdcsync.pgpass"
