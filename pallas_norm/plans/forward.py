"""The plans of the forward pass."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import jax.numpy as jnp

from .. import _validate
from .hardware import RESIDENT_CLUSTERS, SMS, WARPS
from .lengths import LARGEST_N, SMALLEST_N, checked
from .order import Order, without_kernel
from .plan import Choice, Plan, Regime, Source, pipelined, staged_view
from .vectors import Narrower, cta_vector, lanes_of, narrow, vector, warp_vector

if TYPE_CHECKING:
    from jax.typing import DTypeLike

ANY = LARGEST_N * 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The first row of the table that a row length, its bytes and those of a column fit is taken."""

    largest_n: int
    largest_row_bytes: int = ANY
    largest_column_bytes: int = ANY  # of what is read, x and the residual together
    regime: Regime = Regime.CTA
    warpgroups: int = 1
    cluster: int = 1
    source: Source = Source.REGISTERS
    programs: int | None = None
    stages: int = 0
    unstaged: Source = Source.MEMORY  # of a PIPELINE, where too few stages fit: in the residual form
    why: str
    figures: tuple[int, ...]  # the files bench/results/tuning_*.json that have the times


# Times are of an H200, bf16, cold L2; the copy kernel took 67 us where the bytes of x and y are 268 MB. A row of a
# pipeline is skipped for rows that bulk copies cannot move; it keeps rows in registers: read twice from shared memory
# 1024 x 32768 took 35.9 us, 65536 73.6, 131072 145.3.
TABLE = (
    Row(
        largest_n=1023,
        regime=Regime.WARP,
        why="65536 x 896: 57.8 us, CTA 60.2; 65536 x 1024: 67.2 us, CTA 64.8",
        figures=(1,),
    ),
    Row(
        largest_n=8192,
        why="16384 x 4096: 66.8 us, 2 warpgroups 74.0; 8192 x 8192: 66.6, 66.6 with 2",
        figures=(1,),
    ),
    Row(
        largest_n=12288,
        largest_column_bytes=2,
        cluster=2,
        why="16384 x 12288: 197.2 us, 2 warpgroups of a CTA 205.4; 8192 x 10240: 81.7, 92.4; x 9216: 79.1, 92.4",
        figures=(17,),
    ),
    Row(
        largest_n=16384,
        largest_column_bytes=2,
        warpgroups=2,
        why="16384 x 16384: 259.1 us, 2 CTAs 261.8; 8192 x 14336: 117.9, 120.2; 4096 x 16384, 4 warpgroups: 66.9, 90.7",
        figures=(1, 3, 17),
    ),
    Row(
        largest_n=16384,
        largest_column_bytes=4,
        cluster=2,
        why="float32, 4096 x 16384: 131.8 us, 2 warpgroups of a CTA 140.0; x 12288: 99.4, 114.8; 16 bits with a "
        "residual, 4096 x 16384: 133.4, 136.5",
        figures=(17,),
    ),
    Row(
        largest_n=16384,
        warpgroups=2,
        why="float32 and a residual, 4096 x 16384: 263.0 us, 2 CTAs 264.4; x 12288: 197.8, 201.3",
        figures=(17,),
    ),
    Row(
        largest_n=32768,
        largest_row_bytes=65536,
        cluster=4,
        source=Source.PIPELINE,
        programs=4 * RESIDENT_CLUSTERS[4],
        stages=3,
        unstaged=Source.REGISTERS,
        why="1024 rows: 34.9 us, one CTA of 4 warpgroups 36.0; 64: 4.8, 5.5",
        figures=(15,),
    ),
    Row(
        largest_n=32768,
        largest_row_bytes=65536,
        warpgroups=4,
        source=Source.PIPELINE,
        programs=SMS,
        stages=3,
        unstaged=Source.REGISTERS,
        why="rows of which no bulk copy moves a quarter; 1024 rows: 34.1 us, no pipeline 37.3",
        figures=(4, 9),
    ),
    Row(
        largest_n=32768,
        largest_row_bytes=65536,
        warpgroups=4,
        why="rows that no bulk copy moves; 2048 x 32768: 70.8 us, 8 warpgroups 76.0",
        figures=(4,),
    ),
    Row(
        largest_n=65536,
        largest_row_bytes=131072,
        cluster=8,
        source=Source.PIPELINE,
        programs=4 * RESIDENT_CLUSTERS[8],
        stages=3,
        unstaged=Source.REGISTERS,
        why="1024 x 65536: 68.3 us, 2 CTAs of 4 warpgroups 70.0; 64: 6.6, 7.7",
        figures=(15,),
    ),
    Row(
        largest_n=65536,
        largest_row_bytes=131072,
        warpgroups=8,
        source=Source.MEMORY,
        why="1024 x 65536: 77.6 us, kept in a cluster of 4: 93.2",
        figures=(4, 7),
    ),
    Row(
        largest_n=LARGEST_N,
        largest_row_bytes=262144,
        warpgroups=2,
        cluster=8,
        source=Source.PIPELINE,
        programs=RESIDENT_CLUSTERS[8],
        stages=4,
        unstaged=Source.REGISTERS,
        why="1024 x 131072: 136.6 us, 4 CTAs of 4 warpgroups 137.2; 64: 11.2, 12.5",
        figures=(15,),
    ),
    Row(
        largest_n=LARGEST_N,
        largest_row_bytes=262144,
        warpgroups=8,
        cluster=2,
        source=Source.MEMORY,
        why="512 x 131072: 94.6 us, kept in a cluster of 8: 101.7",
        figures=(4, 7),
    ),
    Row(
        largest_n=LARGEST_N,
        warpgroups=4,
        cluster=8,
        source=Source.PIPELINE,
        programs=RESIDENT_CLUSTERS[8],
        stages=2,
        unstaged=Source.REGISTERS,
        why="64 x 131072 in float32: 20.1 us, 4 CTAs of 8 warpgroups that read twice 28.5",
        figures=(15,),
    ),
    Row(
        largest_n=LARGEST_N,
        warpgroups=8,
        cluster=4,
        source=Source.MEMORY,
        why="as the row of half the bytes; not measured",
        figures=(),
    ),
)

NARROWER = (
    Narrower(
        itemsize=2,
        smallest_n=513,
        multiple_of=32 * 4,
        vector_bytes=8,
        why="8 rows of 896: 1.41 us, with 16 bytes 1.79; of 640 1.28, 1.70; of 768 1.28, 1.41; with 65536 rows no "
        "slower. 512 and 1000 gain nothing",
        figures=(9,),
    ),
)
WIDE_BYTES = 16  # of a vector. Longer rows with narrower ones are shared by more warpgroups: vectors.NARROW
LARGEST_WIDE_N = 8192
# Of a row in a CTA, at most this part is read twice with vectors of 16 bytes: 16384 x 1536 25.2 us, not 27.4.
LARGEST_OVERLAP = 1 / 4


def _cta_plan(n: int, itemsize: int, row: Row) -> Plan:
    warpgroups, cluster, source = row.warpgroups, row.cluster, row.source
    if vector(n, itemsize) * itemsize < WIDE_BYTES and n > LARGEST_WIDE_N:
        shared = narrow(n)
        warpgroups, cluster, source = shared.warpgroups, shared.cluster, Source.REGISTERS
    vec = cta_vector(n, itemsize, warpgroups * cluster, largest_overlap=int(n * LARGEST_OVERLAP))
    return Plan(n, Regime.CTA, vec, warpgroups=warpgroups, cluster=cluster, source=source)


@functools.cache
def choice(n: int, itemsize: int, column_bytes: int, narrowest: int) -> Choice:
    """itemsize: of what is normalised. column_bytes: of what is read, x and the residual together; narrowest: of the
    narrower of them."""
    for row in TABLE:
        if n > row.largest_n or n * itemsize > row.largest_row_bytes or column_bytes > row.largest_column_bytes:
            continue
        if row.regime is Regime.WARP:
            vec = warp_vector(n, itemsize, NARROWER)
            lanes = lanes_of(n, vec)
            return Choice(Plan(n, Regime.WARP, vec, lanes, WARPS * (32 // lanes)), row.why, row.figures)
        plan = _cta_plan(n, itemsize, row)
        if plan.source is not Source.PIPELINE:
            return Choice(plan, row.why, row.figures)
        if staged_view(plan, itemsize) is not None:
            kept = dataclasses.replace(plan, programs=row.programs, rows_in_registers=True)
            kept = None if staged_view(plan, narrowest) is None else pipelined(kept, row.stages, column_bytes)
            # Or the same chunks, so that the bits are those of the form without a residual.
            return Choice(kept or dataclasses.replace(plan, source=row.unstaged), row.why, row.figures)
    raise AssertionError(f"the table has no row for {n} elements")


def plan_for(n: int, dtype: DTypeLike, *, residual: bool = False, read: tuple[DTypeLike, ...] | None = None) -> Plan:
    """The forward plan for rows of `n` elements of `dtype`, that of what is normalised, x or s; on Hopper, and for many
    rows, while `explain(x).plan` is that of the GPU here, and of so many rows as x has. The bits are the same.

    residual: the form that also adds a residual. read: the dtypes of what is read, x and in that form the residual,
    where they are others.

    Raises:
        TypeError: n is no int, or dtype is none of bfloat16, float16 and float32.
        ValueError: n is an int of over 64 bits.
        NotImplementedError: there is no kernel for n.

    Example:
        print(plan_for(4096, "bfloat16"))
    """
    n, itemsize = checked(n), jnp.dtype(_validate.dtype_name("dtype", dtype)).itemsize
    if read is None:
        return choice(n, itemsize, itemsize * (2 if residual else 1), itemsize).plan
    sizes = [jnp.dtype(_validate.dtype_name("read", one)).itemsize for one in read]
    return choice(n, itemsize, sum(sizes), min(sizes)).plan


def forward_order(n: int, dtype: DTypeLike) -> Order:
    """The order in which the squares of a row of `n` elements of `dtype` are added up, with or without a residual."""
    return plan_for(n, dtype).order if SMALLEST_N <= n <= LARGEST_N else without_kernel(n)
