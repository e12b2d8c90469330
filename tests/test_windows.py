"""Rows that lie inside larger arrays full of NaN: the same bits, and nothing outside the window is read or written.

Property 21. In the interpreter every array of a kernel, parts and outputs as well, gets a margin of one element on each
side. Of the compiled programs the operands are slices, and the results go into a window of a donated array.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import pallas_norm
from pallas_norm._spec import Spec
from pallas_norm.kernels import mosaic
from pallas_norm.plans.plan import BackwardPlan, Plan, Regime, Source
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import oracle, rewrites, specified
from tests.oracle import BF16, DTYPES, F32, Array
from tests.rewrites import Rewrite
from tests.strategies import numbers, weights

# --- a margin around every array of an interpreted kernel -----------------------------------------------------------


def inside(shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(1, 1 + size) for size in shape)


@pytest.fixture
def margins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Array]]:
    """The outputs of every kernel, margins included: NaN, as is in the interpreter what nobody has written. The inputs'
    margins are large numbers, which show in a sum, and in the result of a row that is none."""
    written: list[Array] = []
    kernel = mosaic.kernel

    def with_margins(body: Callable[..., None], *, out_type: Any, **options: Any) -> Callable[..., Any]:
        several = isinstance(out_type, tuple)
        results = out_type if several else (out_type,)

        def call(*inputs: jax.Array) -> Any:
            shapes = [value.shape for value in (*inputs, *results)]

            def in_windows(*refs: Any) -> None:
                windows = [
                    ref.at[tuple(pl.ds(1, size) for size in shape)] for ref, shape in zip(refs, shapes, strict=False)
                ]
                body(*windows, *refs[len(shapes) :])  # scratch is as it was

            wider = tuple(
                jax.ShapeDtypeStruct(tuple(size + 2 for size in result.shape), result.dtype) for result in results
            )
            padded = [jnp.pad(value, 1, constant_values=1000) for value in inputs]
            whole = kernel(in_windows, out_type=wider, **options)(*padded)
            written.extend(map(np.asarray, whole))
            windows = tuple(value[inside(result.shape)] for value, result in zip(whole, results, strict=True))
            return windows if several else windows[0]

        return call

    monkeypatch.setattr(mosaic, "kernel", with_margins)
    yield written
    assert written, "no kernel ran"


def assert_margins_untouched(written: list[Array]) -> None:
    for value in written:
        margin = value.astype(F32)
        margin[tuple(slice(1, -1) for _ in value.shape)] = np.nan
        assert np.isnan(margin).all(), f"{(~np.isnan(margin)).sum()} elements beside an output of {value.shape}"


class Kernels(NamedTuple):
    """Plans of a row length, and rows that fill blocks and leave some over."""

    n: int
    rows: int
    warpgroups: int | None = None  # that share a row, whatever the tables say
    source: Source | None = None

    def plans(self) -> tuple[Plan, BackwardPlan]:
        plan, backward = plan_for(self.n, BF16), backward_plan_for(self.n, BF16, residual=True)
        if self.warpgroups is not None:
            shared = {"regime": Regime.CTA, "warpgroups": self.warpgroups, "lanes": 32, "block": 1, "vec": 4}
            plan, backward = dataclasses.replace(plan, **shared), dataclasses.replace(backward, **shared)
        return plan, dataclasses.replace(backward, source=self.source or backward.source)


KERNELS = {
    "rows in warps, one element a lane": Kernels(33, 6),
    "rows in warps": Kernels(128, 19),
    "rows in warps, read twice": Kernels(1000, 5),
    "a warpgroup, a pipeline": Kernels(2048, 5),
    "rows in warps, a pipeline": Kernels(512, 9),
    "chunks that overlap": Kernels(1344, 2),
    "two warpgroups, a pipeline": Kernels(1024, 2, warpgroups=2),
    "two warpgroups, chunks that overlap": Kernels(1344, 2, warpgroups=2, source=Source.MEMORY),
}


def run(kernels: Kernels) -> dict[str, Array]:
    """Forward with a residual, then backward with ds."""
    n, rows, *_ = kernels
    rng = np.random.default_rng(n)
    x, residual, dy, ds = (rng.standard_normal((rows, n)).astype(BF16) for _ in range(4))
    weight = weights(rng, n, "bf16")
    forward, backward = (sys.modules[f"pallas_norm.kernels.{name}"] for name in ("forward", "backward"))  # of a mutant
    plan, backward_plan = kernels.plans()
    options = {"spec": Spec(), "interpret": True}
    given = {"x": x, "residual": residual, "weight": weight}
    given = {name: jnp.asarray(value) for name, value in given.items()}
    results = forward.forward(given, plan=plan, with_rstd=True, **options)
    given = {"x": results["s"], "dy": dy, "weight": weight, "rstd": results["rstd"], "ds": ds}
    given = {name: jnp.asarray(value) for name, value in given.items()}
    results |= backward.backward(given, plan=backward_plan, with_dweight=True, **options)
    given = {"x": x, "residual": residual, "weight": weight, "dy": dy, "ds": ds}
    return {name: np.asarray(value) for name, value in results.items()} | given


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", KERNELS)
def test_an_interpreted_kernel_keeps_to_its_window(margins: list[Array], name: str) -> None:
    results, (plan, backward_plan) = run(KERNELS[name]), KERNELS[name].plans()
    assert_margins_untouched(margins)
    s, weight, dy = oracle.add(results["x"], results["residual"]), results["weight"], results["dy"]
    y, rstd = specified.forward(s, weight, Spec().eps, width=plan.width)
    dx = specified.input_gradient(s, weight, rstd, dy, results["ds"], width=backward_plan.width)
    for found, value in {"s": s, "y": y, "rstd": rstd, "dx": dx}.items():
        oracle.assert_same(results[found], value)
    oracle.assert_within(results["dweight"], *oracle.weight_gradient64(s, rstd, dy, F32))


def test_the_kernels_above_are_of_every_kind() -> None:
    forward, backward = zip(*(kernels.plans() for kernels in KERNELS.values()), strict=True)
    assert {plan.source for plan in backward} == set(Source)
    assert {plan.regime for plan in forward} == {plan.regime for plan in backward} == set(Regime)
    for plans in (forward, backward):
        kinds = {(plan.regime, plan.workers > 1, plan.overlap > 0) for plan in plans}
        assert kinds >= {(Regime.CTA, shared, overlap) for shared in (False, True) for overlap in (False, True)}


COLUMN = "ref.at[self.row, pl.ds({}, self.plan.span)], chunk"
# Pallas itself refuses a start outside that it knows, so this one depends on the program.
UNKNOWN = 'start + 1 + 0 * lax.axis_index("program")'
LEFT_OVER = "program - extent.first_left + extent.blocks * plan.block"
ROW, WORKER = "return WarpgroupRow(plan, {}, interpret)", "(first + part) * self.plan.span{} for"
OUTSIDE = {
    "a column too far right": (
        Rewrite("block", COLUMN.format("start"), COLUMN.format(UNKNOWN)),
        "a warpgroup, a pipeline",
    ),
    "rows left over a row too low": (Rewrite("grid", LEFT_OVER, LEFT_OVER + " + 1"), "rows in warps"),
    "a row too low": (Rewrite("grid", ROW.format("index"), ROW.format("index + 1")), "chunks that overlap"),
    "a worker's chunks a column too far right": (
        Rewrite("cta", WORKER.format(""), WORKER.format(" + 1")),
        "two warpgroups, a pipeline",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OUTSIDE)
def test_a_kernel_that_leaves_its_window_is_seen(margins: list[Array], name: str) -> None:
    """By what it wrote, whatever it computed."""
    rewrite, kernels = OUTSIDE[name]
    with rewrites.rewritten(rewrite):
        run(KERNELS[kernels])
    with pytest.raises(AssertionError, match="elements beside an output"):
        assert_margins_untouched(margins)


# --- slices of arrays, in compiled programs ---------------------------------------------------------------------------

ROWS = 35  # a block and rows left over, of every width below


def columns(x: jax.Array, n: int, offset: int) -> jax.Array:
    return x[1 : 1 + ROWS, offset : offset + n]


SLICES: dict[str, tuple[Callable[[int], tuple[int, ...]], Callable[[jax.Array, int], jax.Array]]] = {
    "whole rows": (lambda n: (ROWS + 2, n), lambda x, n: x[1 : 1 + ROWS]),
    "columns from 1, an odd stride": (lambda n: (ROWS + 2, n + 3), functools.partial(columns, offset=1)),
    "columns from 8, an even stride": (lambda n: (ROWS + 2, n + 16), functools.partial(columns, offset=8)),
    "every second row": (lambda n: (2 * ROWS + 1, n), lambda x, n: x[1::2]),
    "an unaligned beginning": (lambda n: (ROWS * n + 9,), lambda x, n: x[7 : 7 + ROWS * n].reshape(ROWS, n)),
}


def window_of(shape: tuple[int, ...], of: Callable[[Array, int], Array], n: int) -> Array:
    """The indices, in the flat array, of what the slice takes."""
    return np.asarray(of(np.arange(np.prod(shape)).reshape(shape), n))


@pytest.mark.sampled(10)
@pytest.mark.parametrize(("n", "which"), list(zip(itertools.cycle((64, 200, 1000)), SLICES, strict=False)))
def test_a_slice_of_a_larger_array_gives_the_bits_of_the_slice_alone(implementation: str, n: int, which: str) -> None:
    """Of inputs whose sums are exact in any order, because XLA may choose another order for another program."""
    rng = np.random.default_rng(n)
    x = numbers(rng, (ROWS, n), "bf16", "powers")
    weight = (rng.choice([-1.0, 1.0], n) * 2.0 ** rng.integers(-2, 3, n)).astype(BF16)
    dy = rng.integers(-4, 5, (ROWS, n)).astype(BF16)
    shape, take = SLICES[which]
    at = window_of(shape(n), take, n)

    def placed(values: Array) -> Array:
        whole = np.full(np.prod(shape(n)), np.nan, values.dtype)
        whole[at] = values
        return whole.reshape(shape(n))

    def norm(x: Any, weight: Any, dy: Any) -> Any:
        call = functools.partial(pallas_norm.rms_norm, eps=0.0, implementation=implementation)
        y, pullback = jax.vjp(call, x, weight)
        return y, *pullback(dy)

    @functools.partial(jax.jit, donate_argnums=3)
    def sliced(x: Any, weight: Any, dy: Any, held: Any) -> Any:
        y, dx, dweight = norm(take(x, n), weight[3 : 3 + n], take(dy, n))
        indices = jnp.asarray(at)
        return held.reshape(-1).at[indices].set(y).reshape(held.shape), dx, dweight

    y, dx, dweight = map(np.asarray, jax.jit(norm)(x, weight, dy))
    oracle.assert_same(y, (x.astype(F32) * 2.0 ** -np.log2(np.abs(x.astype(F32))) * weight.astype(F32)).astype(BF16))
    held = np.full(shape(n), -7, BF16)
    padded = np.pad(weight, 3, constant_values=np.nan)
    whole, same_dx, same_dweight = map(np.asarray, sliced(placed(x), padded, placed(dy), jnp.asarray(held)))
    oracle.assert_same(whole.reshape(-1)[at], y)
    oracle.assert_same(np.delete(whole, at.reshape(-1)), np.full(whole.size - at.size, -7, BF16))
    oracle.assert_same(same_dx, dx)
    oracle.assert_same(same_dweight, dweight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [50, 128, 1000, 4096, 8193, 16384, 65536])
@pytest.mark.gpu
def test_rows_of_a_window_have_the_bits_of_the_rows_alone(n: int, dtype: str) -> None:
    """Of arbitrary numbers: in the compiled kernels a row's sum has one order."""
    rng = np.random.default_rng(n)
    x, weight = numbers(rng, (ROWS, n), dtype, "normal"), weights(rng, n, dtype)
    norm = functools.partial(pallas_norm.rms_norm, implementation="mosaic_gpu")
    y = np.asarray(jax.jit(norm)(x, weight))

    @functools.partial(jax.jit, donate_argnums=2)
    def in_a_window(x: Any, weight: Any, held: Any) -> Any:
        return jax.lax.dynamic_update_slice(held, norm(x[1:-1], weight), (1, 0))

    padded = np.pad(x, ((1, 1), (0, 0)), constant_values=np.nan)
    whole = np.asarray(in_a_window(padded, weight, jnp.full(padded.shape, -7, x.dtype)))
    oracle.assert_same(whole[1:-1], y)
    oracle.assert_same(whole[[0, -1]], np.full((2, n), -7, x.dtype))
