"""Every way to cover a row, forced onto the same rows: the same roundings, and sums within the bounds of its own plan.

Property 15. Which plan the tables choose is a matter of speed, never of what is computed.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import _dispatch
from pallas_norm._spec import Spec
from pallas_norm.kernels import backward as backward_kernel
from pallas_norm.kernels import forward as forward_kernel
from pallas_norm.plans.backward_staged import PIPELINES, SMALLEST_PIPELINE
from pallas_norm.plans.forward import TABLE
from pallas_norm.plans.hardware import WARPS
from pallas_norm.plans.lengths import LARGEST_N, SMALLEST_N
from pallas_norm.plans.plan import BackwardPlan, Plan, Regime, Source, pipeline_tile
from pallas_norm.plans.vectors import NARROW
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import oracle, specified, test_backward_properties, test_forward_properties
from tests.oracle import DTYPES, F32
from tests.strategies import Case

# n: a multiple of every vector; an odd multiple of 8; odd. The last leaves lanes and chunks that overlap.
WIDTHS = (1024, 1000, 1025)
EPS = 0.37


def vectors(n: int, dtype: str) -> list[int]:
    return [vec for vec in (8, 4, 2, 1) if n % vec == 0 and vec * DTYPES[dtype].itemsize <= 16]


def forward_plans(n: int, dtype: str) -> dict[str, Plan]:
    widest = vectors(n, dtype)[0]
    in_warps = {
        f"warp of {lanes} lanes": Plan(n, Regime.WARP, widest, lanes, WARPS * (32 // lanes))
        for lanes in (4, 8, 16, 32)
        if n <= 40 * lanes * widest
    }
    narrow = {f"vectors of {vec}": Plan(n, Regime.WARP, vec, 32, WARPS) for vec in vectors(n, dtype) if vec != widest}
    shared = {
        f"{warpgroups} warpgroups, cluster of {cluster}": Plan(
            n, Regime.CTA, min(widest, 2), warpgroups=warpgroups, cluster=cluster
        )
        for warpgroups, cluster in ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (1, 4), (2, 4), (1, 8))
    }
    alone = Plan(n, Regime.CTA, min(widest, 2))
    twice = {
        "read twice": dataclasses.replace(alone, source=Source.MEMORY),
        "shared and read twice": dataclasses.replace(alone, source=Source.MEMORY, warpgroups=2),
    }
    plans = {"the table's": plan_for(n, DTYPES[dtype])} | in_warps | narrow | shared | twice
    return {name: plan for name, plan in plans.items() if plan.width <= n}  # as an order's is


def backward_plans(n: int, dtype: str) -> dict[str, BackwardPlan]:
    widest = vectors(n, dtype)[0]
    lanes = 32 if n > 32 * widest else 4
    in_warps = {
        f"warps, {source.value}": BackwardPlan(n, Regime.WARP, widest, lanes, WARPS * (32 // lanes), source=source)
        for source in (Source.REGISTERS, Source.MEMORY)
    }
    sources = [Source.REGISTERS, Source.MEMORY]
    if pipeline_tile(n, DTYPES[dtype].itemsize) is not None:
        sources.append(Source.PIPELINE)
    shared = {
        f"{warpgroups} warpgroups, cluster of {cluster}, {source.value}": BackwardPlan(
            n,
            Regime.CTA,
            min(widest, 2),
            warpgroups=warpgroups,
            cluster=cluster,
            source=source,
            stages=3 if source is Source.PIPELINE else 0,
        )
        for warpgroups, cluster in ((1, 1), (2, 1), (4, 1), (2, 2))
        for source in sources
        if cluster == 1 or source is Source.MEMORY
    }
    read_again = dataclasses.replace(shared["2 warpgroups, cluster of 1, memory"], keeps_weight=False)
    plans = in_warps | shared | {"weight read for every row": read_again}
    plans |= {"the table's": backward_plan_for(n, DTYPES[dtype])}
    # Few programs, so that each takes several rows.
    return {name: dataclasses.replace(plan, programs=2) for name, plan in plans.items() if plan.width <= n}


PUSHED = {  # of the interpreted plans, those that every push runs: one for each way to share or to read a row
    *("the table's", "warp of 8 lanes", "warp of 32 lanes", "vectors of 1", "read twice", "shared and read twice"),
    *("2 warpgroups, cluster of 1", "2 warpgroups, cluster of 2", "warps, registers", "weight read for every row"),
    *(f"1 warpgroups, cluster of 1, {source}" for source in ("registers", "memory")),
    *(f"2 warpgroups, cluster of {cluster}, {source}" for cluster, source in ((1, "pipeline"), (2, "memory"))),
}


def parameters(plans: Any) -> list[Any]:
    """(path, n, name)"""
    found = []
    for n in WIDTHS:
        for name in plans(n, "bf16"):
            pushed = name in PUSHED and (n == WIDTHS[0] or name == "2 warpgroups, cluster of 1")
            for path, marks in (
                ("interpret", [] if pushed else [pytest.mark.nightly]),
                ("mosaic_gpu", [pytest.mark.gpu]),
            ):
                found.append(pytest.param(path, n, name, id=f"{path}-{n}-{name}", marks=marks))
    return found


def on_device(operands: dict[str, Any]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(value) for name, value in operands.items()}


@pytest.mark.sampled(10)
@pytest.mark.parametrize(("path", "n", "name"), parameters(forward_plans))
def test_every_forward_plan_adds_in_its_order(path: str, n: int, name: str) -> None:
    plan = forward_plans(n, "bf16")[name]
    case = Case(n, plan.block + 2, "bf16", "bf16", "wide", seed=n)
    x, weight = case.x(), case.weight()
    kernel = functools.partial(
        forward_kernel.forward, plan=plan, spec=Spec(eps=EPS), with_rstd=True, interpret=path == "interpret"
    )
    results = jax.jit(kernel)(on_device({"x": x, "weight": weight}))
    y, rstd = specified.forward(x, weight, EPS, width=plan.width)
    oracle.assert_same(results["rstd"], rstd)
    oracle.assert_same(results["y"], y)


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("path", "n", "name"), parameters(backward_plans))
def test_every_backward_plan_gives_gradients_within_its_bounds(path: str, n: int, name: str) -> None:
    plan = backward_plans(n, "bf16")[name]
    case = Case(n, 3 * plan.block + 2, "bf16", "f32", "normal", seed=n)
    kernel = jax.jit(
        functools.partial(
            backward_kernel.backward, plan=plan, spec=Spec(), with_dweight=True, interpret=path == "interpret"
        )
    )
    for exact in (True,) if path == "interpret" else (True, False):
        x, weight, dy = case.exact() if exact else (case.x(), case.weight(), case.dy(F32))
        rstd = oracle.rstd64(x, 0.0).astype(F32)
        results = kernel(on_device({"x": x, "weight": weight, "dy": dy, "rstd": rstd}))
        dx, dweight = np.asarray(results["dx"]), np.asarray(results["dweight"])
        oracle.assert_same(dx, specified.input_gradient(x, weight, rstd, dy, width=plan.width))
        oracle.assert_within(dweight, *oracle.weight_gradient64(x, rstd, dy, F32))
        if exact:
            oracle.assert_same(dweight + 0, (x.astype(F32) * dy).sum(axis=0) + 0)


# --- the plan never depends on the number of rows -------------------------------------------------------------------


@pytest.mark.sampled(4)
@pytest.mark.parametrize("n", [128, 1000, 2048, 65536])
def test_every_number_of_rows_takes_the_same_plan(monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """The kernels' own arguments, of whole calls."""
    seen: list[Plan] = []

    def recording(kernel: Any) -> Any:
        def call(operands: Any, *, plan: Plan, **options: Any) -> Any:
            seen.append(plan)
            return kernel(operands, plan=plan, **options)

        return call

    monkeypatch.setattr(_dispatch.forward_kernel, "forward", recording(forward_kernel.forward))
    monkeypatch.setattr(_dispatch.backward_kernel, "backward", recording(backward_kernel.backward))
    weight = jax.ShapeDtypeStruct((n,), jnp.bfloat16)

    def gradient(x: Any, weight: Any) -> Any:
        return jax.vjp(functools.partial(pallas_norm.rms_norm, implementation="interpret"), x, weight)[1](x)

    rows = (1, 2, 3, 7, 8, 33, 1000, 100_000)
    for count in rows:
        jax.eval_shape(lambda x, w: gradient(x, w), jax.ShapeDtypeStruct((count, n), jnp.bfloat16), weight)
    assert len(seen) >= 2 * len(rows)
    assert set(seen) == {plan_for(n, "bfloat16"), backward_plan_for(n, "bfloat16")}


# --- n at every limit of the tables ---------------------------------------------------------------------------------

LIMITS = {
    SMALLEST_N,
    256,
    SMALLEST_PIPELINE,
    4096,
    8192,
    *(row.largest_n for row in (*TABLE, *NARROW)),
    *(row.largest_row_bytes // size for row in TABLE for size in (2, 4) if row.largest_row_bytes // size <= LARGEST_N),
    *(row.largest_row_bytes // size for row in PIPELINES for size in (2, 4)),
}
NEAR = sorted({limit + step for limit in LIMITS for step in (-1, 0, 1)})
WITH_KERNEL = [n for n in NEAR if SMALLEST_N <= n <= LARGEST_N]


def check_limit(implementation: str, n: int, dtype: str) -> None:
    case = Case(n, 2, dtype, dtype, "normal", seed=n, eps=0.5)
    test_forward_properties.check_integers(case, implementation)
    test_backward_properties.check_exact(case, implementation)


@pytest.mark.sampled(37)
@pytest.mark.parametrize("n", NEAR)
def test_around_every_limit_of_the_tables_the_compiled_specification_is_right(n: int) -> None:
    check_limit("xla", n, "bf16")


PUSHED_WIDTHS = (32, 33, 1023, 1024, 1025)  # both regimes; the interpreter takes long for long rows


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    "n",
    [pytest.param(n, marks=[] if n in PUSHED_WIDTHS else pytest.mark.nightly) for n in WITH_KERNEL if n <= 32769],
)
def test_around_every_limit_of_the_tables_the_interpreted_kernels_are_right(n: int) -> None:
    check_limit("interpret", n, "bf16")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", WITH_KERNEL)
def test_around_every_limit_of_the_tables_the_kernels_are_right(n: int, dtype: str) -> None:
    test_forward_properties.check(Case(n, 2, dtype, dtype, "normal", seed=n, eps=0.5), "mosaic_gpu")
    check_limit("mosaic_gpu", n, dtype)


def test_every_limit_is_one_at_which_a_plan_changes_or_the_kernels_end() -> None:
    def kind(n: int) -> Any:
        if not SMALLEST_N <= n <= LARGEST_N:
            return None
        plans = (
            plan_for(n, "bfloat16"),
            plan_for(n, "float32"),
            *(backward_plan_for(n, dtype) for dtype in ("bfloat16", "float32")),
        )
        return [(plan.regime, plan.workers, plan.block, getattr(plan, "programs", 0), plan.vec) for plan in plans]

    for limit in LIMITS:
        assert len({str(kind(n)) for n in (limit - 1, limit, limit + 1)}) > 1, limit
