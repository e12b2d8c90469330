"""Plans: the tables are total, every column of a row is owned once, and what a plan needs is there."""

from __future__ import annotations

import dataclasses
import inspect
import itertools

import numpy as np
import pytest

from pallas_norm.kernels import launch
from pallas_norm.kernels.block import Block
from pallas_norm.kernels.cta import SharedRow, WarpgroupRow
from pallas_norm.kernels.warp import WarpRows
from pallas_norm.plans.backward_staged import PIPELINES, SMALLEST_PIPELINE, WARP_PIPELINES
from pallas_norm.plans.backward_warp import HALVED, ROWS, SHORT
from pallas_norm.plans.forward import ANY, TABLE
from pallas_norm.plans.hardware import SMEM_BYTES, SMS, WARPS
from pallas_norm.plans.lengths import LARGEST_N, SMALLEST_N
from pallas_norm.plans.plan import BackwardPlan, Plan, Regime, Source, pipeline_tile, staged_view
from pallas_norm.plans.vectors import NARROW
from pallas_norm.regimes import backward_plan_for, plan_for

LIMITS = (
    {row.largest_n for row in TABLE}
    | {row.largest_row_bytes // size for row in TABLE for size in (2, 4)}
    | {row.largest_n for row in NARROW}
    | {row.largest_row_bytes // size for row in PIPELINES for size in (2, 4)}
    | {SMALLEST_N, SMALLEST_PIPELINE, 256, 1023, 4096, 8192}
    | {2**power for power in range(5, 18)}
)
NEAR_LIMITS = {n + off for n in LIMITS for off in range(-2, 3)}
SAMPLE = {int(n) for n in np.exp(np.random.default_rng(0).uniform(np.log(2048), np.log(LARGEST_N), 400))}
WIDTHS = sorted(n for n in NEAR_LIMITS | SAMPLE | set(range(32, 2049)) if SMALLEST_N <= n <= LARGEST_N)
ALIGNED = sorted({n for n in WIDTHS if n % 64 == 0} | set(range(2048, LARGEST_N + 1, 64)))  # the pipelines' rows

FORWARD = ("bfloat16", "float32")  # float16 has the size of bfloat16, and a plan looks at no more
BACKWARD = [
    {"dtype": dtype, "dy_dtype": dy_dtype, "residual": residual}
    for dtype, dy_dtype in itertools.product(FORWARD, repeat=2)
    for residual in (False, True)
]


class Everyone:
    """Mixed into SharedRow: the starts and repeats of all workers at once, outside a kernel."""

    def _worker(self) -> np.ndarray:
        return np.arange(self.plan.workers)  # pyright: ignore


class EveryWorkersRow(Everyone, SharedRow):
    pass


def block_of(plan: Plan) -> Block:
    if plan.regime is Regime.WARP:
        return WarpRows(plan, 0, interpret=True)
    if plan.workers == 1:
        return WarpgroupRow(plan, 0, interpret=True)
    return EveryWorkersRow(plan, 0, True, None, 0, 0)  # pyright: ignore  # noqa: FBT003


def offsets_of(plan: Plan) -> np.ndarray:
    """(parts, workers): where in a block of columns each of them begins."""
    return np.array(block_of(plan)._offsets(), np.int64).reshape(plan.parts, plan.workers)


def starts_of(plan: Plan) -> np.ndarray:
    """(blocks, parts, workers)."""
    return np.array(block_of(plan)._starts(), np.int64).reshape(plan.blocks, plan.parts, plan.workers)


def times_counted(plan: Plan, starts: np.ndarray) -> np.ndarray:
    """How often each column enters the row sum: a chunk is a +1 at its start and a -1 behind its end."""
    begins = starts.copy()
    begins[-1] += np.clip(plan.overlap - offsets_of(plan), 0, plan.span)  # the last block's first elements are left out
    steps = np.zeros(plan.n + 1, np.int64)
    np.add.at(steps, begins, 1)
    np.add.at(steps, starts + plan.span, -1)
    return np.cumsum(steps)[:-1]


def check_order(plan: Plan, context: object) -> None:
    """A part of a worker has the columns of a span, from the first block to the last, and they lie in the order's own
    order: parts, workers and lanes are neighbours of each other."""
    order = plan.order
    begin_of_block = np.minimum(np.arange(order.blocks) * order.width, plan.n - order.width)
    assert np.array_equal(starts_of(plan), begin_of_block[:, None, None] + offsets_of(plan)), context
    assert np.array_equal(offsets_of(plan).T.reshape(-1), np.arange(plan.workers * plan.parts) * plan.span), context
    assert order.width == plan.workers * plan.parts * plan.span <= plan.n, context
    for owners in (plan.vec, plan.lanes, plan.warpgroups, plan.cluster, plan.parts):  # each adds up pairs of neighbours
        assert owners & (owners - 1) == 0, context


def check(plan: Plan, itemsize: int, context: object) -> None:
    starts = starts_of(plan)
    assert starts.min() >= 0, context
    assert starts.max() + plan.span <= plan.n, context
    assert np.all(times_counted(plan, starts) == 1), context
    # A row starts at a multiple of n elements, a chunk at its own offset: both have to be whole vectors.
    assert plan.n % plan.vec == 0, context
    assert np.all(starts % plan.vec == 0), context
    assert plan.vec * itemsize <= 16, context
    assert plan.lanes in (4, 8, 16, 32), context
    check_order(plan, context)
    if plan.regime is Regime.WARP:
        assert plan.block % (4 * (32 // plan.lanes)) == 0, context
        assert plan.workers == 1, context
    else:
        assert (plan.block, plan.lanes) == (1, 32), context
        assert plan.warpgroups * 128 <= 1024, context  # threads of a CTA
        assert plan.cluster in (1, 2, 4, 8), context


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", FORWARD)
def test_forward_plans_count_every_column_once_with_aligned_vectors(dtype: str) -> None:
    for n in WIDTHS:
        plan = plan_for(n, dtype)
        assert plan.n == n
        check(plan, np.dtype("uint16" if dtype == "bfloat16" else dtype).itemsize, n)


@pytest.mark.sampled(8)
@pytest.mark.parametrize("form", BACKWARD, ids=str)
def test_backward_plans_count_every_column_once_with_aligned_vectors(form: dict) -> None:
    for n in WIDTHS:
        check(backward_plan_for(n, **form), 4 if form["dtype"] == "float32" else 2, (n, form))


def test_the_plan_that_stands_in_for_a_cluster_counts_every_column_once() -> None:
    plans = {n: (plan_for(n, "float32"), 4) for n in WIDTHS} | {
        -n: (backward_plan_for(n, "bfloat16"), 2) for n in WIDTHS
    }
    clusters = {n: plan for n, plan in plans.items() if plan[0].cluster > 1}
    assert {plan.cluster for plan, _ in clusters.values()} == {2, 4, 8}
    for n, (plan, itemsize) in clusters.items():
        stand_in = launch.interpretable(plan, itemsize)
        assert stand_in.cluster == 1
        assert stand_in.source is not Source.PIPELINE or pipeline_tile(abs(n), itemsize) is not None
        assert np.all(times_counted(stand_in, starts_of(stand_in)) == 1), n
        check_order(stand_in, n)
        assert stand_in.order == plan.order, n


@pytest.mark.sampled(3)
@pytest.mark.parametrize("form", BACKWARD, ids=str)
def test_backward_plans_fit_in_shared_memory(form: dict) -> None:
    names = ["dtype", "dy_dtype", *(["dtype"] if form["residual"] else [])]
    sizes = [4 if form[name] == "float32" else 2 for name in names]
    sources = set()
    for n in sorted({*WIDTHS, *ALIGNED}):
        plan = backward_plan_for(n, **form)
        sources.add(plan.source)
        check_memory(plan, sizes)
    assert sources == set(Source)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", FORWARD)
def test_forward_plans_fit_in_shared_memory(dtype: str, *, residual: bool) -> None:
    itemsize = 4 if dtype == "float32" else 2
    plans = [plan_for(n, dtype, residual=residual) for n in sorted({*WIDTHS, *ALIGNED})]
    assert {plan.source for plan in plans} == set(Source)
    for plan in plans:
        check_memory(plan, [itemsize] * (2 if residual else 1))


def chunks_of(plan: Plan) -> Plan:
    """Less what gives no bit: where rows come from, and how many of the warpgroups that share one a CTA has."""
    own = {"source": Source.REGISTERS, "stages": 0, "programs": None, "rows_in_registers": False}
    return dataclasses.replace(plan, **own, warpgroups=plan.workers, cluster=1)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("read", [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float32", "float32")], ids=str)
@pytest.mark.parametrize("dtype", FORWARD)
def test_rows_of_other_dtypes_than_s_fit_and_are_read_in_the_chunks_of_s(dtype: str, read: tuple[str, str]) -> None:
    """So add_rms_norm has the bits of the norm of s, whatever it is the sum of."""
    for n in sorted({*WIDTHS, *ALIGNED, *range(32800, LARGEST_N + 1, 64)}):  # the last ones: 64 k + 32
        plan, alone = plan_for(n, dtype, residual=True, read=read), plan_for(n, dtype)
        assert chunks_of(plan) == chunks_of(alone), n
        check_memory(plan, [4 if one == "float32" else 2 for one in read])
    assert plan_for(n, dtype, residual=True, read=read) == plan_for(n, dtype, residual=True, read=read[::-1])


def check_memory(plan: Plan, sizes: list[int]) -> None:
    """A program's shared memory takes 1 KB more than it asks for, and each array of an exchange a whole KB; a pipeline
    counts on all its programs of an SM at once."""
    used = sum(-(-plan.block * plan.n * size * plan.stages // plan.cluster // 1024) * 1024 for size in sizes)
    if plan.regime is Regime.WARP and isinstance(plan, BackwardPlan):
        used += plan.block * plan.span * 4  # where the rows meet to give dweight
    used += 3 * 1024 if plan.workers > 1 else 8 * (plan.stages + 2)
    programs_per_sm = max(1, (plan.programs or 0) * plan.cluster // SMS)
    together = programs_per_sm if plan.source is Source.PIPELINE else 1
    assert together * (used + 1024) <= SMEM_BYTES, plan
    if plan.source is Source.PIPELINE:
        assert plan.stages >= 2, plan
        check_view(plan, min(sizes))
    else:
        assert (plan.stages, plan.rows_in_registers) == (0, False), plan


def check_view(plan: Plan, itemsize: int) -> None:
    """A bulk copy moves at most 5 axes of at most 256 elements, of whole 16 bytes, in all whole 128 bytes."""
    view = staged_view(plan, itemsize)
    assert view is not None, plan
    assert np.prod(view) == plan.n, plan
    part = view if plan.cluster == 1 else (view[0], *view[2:])
    assert plan.cluster in (1, view[1]), plan
    assert max(part) <= 256, plan
    assert len(view) < 5, plan
    assert view[-1] * itemsize % 16 == 0, plan
    assert np.prod(part) * itemsize % 128 == 0, plan


@pytest.mark.parametrize("dtype", FORWARD)
def test_the_residual_form_reads_a_row_in_the_same_chunks(dtype: str) -> None:
    """So add_rms_norm has the bits of an addition and rms_norm."""
    plans = [(plan_for(n, dtype), plan_for(n, dtype, residual=True)) for n in sorted({*WIDTHS, *ALIGNED})]
    assert all(chunks_of(plan) == chunks_of(with_residual) for plan, with_residual in plans)
    assert any(plan != with_residual for plan, with_residual in plans)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_tile_is_found_wherever_there_is_one(itemsize: int) -> None:
    for n in WIDTHS:
        widths = (width for width in range(1, 257) if n % width == 0 and n // width <= 256)
        exists = n * itemsize % 128 == 0 and any(width * itemsize % 16 == 0 for width in widths)
        assert (pipeline_tile(n, itemsize) is not None) == exists, n


def test_the_tables_are_monotone_and_total() -> None:
    for table in (TABLE, PIPELINES, WARP_PIPELINES):
        limits = [(row.largest_n, row.largest_row_bytes) for row in table]
        assert limits == sorted(limits)
    assert (TABLE[-1].largest_n, TABLE[-1].largest_row_bytes) == (LARGEST_N, ANY)
    widths = [row.largest_n for row in NARROW]
    assert widths == sorted(set(widths))
    assert widths[-1] == LARGEST_N
    for table in (PIPELINES, WARP_PIPELINES):
        limits = [row.largest_n for row in table]
        assert limits == sorted(limits)
        assert all(row.stages >= 2 for row in table)


def test_every_line_of_the_tables_is_some_rows_plan() -> None:
    """A line that no row reaches is a number without an effect."""
    forward = [plan_for(n, dtype) for n in ALIGNED + WIDTHS for dtype in FORWARD]
    wide = {(plan.warpgroups, plan.cluster, plan.source) for plan in forward if plan.regime is Regime.CTA}
    assert {(row.warpgroups, row.cluster, row.source) for row in TABLE if row.regime is Regime.CTA} <= wide
    assert {(row.warpgroups, row.cluster, Source.REGISTERS) for row in NARROW} <= wide
    backward = [backward_plan_for(n, **form) for n in ALIGNED for form in BACKWARD]
    for table, regime in ((PIPELINES, Regime.CTA), (WARP_PIPELINES, Regime.WARP)):
        piped = [plan for plan in backward if plan.source is Source.PIPELINE and plan.regime is regime]
        found = {(plan.warpgroups, plan.cluster, plan.stages, plan.programs, plan.rows_in_registers) for plan in piped}
        assert {
            (row.warpgroups, row.cluster, row.stages, row.programs, row.rows_in_registers) for row in table
        } <= found
    found = set()
    for plan in (backward_plan_for(n, **form) for n in range(32, 257) for form in BACKWARD):
        if plan.source is Source.REGISTERS and plan.vec > 1:
            elements = plan.chunks * plan.vec * plan.block * plan.lanes // (WARPS * 32)
            found.add((next(row.largest for row in SHORT if elements <= row.largest), plan.programs // SMS))
    most = {row.most_programs for row in ROWS}
    assert found == {(row.largest, min(per_sm, limit)) for row in SHORT for per_sm in row.programs for limit in most}


def test_short_rows_with_many_elements_a_lane_are_shared_by_more_lanes_with_the_same_columns() -> None:
    for form in BACKWARD:
        short = [backward_plan_for(n, **form) for n in range(32, 257)]
        assert not [plan for plan in short if plan.vec >= 4 and plan.chunks * plan.vec in HALVED]
        assert [(plan.vec, plan.lanes, plan.width) for plan in short if plan.n in (80, 160)] == [
            (2, 8, 16),
            (2, 16, 32),
        ]


def test_rows_are_kept_in_warps_below_a_width_and_shared_above_it() -> None:
    for dtype in FORWARD:
        kinds = [plan_for(n, dtype).regime for n in WIDTHS]
        assert kinds == sorted(kinds, key=[Regime.WARP, Regime.CTA].index)


def test_a_plan_is_a_function_of_row_length_and_dtypes_and_of_nothing_else() -> None:
    """Were the number of rows an argument, a row's bits would depend on its batch."""
    assert list(inspect.signature(plan_for).parameters) == ["n", "dtype", "residual", "read"]
    assert list(inspect.signature(backward_plan_for).parameters) == ["n", "dtype", "dy_dtype", "residual"]
    assert plan_for(4096, "bfloat16") == plan_for(4096, "float16")
    assert hash(plan_for(4096, "bfloat16")) == hash(plan_for(4096, "bfloat16"))


def test_plans_are_immutable() -> None:
    plan = backward_plan_for(4096, "bfloat16")
    assert isinstance(plan, BackwardPlan)
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan.n = 5  # pyright: ignore
