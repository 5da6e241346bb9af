"""Which DSNs may lead to a standby although the primary can be reached."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cdcsync.errors import SetupError
from cdcsync.postgres.settings import conninfo_for
from cdcsync.preflight.hosts import connection_options, host_faults

SEVERAL = "postgresql://a,b/app"


@pytest.mark.parametrize(
    ("dsn", "refused"),
    [
        pytest.param(SEVERAL, True, id="several hosts"),
        pytest.param("host=a,b dbname=app", True, id="several hosts as pairs"),
        pytest.param("hostaddr=127.0.0.1,127.0.0.2 dbname=app", True, id="several addresses"),
        pytest.param(f"{SEVERAL}?target_session_attrs=any", True, id="any"),
        pytest.param(f"{SEVERAL}?target_session_attrs=prefer-standby", True, id="a standby rather"),
        pytest.param(f"{SEVERAL}?target_session_attrs=standby", True, id="a standby only"),
        pytest.param(f"{SEVERAL}?target_session_attrs=read-only", True, id="read-only"),
        pytest.param(f"{SEVERAL}?target_session_attrs=read-write", False, id="read-write"),
        pytest.param(f"{SEVERAL}?target_session_attrs=primary", False, id="a primary only"),
        pytest.param("postgresql://a/app", False, id="one host"),
        pytest.param("", False, id="no host"),
        pytest.param("not a dsn", False, id="a faulty one, which has an error of its own"),
    ],
)
def test_several_hosts_need_an_attribute_that_only_a_primary_has(dsn: str, refused: bool) -> None:
    found = list(host_faults("target", connection_options(dsn)))

    assert bool(found) is refused
    for one in found:
        assert one.where == "target.dsn"
        assert "target_session_attrs=read-write in target.dsn" in str(one.hint)


@pytest.mark.parametrize("variable", ["PGPASSWORD", "PGUSER", "PGHOST", "PGAPPNAME", "PGPASSFILE"])
def test_a_variable_that_is_not_utf_8_is_named(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, os.fsdecode(b"s3cr\xe4t"))
    for used in (connection_options, conninfo_for):
        with pytest.raises(SetupError, match="is not UTF-8") as caught:
            used("dbname=app")
        assert caught.value.where == variable
        assert "s3cr" not in str(caught.value)


def test_a_service_file_that_is_not_utf_8_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").write_bytes(b"[far]\nhost=h\npassword=s3cr\xe4t\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGSERVICE", "far")
    with pytest.raises(SetupError, match="the password of libpq's environment is not UTF-8") as caught:
        conninfo_for("dbname=app")
    assert "service file" in str(caught.value.where)


def test_the_environment_names_hosts_and_attributes_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGHOST", "a,b")
    assert list(host_faults("source", connection_options("dbname=app")))
    assert not list(host_faults("source", connection_options("host=c")))
    monkeypatch.setenv("PGTARGETSESSIONATTRS", "read-write")
    assert not list(host_faults("source", connection_options("dbname=app")))


def test_the_service_of_a_dsn_names_hosts_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "services").write_text("[far]\nhost=a,b\n[near]\nhost=a\n[empty..part]\nhost=a..b\n")
    monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
    monkeypatch.setenv("PGHOST", "c,d")
    assert list(host_faults("source", connection_options("service=far")))
    assert not list(host_faults("source", connection_options("service=far target_session_attrs=read-write")))
    assert not list(host_faults("source", connection_options("service=near")))
    with pytest.raises(SetupError, match=r"a\.\.b cannot be a host name"):
        conninfo_for("service=empty..part")
