"""Few rows have a schedule of their own, with the order of additions, and so the bits, of the one for many."""

from __future__ import annotations

import functools
import itertools
import sys
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_norm import _dispatch, add_rms_norm, explain, rms_norm
from pallas_norm._spec import Spec
from pallas_norm.kernels import forward as forward_kernel
from pallas_norm.plans import few_rows
from pallas_norm.plans.fitting import forward_plan_on
from pallas_norm.plans.hardware import H200, Gpu
from pallas_norm.plans.plan import Plan
from pallas_norm.regimes import plan_for
from tests import rewrites
from tests.kernel_text import modules
from tests.rewrites import Rewrite
from tests.test_regimes import ALIGNED, FORWARD, WIDTHS, check

A100 = Gpu((8, 0), 163 << 10, 108)
SIZES = {"bfloat16": 2, "float32": 4}


def scheduled(n: int, dtype: str) -> tuple[Plan, int, Plan] | None:
    """(the plan, up to how many rows another one, that one)."""
    plan = plan_for(n, dtype)
    found = sys.modules["pallas_norm.plans.few_rows"].of(plan, SIZES[dtype], H200)
    return None if found is None else (plan, *found)


def check_all() -> list[Plan]:
    found: list[Plan] = []
    for n, dtype in itertools.product(sorted({*WIDTHS, *ALIGNED}), FORWARD):
        if (of_few := scheduled(n, dtype)) is not None:
            plan, most, few = of_few
            assert few.order == plan.order, (n, dtype)
            assert few != plan
            assert most >= 1
            check(few, SIZES[dtype], (n, dtype))
            found.append(few)
    return found


def test_they_add_up_a_row_in_the_same_order_and_read_every_column_once() -> None:
    found = check_all()
    shapes = {(plan.warpgroups, plan.cluster) for plan in found}
    assert shapes == {(row.warpgroups, row.cluster) for row in few_rows.TABLE}
    assert all(plan.chunks * plan.vec <= 64 for plan in found)  # elements of a lane: with more they spill


def test_a_schedule_with_other_columns_side_by_side_is_noticed() -> None:
    vector = Rewrite("plans.few_rows", "plan.width // _threads(row)", "plan.vec")
    with rewrites.rewritten(vector), pytest.raises(AssertionError):
        check_all()


@pytest.mark.parametrize("row", few_rows.TABLE, ids=lambda row: f"{row.largest_n}-{row.itemsize}")
def test_which_rows_are_few(row: few_rows.FewRows) -> None:
    n = row.largest_n // 8 * 8  # whose vectors are wide
    plan = plan_for(n, "bfloat16" if row.itemsize == 2 else "float32")
    batches = ((), (1,), (row.most,), (1, row.most), (row.most + 1,), (2, row.most))
    taken = [few_rows.schedule(plan, row.itemsize, H200, batch) for batch in batches]
    assert [few != plan for few in taken] == [True, True, True, True, False, False]
    assert {few.cluster for few in taken} == {plan.cluster, row.cluster}
    assert {few.block for few in taken} == {plan.block, 1}


def test_a_number_of_rows_that_is_not_known_yet_is_not_few() -> None:
    plan = plan_for(32768, "bfloat16")
    assert few_rows.schedule(plan, 2, H200, export.symbolic_shape("rows")) is plan


def test_a_gpu_without_clusters_has_the_schedules_of_one_cta_alone() -> None:
    for n in (4096, 16384, 32768):
        plan = forward_plan_on(A100, n, "bfloat16")
        assert (few_rows.of(plan, 2, A100) is not None) == (n == 4096)


def test_narrow_vectors_and_short_rows_of_a_warp_have_one_schedule() -> None:
    """Of 1022 elements a warp adds up 64 side by side, fewer than a CTA has lanes."""
    for n in (128, 512, 1022, 4100, 32766):
        assert few_rows.of(plan_for(n, "bfloat16"), 2, H200) is None


def test_a_plan_that_is_the_one_for_few_already_has_no_other() -> None:
    """torch would compile it twice, and `explain` tell of two. An RTX 50 has no room for the stages of this one."""
    gpu = Gpu((12, 0), 99 << 10, 170)
    plan = forward_plan_on(gpu, 131072, "float32")
    assert few_rows.of(plan, 4, gpu) is None


# --- in programs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize(("rows", "ctas"), [(64, 8), (65, 4)])
def test_the_kernel_of_a_program_is_that_of_its_rows(
    rows: int, ctas: int, monkeypatch: pytest.MonkeyPatch, *, add: bool
) -> None:
    lowered: list[Plan] = []

    def spy(*operands: Any, plan: Plan, **options: Any) -> Any:
        lowered.append(plan)
        return forward_kernel.forward(*operands, plan=plan, **options)

    monkeypatch.setattr(_dispatch, "forward_kernel", SimpleNamespace(forward=spy))
    x, weight = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((rows, 32768), (32768,)))
    function, operands = (add_rms_norm, (x, x, weight)) if add else (rms_norm, (x, weight))
    (_,) = modules(function, *operands)
    assert [plan.cluster for plan in lowered] == [ctas]
    path = explain(x)
    assert path.plan is not None
    assert path.plan.cluster == ctas
    assert "; up to 64 rows are shared by more warps, with the same bits" in path.why


@pytest.mark.sampled(2)
@pytest.mark.parametrize("n", [1000, 1640, 4096, *(pytest.param(n, marks=pytest.mark.slow) for n in (16384, 32768))])
def test_the_bits_are_those_of_the_plan_for_many(n: int) -> None:
    """In the interpreter, one of whose CTAs stands in for those of a cluster. 1000: many are rows of warps; as of 1640
    the last block overlaps."""
    of_few = scheduled(n, "bfloat16")
    assert of_few is not None
    many, most, few = of_few
    rows = min(most, 3)
    x = jax.random.normal(jax.random.key(n), (rows, n), jnp.bfloat16) * 3
    operands = {"x": x, "weight": jax.random.normal(jax.random.key(1), (n,), jnp.bfloat16)}
    options: dict[str, Any] = {"spec": Spec(), "with_rstd": True, "interpret": True}
    by_plan = [
        jax.jit(functools.partial(forward_kernel.forward, plan=plan, **options))(operands) for plan in (few, many)
    ]
    for name in ("y", "rstd"):
        assert np.array_equal(*(np.asarray(found[name]).view(np.uint8) for found in by_plan)), name
