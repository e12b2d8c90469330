"""The cases of the doctor's self-check: each has recorded bits, and on every GPU they reach every kind of kernel."""

from __future__ import annotations

import pytest

from pallas_norm import _golden, _selfcheck
from pallas_norm.plans import few_rows
from pallas_norm.plans.fitting import Misfit, forward_plan_on
from pallas_norm.plans.forward import TABLE
from pallas_norm.plans.hardware import H200, Gpu
from pallas_norm.plans.plan import Plan, Source
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import golden

A100 = Gpu((8, 0), 166912, 108)
GPUS = (H200, A100, Gpu((10, 0), 232448, 148), Gpu((12, 0), 101376, 128))


def owner(plan: Plan | None) -> tuple[object, ...]:
    assert plan is not None
    return plan.regime, plan.warpgroups, plan.cluster, plan.source


def many_on(gpu: Gpu, n: int, dtype: str) -> Plan | None:
    try:
        return forward_plan_on(gpu, n, dtype)
    except Misfit:
        return None


def test_every_case_of_every_gpu_has_recorded_bits() -> None:
    gpus = [H200, *(Gpu(capability, 101376, 128) for capability in ((8, 0), (8, 6), (8, 9), (10, 0), (12, 0)))]
    cases = {
        *_selfcheck.XLA_CASES,
        *_golden.WITHOUT_KERNEL,
        *(case for gpu in gpus for case in _selfcheck.kernel_cases(gpu)),
    }
    assert cases <= set(golden.OF_DOCTOR)
    assert list(golden.DOCTOR.read()) == [str(case) for case in golden.OF_DOCTOR]


def test_the_cases_reach_every_row_of_the_table_and_every_source() -> None:
    cases = _selfcheck.kernel_cases()
    plans = [_selfcheck.forward_plan_of(case) for case in cases]
    assert {owner(plan) for plan in plans} >= {(row.regime, row.warpgroups, row.cluster, row.source) for row in TABLE}
    for dtype in _golden.DTYPES:
        backward = [backward_plan_for(case.n, case.dtype) for case in cases if case.dtype == dtype]
        assert {plan.source for plan in backward} == set(Source)
    many = (plan_for(case.n, case.dtype) for case in cases)
    assert all(case.rows > plan.block for case, plan, its in zip(cases, plans, many, strict=True) if plan == its)


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu.capability))
@pytest.mark.parametrize("dtype", _golden.DTYPES)
def test_the_cases_reach_every_plan_for_many_rows(gpu: Gpu, dtype: str) -> None:
    """Of each kind that a length has; not by rows that take another plan."""
    plans = {n: many_on(gpu, n, dtype) for n in _golden.LENGTHS}
    cases = [case for case in _selfcheck.kernel_cases(gpu) if case.dtype == dtype]
    reached = {owner(plans[case.n]) for case in cases if _selfcheck.forward_plan_of(case, gpu) == plans[case.n]}
    assert reached == {owner(plan) for plan in plans.values() if plan is not None}


@pytest.mark.parametrize("gpu", GPUS, ids=lambda gpu: str(gpu.capability))
@pytest.mark.parametrize("dtype", _golden.DTYPES)
def test_the_cases_reach_every_plan_for_few_rows(gpu: Gpu, dtype: str) -> None:
    itemsize, reached = _golden.DTYPES[dtype].itemsize, set[few_rows.FewRows]()
    for case in (case for case in _selfcheck.kernel_cases(gpu) if case.dtype == dtype):
        many = forward_plan_on(gpu, case.n, dtype)
        few, row = few_rows.of(many, itemsize, gpu), few_rows.choice(many, itemsize)
        if few is not None and row is not None and case.rows <= row.most:
            assert _selfcheck.forward_plan_of(case, gpu) == few[1]
            reached.add(row)
    wanted = {row for row in few_rows.TABLE if row.itemsize == itemsize and (gpu.clusters or row.cluster == 1)}
    assert reached == wanted
    assert wanted or dtype == "float32"


@pytest.mark.parametrize("dtype", _golden.DTYPES)
def test_a_length_that_has_two_schedules_has_a_case_of_each(dtype: str) -> None:
    itemsize = _golden.DTYPES[dtype].itemsize
    for n in _golden.LENGTHS:
        few = few_rows.of(forward_plan_on(H200, n, dtype), itemsize, H200)
        if few is not None:
            assert {case.rows <= few[0] for case in _golden.cases(n, dtype)} == {True, False}


def test_a_line_names_the_kernel_of_its_rows() -> None:
    few, many = _golden.cases(16384, "bfloat16")
    assert [_selfcheck.shape_of(case) for case in (few, many, _golden.LARGE)] == [
        "n = 16384",
        "65 x 16384",
        "4096 x 1024",
    ]
    assert _selfcheck.kind_of(few) == "cta, 1 warpgroup in each of 4 CTAs"
    assert _selfcheck.kind_of(many) == _selfcheck.kind_of(few, A100) == "cta, 2 warpgroups"
    assert [_selfcheck.kind_of(case) for case in _golden.cases(4096, "float16")] == [
        "cta, 1 warpgroup",
        "cta, 2 warpgroups",
    ]


def test_before_hopper_the_cases_are_those_that_have_a_kernel_there() -> None:
    cases = _selfcheck.kernel_cases(A100)
    plans = [forward_plan_on(A100, case.n, case.dtype) for case in cases]  # raises where there is none
    assert {plan.source for plan in plans} == {Source.REGISTERS, Source.MEMORY}
    assert {(case.n, case.dtype) for case in cases} >= {(128, "float16"), (4096, "bfloat16"), (32760, "bfloat16")}
    assert max(case.n for case in cases) == 65528
