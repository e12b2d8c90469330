"""One row length of each plan that the kernels of a form have, or of each kind of plan."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

from pallas_norm.plans import few_rows
from pallas_norm.plans.fitting import Misfit
from pallas_norm.plans.hardware import H200
from pallas_norm.plans.lengths import LARGEST_N, SMALLEST_N
from pallas_norm.plans.plan import BackwardPlan, Plan
from pallas_norm.plans.rope import rope_backward_plan_on, rope_plan_on
from pallas_norm.regimes import backward_plan_for, plan_for

Plans = tuple[Plan, ...]
Planned = Callable[[int, str], Plans]  # the plans of the kernels that a form has, for rows of so many elements


def plain(n: int, dtype: str) -> Plans:
    return plan_for(n, dtype), backward_plan_for(n, dtype)


def of_one_row(n: int, dtype: str) -> Plans:
    itemsize = 4 if dtype == "float32" else 2
    return few_rows.schedule(plan_for(n, dtype), itemsize, H200, (1,)), backward_plan_for(n, dtype)


def added(n: int, dtype: str) -> Plans:
    return plan_for(n, dtype, residual=True), backward_plan_for(n, dtype, residual=True)


def with_and_without(n: int, dtype: str) -> Plans:
    return *plain(n, dtype), *added(n, dtype)


def wide_dy(n: int, dtype: str) -> Plans:
    return plan_for(n, dtype), backward_plan_for(n, dtype, dy_dtype="float32")


def wide_stream(n: int, dtype: str) -> Plans:
    return plan_for(n, "float32", residual=True, read=(dtype, "float32")), backward_plan_for(
        n, "float32", residual=True
    )


def forward_only(n: int, dtype: str) -> Plans:
    return plan_for(n, dtype), plan_for(n, dtype, residual=True)


def of_heads(n: int, dtype: str) -> Plans:
    try:
        return (rope_plan_on(H200, n, dtype),)
    except Misfit:
        return ()


def of_gradients(n: int, dtype: str) -> Plans:
    try:
        return (rope_backward_plan_on(H200, n, dtype, dy_dtype=dtype),)
    except Misfit:
        return ()


def numbers(plan: Plan) -> tuple[Any, ...]:
    """What n alone does not give: rows with the same numbers differ in constants and in repetitions."""
    return NUMBERS[type(plan)](plan), plan.overlap > 0


NUMBERS = {
    kind: operator.attrgetter(*(field.name for field in dataclasses.fields(kind) if field.name != "n"))
    for kind in (Plan, BackwardPlan)
}


def kind(plan: Plan) -> tuple[Any, ...]:
    """What decides which statements a kernel has."""
    shared = plan.warpgroups > 1, plan.cluster > 1
    kept = plan.rows_in_registers, getattr(plan, "keeps_weight", None)
    return plan.regime, *shared, plan.block > 1, plan.overlap > 0, plan.source, *kept


@functools.cache
def of(planned: Planned, dtype: str, told_apart: Callable[[Plan], tuple[Any, ...]]) -> list[int]:
    """The smallest row length of each plan, or kind of plan."""
    seen: set[tuple[Any, ...]] = set()
    found: list[int] = []
    for n in range(SMALLEST_N, LARGEST_N + 1):
        keys = {(place, *told_apart(plan)) for place, plan in enumerate(planned(n, dtype))}
        if not keys <= seen:
            found.append(n)
            seen |= keys
    return found
