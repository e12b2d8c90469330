"""The plans of the backward pass: a persistent grid of programs, each with its part of dweight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from .. import _validate
from .hardware import HELD, SMS, WARPS
from .lengths import LARGEST_N, checked
from .plan import FEWEST_STAGES, BackwardPlan, Regime, Source, staged_view, stages_of
from .vectors import NARROW, Narrower, cta_vector, lanes_of, vector, warp_vector

if TYPE_CHECKING:
    from jax.typing import DTypeLike

# --- rows that bulk copies move ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """Rows that bulk copies bring to shared memory."""

    largest_n: int
    largest_row_bytes: int
    regime: Regime = Regime.CTA
    warpgroups: int = 1
    cluster: int = 1
    stages: int
    programs: int
    keeps_rows: bool = False
    why: str
    figures: str  # the result file, of those in bench/results, that has the times


# Rows in warps, of 16-bit types. The others stay in registers (up to LONGEST_SHORT), or are read twice.
WARP_PIPELINES = (
    Staged(
        largest_n=640,
        largest_row_bytes=1280,
        regime=Regime.WARP,
        stages=3,
        programs=4 * SMS,
        why="65536 x 512: 54.8 us, read twice 56.4, refilled later 56.0",
        figures="",
    ),
    Staged(
        largest_n=832,
        largest_row_bytes=1664,
        regime=Regime.WARP,
        stages=4,
        programs=3 * SMS,
        why="32768 x 768: 42.7 us, refilled later 44.1, CTA 44.6",
        figures="",
    ),
)

SMALLEST_PIPELINE = 768  # of a CTA; 32768 x 896: 55.7 us, in warps 57.6, but 65536 x 512: 68.2, in warps 57.6

# Share of the copy kernel's throughput on an H200, bf16, both kernels of the backward pass counted.
PIPELINES = (
    Staged(
        largest_n=1024,
        largest_row_bytes=2048,
        stages=4,
        programs=7 * SMS,
        keeps_rows=True,
        why="32768 x 1024: 0.929, in warps 0.897; 896: 0.928, 0.894",
        figures="",
    ),
    Staged(
        largest_n=2048,
        largest_row_bytes=4096,
        stages=4,
        programs=5 * SMS,
        why="16384 x 2048: 0.923; rows kept, 4 programs an SM 0.903, in warps 0.873",
        figures="",
    ),
    Staged(
        largest_n=3072,
        largest_row_bytes=8192,
        stages=3,
        programs=3 * SMS,
        keeps_rows=True,
        why="16384 x 3072: 0.942; rows not kept 0.928",
        figures="",
    ),
    Staged(
        largest_n=4096,
        largest_row_bytes=8192,
        stages=3,
        programs=2 * SMS,
        keeps_rows=True,
        why="16384 x 4096: 0.947; rows not kept 0.932",
        figures="",
    ),
    Staged(
        largest_n=7168,
        largest_row_bytes=16384,
        stages=3,
        programs=2 * SMS,
        why="16384 x 5120: 0.956, rows kept 0.960; 5376: 0.962, 0.952; 7168: 0.920",
        figures="",
    ),
    Staged(
        largest_n=8192,
        largest_row_bytes=16384,
        warpgroups=4,
        stages=3,
        programs=SMS,
        keeps_rows=True,
        why="8192 x 8192: 0.951; rows not kept 0.893, 2 warpgroups 0.847",
        figures="",
    ),
    Staged(
        largest_n=16384,
        largest_row_bytes=32768,
        warpgroups=4,
        stages=3,
        programs=SMS,
        why="4096 x 16384: 0.899; 8 warpgroups 0.887, 2 CTAs 0.751",
        figures="",
    ),
    Staged(
        largest_n=32768,
        largest_row_bytes=65536,
        warpgroups=4,
        cluster=2,
        stages=3,
        programs=HELD[2],
        why="2048 x 32768: 0.848; 4 CTAs 0.710, read twice 0.640",
        figures="",
    ),
    Staged(
        largest_n=65536,
        largest_row_bytes=131072,
        warpgroups=4,
        cluster=4,
        stages=3,
        programs=HELD[4],
        why="1024 x 65536: 0.789; 8 CTAs 0.707, read twice 0.461",
        figures="",
    ),
    Staged(
        largest_n=LARGEST_N,
        largest_row_bytes=262144,
        warpgroups=4,
        cluster=8,
        stages=3,
        programs=HELD[8],
        why="1024 x 131072: 0.814; 512 rows, read twice 0.424",
        figures="",
    ),
)

LARGEST_OVERLAP = 1 / 8  # of a row that is read twice: less than in the forward pass, because there is more to compute


def _staged(plan: BackwardPlan, row: Staged, itemsize: int, column_bytes: int) -> BackwardPlan | None:
    # Of a wider dy, or of ds too, a lane has more in registers: 2048 with ds needs 111, and five programs have 96.
    wide = column_bytes > 2 * itemsize
    programs = row.programs - SMS if wide and row.programs > 2 * SMS else row.programs
    per_sm = max(1, programs * row.cluster // SMS)
    stages = min(row.stages, stages_of(plan, column_bytes, per_sm=per_sm))
    if stages < FEWEST_STAGES or staged_view(plan, itemsize) is None:
        return None
    return dataclasses.replace(
        plan, source=Source.PIPELINE, stages=stages, programs=programs, keeps_rows=row.keeps_rows
    )


def _pipeline_plan(n: int, itemsize: int, column_bytes: int) -> BackwardPlan | None:
    """None for rows that are better off without, and for those that no bulk copy moves."""

    def fitting(table: Sequence[Staged]) -> Iterator[Staged]:
        return (row for row in table if n <= row.largest_n and n * itemsize <= row.largest_row_bytes)

    if n > LONGEST_SHORT and itemsize == 2:
        for row in fitting(WARP_PIPELINES):
            vec = vector(n, itemsize)
            vec = vec // 2 if -n % (32 * vec) > n // 8 else vec
            if (plan := _staged(BackwardPlan(n, Regime.WARP, vec, 32, WARPS), row, itemsize, column_bytes)) is not None:
                return plan
    if n < SMALLEST_PIPELINE:
        return None
    for row in fitting(PIPELINES):
        vec = cta_vector(n, itemsize, row.warpgroups * row.cluster, largest_overlap=int(n * LARGEST_OVERLAP))
        shape = BackwardPlan(n, Regime.CTA, vec, warpgroups=row.warpgroups, cluster=row.cluster)
        if (plan := _staged(shape, row, itemsize, column_bytes)) is not None:
            return plan
    return None


# --- rows of a CTA that are read twice --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reread:
    """Rows that bulk copies cannot move."""

    largest_n: int
    with_wide_columns: bool = True  # of a wider dy, or of ds too
    warpgroups: int
    cluster: int = 1
    per_sm: int = 1  # programs


# An SM has the registers for two programs of up to 17 elements a lane, and where x and dy are all that a row has; more
# would run after the others.
REREAD = (
    Reread(largest_n=4096, warpgroups=1, per_sm=2),
    Reread(largest_n=4352, with_wide_columns=False, warpgroups=2, per_sm=2),
    Reread(largest_n=8192, warpgroups=2),
    *(Reread(largest_n=row.largest_n, warpgroups=row.warpgroups, cluster=row.cluster) for row in NARROW),
)


def _reread_plan(n: int, itemsize: int, column_bytes: int) -> BackwardPlan:
    wide = column_bytes > 2 * itemsize
    row = next(row for row in REREAD if n <= row.largest_n and (row.with_wide_columns or not wide))
    vec = cta_vector(n, itemsize, row.warpgroups * row.cluster, largest_overlap=n // 4)
    programs = HELD[row.cluster] * row.per_sm
    return BackwardPlan(
        n,
        Regime.CTA,
        vec,
        warpgroups=row.warpgroups,
        cluster=row.cluster,
        source=Source.MEMORY,
        keeps_weight=False,
        programs=programs,
    )


# --- rows in warps ----------------------------------------------------------------------------------------------------

LONGEST_SHORT = 256  # in registers
LONGEST_IN_WARPS = 1023
MOST_ELEMENTS = 24  # of a lane: n = 200 and 896 spilled with 56


@dataclasses.dataclass(frozen=True, kw_only=True)
class Short:
    """Programs of an SM where a lane has up to so many elements, of all its rows."""

    largest: int
    programs: tuple[int, int, int, int]  # where a column of x, dy and ds has up to 4, 6, 8 and 12 bytes


# As many as an SM has registers for at once; the others would run in a second wave. Of 80 elements, of which 3 fit,
# 128 MB took 113 us with 6 and 128 with 4; of 96 elements, of which 5 fit, 111 with 4 and 126 with 6.
SHORT = (
    Short(largest=8, programs=(7, 5, 5, 4)),
    Short(largest=12, programs=(5, 4, 4, 3)),
    Short(largest=16, programs=(4, 3, 3, 2)),
    Short(largest=20, programs=(3, 3, 2, 2)),
    Short(largest=MOST_ELEMENTS, programs=(3, 2, 2, 2)),
)
# Elements that are read one by one take more registers: n = 127 88, n = 128 72; four are what all but the longest of
# these have registers for.
ODD_PER_SM = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rows:
    """Rows of a group of lanes at a time, where one gives a lane up to so many elements."""

    largest: int
    rows: int
    why: str
    figures: str


ROWS = (
    Rows(largest=8, rows=2, why="65536 x 128: 19.1 us, with one row 21.3, with four 24.2", figures=""),
    Rows(largest=MOST_ELEMENTS, rows=1, why="one row is enough to be read at a time", figures=""),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RereadInWarps:
    """Rows that are too long to be short ones, and that no bulk copy moves."""

    largest_n: int
    per_sm: int  # programs for which an SM has registers
    why: str
    figures: str


REREAD_IN_WARPS = (
    RereadInWarps(
        largest_n=640,
        per_sm=4,
        why="65536 x 512: 57.6 us, kept in registers 58.6, and then n = 1000 spills",
        figures="",
    ),
    RereadInWarps(largest_n=LONGEST_IN_WARPS, per_sm=3, why="registers for three programs", figures=""),
)

NARROWER = (
    Narrower(
        itemsize=2,
        largest_n=224,
        vector_bytes=8,
        why="64 MB of 96 elements 59.9 us, with 16 bytes 77.1; of 160 68.9, 82.7; 4096 x 128: 4.6, 5.3. Of 256 "
        "elements 59.1, 54.4",
        figures="",
    ),
)


def _short_programs(elements: int, column_bytes: int) -> int:
    row = next(row for row in SHORT if elements <= row.largest)
    return SMS * row.programs[(4, 6, 8, 12).index(column_bytes)]


def _warp_plan(n: int, itemsize: int, column_bytes: int) -> BackwardPlan:
    vec = warp_vector(n, itemsize, NARROWER)

    def elements(lanes: int) -> int:
        return -(-n // (lanes * vec)) * vec

    lanes = lanes_of(n, vec)
    while lanes < 32 and elements(lanes) > MOST_ELEMENTS:
        lanes *= 2
    block = WARPS * (32 // lanes)
    if n <= LONGEST_SHORT:
        rows = next(row.rows for row in ROWS if elements(lanes) <= row.largest)
        programs = ODD_PER_SM * SMS if vec == 1 else _short_programs(rows * elements(lanes), column_bytes)
        return BackwardPlan(n, Regime.WARP, vec, lanes, block * rows, programs=programs)
    row = next(row for row in REREAD_IN_WARPS if n <= row.largest_n)
    programs = row.per_sm * SMS
    return BackwardPlan(n, Regime.WARP, vec, lanes, block, source=Source.MEMORY, keeps_weight=False, programs=programs)


# --- the choice -------------------------------------------------------------------------------------------------------


@functools.cache
def _plan(n: int, itemsize: int, column_bytes: int) -> BackwardPlan:
    """column_bytes: of x, dy and ds together."""
    if (plan := _pipeline_plan(n, itemsize, column_bytes)) is not None:
        return plan
    if n <= LONGEST_IN_WARPS:
        return _warp_plan(n, itemsize, column_bytes)
    return _reread_plan(n, itemsize, column_bytes)


def backward_plan_for(
    n: int, dtype: DTypeLike, *, dy_dtype: DTypeLike | None = None, residual: bool = False
) -> BackwardPlan:
    """The backward plan for rows of `n` elements of `dtype`.

    dy_dtype: that of y, by default that of x. residual: the form that also adds a gradient ds.
    Raises NotImplementedError where there is no kernel for n.
    """
    n, itemsize = checked(n), jnp.dtype(_validate.dtype_name("dtype", dtype)).itemsize
    dy_itemsize = jnp.dtype(_validate.dtype_name("dy_dtype", dtype if dy_dtype is None else dy_dtype)).itemsize
    return _plan(n, itemsize, dy_itemsize + itemsize * (2 if residual else 1))
