"""What the package holds to deploy with: every file can be had by a command, unchanged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from cdcsync.cli import main
from cdcsync.config import parse
from tests import ROOT


def exit_status(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    assert isinstance(exited.value.code, int)
    return exited.value.code


PRINTED = {
    ("example",): "cdcsync.example.toml",
    ("roles",): "roles.sql",
    ("systemd",): "cdcsync.service",
    ("systemd", "--template"): "cdcsync@.service",
    ("systemd", "--serve"): "cdcsync-serve.service",
    ("alerts",): "alerts.yml",
    ("dashboard",): "dashboard.json",
}


@pytest.mark.parametrize(("arguments", "name"), PRINTED.items(), ids=" ".join)
def test_a_file_is_printed_as_it_is(arguments: tuple[str, ...], name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status("config", *arguments) == 0
    assert capsys.readouterr().out == (ROOT / "config" / name).read_text()


def test_every_file_of_the_configuration_folder_can_be_printed() -> None:
    assert {path.name for path in (ROOT / "config").iterdir()} == set(PRINTED.values())


def test_what_compose_writes_holds_every_file_that_it_mounts(tmp_path: Path) -> None:
    assert exit_status("config", "compose", tmp_path / "shop") == 0
    folder = tmp_path / "shop" / "docker"
    services = yaml.safe_load((folder / "compose.yaml").read_text())["services"]
    mounts = [mount for service in services.values() for mount in service.get("volumes", []) if mount.startswith(".")]
    assert len(mounts) > 5
    for mount in mounts:
        assert (folder / mount.split(":")[0]).exists(), mount
    script = folder / "initdb" / "20-roles.sh"
    assert script.stat().st_mode == (ROOT / "docker" / "initdb" / "20-roles.sh").stat().st_mode


def test_what_kubernetes_writes_holds_every_resource_and_a_configuration(tmp_path: Path) -> None:
    assert exit_status("config", "kubernetes", tmp_path) == 0
    folder = tmp_path / "deploy" / "kubernetes"
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text())
    for name in [*kustomization["resources"], *kustomization["configMapGenerator"][0]["files"]]:
        assert (folder / name).is_file(), name
    text = (folder / "cdcsync.toml").read_text()
    environment = dict.fromkeys(re.findall(r"\$\{(\w+)", text), "postgresql://h/d")
    assert parse(text, environment, where="cdcsync.toml").indexes


def test_files_that_are_there_are_kept_and_nothing_is_written_beside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = tmp_path / "deploy" / "kubernetes" / "secret.example.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    assert exit_status("config", "kubernetes", tmp_path) == 2
    assert str(mine) in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]
    assert mine.read_text() == "mine"


@pytest.mark.parametrize(
    ("command", "in_the_way"),
    [("compose", "docker"), ("compose", "docker/grafana"), ("kubernetes", "deploy"), ("kubernetes", ".")],
)
def test_if_a_file_cannot_be_written_none_is_and_the_command_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str, in_the_way: str
) -> None:
    directory = tmp_path / "shop"
    mine = directory / in_the_way
    mine.parent.mkdir(parents=True, exist_ok=True)
    mine.write_text("mine")
    before = set(tmp_path.rglob("*"))
    assert exit_status("config", command, directory) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert "nothing was\n" in told.err
    assert "fix:" in told.err
    assert set(tmp_path.rglob("*")) == before
    mine.unlink()
    assert exit_status("config", command, directory) == 0
