"""Few rows shared by more lanes than many: a second schedule of the forward pass, with the same bits.

A grid of few rows leaves most of a GPU idle, so that a row takes as long as its lanes take to read their parts. More
warps, or CTAs, with fewer columns each read a row sooner; where rows fill the GPU they would only wait for each other.
The columns that are added up side by side stay the same, and with them the order of additions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from .hardware import WARPS, Gpu
from .lengths import LARGEST_N
from .plan import Plan, Regime, Source

WIDE_BYTES = 16  # of a vector: a CTA with narrower ones has its row shared by many already


@dataclasses.dataclass(frozen=True, kw_only=True)
class FewRows:
    """Of rows of these lengths, in a CTA or a cluster; the plan for many may have them in warps."""

    smallest_n: int
    largest_n: int
    itemsize: int
    most: int  # rows that the schedule is for
    warpgroups: int
    cluster: int = 1
    why: str
    figures: tuple[int, ...] = (15,)  # the files bench/results/tuning_*.json that have the times


# Microseconds of an H200, and of the plan for many; for one row of over 16384 elements of the one that was before it.
TABLE = (
    *(
        FewRows(smallest_n=513, largest_n=1023, itemsize=size, most=8, warpgroups=1, why=why, figures=(17,))
        for size, why in (
            (2, "1 x 896: 1.34, 1.60; 8: 1.38, 1.57; 8 x 1000: 1.38, 1.60; of 16 rows, and of 512 elements no less"),
            (4, "1 x 896: 1.31, 1.50; 8: 1.44, 1.73; of 512 elements no less"),
        )
    ),
    FewRows(
        smallest_n=1025,
        largest_n=6144,
        itemsize=2,
        most=4,
        warpgroups=2,
        why="1 x 2048: 1.34, 1.50; 1 x 4096: 1.60, 1.73; 1 x 1024: 1.34, 1.18",
        figures=(15, 17),
    ),
    FewRows(
        smallest_n=6145,
        largest_n=8192,
        itemsize=2,
        most=16,
        warpgroups=1,
        cluster=4,
        why="1 x 8192: 1.73, 2.14, with 2 warpgroups 1.89; 16: 2.14, 2.24; with a residual 2.30, 2.66",
        figures=(17,),
    ),
    FewRows(
        smallest_n=1025,
        largest_n=4096,
        itemsize=4,
        most=1,
        warpgroups=2,
        why="1 x 2048: 1.54, 1.70; 1 x 4096: 1.82, 2.02; 4 x 2048: 1.66, 1.57",
        figures=(17,),
    ),
    FewRows(
        smallest_n=4097,
        largest_n=8192,
        itemsize=4,
        most=16,
        warpgroups=1,
        cluster=4,
        why="1 x 8192: 1.89, 2.46; 16: 2.27, 2.66; 8 x 6144: 2.02, 2.21",
        figures=(17,),
    ),
    FewRows(
        smallest_n=8193,
        largest_n=16384,
        itemsize=4,
        most=64,
        warpgroups=1,
        cluster=8,
        why="1 x 16384: 2.02, 2.50; 64: 4.38, 4.48; with a residual 1: 2.27, 5.06",
        figures=(17,),
    ),
    FewRows(
        smallest_n=8193,
        largest_n=16384,
        itemsize=2,
        most=64,
        warpgroups=1,
        cluster=4,
        why="1 x 16384: 1.9, 2.6; 64: 3.2, 3.4",
    ),
    *(
        FewRows(smallest_n=16385, largest_n=32768, itemsize=size, most=64, warpgroups=1, cluster=8, why=why)
        for size, why in ((2, "1 x 32768: 2.1, 4.1; 64: 4.5, 4.8"), (4, "1 x 32768: 2.2, 4.0; 64: 6.4, 6.5"))
    ),
    *(
        FewRows(smallest_n=32769, largest_n=65536, itemsize=size, most=32, warpgroups=2, cluster=8, why=why)
        for size, why in ((2, "1 x 65536: 2.4, 4.4; 32: 4.8, 4.9"), (4, "1 x 65536: 2.8, 4.1"))
    ),
    *(
        FewRows(smallest_n=65537, largest_n=LARGEST_N, itemsize=size, most=16, warpgroups=size, cluster=8, why=why)
        for size, why in ((2, "1 x 131072: 3.0, 4.4; 16: 5.1, 5.9"), (4, "1 x 131072: 3.9, 6.5"))
    ),
)


def row_of(n: int, itemsize: int) -> FewRows | None:
    """The table's row for that length."""
    fitting = (row for row in TABLE if row.itemsize == itemsize and row.smallest_n <= n <= row.largest_n)
    return next(fitting, None)


def choice(plan: Plan, itemsize: int) -> FewRows | None:
    """The table's row for a plan of rows whose elements have that size, or None."""
    if plan.regime is Regime.CTA and plan.vec * itemsize < WIDE_BYTES:
        return None
    row = row_of(plan.n, itemsize)
    return None if row is None or plan.width < _threads(row) else row


def _threads(row: FewRows) -> int:
    return WARPS * 32 * row.warpgroups * row.cluster


def of(plan: Plan, itemsize: int, gpu: Gpu) -> tuple[int, Plan] | None:
    """(most rows, the plan for so many), where that GPU has one beside `plan`; with the order of its additions.

    itemsize: of what is normalised.
    """
    row = choice(plan, itemsize)
    if row is None or (row.cluster > 1 and not gpu.clusters):
        return None
    one_row = {"regime": Regime.CTA, "lanes": 32, "block": 1}
    shape = {**one_row, "vec": plan.width // _threads(row), "warpgroups": row.warpgroups, "cluster": row.cluster}
    once = {"source": Source.REGISTERS, "stages": 0, "rows_in_registers": False, "programs": None}
    few = dataclasses.replace(plan, **shape, **once)
    return None if few == plan else (row.most, few)


def schedule(plan: Plan, itemsize: int, gpu: Gpu, batch: Sequence[Any]) -> Plan:
    """The plan for rows of these leading axes: `plan`, or the one for few with the same bits."""
    few = of(plan, itemsize, gpu)
    if few is None or not all(isinstance(size, int) for size in batch):  # a symbolic one is no number yet
        return plan
    return few[1] if math.prod(batch) <= few[0] else plan
