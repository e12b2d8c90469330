"""The disk cache as somebody else left it: never trusted, never run, never in the way."""

from __future__ import annotations

import builtins
import errno
import hashlib
import os
import pickle
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm.plans.hardware import H200, Gpu
from pallas_norm_torch import cache
from pallas_norm_torch.launch import compiling, lowering

KEY, PAYLOAD = "jax 0.11 kernel", bytes(range(256)) * 40


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pallas_norm"


def the_file(folder: Path) -> Path:
    (file,) = folder.glob("*.kernel")
    return file


# --- what is read is bytes, and nothing else ------------------------------------------------------------------------


class Bomb:
    """Runs a command where it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, ...]]:
        return os.system, ("touch exploded",)


HOSTILE = {
    "a pickle": pickle.dumps(Bomb()),
    "a pickle behind the magic": cache.MAGIC + bytes(cache.DIGEST_BYTES) + pickle.dumps(Bomb()),
    "Python": b"__import__('os').system('touch exploded')\n",
    "a script": b"#!/bin/sh\ntouch exploded\n",
    "a shared library": b"\x7fELF" + bytes(1000),
    "a digest without the key": cache.MAGIC + hashlib.sha256(PAYLOAD).digest() + PAYLOAD,
    "the magic of another version": b"pallas-norm kernel 2\n" + cache._seal(KEY, PAYLOAD) + PAYLOAD,
    "nothing behind the magic": cache.MAGIC,
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_of_the_right_name_is_refused_and_not_run(
    content: bytes, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cache.store(KEY, PAYLOAD)
    the_file(folder).write_bytes(content)
    assert cache.load(KEY) is None
    assert not (tmp_path / "exploded").exists()


def test_what_is_loaded_is_the_bytes_that_were_stored_also_where_they_are_a_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing between the file and the caller looks into them: no import, no code is made or run, no process starts."""
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps(Bomb())
    assert cache.store(KEY, payload)
    events = []
    forbidden = ("import", "compile", "exec", "marshal.loads", "pickle.find_class", "os.system", "subprocess.Popen")
    listening = [True]
    sys.addaudithook(lambda event, _: events.append(event) if listening and event in forbidden else None)
    found = cache.load(KEY)
    listening.clear()
    assert found == payload
    assert events == []
    assert not (tmp_path / "exploded").exists()


@given(st.binary(max_size=200), st.booleans())
def test_only_the_sealed_bytes_of_the_key_come_back(content: bytes, sealed: bool) -> None:  # noqa: FBT001
    cache.store("fuzzed", b"")
    path = cache._path("fuzzed")
    path.write_bytes(cache.MAGIC + cache._seal("fuzzed", content) + content if sealed else content)
    assert cache.load("fuzzed") == (content if sealed else None)


@given(st.data())
def test_no_byte_of_a_file_may_change(data: st.DataObject) -> None:
    cache.store("fuzzed", PAYLOAD[:300])
    path = cache._path("fuzzed")
    content = bytearray(path.read_bytes())
    for at in data.draw(st.sets(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(content[: data.draw(st.sampled_from((None, -1, 10)))])
    assert cache.load("fuzzed") is None


# --- whose it is ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", ["file", "folder"])
def test_a_foreign_owner_is_not_trusted(foreign: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of both is enough: in another's folder a file can be exchanged, and another's file can change."""
    cache.store(KEY, PAYLOAD)
    assert cache.load(KEY) == PAYLOAD
    function = "fstat" if foreign == "file" else "stat"
    real = getattr(os, function)

    def owned_by_another(*arguments: Any, **options: Any) -> Any:
        found = list(real(*arguments, **options))
        found[stat.ST_UID] = os.geteuid() + 1
        return os.stat_result(found)

    monkeypatch.setattr(os, function, owned_by_another)
    assert cache.load(KEY) is None
    if foreign == "folder":
        assert not cache.store(KEY, PAYLOAD)


def test_the_permissions_are_those_of_the_file_that_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked of the open descriptor: by name, the file could be another one by the time it is opened."""
    cache.store(KEY, PAYLOAD)
    path, asked = the_file(folder), []
    real = os.stat
    monkeypatch.setattr(os, "stat", lambda what, **options: asked.append(what) or real(what, **options))
    assert cache.load(KEY) == PAYLOAD
    assert path not in asked


def test_a_link_to_a_right_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    cache.store(KEY, PAYLOAD)
    elsewhere = tmp_path / "elsewhere"
    the_file(folder).rename(elsewhere)
    cache._path(KEY).symlink_to(elsewhere)
    assert cache.load(KEY) is None
    assert cache.store(KEY, b"new")  # replaces the link, and does not write through it
    assert cache.load(KEY) == b"new"
    assert elsewhere.read_bytes().endswith(PAYLOAD)


@pytest.mark.slow
def test_a_pipe_of_the_right_name_does_not_hang(folder: Path) -> None:
    """open() of a pipe without a writer waits for one."""
    cache.store(KEY, PAYLOAD)
    the_file(folder).unlink()
    os.mkfifo(cache._path(KEY), 0o600)
    code = "import sys; from pallas_norm_torch import cache; sys.exit(cache.load(sys.argv[1]) is not None)"
    subprocess.run([sys.executable, "-c", code, KEY], check=True, timeout=60)


# --- a disk that does not take it -------------------------------------------------------------------------------------


def refuses(code: int) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    return refuse


class FullFile:
    """A file on a full disk, which is found out at the write or at the close."""

    def __init__(self, file: Any, when: str) -> None:
        self.file, self.when = file, when

    def __enter__(self) -> FullFile:
        return self

    def write(self, content: bytes) -> int:
        if self.when == "write":
            self.file.write(content[:10])
            refuses(errno.ENOSPC)()
        return self.file.write(content)

    def __exit__(self, *_: object) -> None:
        self.file.close()
        if self.when == "close":
            refuses(errno.ENOSPC)()


@pytest.mark.parametrize("when", ["write", "close"])
def test_a_disk_that_fills_up_leaves_nothing_new(when: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, PAYLOAD)
    real = builtins.open
    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", lambda *arguments: FullFile(real(*arguments), when))
        assert not cache.store(KEY, b"new")
    assert [file.suffix for file in folder.iterdir()] == [".kernel"]
    assert cache.load(KEY) == PAYLOAD


@pytest.mark.parametrize("function", ["tempfile.mkstemp", "os.replace", "pathlib.Path.mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT, errno.EIO])
def test_a_step_that_fails_is_no_error(function: str, code: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(KEY, PAYLOAD)
    with monkeypatch.context() as patch:
        patch.setattr(function, refuses(code))
        assert not cache.store(KEY, b"new")
    assert [file.suffix for file in folder.iterdir()] == [".kernel"]
    assert cache.load(KEY) == PAYLOAD


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write to a folder that is read-only")
def test_a_read_only_folder_is_read_and_not_written(folder: Path) -> None:
    cache.store(KEY, PAYLOAD)
    folder.chmod(0o500)
    try:
        assert not cache.store("another", b"new")
        assert cache.load(KEY) == PAYLOAD
    finally:
        folder.chmod(0o700)


# --- and the call still gets its kernel -------------------------------------------------------------------------------


class Program:
    plan, gpu = "a plan", H200


@pytest.mark.parametrize("left", [*HOSTILE, "a full disk", "what was stored"])
def test_the_kernel_is_lowered_where_the_cache_has_none(
    left: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lowered = []
    monkeypatch.setattr(lowering, "module_of", lambda program: lowered.append(program) or (PAYLOAD, 7))
    program = Program()
    assert compiling._cached_module(program) == (PAYLOAD, 7)
    if left in HOSTILE:
        the_file(folder).write_bytes(HOSTILE[left])
    elif left == "a full disk":
        the_file(folder).unlink()
        monkeypatch.setattr(os, "replace", refuses(errno.ENOSPC))
    assert compiling._cached_module(program) == (PAYLOAD, 7)
    assert len(lowered) == (1 if left == "what was stored" else 2)


def test_another_gpu_has_a_module_of_its_own(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code depends on the architecture and on the shared memory."""
    monkeypatch.setattr(lowering, "module_of", lambda program: (repr(program.gpu).encode(), 7))
    program = Program()  # one: its key has its address
    for program.gpu in (H200, Gpu((12, 0), 101376, 170)):
        assert compiling._cached_module(program)[0] == repr(program.gpu).encode()


def test_a_release_without_sources_has_a_key_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation of .pyc files alone: the hash of nothing was equal for all releases."""
    monkeypatch.setattr(compiling.pallas_norm, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(compiling, "__file__", str(tmp_path / "launch" / "compiling.py"))
    digests = set()
    for release in ("0.1.0", "0.2.0"):
        monkeypatch.setattr(compiling.importlib.metadata, "version", lambda name, release=release: release)
        compiling._source_digest.cache_clear()
        digests.add(compiling._source_digest())
    compiling._source_digest.cache_clear()
    assert len(digests) == 2
