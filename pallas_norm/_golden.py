"""Bits that a machine is checked against: operands that are the same everywhere, and the digests that their results had
when this version was released, in golden_bits.txt beside this file.

The operands are whole numbers hashed by position: they depend on no generator of NumPy's or JAX's.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
from typing import Any, NamedTuple, TypeAlias

import ml_dtypes
import numpy as np

from .plans import few_rows

Array: TypeAlias = np.ndarray[Any, np.dtype[Any]]

EPS = 1e-2  # larger than that of models, so that a result without it is not within any bounds
DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}
RESULTS = ("rstd", "y", "dx")
RESIDUAL_RESULTS = ("s", "rstd", "y", "dx")
# Row lengths of models, the last one of those that bulk copies move whole but not in quarters; one that its last chunk
# overlaps, one that is odd, and three that no bulk copy moves.
LENGTHS = (128, 512, 1000, 4096, 8192, 12289, 16384, 32760, 32768, 65528, 65536, 131064, 131072, 18432)


class Case(NamedTuple):
    n: int
    dtype: str
    rows: int

    def __str__(self) -> str:
        return f"{self.rows} x {self.n} {self.dtype}"


def case(n: int, dtype: str) -> Case:
    """Of narrow rows two blocks of every kernel, and some that fill none."""
    return Case(n, dtype, 69 if n <= 1024 else 5)


def cases(n: int, dtype: str) -> list[Case]:
    """The one of `case`, and where few rows have a schedule of their own one for the other."""
    one, row = case(n, dtype), few_rows.row_of(n, DTYPES[dtype].itemsize)
    if row is None:
        return [one]
    return [one, one._replace(rows=row.most + 1 if one.rows <= row.most else max(1, row.most - 1))]


WITHOUT_KERNEL = tuple(case(16, dtype) for dtype in DTYPES)
# What XLA fuses, and with it which rounding it might drop, depends on the shape: on a CPU it kept that of the plain
# formula in 512 x 1024 and dropped it in 4096 x 1024.
LARGE = Case(1024, "bfloat16", 4096)


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
    """Ordinary numbers: none is subnormal, and no sum overflows."""
    wide = {name: _numbers(2 * i + 1, case.rows, case.n) for i, name in enumerate(("x", "residual", "dy", "ds"))}
    wide["weight"] = np.float32(1) + _mixed(9, case.n).astype(np.float32) / np.float32(1 << 24)
    return {name: value.astype(DTYPES[case.dtype]) for name, value in wide.items()}


def digest(value: Array) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()[:16]


@functools.cache
def _recorded() -> dict[str, list[str]]:
    text = importlib.resources.files("pallas_norm").joinpath("golden_bits.txt").read_text(encoding="utf-8")
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    return {label: found.split() for label, found in (line.split(": ") for line in lines)}


def bits(case: Case, *, residual: bool) -> dict[str, str]:
    """The digests of the results: of rms_norm, or of add_rms_norm, with their gradients."""
    found = _recorded()[str(case)]
    names, own = (RESIDUAL_RESULTS, found[len(RESULTS) :]) if residual else (RESULTS, found[: len(RESULTS)])
    return dict(zip(names, own, strict=True))
