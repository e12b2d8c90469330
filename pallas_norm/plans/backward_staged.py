"""Rows of the backward pass that bulk copies bring to shared memory, several ahead of the one that is worked on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

from .backward_warp import LONGEST_SHORT
from .hardware import RESIDENT_CLUSTERS, SMS, WARPS
from .lengths import LARGEST_N
from .plan import FEWEST_STAGES, BackwardPlan, Choice, Regime, Source, per_sm, staged_view, stages_of
from .vectors import cta_vector, vector


@dataclasses.dataclass(frozen=True, kw_only=True)
class Staged:
    """Rows that bulk copies bring to shared memory."""

    largest_n: int
    largest_row_bytes: int
    regime: Regime = Regime.CTA
    warpgroups: int = 1
    cluster: int = 1
    vector_bytes: int = 16  # at most
    stages: int
    programs: int
    rows_in_registers: bool = False
    with_wide_columns: bool = True  # of a wider dy, or of ds too: a lane has more in registers
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
        cluster=2,
        vector_bytes=8,
        stages=3,
        programs=4 * RESIDENT_CLUSTERS[2],
        rows_in_registers=True,
        why="16384 x 4096: 0.965, in one CTA 0.942; 4096 rows: 0.852, 0.815; 256: 0.453, 0.377",
        figures=(16,),
    ),
    Staged(
        largest_n=4096,
        largest_row_bytes=8192,
        stages=3,
        programs=2 * SMS,
        rows_in_registers=True,
        why="rows of which no bulk copy moves a half; 16384 x 4096: 0.947; rows not kept 0.932",
        figures=(10, 11),
    ),
    Staged(
        largest_n=4096,
        largest_row_bytes=16384,
        stages=3,
        programs=2 * SMS,
        rows_in_registers=True,
        with_wide_columns=False,
        why="float32, 4096 x 4096: 0.922, rows not kept 0.898; 256 rows: 0.570, 0.559",
        figures=(17,),
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
        warpgroups=2,
        cluster=2,
        stages=4,
        programs=2 * RESIDENT_CLUSTERS[2],
        rows_in_registers=True,
        why="16384 x 8192: 0.974, in one CTA 0.958; 1024 rows: 0.730, 0.714",
        figures=(16,),
    ),
    Staged(
        largest_n=8192,
        largest_row_bytes=16384,
        warpgroups=4,
        stages=3,
        programs=SMS,
        rows_in_registers=True,
        why="rows of which no bulk copy moves a half; 8192 x 8192: 0.951; rows not kept 0.893, 2 warpgroups 0.847",
        figures=(8, 9, 11),
    ),
    Staged(
        largest_n=16384,
        largest_row_bytes=32768,
        cluster=4,
        stages=2,
        programs=3 * RESIDENT_CLUSTERS[4],
        rows_in_registers=True,
        with_wide_columns=False,
        why="4096 x 16384: 0.913, in one CTA 0.889; 256 rows: 0.55, 0.45; 8192 x 12288: 0.949, 0.922",
        figures=(16,),
    ),
    Staged(
        largest_n=16384,
        largest_row_bytes=32768,
        warpgroups=4,
        stages=3,
        programs=SMS,
        why="rows of which no bulk copy moves a quarter; 4096 x 16384: 0.899; 8 warpgroups 0.887, 2 CTAs 0.751",
        figures=(6, 9, 11),
    ),
    Staged(
        largest_n=32768,
        largest_row_bytes=65536,
        cluster=8,
        stages=2,
        programs=3 * RESIDENT_CLUSTERS[8],
        rows_in_registers=True,
        with_wide_columns=False,
        why="4096 x 32768: 0.952, 2 CTAs of 4 warpgroups 0.917; 1024 rows: 0.859, 0.831; 256: 0.68, 0.61",
        figures=(16,),
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
        warpgroups=2,
        cluster=8,
        stages=3,
        programs=2 * RESIDENT_CLUSTERS[8],
        with_wide_columns=False,
        why="1024 x 65536: 0.858, 4 CTAs of 4 warpgroups 0.841; 256 rows: 0.707, 0.699",
        figures=(16,),
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
    shared = dataclasses.replace(plan, programs=programs)
    stages = min(row.stages, stages_of(plan, column_bytes, per_sm=per_sm(shared)))
    if stages < FEWEST_STAGES or staged_view(plan, narrowest) is None:
        return None
    return dataclasses.replace(
        plan, source=Source.PIPELINE, stages=stages, programs=programs, rows_in_registers=row.rows_in_registers
    )


def pipeline(n: int, itemsize: int, column_bytes: int, narrowest: int) -> Choice | None:
    """None for rows that are better off without, and for those that no bulk copy moves."""

    def fitting(table: Sequence[Staged]) -> Iterator[Staged]:
        narrow = column_bytes <= 2 * itemsize
        rows = (row for row in table if n <= row.largest_n and n * itemsize <= row.largest_row_bytes)
        return (row for row in rows if row.with_wide_columns or narrow)

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
        vec = min(vec, row.vector_bytes // itemsize)
        shape = BackwardPlan(n, Regime.CTA, vec, warpgroups=row.warpgroups, cluster=row.cluster)
        if (plan := _staged(shape, row, itemsize, column_bytes, narrowest)) is not None:
            return Choice(plan, row.why, row.figures)
    return None
