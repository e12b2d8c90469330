"""Which kernel covers a row of n elements, and with which numbers: data, and one pure function of (n, dtype).

Never of the row count: that is what makes a row's bits independent of its batch.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp

from . import _validate

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

    A row is covered with `chunks` equal chunks; the last ones end exactly at n and overlap their predecessors, so no
    memory operation needs a mask. What overlaps is left out of the sum and written twice with the same values.
    """

    n: int
    regime: Regime
    vec: int  # neighbouring elements that a lane reads at once
    lanes: int = 32  # lanes that share a row
    block: int = 1  # rows of one warpgroup
    warpgroups: int = 1  # that share a row
    cluster: int = 1  # CTAs that share a row
    rereads: bool = False  # a row is read once for its sum and again, from L1 or L2, for its result

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
    largest_row_bytes: int
    regime: Regime
    warpgroups: int
    cluster: int
    why: str
    rereads: bool = False


ANY = LARGEST_N * 4

# Times are of an H200, bf16, cold L2 (bench/results/tuning_*.json); the copy kernel took 67 us where the bytes of x
# and y are 268 MB.
TABLE = (
    Row(1023, ANY, Regime.WARP, 1, 1, "65536 x 896: 57.8 us, CTA 60.2; 65536 x 1024: 67.2 us, CTA 64.8"),
    Row(8192, ANY, Regime.CTA, 1, 1, "16384 x 4096: 66.8 us, 2 warpgroups 74.0; 8192 x 8192: 66.6, 66.6 with 2"),
    Row(16384, ANY, Regime.CTA, 2, 1, "4096 x 16384: 66.9 us, 4 warpgroups 90.7, read twice 69.8"),
    Row(32768, 65536, Regime.CTA, 4, 1, "2048 x 32768: 71.3 us, 8 warpgroups 75.4, read twice 79.3, cluster of 2 82.5"),
    Row(65536, 131072, Regime.CTA, 8, 1, "1024 x 65536: 79.4 us, kept in a cluster of 4: 91.2", rereads=True),
    Row(LARGEST_N, 262144, Regime.CTA, 8, 2, "512 x 131072: 92.7 us, kept in a cluster of 8: 100.9", rereads=True),
    Row(LARGEST_N, ANY, Regime.CTA, 8, 4, "as the row above, for rows of twice the bytes; not measured", rereads=True),
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


def _lanes(n: int, vec: int) -> int:
    """Lanes for a row in a warp: all 32, or fewer until they are filled and at most an eighth of what they read is
    read twice."""
    lanes = 32
    while lanes * vec > n or (lanes > 4 and -n % (lanes * vec) > n // 8):
        lanes //= 2
    return lanes


def _cta_vector(n: int, vec: int, itemsize: int, workers: int) -> int:
    """Narrower vectors, down to 8 bytes, where over a quarter of a row would be read twice (16384 x 1536: 25.2 us,
    not 27.4)."""
    while WARPS * 32 * vec > n or (vec > 8 // itemsize and -n % (WARPS * 32 * vec * workers) > n // 4):
        vec //= 2
    return vec


@functools.cache
def _plan(n: int, itemsize: int) -> Plan:
    row = next(row for row in TABLE if n <= row.largest_n and n * itemsize <= row.largest_row_bytes)
    vec = vector(n, itemsize)
    if row.regime is Regime.WARP:
        lanes = _lanes(n, vec)
        return Plan(n, Regime.WARP, vec, lanes, WARPS * (32 // lanes))
    warpgroups, cluster, rereads = row.warpgroups, row.cluster, row.rereads
    if vec * itemsize < 16 and n > 8192:
        (warpgroups, cluster), rereads = _narrow(n), False
    vec = _cta_vector(n, vec, itemsize, warpgroups * cluster)
    return Plan(n, Regime.CTA, vec, warpgroups=warpgroups, cluster=cluster, rereads=rereads)


def plan_for(n: int, dtype: DTypeLike) -> Plan:
    """The forward plan for rows of `n` elements of `dtype`. Raises NotImplementedError where there is no kernel for
    n."""
    n, itemsize = _check(n), jnp.dtype(_validate.dtype_name("dtype", dtype)).itemsize
    return _plan(n, itemsize)


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
    largest_row_bytes: int
    warpgroups: int
    stages: int
    per_sm: int  # programs
    why: str


SMS = 132  # of an H100 or H200. Fixed, so that the grid, and with it the order in which dweight is added up, is too.
SMEM_BYTES = 227 << 10  # of an SM, for all its programs

SMALLEST_PIPELINE = 768  # 32768 x 896: 55.7 us, in warps 57.6; 65536 x 512: 68.2, in warps 57.6

# Share of the copy kernel's throughput on an H200, bf16, both kernels of the backward pass counted.
PIPELINES = (
    Stages(4096, 1, 4, 5, "16384 x 2048: 0.898; 4 programs an SM 0.870, 2 warpgroups 0.864, kept in registers 0.844"),
    Stages(8192, 1, 3, 3, "16384 x 4096: 0.919; 2 stages 0.874, 2 warpgroups 0.900, kept in registers 0.840"),
    Stages(16384, 1, 3, 2, "8192 x 8192: 0.890; 4 warpgroups 0.867, weight read for every row 0.861"),
    Stages(32768, 4, 3, 1, "4096 x 16384: 0.903; 2 warpgroups 0.885, 8 0.876, 2 stages 0.808"),
)


@functools.cache
def _backward_plan(n: int, itemsize: int, column_bytes: int) -> BackwardPlan:
    """column_bytes: of x, dy and ds together."""
    if n < SMALLEST_PIPELINE:
        return _backward_warp_plan(n, itemsize)
    for row in PIPELINES:
        # Two stages at least: the one that is read, and the one that is filled.
        stages = min(row.stages, (SMEM_BYTES // row.per_sm - 2048) // (n * column_bytes))
        if n * itemsize <= row.largest_row_bytes and stages >= 2 and pipeline_tile(n, itemsize) is not None:
            return BackwardPlan(
                n,
                Regime.CTA,
                _cta_vector(n, 16 // itemsize, itemsize, row.warpgroups),
                warpgroups=row.warpgroups,
                source=Source.PIPELINE,
                stages=stages,
                programs=row.per_sm * SMS,
            )
    if n <= 1023:
        return _backward_warp_plan(n, itemsize)
    # Rows that bulk copies cannot move: those of 16-byte multiples, up to 32 KB, can be.
    warpgroups, cluster = (1, 1) if n <= 4096 else (2, 1) if n <= 8192 else _narrow(n)
    return BackwardPlan(
        n,
        Regime.CTA,
        _cta_vector(n, vector(n, itemsize), itemsize, warpgroups * cluster),
        warpgroups=warpgroups,
        cluster=cluster,
        source=Source.MEMORY,
        keeps_weight=False,
        programs=2 * SMS // cluster,
    )


def _backward_warp_plan(n: int, itemsize: int) -> BackwardPlan:
    vec = vector(n, itemsize)
    lanes = _lanes(n, vec)
    while lanes < 32 and -(-n // (lanes * vec)) * vec > 24:  # n = 200 and 896 spilled with 56 elements a lane
        lanes *= 2
    rows = WARPS * (32 // lanes)
    if n <= 256:
        # Two rows a group of lanes where one is short: 65536 x 128 19.1 us, with one 21.3, with four 24.2.
        short = -(-n // (lanes * vec)) * vec <= 8
        return BackwardPlan(n, Regime.WARP, vec, lanes, rows * (2 if short else 1), programs=4 * SMS)
    # Read twice: 65536 x 512 57.6 us, kept in registers 58.6, and then n = 1000 spills.
    return BackwardPlan(n, Regime.WARP, vec, lanes, rows, source=Source.MEMORY, keeps_weight=False, programs=4 * SMS)


def pipeline_tile(n: int, itemsize: int) -> tuple[int, int] | None:
    """A row as (n // width, width), which one bulk copy can move, or None if none can.

    At most 256 a side, a width of whole 16 bytes, a row of whole 128 bytes: Mosaic splits the count of bytes over 128
    lanes.
    """
    if n * itemsize % 128:
        return None
    widths = (width for width in range(256, 0, -1) if n % width == 0 and width * itemsize % 16 == 0)
    width = next(widths, None)
    return None if width is None or n // width > 256 else (n // width, width)
