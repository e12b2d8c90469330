"""Seeded operands that are the same on every machine, and digests of results: a change of one is a change of version.

tests/data/golden_bits.txt has the digests, golden.py compares them.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

EPS = 1e-6
DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
RESULTS = ("rstd", "y", "dx")
RESIDUAL_RESULTS = ("s", "rstd", "y", "dx")


class Case(NamedTuple):
    n: int
    dtype: str

    @property
    def rows(self) -> int:
        """Of narrow ones two blocks of every kernel, and some that fill none."""
        return 69 if self.n <= 1024 else 5

    def __str__(self) -> str:
        return f"{self.rows} x {self.n} {self.dtype}"


def _mixed(stream: int, count: int) -> Array:
    """24 bits each: SplitMix64 of stream and position."""
    z = (np.arange(count, dtype=np.uint64) + np.uint64(stream << 40)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(40)).astype(np.int32)


def _numbers(stream: int, rows: int, n: int) -> Array:
    """From -4 up to 4, all of one row times a power of two."""
    unscaled = (_mixed(stream, rows * n) - np.int32(1 << 23)).astype(np.float32).reshape(rows, n) / np.float32(1 << 21)
    return np.ldexp(unscaled, _mixed(stream + 1, rows)[:, None] % 9 - 4)


def operands(case: Case) -> dict[str, Array]:
    wide = {name: _numbers(2 * i + 1, case.rows, case.n) for i, name in enumerate(("x", "residual", "dy", "ds"))}
    wide["weight"] = np.float32(1) + _mixed(9, case.n).astype(np.float32) / np.float32(1 << 24)
    return {name: value.astype(DTYPES[case.dtype]) for name, value in wide.items()}


def digest(value: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]
