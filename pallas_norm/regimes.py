"""Which kernel covers a row of n elements, and with which numbers: data, and one pure function of (n, dtype).

Never of the row count: that is what makes a row's bits independent of its batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from . import _validate
from ._plan import FEWEST_STAGES, WARPS, BackwardPlan, Plan, Regime, Source, staged_view, stages_of

if TYPE_CHECKING:
    from jax.typing import DTypeLike

SMALLEST_N, LARGEST_N = 32, 131072


class Row(NamedTuple):
    largest_n: int
    largest_row_bytes: int
    regime: Regime
    warpgroups: int
    cluster: int
    why: str
    source: Source = Source.REGISTERS
    programs: int | None = None
    stages: int = 0
    unstaged: Source = Source.MEMORY  # of a PIPELINE, where too few stages fit: in the residual form


# Of an H100 or H200. Fixed, so that the grid, and with it the order in which dweight is added up, is too.
SMS = 132
# By CTAs of a cluster, clusters that an H200 holds at a time where a CTA fills an SM; more run after the others.
HELD = {1: SMS, 2: 66, 4: 30, 8: 15}

ANY = LARGEST_N * 4
WARP, CTA = Regime.WARP, Regime.CTA
PIPELINE, MEMORY, REGISTERS = Source.PIPELINE, Source.MEMORY, Source.REGISTERS

# Times are of an H200, bf16, cold L2 (bench/results/tuning_*.json); the copy kernel took 67 us where the bytes of x
# and y are 268 MB. A row of a pipeline is skipped for rows that bulk copies cannot move; it keeps rows in registers:
# read twice from shared memory 1024 x 32768 took 35.9 us, 65536 73.6, 131072 145.3.
TABLE = (
    Row(1023, ANY, WARP, 1, 1, "65536 x 896: 57.8 us, CTA 60.2; 65536 x 1024: 67.2 us, CTA 64.8"),
    Row(8192, ANY, CTA, 1, 1, "16384 x 4096: 66.8 us, 2 warpgroups 74.0; 8192 x 8192: 66.6, 66.6 with 2"),
    Row(16384, ANY, CTA, 2, 1, "4096 x 16384: 66.9 us, 4 warpgroups 90.7, read twice 69.8"),
    Row(32768, 65536, CTA, 4, 1, "1024 rows: 34.1 us, no pipeline 37.3; 64: 5.3, 4.9", PIPELINE, SMS, 3, REGISTERS),
    Row(32768, 65536, CTA, 4, 1, "rows that no bulk copy moves; 2048 x 32768: 70.8 us, 8 warpgroups 76.0"),
    Row(65536, 131072, CTA, 4, 2, "1024 x 65536: 72.3 us, 3 stages 72.8, 4 CTAs 77.9", PIPELINE, HELD[2], 2),
    Row(65536, 131072, CTA, 8, 1, "1024 x 65536: 77.6 us, kept in a cluster of 4: 93.2", MEMORY),
    Row(LARGEST_N, 262144, CTA, 4, 4, "1024 x 131072: 141.6 us, 3 stages 142.4, 8 CTAs 160.8", PIPELINE, HELD[4], 2),
    Row(LARGEST_N, 262144, CTA, 8, 2, "512 x 131072: 94.6 us, kept in a cluster of 8: 101.7", MEMORY),
    Row(LARGEST_N, ANY, CTA, 8, 4, "as the row above, for rows of twice the bytes; not measured", MEMORY),
)


class Narrow(NamedTuple):
    largest_n: int
    warpgroups: int
    cluster: int


# Rows whose vectors are narrower than 16 bytes, and backward rows that no pipeline takes: at most 16 elements a lane.
# With 32 and more, one address for each load fills the registers (n = 32767: 444 bytes spilled).
NARROW = (Narrow(16384, 4, 2), Narrow(32768, 4, 4), Narrow(65536, 4, 8), Narrow(LARGEST_N, 8, 8))


def _narrow(n: int) -> tuple[int, int]:
    row = next(row for row in NARROW if n <= row.largest_n)
    return row.warpgroups, row.cluster


def vector(n: int, itemsize: int) -> int:
    """The widest vector, up to 16 bytes, that keeps every row aligned: it divides n."""
    vec = 16 // itemsize
    while n % vec:
        vec //= 2
    return vec


def _warp_vector(n: int, itemsize: int) -> int:
    """8 bytes for 16-bit rows that are long and a multiple of what 32 lanes read so. 8 rows of 896: 1.41 us, with 16
    bytes 1.79; of 640 1.28, 1.70; of 768 1.28, 1.41; with 65536 rows no slower. 512 and 1000 gain nothing."""
    vec = vector(n, itemsize)
    return 4 if itemsize == 2 and n > 512 and n % (32 * 4) == 0 else vec


def _lanes(n: int, vec: int) -> int:
    """Lanes for a row in a warp: all 32, or fewer until they are filled and at most an eighth of what they read is
    read twice."""
    lanes = 32
    while lanes * vec > n or (lanes > 4 and -n % (lanes * vec) > n // 8):
        lanes //= 2
    return lanes


def _cta_vector(n: int, vec: int, itemsize: int, workers: int, *, largest_overlap: int | None = None) -> int:
    """Narrower vectors, down to 8 bytes, where over a quarter of a row would be read twice (16384 x 1536: 25.2 us,
    not 27.4), or in a backward pass, which has more to compute, over an eighth."""
    largest = n // 4 if largest_overlap is None else largest_overlap
    while WARPS * 32 * vec > n or (vec > 8 // itemsize and -n % (WARPS * 32 * vec * workers) > largest):
        vec //= 2
    return vec


def _cta_plan(n: int, itemsize: int, row: Row) -> Plan:
    vec, warpgroups, cluster, source = vector(n, itemsize), row.warpgroups, row.cluster, row.source
    if vec * itemsize < 16 and n > 8192:
        (warpgroups, cluster), source = _narrow(n), Source.REGISTERS
    vec = _cta_vector(n, vec, itemsize, warpgroups * cluster)
    return Plan(n, CTA, vec, warpgroups=warpgroups, cluster=cluster, source=source)


@functools.cache
def _plan(n: int, itemsize: int, inputs: int) -> Plan:
    """inputs: arrays of rows that are read."""
    for row in (row for row in TABLE if n <= row.largest_n and n * itemsize <= row.largest_row_bytes):
        if row.regime is WARP:
            vec = _warp_vector(n, itemsize)
            lanes = _lanes(n, vec)
            return Plan(n, WARP, vec, lanes, WARPS * (32 // lanes))
        plan = _cta_plan(n, itemsize, row)
        if plan.source is not PIPELINE:
            return plan
        if staged_view(plan, itemsize) is not None:
            stages = min(row.stages, stages_of(plan, inputs * itemsize, per_sm=1))
            if stages < FEWEST_STAGES:  # the same chunks, so that the bits are those of the form without a residual
                return dataclasses.replace(plan, source=row.unstaged)
            return dataclasses.replace(plan, stages=stages, programs=row.programs, keeps_rows=True)
    raise AssertionError(f"the table has no row for {n} elements")


def plan_for(n: int, dtype: DTypeLike, *, residual: bool = False) -> Plan:
    """The forward plan for rows of `n` elements of `dtype`.

    residual: the form that also adds a residual. Raises NotImplementedError where there is no kernel for n.
    """
    n, itemsize = _check(n), jnp.dtype(_validate.dtype_name("dtype", dtype)).itemsize
    return _plan(n, itemsize, 2 if residual else 1)


def _check(n: int) -> int:
    n = _validate.row_length(n)
    if not SMALLEST_N <= n <= LARGEST_N:
        raise NotImplementedError(
            f"no kernel for rows of {n} elements: the kernels take {SMALLEST_N} <= n <= {LARGEST_N}; "
            'leave implementation at None or pass "xla"'
        )
    return n


def backward_plan_for(
    n: int, dtype: DTypeLike, *, dy_dtype: DTypeLike | None = None, residual: bool = False
) -> BackwardPlan:
    """The backward plan for rows of `n` elements of `dtype`.

    dy_dtype: that of y, by default that of x. residual: the form that also adds a gradient ds.
    Raises NotImplementedError where there is no kernel for n.
    """
    n, itemsize = _check(n), jnp.dtype(_validate.dtype_name("dtype", dtype)).itemsize
    dy_itemsize = jnp.dtype(_validate.dtype_name("dy_dtype", dtype if dy_dtype is None else dy_dtype)).itemsize
    return _backward_plan(n, itemsize, dy_itemsize + itemsize * (2 if residual else 1))


class Stages(NamedTuple):
    largest_n: int
    largest_row_bytes: int
    warpgroups: int
    cluster: int
    stages: int
    programs: int
    why: str
    keeps_rows: bool = False


SMALLEST_PIPELINE = 768  # of a CTA; 32768 x 896: 55.7 us, in warps 57.6, but 65536 x 512: 68.2, in warps 57.6

# Rows in warps, of 16-bit types: programs and stages. The others stay in registers (n <= 256), or are read twice.
WARP_PIPELINES = (
    Stages(640, 1280, 1, 1, 3, 4 * SMS, "65536 x 512: 54.8 us, read twice 56.4, refilled later 56.0"),
    Stages(832, 1664, 1, 1, 4, 3 * SMS, "32768 x 768: 42.7 us, refilled later 44.1, CTA 44.6"),
)

# Share of the copy kernel's throughput on an H200, bf16, both kernels of the backward pass counted.
PIPELINES = (
    Stages(1024, 2048, 1, 1, 4, 7 * SMS, "32768 x 1024: 0.929, in warps 0.897; 896: 0.928, 0.894", keeps_rows=True),
    Stages(2048, 4096, 1, 1, 4, 5 * SMS, "16384 x 2048: 0.923; rows kept, 4 programs an SM 0.903, in warps 0.873"),
    Stages(3072, 8192, 1, 1, 3, 3 * SMS, "16384 x 3072: 0.942; rows not kept 0.928", keeps_rows=True),
    Stages(4096, 8192, 1, 1, 3, 2 * SMS, "16384 x 4096: 0.947; rows not kept 0.932", keeps_rows=True),
    Stages(7168, 16384, 1, 1, 3, 2 * SMS, "16384 x 5120: 0.956, rows kept 0.960; 5376: 0.962, 0.952; 7168: 0.920"),
    Stages(8192, 16384, 4, 1, 3, SMS, "8192 x 8192: 0.951; rows not kept 0.893, 2 warpgroups 0.847", keeps_rows=True),
    Stages(16384, 32768, 4, 1, 3, SMS, "4096 x 16384: 0.899; 8 warpgroups 0.887, 2 CTAs 0.751"),
    Stages(32768, 65536, 4, 2, 3, HELD[2], "2048 x 32768: 0.848; 4 CTAs 0.710, read twice 0.640"),
    Stages(65536, 131072, 4, 4, 3, HELD[4], "1024 x 65536: 0.789; 8 CTAs 0.707, read twice 0.461"),
    Stages(LARGEST_N, 262144, 4, 8, 3, HELD[8], "1024 x 131072: 0.814; 512 rows, read twice 0.424"),
)


def _staged(plan: BackwardPlan, row: Stages, itemsize: int, column_bytes: int) -> BackwardPlan | None:
    # Of a wider dy, or of ds too, a lane has more in registers: 2048 with ds needs 111, and five programs have 96.
    wide = column_bytes > 2 * itemsize
    programs = row.programs - SMS if wide and row.programs > 2 * SMS else row.programs
    per_sm = max(1, programs * row.cluster // SMS)
    stages = min(row.stages, stages_of(plan, column_bytes, per_sm=per_sm))
    if stages < FEWEST_STAGES or staged_view(plan, itemsize) is None:
        return None
    return dataclasses.replace(plan, source=PIPELINE, stages=stages, programs=programs, keeps_rows=row.keeps_rows)


@functools.cache
def _backward_plan(n: int, itemsize: int, column_bytes: int) -> BackwardPlan:
    """column_bytes: of x, dy and ds together."""

    def fitting(table: Sequence[Stages]) -> Iterator[Stages]:
        return (row for row in table if n <= row.largest_n and n * itemsize <= row.largest_row_bytes)

    if n > 256 and itemsize == 2:
        for row in fitting(WARP_PIPELINES):
            vec = vector(n, itemsize)
            vec = vec // 2 if -n % (32 * vec) > n // 8 else vec
            if (plan := _staged(BackwardPlan(n, WARP, vec, 32, WARPS), row, itemsize, column_bytes)) is not None:
                return plan
    if n < SMALLEST_PIPELINE:
        return _backward_warp_plan(n, itemsize, column_bytes)
    for row in fitting(PIPELINES):
        workers = row.warpgroups * row.cluster
        vec = _cta_vector(n, vector(n, itemsize), itemsize, workers, largest_overlap=n // 8)
        shape = BackwardPlan(n, CTA, vec, warpgroups=row.warpgroups, cluster=row.cluster)
        if (plan := _staged(shape, row, itemsize, column_bytes)) is not None:
            return plan
    if n <= 1023:
        return _backward_warp_plan(n, itemsize, column_bytes)
    # Rows that bulk copies cannot move.
    warpgroups, cluster = (1, 1) if n <= 4096 else (2, 1) if n <= 8192 else _narrow(n)
    return BackwardPlan(
        n,
        CTA,
        _cta_vector(n, vector(n, itemsize), itemsize, warpgroups * cluster),
        warpgroups=warpgroups,
        cluster=cluster,
        source=MEMORY,
        keeps_weight=False,
        # An SM has the registers for two programs of up to 17 elements a lane, and where x and dy are all that a row
        # has; more would run after the others.
        programs=HELD[cluster] * (2 if n <= (4352 if column_bytes == 2 * itemsize else 4096) else 1),
    )


class Short(NamedTuple):
    largest: int  # elements of a lane, of all its rows
    programs: tuple[int, int, int, int]  # on an SM, where a column of x, dy and ds has up to 4, 6, 8 and 12 bytes


# As many as an SM has registers for at once; the others would run in a second wave. Of 80 elements, of which 3 fit,
# 128 MB took 113 us with 6 and 128 with 4; of 96 elements, of which 5 fit, 111 with 4 and 126 with 6.
SHORT = (
    Short(8, (7, 5, 5, 4)),
    Short(12, (5, 4, 4, 3)),
    Short(16, (4, 3, 3, 2)),
    Short(20, (3, 3, 2, 2)),
    Short(24, (3, 2, 2, 2)),
)


def _short_programs(elements: int, column_bytes: int) -> int:
    row = next(row for row in SHORT if elements <= row.largest)
    return SMS * row.programs[(4, 6, 8, 12).index(column_bytes)]


def _backward_warp_plan(n: int, itemsize: int, column_bytes: int) -> BackwardPlan:
    vec = vector(n, itemsize)
    if itemsize == 2 and n <= 224:
        # 8 bytes: 64 MB of 96 elements 59.9 us, with 16 bytes 77.1; of 160 68.9, 82.7; 4096 x 128: 4.6, 5.3. Of 256
        # elements 59.1, 54.4.
        vec = min(vec, 4)

    def elements(lanes: int) -> int:
        return -(-n // (lanes * vec)) * vec

    lanes = _lanes(n, vec)
    while lanes < 32 and elements(lanes) > 24:  # n = 200 and 896 spilled with 56 elements a lane
        lanes *= 2
    rows = WARPS * (32 // lanes)
    if n <= 256:
        # Two rows a group of lanes where one is short: 65536 x 128 19.1 us, with one 21.3, with four 24.2.
        several = 2 if elements(lanes) <= 8 else 1
        # Elements that are read one by one take more registers: n = 127 88, n = 128 72; four are what all but the
        # longest of these have registers for.
        programs = 4 * SMS if vec == 1 else _short_programs(several * elements(lanes), column_bytes)
        return BackwardPlan(n, WARP, vec, lanes, rows * several, programs=programs)
    # Read twice: 65536 x 512 57.6 us, kept in registers 58.6, and then n = 1000 spills. Registers for four programs an
    # SM, or of longer rows for three.
    programs = (4 if n <= 640 else 3) * SMS
    return BackwardPlan(n, WARP, vec, lanes, rows, source=MEMORY, keeps_weight=False, programs=programs)
