"""The package as it is installed: built, put into an empty environment, and used away from the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from tests import ROOT

pytestmark = [pytest.mark.proof, pytest.mark.timeout(600)]


def _run(*command: str | Path, where: Path, patience_s: float = 300) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=where,
        env={**environment, "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=patience_s,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def _tracked() -> set[str]:
    """Return the files of the repository, and those that are about to be."""
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("what belongs to the repository is known to git alone")
    listed = _run(git, "ls-files", "--cached", "--others", "--exclude-standard", where=ROOT).splitlines()
    return {name for name in listed if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A source distribution of a copy of the repository, and the wheel that is made from it."""
    copy, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in _tracked():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, copy / name)
    uv = Path(sys.executable).with_name("uv")
    _run(uv, "build", "--offline", "--no-build-isolation", "--python", sys.executable, "-o", dist, ".", where=copy)
    return next(dist.glob("*.tar.gz")), next(dist.glob("*.whl"))


@pytest.fixture(scope="module")
def command(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command of an environment that holds the wheel; its dependencies are those of the tests."""
    place = tmp_path_factory.mktemp("venv")
    venv.create(place, with_pip=False, symlinks=True)
    uv = Path(sys.executable).with_name("uv")
    _run(uv, "pip", "install", "--offline", "--no-deps", "--python", place / "bin" / "python", built[1], where=place)
    (packages,) = place.glob("lib/python*/site-packages")
    # A line of such a file adds a directory, and not what the files in there would add, as an editable install does.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    found = _run(place / "bin" / "python", "-c", "import cdcsync; print(cdcsync.__file__)", where=place)
    assert found.startswith(str(packages))
    return place / "bin" / "cdcsync"


def test_the_source_distribution_holds_every_file_of_the_repository(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[0]) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    assert _tracked() - held == set()


def test_the_wheel_holds_what_is_deployed_with_it_and_no_tests(built: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(built[1]) as archive:
        held = set(archive.namelist())
    folders = ("config/", "deploy/", "docker/")
    assert {f"cdcsync/shipped/{name}" for name in _tracked() if name.startswith(folders)} <= held
    assert all(name.startswith(("cdcsync/", "cdcsync-")) for name in held)
    assert {name for name in _tracked() if name.startswith("cdcsync/")} <= held


def test_the_installed_command_hands_out_the_files(command: Path, tmp_path: Path) -> None:
    for name, file in (("example", "cdcsync.example.toml"), ("roles", "roles.sql"), ("alerts", "alerts.yml")):
        assert _run(command, "config", name, where=tmp_path) == (ROOT / "config" / file).read_text()
    _run(command, "config", "compose", "shop", where=tmp_path)
    _run(command, "config", "kubernetes", "shop-on-kubernetes", where=tmp_path)
    assert (tmp_path / "shop" / "docker" / "compose.yaml").is_file()
    assert (tmp_path / "shop-on-kubernetes" / "deploy" / "kubernetes" / "deployment.yaml").is_file()


@pytest.mark.model
def test_the_installed_command_runs_the_demo(command: Path, tmp_path: Path) -> None:
    assert "how soon after the commit" in _run(command, "demo", "--rows", "40", where=tmp_path)
