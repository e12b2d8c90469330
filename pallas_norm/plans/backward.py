"""The plans of the backward pass: a persistent grid of programs, each with its part of dweight."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import jax.numpy as jnp

from .. import _validate
from .backward_warp import LONGEST_IN_WARPS, LONGEST_SHORT, in_warps
from .hardware import RESIDENT_CLUSTERS, SMS, WARPS
from .lengths import LARGEST_N, SMALLEST_N, checked
from .order import Order, without_kernel
from .plan import FEWEST_STAGES, BackwardPlan, Choice, Regime, Source, staged_view, stages_of
from .vectors import NARROW, cta_vector, vector

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
    rows_in_registers: bool = False
    why: str
    figures: tuple[int, ...]  # the files bench/results/tuning_*.json that have the times


# Rows in warps, of 16-bit types. The others stay in registers (up to LONGEST_SHORT), or are read twice.
WARP_PIPELINES = (
    Staged(
        largest_n=640,
        largest_row_bytes=1280,
        regime=Regime.WARP,
        stages=3,
        programs=4 * SMS,
        why="65536 x 512: 54.8 us, read twice 56.4, refilled later 56.0",
        figures=(7, 9, 10),
    ),
    Staged(
        largest_n=832,
        largest_row_bytes=1664,
        regime=Regime.WARP,
        stages=4,
        programs=3 * SMS,
        why="32768 x 768: 42.7 us, refilled later 44.1, CTA 44.6",
        figures=(9, 10),
    ),
)

SMALLEST_PIPELINE = 768  # of a CTA. 32768 x 896: 55.7 us, in warps 57.6; but 65536 x 512: 68.2, 57.6 (tuning_3)

# Share of the copy kernel's throughput on an H200, bf16, both kernels of the backward pass counted.
PIPELINES = (
    Staged(
        largest_n=1024,
        largest_row_bytes=2048,
        stages=4,
        programs=7 * SMS,
        rows_in_registers=True,
        why="32768 x 1024: 0.929, in warps 0.897; 896: 0.928, 0.894",
        figures=(9, 10, 11),
    ),
    Staged(
        largest_n=2048,
        largest_row_bytes=4096,
        stages=4,
        programs=5 * SMS,
        why="16384 x 2048: 0.923; rows kept, 4 programs an SM 0.903, in warps 0.873",
        figures=(6, 11),
    ),
    Staged(
        largest_n=3072,
        largest_row_bytes=8192,
        stages=3,
        programs=3 * SMS,
        rows_in_registers=True,
        why="16384 x 3072: 0.942; rows not kept 0.928",
        figures=(9, 11),
    ),
    Staged(
        largest_n=4096,
        largest_row_bytes=8192,
        stages=3,
        programs=2 * SMS,
        rows_in_registers=True,
        why="16384 x 4096: 0.947; rows not kept 0.932",
        figures=(10, 11),
    ),
    Staged(
        largest_n=7168,
        largest_row_bytes=16384,
        stages=3,
        programs=2 * SMS,
        why="16384 x 5120: 0.956, rows kept 0.960; 5376: 0.962, 0.952; 7168: 0.920",
        figures=(9, 11),
    ),
    Staged(
        largest_n=8192,
        largest_row_bytes=16384,
        warpgroups=4,
        stages=3,
        programs=SMS,
        rows_in_registers=True,
        why="8192 x 8192: 0.951; rows not kept 0.893, 2 warpgroups 0.847",
        figures=(8, 9, 11),
    ),
    Staged(
        largest_n=16384,
        largest_row_bytes=32768,
        warpgroups=4,
        stages=3,
        programs=SMS,
        why="4096 x 16384: 0.899; 8 warpgroups 0.887, 2 CTAs 0.751",
        figures=(6, 9, 11),
    ),
    Staged(
        largest_n=32768,
        largest_row_bytes=65536,
        warpgroups=4,
        cluster=2,
        stages=3,
        programs=RESIDENT_CLUSTERS[2],
        why="2048 x 32768: 0.848; 4 CTAs 0.710, read twice 0.640",
        figures=(5, 9, 11),
    ),
    Staged(
        largest_n=65536,
        largest_row_bytes=131072,
        warpgroups=4,
        cluster=4,
        stages=3,
        programs=RESIDENT_CLUSTERS[4],
        why="1024 x 65536: 0.789; 8 CTAs 0.707, read twice 0.461",
        figures=(5, 9, 11),
    ),
    Staged(
        largest_n=LARGEST_N,
        largest_row_bytes=262144,
        warpgroups=4,
        cluster=8,
        stages=3,
        programs=RESIDENT_CLUSTERS[8],
        why="1024 x 131072: 0.814; 512 rows, read twice 0.424",
        figures=(5, 11),
    ),
)

LARGEST_OVERLAP = 1 / 8  # of a row that is read twice: less than in the forward pass, because there is more to compute


def _staged(plan: BackwardPlan, row: Staged, itemsize: int, column_bytes: int, narrowest: int) -> BackwardPlan | None:
    # Of a wider dy, or of ds too, a lane has more in registers: 2048 with ds needs 111, and five programs have 96.
    wide = column_bytes > 2 * itemsize
    programs = row.programs - SMS if wide and row.programs > 2 * SMS else row.programs
    per_sm = max(1, programs * row.cluster // SMS)
    stages = min(row.stages, stages_of(plan, column_bytes, per_sm=per_sm))
    if stages < FEWEST_STAGES or staged_view(plan, narrowest) is None:
        return None
    return dataclasses.replace(
        plan, source=Source.PIPELINE, stages=stages, programs=programs, rows_in_registers=row.rows_in_registers
    )


def _pipeline(n: int, itemsize: int, column_bytes: int, narrowest: int) -> Choice | None:
    """None for rows that are better off without, and for those that no bulk copy moves."""

    def fitting(table: Sequence[Staged]) -> Iterator[Staged]:
        return (row for row in table if n <= row.largest_n and n * itemsize <= row.largest_row_bytes)

    if n > LONGEST_SHORT and itemsize == 2:
        for row in fitting(WARP_PIPELINES):
            vec = vector(n, itemsize)
            vec = vec // 2 if -n % (32 * vec) > n // 8 else vec
            shape = BackwardPlan(n, Regime.WARP, vec, 32, WARPS)
            if (plan := _staged(shape, row, itemsize, column_bytes, narrowest)) is not None:
                return Choice(plan, row.why, row.figures)
    if n < SMALLEST_PIPELINE:
        return None
    for row in fitting(PIPELINES):
        vec = cta_vector(n, itemsize, row.warpgroups * row.cluster, largest_overlap=int(n * LARGEST_OVERLAP))
        shape = BackwardPlan(n, Regime.CTA, vec, warpgroups=row.warpgroups, cluster=row.cluster)
        if (plan := _staged(shape, row, itemsize, column_bytes, narrowest)) is not None:
            return Choice(plan, row.why, row.figures)
    return None


# --- rows of a CTA that are read twice --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reread:
    """Rows that bulk copies cannot move."""

    largest_n: int
    with_wide_columns: bool = True  # of a wider dy, or of ds too
    warpgroups: int
    cluster: int = 1
    per_sm: int = 1  # programs for which an SM has registers; more would run after the others
    why: str


REREAD = (
    Reread(largest_n=4096, warpgroups=1, per_sm=2, why="no bulk copy moves it; a lane has at most 32 elements"),
    Reread(
        largest_n=4352,
        with_wide_columns=False,
        warpgroups=2,
        per_sm=2,
        why="no bulk copy moves it; registers for two programs of up to 17 elements a lane",
    ),
    Reread(largest_n=8192, warpgroups=2, why="no bulk copy moves it; registers for one program"),
    *(
        Reread(
            largest_n=row.largest_n,
            warpgroups=row.warpgroups,
            cluster=row.cluster,
            why="no bulk copy moves it; at most 16 elements a lane, whose addresses fill the registers else",
        )
        for row in NARROW
    ),
)
LARGEST_REREAD_OVERLAP = 1 / 4


def _reread(n: int, itemsize: int, column_bytes: int) -> Choice:
    wide = column_bytes > 2 * itemsize
    row = next(row for row in REREAD if n <= row.largest_n and (row.with_wide_columns or not wide))
    vec = cta_vector(n, itemsize, row.warpgroups * row.cluster, largest_overlap=int(n * LARGEST_REREAD_OVERLAP))
    programs = RESIDENT_CLUSTERS[row.cluster] * row.per_sm
    plan = BackwardPlan(
        n,
        Regime.CTA,
        vec,
        warpgroups=row.warpgroups,
        cluster=row.cluster,
        source=Source.MEMORY,
        keeps_weight=False,
        programs=programs,
    )
    return Choice(plan, row.why, ())


# --- the choice -------------------------------------------------------------------------------------------------------


@functools.cache
def choice(n: int, itemsize: int, column_bytes: int, narrowest: int) -> Choice:
    """itemsize: of x, which is s in the residual form, and of ds. column_bytes: of x, dy and ds together; narrowest: of
    the narrower of x and dy."""
    if (piped := _pipeline(n, itemsize, column_bytes, narrowest)) is not None:
        return piped
    return (in_warps if n <= LONGEST_IN_WARPS else _reread)(n, itemsize, column_bytes)


def backward_plan_for(
    n: int, dtype: DTypeLike, *, dy_dtype: DTypeLike | None = None, residual: bool = False
) -> BackwardPlan:
    """The backward plan for rows of `n` elements of `dtype`, on Hopper.

    dtype: that of x, in the residual form of s. dy_dtype: that of y, by default that of x. residual: the form that also
    adds a gradient ds.

    Raises: as `plan_for`.

    Example:
        print(backward_plan_for(4096, "bfloat16"))
    """
    n, itemsize = checked(n), jnp.dtype(_validate.dtype_name("dtype", dtype)).itemsize
    dy_itemsize = jnp.dtype(_validate.dtype_name("dy_dtype", dtype if dy_dtype is None else dy_dtype)).itemsize
    column_bytes = dy_itemsize + itemsize * (2 if residual else 1)
    return choice(n, itemsize, column_bytes, min(itemsize, dy_itemsize)).plan


def backward_order(n: int, dtype: DTypeLike, *, dy_dtype: DTypeLike | None = None, residual: bool = False) -> Order:
    """The order in which the products g * unit of a row are added up.

    That of the squares for most rows. Where the backward pass shares a row among more warps it has more columns, and
    how many warps depends on what a column of x, dy and ds takes of the shared memory.
    """
    if not SMALLEST_N <= n <= LARGEST_N:
        return without_kernel(n)
    return backward_plan_for(n, dtype, dy_dtype=dy_dtype, residual=residual).order
