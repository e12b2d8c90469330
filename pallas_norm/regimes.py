"""Which kernel covers a row of n elements, and with which numbers: data, and one pure function of (n, dtype).

Never of the row count: that is what makes a row's bits independent of its batch.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

if TYPE_CHECKING:
    from jax.typing import DTypeLike

WARPS = 4  # in a warpgroup, which is what Pallas calls a thread
SMALLEST_N, LARGEST_N = 32, 131072


class Regime(enum.Enum):
    WARP = "warp"  # a row never leaves a warp: its sum is shuffles only
    CTA = "cta"  # the warps of one CTA, or of a cluster of CTAs, share a row


@dataclasses.dataclass(frozen=True)
class Plan:
    """The block that one CTA covers: rows, columns per chunk, vector width, and who owns what.

    A row is covered with `chunks` equal chunks; the last ones end exactly at n and overlap their predecessors, so no memory operation
    needs a mask. What overlaps is left out of the sum and written twice with the same values.
    """

    n: int
    regime: Regime
    vec: int  # neighbouring elements that a lane reads at once
    lanes: int = 32  # lanes that share a row
    block: int = 1  # rows of one warpgroup
    warpgroups: int = 1  # that share a row
    cluster: int = 1  # CTAs that share a row

    @property
    def span(self) -> int:
        """Columns of one chunk: what one warpgroup (CTA) or one group of lanes (WARP) reads at once."""
        return (WARPS * 32 if self.regime is Regime.CTA else self.lanes) * self.vec

    @property
    def workers(self) -> int:
        """Warpgroups that share a row; chunk j of worker k is chunk j * workers + k of the row."""
        return self.warpgroups * self.cluster

    @property
    def chunks(self) -> int:
        """Chunks that each worker reads."""
        return -(-self.n // (self.span * self.workers))

    @property
    def overlap(self) -> int:
        """Elements that are read twice."""
        return self.chunks * self.workers * self.span - self.n

    @property
    def depth(self) -> int:
        """Additions on the longest path of the row sum: it bounds the sum's relative error by depth * 2^-24."""
        lanes = self.lanes.bit_length() - 1
        across_warps = WARPS * self.warpgroups + self.cluster if self.regime is Regime.CTA else 0
        return self.chunks + self.vec + lanes + across_warps


class Source(enum.Enum):
    """Where the second pass over a row of the backward kernel finds x and dy."""

    REGISTERS = "registers"  # kept from the first pass; the next row's loads are in flight meanwhile
    PIPELINE = "pipeline"  # in shared memory, where bulk copies brought them several rows ahead
    MEMORY = "memory"  # read again: from L1, where the row fits


@dataclasses.dataclass(frozen=True)
class BackwardPlan(Plan):
    source: Source = Source.REGISTERS
    stages: int = 0  # rows in shared memory, of a PIPELINE
    keeps_weight: bool = True  # in registers; else it is read again for every row
    programs: int = 264  # of the persistent grid, at most

class Row(NamedTuple):
    largest_n: int
    regime: Regime
    warpgroups: int
    cluster: int
    why: str


TABLE = (
    Row(1023, Regime.WARP, 1, 1, "H200, 65536 rows: n = 896 warp 57.8 us, CTA 60.2; n = 1024 warp 67.2, CTA 64.8"),
    Row(8192, Regime.CTA, 1, 1, "H200, 8192 x 8192: 66.6 us, as with 2 warpgroups; 16384 x 4096: 66.8 against 74.0 with 2"),
    Row(16384, Regime.CTA, 2, 1, "H200, 4096 x 16384: 67.4 us, 1 warpgroup 66.8, 4 warpgroups 90.7; 2 for the latency of few rows"),
    Row(32768, Regime.CTA, 4, 1, "H200, 2048 x 32768: 73.6 us, 8 warpgroups 74.7, cluster of 2 82.5; 1 warpgroup spills"),
    Row(65536, Regime.CTA, 2, 4, "H200, 1024 x 65536: 86.7 us, cluster of 8 88.1, of 2 95.6"),
    Row(LARGEST_N, Regime.CTA, 2, 8, "H200, 512 x 131072: 92.7 us, cluster of 4 100.3"),
)


def _vector(n: int, itemsize: int) -> int:
    """The widest vector, up to 16 bytes, that keeps every row aligned: it divides n."""
    vec = 16 // itemsize
    while n % vec:
        vec //= 2
    return vec


def _lanes(n: int, vec: int) -> int:
    """Lanes for a row in a warp: all 32, or fewer until they are filled and at most an eighth of what they read is read twice."""
    lanes = 32
    while lanes * vec > n or (lanes > 4 and -n % (lanes * vec) > n // 8):
        lanes //= 2
    return lanes


def _cta_vector(n: int, vec: int, itemsize: int, workers: int) -> int:
    """Narrower vectors, down to 8 bytes, where more than a quarter of the row would be read twice (n = 1536: 25.2 us, not 27.4)."""
    while vec > 8 // itemsize and -n % (WARPS * 32 * vec * workers) > n // 4:
        vec //= 2
    return vec


@functools.cache
def _plan(n: int, itemsize: int) -> Plan:
    row = next(row for row in TABLE if n <= row.largest_n)
    vec = _vector(n, itemsize)
    if row.regime is Regime.WARP:
        lanes = _lanes(n, vec)
        return Plan(n, Regime.WARP, vec, lanes, WARPS * (32 // lanes))
    vec = _cta_vector(n, vec, itemsize, row.warpgroups * row.cluster)
    return Plan(n, Regime.CTA, vec, warpgroups=row.warpgroups, cluster=row.cluster)


def plan_for(n: int, dtype: DTypeLike) -> Plan:
    """The forward plan for rows of `n` elements of `dtype`. Raises NotImplementedError where there is no kernel for n."""
    _check(n)
    return _plan(n, jnp.dtype(dtype).itemsize)


def _check(n: int) -> None:
    if not SMALLEST_N <= n <= LARGEST_N:
        raise NotImplementedError(
            f"no kernel for rows of {n} elements: the kernels take {SMALLEST_N} <= n <= {LARGEST_N}; "
            'leave implementation at None or pass "xla"'
        )


def backward_plan_for(n: int, dtype: DTypeLike, *, residual: bool = False) -> BackwardPlan:
    """The backward plan for rows of `n` elements of `dtype`; `residual` for the form that also adds a gradient ds."""
    _check(n)
    return _backward_plan(n, jnp.dtype(dtype).itemsize, 3 if residual else 2)


class Stages(NamedTuple):
    largest_row_bytes: int
    warpgroups: int
    stages: int
    per_sm: int  # programs
    why: str


SMS = 132  # of an H100 or H200. Fixed, so that the grid, and with it the order in which dweight is added up, is too.
SMEM_BYTES = 227 << 10  # of an SM, for all its programs

# Share of the copy kernel's throughput on an H200, bf16, both kernels of the backward pass counted.
PIPELINES = (
    Stages(4096, 1, 4, 5, "16384 x 2048: 0.889; 4 programs an SM 0.870, 2 warpgroups 0.864, kept in registers 0.844"),
    Stages(8192, 1, 3, 3, "16384 x 4096: 0.912; 2 stages 0.874, 2 warpgroups 0.900, kept in registers 0.840"),
    Stages(16384, 1, 3, 2, "8192 x 8192: 0.889; 4 warpgroups 0.867, weight read for every row 0.861"),
    Stages(32768, 4, 3, 1, "4096 x 16384: 0.902; 2 warpgroups 0.885, 8 0.873, 2 stages 0.808"),
)


class Reread(NamedTuple):
    largest_n: int
    warpgroups: int
    cluster: int


# Rows that bulk copies cannot move (16-byte multiples of up to 32 KB can be): 32 elements a lane, so that dweight stays in registers.
REREADS = (
    Reread(4096, 1, 1),
    Reread(8192, 2, 1),
    Reread(16384, 4, 1),
    Reread(32768, 4, 2),
    Reread(65536, 4, 4),
    Reread(LARGEST_N, 4, 8),
)


@functools.cache
def _backward_plan(n: int, itemsize: int, operands: int) -> BackwardPlan:
    forward = _plan(n, itemsize)
    if forward.regime is Regime.WARP:
        # Two rows a group of lanes where they are short: 65536 x 128 19.2 us, with one row 21.5, with four 24.2.
        rows = 2 if n <= 256 else 1
        return BackwardPlan(n, Regime.WARP, forward.vec, forward.lanes, forward.block * rows, programs=4 * SMS)
    row_bytes = n * itemsize
    for row in PIPELINES:
        if row_bytes <= row.largest_row_bytes and pipeline_tile(n, itemsize) is not None:
            vec = _cta_vector(n, 16 // itemsize, itemsize, row.warpgroups)
            stages = min(row.stages, SMEM_BYTES // row.per_sm // (operands * row_bytes + 1024))
            return BackwardPlan(
                n,
                Regime.CTA,
                vec,
                warpgroups=row.warpgroups,
                source=Source.PIPELINE,
                stages=stages,
                programs=row.per_sm * SMS,
            )
    reread = next(row for row in REREADS if n <= row.largest_n)
    vec = _cta_vector(n, _vector(n, itemsize), itemsize, reread.warpgroups * reread.cluster)
    return BackwardPlan(
        n,
        Regime.CTA,
        vec,
        warpgroups=reread.warpgroups,
        cluster=reread.cluster,
        source=Source.MEMORY,
        keeps_weight=False,
        programs=2 * SMS // reread.cluster,
    )


def pipeline_tile(n: int, itemsize: int) -> tuple[int, int] | None:
    """A row as (n // width, width), which one bulk copy can move: at most 256 a side, rows of 16-byte multiples. None if none is."""
    widths = (width for width in range(256, 0, -1) if n % width == 0 and width * itemsize % 16 == 0)
    width = next(widths, None)
    return None if width is None or n // width > 256 else (n // width, width)
