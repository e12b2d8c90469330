"""Plans on other GPUs than those the tables are for: the same order of additions, and what the GPU has."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest

from pallas_norm.plans.fitting import MOST_TOGETHER, Misfit, backward_plan_on, forward_plan_on
from pallas_norm.plans.hardware import GENERATIONS, H200, RESIDENT_CLUSTERS, SMS, Gpu, generation, named
from pallas_norm.plans.lengths import LARGEST_N
from pallas_norm.plans.plan import BackwardPlan, Plan, Regime, Source, per_sm
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import rewrites
from tests.test_regimes import ALIGNED, BACKWARD, FORWARD, WIDTHS

# Whole GPUs, slices of them (MIG), and chips with few multiprocessors.
COUNTS = {
    (8, 0): (108, 56, 14),
    (8, 6): (84, 72, 20),
    (8, 7): (16,),
    (8, 9): (142, 128, 58, 24),
    (9, 0): (132, 114, 78, 16),
    (10, 0): (148,),
    (10, 3): (148,),
    (11, 0): (20,),
    (12, 0): (188, 170, 36),
    (12, 1): (48,),
}
GPUS = [
    Gpu(capability, generation(capability).shared_bytes, count)
    for capability, counts in COUNTS.items()
    for count in counts
]
NS = sorted({*WIDTHS[::11], *ALIGNED[::17]})
# What gives the order in which a row is added up.
ORDER = ("n", "regime", "vec", "lanes", "block", "workers", "width", "chunks", "overlap", "depth")


def order(plan: Plan) -> tuple[Any, ...]:
    return tuple(getattr(plan, name) for name in ORDER)


def runs_on(table: Plan, gpu: Gpu) -> bool:
    """Rows of a cluster of few warpgroups are those of one CTA where there are no clusters."""
    return gpu.clusters or table.cluster == 1 or table.workers <= MOST_TOGETHER


def id_of(gpu: Gpu) -> str:
    return f"{named(gpu.capability)} with {gpu.multiprocessors}"


def every_plan(gpu: Gpu) -> list[tuple[Plan, Plan, int, bool]]:
    """(the table's, the fitted one, bytes of a column, with_dweight), of rows that the GPU has a kernel for."""
    found: list[tuple[Plan, Plan, int, bool]] = []
    for n in NS:
        for dtype in FORWARD:
            for residual in (False, True):
                table = plan_for(n, dtype, residual=residual)
                if runs_on(table, gpu):
                    size = (4 if dtype == "float32" else 2) * (2 if residual else 1)
                    found.append((table, forward_plan_on(gpu, n, dtype, residual=residual), size, False))
        for form in BACKWARD:
            table = backward_plan_for(n, **form)
            size = (4 if form["dy_dtype"] == "float32" else 2) + (4 if form["dtype"] == "float32" else 2) * (
                2 if form["residual"] else 1
            )
            if runs_on(table, gpu):
                for with_dweight in (False, True):
                    found.append(
                        (table, backward_plan_on(gpu, n, **form, with_dweight=with_dweight), size, with_dweight)
                    )
    return found


@pytest.mark.sampled(8)
@pytest.mark.parametrize("gpu", GPUS, ids=id_of)
def test_every_gpu_adds_up_a_row_in_the_same_order_and_dweight_too(gpu: Gpu) -> None:
    plans = every_plan(gpu)
    assert len(plans) > 500
    for table, plan, _, with_dweight in plans:
        assert order(plan) == order(table)
        assert type(plan) is type(table)
        if with_dweight:  # each program adds up its rows: another number of them is another order
            assert plan.programs == table.programs, plan


def per_sm_of(gpu: Gpu, plan: Plan) -> int:
    """Of a persistent grid that is as large as the GPU."""
    assert plan.programs is not None
    return -(-plan.programs * plan.cluster // gpu.multiprocessors)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("gpu", GPUS, ids=id_of)
def test_every_plan_fits_its_gpu(gpu: Gpu) -> None:
    """A program's shared memory takes 1 KB more than it asks for, of an SM that has 1 KB more than a CTA may have."""
    sources: set[Source] = set()
    for table, plan, column_bytes, _ in every_plan(gpu):
        sources.add(plan.source)
        if not gpu.clusters:
            assert (plan.cluster, plan.source is Source.PIPELINE, plan.stages) == (1, False, 0), plan
        exchange = 3 << 10 if plan.workers > 1 else 8 * (plan.stages + 2)
        used = plan.block * plan.n * column_bytes * plan.stages // plan.cluster + (3 << 10) + exchange
        if plan.regime is Regime.WARP and isinstance(plan, BackwardPlan):
            used += plan.block * plan.span * 4
        assert used <= gpu.shared_bytes, plan
        if plan.source is Source.PIPELINE:
            assert 2 <= plan.stages <= table.stages, plan
            together = per_sm(table) if isinstance(plan, BackwardPlan) else per_sm_of(gpu, plan)
            assert together * (used + 1024) <= gpu.shared_bytes + 1024, plan
        else:
            assert (plan.stages, plan.rows_in_registers) == (0, False), plan
    assert (Source.PIPELINE in sources) == gpu.clusters


def test_an_h200_runs_the_plans_of_the_tables() -> None:
    for table, plan, _, _ in every_plan(H200):
        assert plan is table or plan == table


@pytest.mark.slow
def test_no_grid_but_that_of_dweight_is_larger_or_smaller_than_its_gpu() -> None:
    seen: set[int] = set()
    for gpu in GPUS:
        for table, plan, _, with_dweight in every_plan(gpu):
            if plan.programs is None or with_dweight:
                continue
            seen.add(plan.cluster)
            if plan.cluster == 1:  # as many programs an SM as on an H200
                assert plan.programs == table.programs * gpu.multiprocessors // SMS
            else:
                assert plan.programs * plan.cluster <= per_sm(table) * max(gpu.multiprocessors, plan.cluster)
                assert plan.programs >= 1
    assert seen == {1, 2, 4, 8}


def test_what_a_gpu_without_bulk_copies_reads_again() -> None:
    """Forward plans that keep rows in registers still do; a backward plan reads its rows, and the weight, twice."""
    a100 = Gpu((8, 0), 163 << 10, 108)
    forward = forward_plan_on(a100, 32768, "bfloat16")
    assert plan_for(32768, "bfloat16").source is Source.PIPELINE
    assert (forward.source, forward.programs, forward.warpgroups) == (Source.REGISTERS, None, 4)
    backward = backward_plan_on(a100, 4096, "bfloat16")
    assert (backward.source, backward.keeps_weight, backward.programs) == (Source.MEMORY, False, 2 * SMS)


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_rows_that_need_a_cluster_have_no_kernel_before_hopper(capability: tuple[int, int]) -> None:
    gpu = Gpu(capability, generation(capability).shared_bytes, 108)
    with pytest.raises(Misfit) as error:
        forward_plan_on(gpu, 65536, "bfloat16")
    assert str(error.value) == (
        f"rows of 65536 elements are shared by a cluster of 8 CTAs, and a GPU of compute capability "
        f"{named(capability)} has no clusters, which came with 9.0 (Hopper)"
    )


# Of rows of whole 128 bytes; of odd ones it is 8192. Some forward rows beyond lie in one CTA too.
LONGEST = {("forward", "bfloat16"): 32768, ("forward", "float32"): 16384,
           ("backward", "bfloat16"): 16384, ("backward", "float32"): 8192}  # fmt: skip


@pytest.mark.parametrize(("direction", "dtype"), LONGEST, ids=str)
def test_which_rows_lie_in_one_cta(direction: str, dtype: str) -> None:
    """docs/gpus.md says so."""
    a100, limit = Gpu((8, 0), 163 << 10, 108), LONGEST[direction, dtype]
    on = forward_plan_on if direction == "forward" else backward_plan_on
    for n in [n for n in {*WIDTHS, *ALIGNED} if n <= 8192 or (n <= limit and n % 64 == 0)]:
        assert on(a100, n, dtype).cluster == 1
    for n in (2 * limit, LARGEST_N):
        with pytest.raises(Misfit):
            on(a100, n, dtype)
    with pytest.raises(Misfit):
        on(a100, 8193, dtype)


def test_the_generations_are_in_order_and_each_has_a_name() -> None:
    since = [row.since for row in GENERATIONS]
    assert since == sorted(set(since))
    assert [row.clusters for row in GENERATIONS] == [row.since >= (9, 0) for row in GENERATIONS]
    assert generation((10, 3)) is generation((10, 0))
    assert generation((13, 0)) is GENERATIONS[-1]
    assert generation((9, 0)).shared_bytes == H200.shared_bytes
    assert np.all([row.shared_bytes % 1024 == 0 for row in GENERATIONS])


# --- wrong fittings ---------------------------------------------------------------------------------------------------


def check_fitting(gpu: Gpu) -> None:
    found = sys.modules["pallas_norm.plans.fitting"]
    for n in (128, 896, 4096, 8192, 16384):
        table = backward_plan_for(n, "bfloat16")
        for with_dweight in (False, True):
            plan = found.backward_plan_on(gpu, n, "bfloat16", with_dweight=with_dweight)
            if with_dweight:
                assert plan.programs == table.programs
            elif plan.cluster == 1:
                assert plan.programs == table.programs * gpu.multiprocessors // SMS
            else:
                each = table.programs // RESIDENT_CLUSTERS[table.cluster]
                assert plan.programs == each * gpu.resident_clusters(plan.cluster)
            assert gpu.clusters or plan.source is not Source.PIPELINE
            assert plan.keeps_weight == (plan.source is not Source.MEMORY), plan
            assert plan.block * plan.n * 4 * plan.stages < gpu.shared_bytes, plan
            assert order(plan) == order(table)


MUTANTS = {
    "dweight in another order": ("and not with_dweight", ""),
    "as many programs as on an H200": ("plan.programs * gpu.multiprocessors // SMS", "plan.programs"),
    "bulk copies before Hopper": ("if gpu.clusters else None", ""),
    "the weight kept beside rows that are read again": ("from_memory(plan), keeps_weight=False", "from_memory(plan)"),
    "stages for an H200's shared memory": ("column_bytes, gpu.shared_bytes", "column_bytes, 227 << 10"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_fitting_is_noticed(name: str) -> None:
    def check() -> None:
        for gpu in (Gpu((8, 0), 163 << 10, 108), Gpu((12, 0), 99 << 10, 170)):
            check_fitting(gpu)

    check()
    with rewrites.rewritten(rewrites.Rewrite("plans.fitting", *MUTANTS[name])), pytest.raises(AssertionError):
        check()
