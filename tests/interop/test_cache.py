"""Lowered kernels on disk: whole and one's own, or as good as absent."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pallas_norm_torch import cache

KEY, PAYLOAD = "jax 0.11 kernel", bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pallas_norm"


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.kernel")
    return file


def test_what_was_stored_is_loaded_and_nothing_else(folder: Path) -> None:
    assert cache.load(KEY) is None
    assert cache.store(KEY, PAYLOAD)
    assert cache.load(KEY) == PAYLOAD
    assert cache.load(KEY + " of another version") is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE(the_file(folder).stat().st_mode) == 0o600


def test_a_file_of_another_key_is_not_taken(folder: Path) -> None:
    cache.store(KEY, PAYLOAD)
    content = the_file(folder).read_bytes()
    cache.store("another", b"payload")
    for file in folder.glob("*.kernel"):
        file.write_bytes(content)
    assert cache.load("another") is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "one bit", "longer", "text", "directory", "link", "gone"])
def test_a_damaged_file_is_absent_and_gets_replaced(damage: str, folder: Path) -> None:
    cache.store(KEY, PAYLOAD)
    file = the_file(folder)
    content = file.read_bytes()
    flipped = content[:-1] + bytes([content[-1] ^ 1])
    changed = {
        "truncated": content[:-7],
        "empty": b"",
        "one bit": flipped,
        "longer": content + b"x",
        "text": b"hello\n",
    }
    if damage in changed:
        file.write_bytes(changed[damage])
    else:
        file.rename(folder / "elsewhere")
        if damage == "directory":
            file.mkdir()
        elif damage == "link":
            file.symlink_to(folder / "elsewhere")
    assert cache.load(KEY) is None
    if damage != "directory":
        assert cache.store(KEY, PAYLOAD)
        assert cache.load(KEY) == PAYLOAD


@pytest.mark.parametrize("bit", [stat.S_IWGRP, stat.S_IWOTH])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_what_others_may_write_is_not_trusted(what: str, bit: int, folder: Path) -> None:
    cache.store(KEY, PAYLOAD)
    path = the_file(folder) if what == "file" else folder
    path.chmod(path.stat().st_mode | bit)
    assert cache.load(KEY) is None


def test_another_users_file_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, PAYLOAD)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert cache.load(KEY) is None
    assert not cache.store(KEY, PAYLOAD)


def test_a_folder_that_cannot_be_made_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert not cache.store(KEY, PAYLOAD)
    assert cache.load(KEY) is None


def test_a_full_disk_is_no_error_and_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert not cache.store(KEY, PAYLOAD)
    assert list(folder.iterdir()) == []
    assert cache.load(KEY) is None


WRITER = """
import sys
from pallas_norm_torch import cache
payload = bytes([int(sys.argv[1])]) * 100_000
for _ in range(200):
    assert cache.store("shared", payload)
    found = cache.load("shared")
    assert found is not None and len(found) == 100_000 and len(set(found)) == 1
"""


@pytest.mark.slow
def test_two_processes_at_once_never_see_half_a_file() -> None:
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(value)]) for value in (1, 2)]
    assert [writer.wait(timeout=120) for writer in writers] == [0, 0]
