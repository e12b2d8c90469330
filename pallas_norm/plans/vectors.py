"""How the lanes that share a row divide it: the width of a vector, the lanes of a row in a warp, and how many
warpgroups share a row whose vectors are narrow."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from .hardware import WARPS
from .lengths import LARGEST_N


@dataclasses.dataclass(frozen=True, kw_only=True)
class Narrower:
    """Rows in warps that are read with narrower vectors than their length allows."""

    itemsize: int
    smallest_n: int = 0
    largest_n: int = LARGEST_N
    multiple_of: int = 1
    vector_bytes: int
    why: str
    figures: tuple[int, ...]  # the files bench/results/tuning_*.json that have the times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Narrow:
    """Rows whose vectors are narrower than 16 bytes, and backward rows that no pipeline takes: at most 16 elements a
    lane. With 32 and more, one address for each load fills the registers (n = 32767: 444 bytes spilled)."""

    largest_n: int
    warpgroups: int
    cluster: int


NARROW = (
    Narrow(largest_n=16384, warpgroups=4, cluster=2),
    Narrow(largest_n=32768, warpgroups=4, cluster=4),
    Narrow(largest_n=65536, warpgroups=4, cluster=8),
    Narrow(largest_n=LARGEST_N, warpgroups=8, cluster=8),
)


def narrow(n: int) -> Narrow:
    return next(row for row in NARROW if n <= row.largest_n)


def vector(n: int, itemsize: int) -> int:
    """The widest vector, up to 16 bytes, that keeps every row aligned: it divides n."""
    vec = 16 // itemsize
    while n % vec:
        vec //= 2
    return vec


def warp_vector(n: int, itemsize: int, table: Sequence[Narrower]) -> int:
    """Of a row in a warp, the widest that no row of the table narrows."""
    vec = vector(n, itemsize)
    for row in table:
        if itemsize == row.itemsize and row.smallest_n <= n <= row.largest_n and n % row.multiple_of == 0:
            vec = min(vec, row.vector_bytes // itemsize)
    return vec


def lanes_of(n: int, vec: int) -> int:
    """Lanes for a row in a warp: all 32, or fewer until they are filled and at most an eighth of what they read is
    read twice."""
    lanes = 32
    while lanes * vec > n or (lanes > 4 and -n % (lanes * vec) > n // 8):
        lanes //= 2
    return lanes


def cta_vector(n: int, itemsize: int, workers: int, *, largest_overlap: int) -> int:
    """Of a row in a CTA: narrower, down to 8 bytes, where more than `largest_overlap` elements would be read twice."""
    vec = vector(n, itemsize)
    while WARPS * 32 * vec > n or (vec > 8 // itemsize and -n % (WARPS * 32 * vec * workers) > largest_overlap):
        vec //= 2
    return vec
