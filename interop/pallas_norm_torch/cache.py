"""Lowered kernels on disk, for the next process: bytes that are verified before anything sees them.

A file that is corrupt, truncated, of another version or another user's is as good as absent, and so is a directory that
cannot be written.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path

MAGIC = b"pallas-norm kernel 1\n"
DIGEST_BYTES = hashlib.sha256().digest_size


def folder() -> Path:
    """`pallas_norm` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "pallas_norm"


def _path(key: str) -> Path:
    return folder() / f"{hashlib.sha256(key.encode()).hexdigest()}.kernel"


def _trusted(status: os.stat_result) -> bool:
    """Written by this user and by nobody else: what a cached kernel does runs with this user's rights."""
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _seal(key: str, payload: bytes) -> bytes:
    return hashlib.sha256(MAGIC + key.encode() + b"\0" + payload).digest()


def load(key: str) -> bytes | None:
    """What `store` wrote under `key`, or None."""
    path = _path(key)
    try:
        if not path.is_absolute() or not _trusted(os.stat(path.parent)):  # not absolute: a user without a home
            return None
        # O_NONBLOCK: to open a pipe is to wait for its writer.
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not (stat.S_ISREG(status.st_mode) and _trusted(status)):
                return None
            content = file.read()
    except OSError:
        return None
    head = len(MAGIC) + DIGEST_BYTES
    payload = content[head:]
    if content[: len(MAGIC)] != MAGIC or content[len(MAGIC) : head] != _seal(key, payload):
        return None
    return payload


def store(key: str, payload: bytes) -> bool:
    """Whether it could be kept. Readers and other writers see a whole file or none."""
    path = _path(key)
    if not path.is_absolute():
        return False
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _trusted(os.stat(path.parent)):
            return False
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, suffix=".part")  # for this user only: mode 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(MAGIC + _seal(key, payload) + payload)
            os.replace(temporary, path)
        except OSError:
            os.unlink(temporary)
            raise
    except OSError:
        return False
    return True
