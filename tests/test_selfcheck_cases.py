"""The cases of the doctor's self-check: each has recorded bits, and on every GPU they reach every kind of kernel."""

from __future__ import annotations

from pallas_norm import _golden, _selfcheck
from pallas_norm.plans.fitting import forward_plan_on
from pallas_norm.plans.forward import TABLE
from pallas_norm.plans.hardware import H200, Gpu
from pallas_norm.plans.plan import Source
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import golden


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
    plans = [plan_for(case.n, case.dtype) for case in cases]
    reached = {(plan.regime, plan.warpgroups, plan.cluster, plan.source) for plan in plans}
    assert reached >= {(row.regime, row.warpgroups, row.cluster, row.source) for row in TABLE}
    for dtype in _golden.DTYPES:
        backward = [backward_plan_for(case.n, case.dtype) for case in cases if case.dtype == dtype]
        assert {plan.source for plan in backward} == set(Source)
    assert all(case.rows > plan.block for case, plan in zip(cases, plans, strict=True))


def test_before_hopper_the_cases_are_those_that_have_a_kernel_there() -> None:
    a100 = Gpu((8, 0), 166912, 108)
    cases = _selfcheck.kernel_cases(a100)
    plans = [forward_plan_on(a100, case.n, case.dtype) for case in cases]  # raises where there is none
    assert {plan.source for plan in plans} == {Source.REGISTERS, Source.MEMORY}
    assert {(case.n, case.dtype) for case in cases} >= {(128, "float16"), (4096, "bfloat16"), (32760, "bfloat16")}
    assert max(case.n for case in cases) == 65528
