"""Files that are written whole or not at all, whoever owns them and wherever they lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cdcsync.process.files import real, replace_file, write_files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def owned_by(path: Path, monkeypatch: pytest.MonkeyPatch, user: int, group: int) -> None:
    """Have the file look as if it were somebody else's."""
    before = path.stat()
    facts = os.stat_result([*before[:4], user, group, *before[6:]])
    stat = Path.stat
    monkeypatch.setattr(Path, "stat", lambda self, **more: facts if self == path else stat(self, **more))


def tree(directory: Path) -> dict[str, str | None]:
    """Return what lies below a directory: the text of files, None for directories."""
    found = sorted(directory.rglob("*"))
    return {str(one.relative_to(directory)): one.read_text() if one.is_file() else None for one in found}


def test_a_file_is_replaced_and_nothing_is_left_beside_it(path: Path) -> None:
    for content in (b"one", b"two"):
        replace_file(path, content)
    assert tree(path.parent) == {"file": "two"}


def test_only_a_new_file_gets_the_mode_that_is_named(path: Path) -> None:
    replace_file(path, b"one", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o600
    path.chmod(0o644)
    replace_file(path, b"two", mode=0o600)
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_root_replaces_stays_its_owners(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(path, b"one", mode=0o640)
    given: list[tuple[int, int]] = []
    owned_by(path, monkeypatch, 4_321, 4_322)
    monkeypatch.setattr(os, "fchown", lambda _, user, group: given.append((user, group)))
    replace_file(path, b"two")
    assert given == [(-1, 4_322), (4_321, -1)]
    assert os.stat(path).st_mode & 0o777 == 0o640


def test_a_group_that_cannot_be_kept_is_not_replaced_by_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(path, b"one", mode=0o640)

    def refused(*_: int) -> None:
        raise PermissionError

    owned_by(path, monkeypatch, 4_321, 4_322)
    monkeypatch.setattr(os, "fchown", refused)
    replace_file(path, b"two")
    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_and_the_file_that_it_leads_to_is_replaced(path: Path, there: bool) -> None:
    (path.parent / "volume").mkdir()
    target = path.parent / "volume" / "real"
    if there:
        target.write_bytes(b"one")
    path.symlink_to(Path("volume") / "real")
    replace_file(path, b"two")
    assert path.is_symlink()
    assert target.read_bytes() == b"two"
    assert [one.name for one in target.parent.iterdir()] == ["real"]


def test_a_loop_of_links_cannot_be_replaced(path: Path) -> None:
    path.symlink_to(path)
    assert real(path) == path
    with pytest.raises(OSError, match="symbolic links"):
        replace_file(path, b"one")
    assert [one.name for one in path.parent.iterdir()] == ["file"]


def test_a_file_that_cannot_be_replaced_is_as_it_was(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replace_file(path, b"one")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(path, b"two")
    assert tree(path.parent) == {"file": "one"}


def test_new_files_are_written_with_their_directories_and_modes(tmp_path: Path) -> None:
    write_files({tmp_path / "a" / "b" / "one": (b"1", 0o751), tmp_path / "a" / "two": (b"2", None)})
    assert tree(tmp_path) == {"a": None, "a/b": None, "a/b/one": "1", "a/two": "2"}
    assert (tmp_path / "a" / "b" / "one").stat().st_mode & 0o777 == 0o751


def test_of_files_of_which_one_is_there_none_is_written(tmp_path: Path) -> None:
    (tmp_path / "two").write_text("mine")
    with pytest.raises(FileExistsError) as refused:
        write_files({tmp_path / "a" / "one": (b"1", None), tmp_path / "two": (b"2", None)})
    assert refused.value.filename == str(tmp_path / "two")
    assert tree(tmp_path) == {"two": "mine"}


def test_of_files_of_which_one_cannot_be_written_none_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    chmod = Path.chmod

    def full(self: Path, mode: int) -> None:
        if self.name == "two":
            raise OSError(28, "No space left on device")
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", full)
    with pytest.raises(OSError, match="No space") as refused:
        write_files({tmp_path / "a" / "b" / "one": (b"1", 0o644), tmp_path / "c" / "two": (b"2", 0o644)})
    assert refused.value.filename == str(tmp_path / "c" / "two")
    assert tree(tmp_path) == {"a": None, "a/mine": "mine"}


def test_what_others_have_put_into_a_directory_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chmod = Path.chmod

    def another_comes(self: Path, mode: int) -> None:
        (self.parent / "theirs").write_text("theirs")
        chmod(self, mode)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "chmod", another_comes)
    with pytest.raises(OSError, match="No space"):
        write_files({tmp_path / "a" / "one": (b"1", 0o644)})
    assert tree(tmp_path) == {"a": None, "a/theirs": "theirs"}
