"""The oracle itself: its comparison, its roundings, its bounds, and that wrong kernels do not pass it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from pallas_norm.plans.backward import backward_order
from pallas_norm.plans.forward import forward_order
from pallas_norm.plans.hardware import WARPS
from pallas_norm.plans.plan import Regime
from pallas_norm.regimes import backward_plan_for, plan_for
from tests import oracle, strategies
from tests.oracle import BF16, DTYPES, F16, F32, Array


@pytest.mark.parametrize("dtype", DTYPES)
def test_comparison_sees_signs_of_zeros_and_nan_by_position(dtype: str) -> None:
    values = np.array([0.0, -0.0, np.nan, 1.0], F32).astype(DTYPES[dtype])
    negative_nan = -values
    assert oracle.same(values, negative_nan).tolist() == [False, False, True, False]
    assert oracle.same(values, values[[0, 1, 3, 2]]).tolist() == [True, True, False, False]
    with pytest.raises(AssertionError, match="1 of 4 differ"):
        oracle.assert_same(values, values[[0, 0, 2, 3]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_distance_counts_representable_numbers(dtype: str) -> None:
    one = np.array([1.0], F32).astype(DTYPES[dtype])
    above = (oracle.bits(one) + 1).view(one.dtype)
    assert oracle.ulps(above, one) == 1
    assert oracle.ulps(-above, -one) == -1
    assert oracle.ulps(-one * 0, one * 0) == 0
    assert oracle.ulps(one * np.nan, one * np.nan) == 0
    assert oracle.ulps(one * np.nan, one) == oracle.UNCOMPARABLE
    assert float(above[0]) - 1 == oracle.spacing(np.array([1.0]), one.dtype)
    smallest = np.array([1], oracle.bits(one).dtype).view(one.dtype)
    assert oracle.spacing(np.array([0.0]), one.dtype) == float(smallest[0])


@pytest.mark.parametrize("kind", [BF16, F16], ids=str)
def test_rounding_is_to_nearest_even(kind: np.dtype) -> None:
    rng = np.random.default_rng(0)
    wide = np.concatenate([rng.integers(0, 1 << 32, 100_000, dtype=np.uint32).view(F32), np.arange(0, 2, 2.0**-9, F32)])
    wide = wide[np.isfinite(wide) & (np.abs(wide) < 6e4)]
    step = oracle.spacing(wide.astype(np.float64), kind)
    nearest = np.rint(wide.astype(np.float64) / step) * step  # rint takes the even one
    assert (oracle.round_to(wide, kind).astype(np.float64) == nearest).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_plan_depth_counts_every_addition_of_its_longest_path(dtype: str) -> None:
    """From the description of the plan, counted anew: in a lane, over lanes, warps, warpgroups and CTAs."""
    for n in (*strategies.WIDTHS, *strategies.SHARED, *strategies.WIDE):
        for plan in (plan_for(n, DTYPES[dtype]), backward_plan_for(n, DTYPES[dtype])):
            of_a_lane = plan.blocks - 1 + int(np.log2(plan.vec))
            of_lanes = int(np.log2(plan.lanes))
            of_warps = int(np.log2(WARPS * plan.workers)) if plan.regime is Regime.CTA else 0
            assert plan.width * plan.blocks - plan.overlap == n
            assert of_a_lane + of_lanes + of_warps == plan.depth


def test_float64_gradients_agree_with_differences_of_the_float64_norm() -> None:
    """Guards against one wrong formula in both places."""
    rng = np.random.default_rng(0)
    x, dy, dx_direction = (rng.standard_normal((3, 40)).astype(F32) for _ in range(3))
    weight, eps, step = strategies.weights(rng, 40, "f32"), 1e-2, 1e-5

    def loss(x64: Array, weight64: Array) -> float:
        rstd = 1 / np.sqrt(np.mean(np.square(x64), axis=-1, keepdims=True) + np.float64(F32.type(eps)))
        return float(np.sum(dy.astype(np.float64) * x64 * rstd * weight64))

    rstd = oracle.rstd64(x, eps)
    dx, _ = oracle.input_gradient64(x, weight, rstd, dy, 0)
    dweight, _ = oracle.weight_gradient64(x, rstd, dy, F32)
    x64, weight64, direction = (value.astype(np.float64) for value in (x, weight, dx_direction))
    along_x = (loss(x64 + step * direction, weight64) - loss(x64 - step * direction, weight64)) / (2 * step)
    along_weight = (loss(x64, weight64 + step) - loss(x64, weight64 - step)) / (2 * step)
    # g and unit are rounded to float32 in the oracle, as the specification has it.
    assert abs(along_x - np.sum(dx * direction)) < 1e-6 * np.sum(np.abs(dx * direction))
    assert abs(along_weight - dweight.sum()) < 1e-6 * np.abs(dweight).sum()


def draw(n: int = 1000, dtype: str = "bf16") -> tuple[Array, Array, Array, Array]:
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((8, n)).astype(DTYPES[dtype]) for _ in range(2))
    return x, strategies.weights(rng, n, dtype), dy, oracle.rstd64(x, 1e-6).astype(F32)


def test_one_rounding_instead_of_two_changes_a_quarter_of_the_outputs_and_no_more_than_a_unit() -> None:
    x, weight, _, rstd = draw()
    twice = oracle.replay(x, weight, rstd)
    once = oracle.replay(x, weight, rstd, cast_before_scale=False)
    assert 0.2 < 1 - oracle.same(once, twice).mean() < 0.3
    assert np.abs(oracle.ulps(once, twice)).max() == 1


WRONG_RSTD = {
    "mean over the width padded to 32": lambda x: np.sqrt(x.shape[1] / 1024),
    "mean over n - 1": lambda x: np.sqrt(1 - 1 / x.shape[1]),
    "eps of 1e-5": lambda x: 1 / np.sqrt(1 + 9e-6),
    "rounded to the dtype of x": lambda x: 1 + 2.0**-9,
}


@pytest.mark.parametrize("name", WRONG_RSTD)
def test_a_wrong_rstd_is_outside_its_bound(name: str) -> None:
    x, _, _, rstd = draw(1023)
    bound = oracle.rstd_bound(forward_order(1023, x.dtype).depth)
    assert oracle.rstd_error(rstd, x, 1e-6).max() <= 1
    assert oracle.rstd_error(rstd * F32.type(WRONG_RSTD[name](x)), x, 1e-6).max() > bound


@pytest.mark.parametrize("flushes", [False, True])
def test_every_order_of_the_sum_is_in_the_interval_of_rstd_from_underflow_to_overflow(flushes: bool) -> None:  # noqa: FBT001
    """Serial, reversed and in pairs; correctly rounded division and root. And the interval is a few units wide."""
    rng = np.random.default_rng(0)
    binades = 2.0 ** np.arange(-80, 70)[:, None]
    x = oracle.flushed((rng.standard_normal((len(binades), 65)) * binades).astype(F32), flushes=flushes)
    for eps in (0.0, 1e-6):
        with np.errstate(all="ignore"):
            squares = oracle.flushed(x * x, flushes=flushes)
            serial = np.add.accumulate(squares, axis=1, dtype=F32)[:, -1]
            reverse = np.add.accumulate(squares[:, ::-1], axis=1, dtype=F32)[:, -1]
            for total in (serial, reverse, np.sum(squares, axis=1, dtype=F32)):
                mean = oracle.flushed(total / F32.type(65), flushes=flushes) + F32.type(eps)
                oracle.assert_rstd(1 / np.sqrt(mean), x, eps, 65, flushes=flushes)
        low, high = oracle.rstd_interval(x, eps, 65, flushes=flushes)
        normal = oracle.judged(x, eps)
        assert (high - low < 2e-5 * low)[normal].all()
        assert normal.sum() > 100


def test_rstd_of_rows_that_no_relative_bound_judges_is_judged_too() -> None:
    x = np.array([[3e38], [np.inf], [np.nan], [0.0], [0.0]], F32)
    for row, right, eps, wrongs in (
        (0, 0.0, 1e-6, (1.0, 1e-30, np.nan)),
        (1, 0.0, 1e-6, (1.0, np.nan)),
        (2, np.nan, 1e-6, (0.0, 1.0)),
        (3, 1e3, 1e-6, (1.001e3, np.inf)),
        (4, np.inf, 0.0, (1e30, np.nan)),
    ):
        oracle.assert_rstd(np.array([right], F32), x[row : row + 1], eps, 1)
        for wrong in wrongs:
            with pytest.raises(AssertionError, match="rstd of row 0"):
                oracle.assert_rstd(np.array([wrong], F32), x[row : row + 1], eps, 1)


def wrong_dx(name: str, x: Array, weight: Array, rstd: Array, dy: Array) -> Array:
    g = dy.astype(F32) * weight.astype(F32)
    if name != "g is not rounded":
        g = g.astype(x.dtype).astype(F32)
    unit = x.astype(F32) * rstd[:, None]
    if name == "the rounded unit is projected":
        unit = unit.astype(x.dtype).astype(F32)
    mean = np.mean((dy.astype(F32) if name == "no weight in the projection" else g) * unit, axis=1, keepdims=True)
    mean = {"no projection": 0 * mean, "mean over n + 24": mean * F32.type(1000 / 1024)}.get(name, mean)
    power = rstd[:, None] ** (2 if name == "rstd squared" else 1)
    return (power * (g - unit * mean)).astype(x.dtype)


@pytest.mark.parametrize(
    "name",
    [
        "g is not rounded",
        "the rounded unit is projected",
        "no weight in the projection",
        "no projection",
        "mean over n + 24",
        "rstd squared",
    ],
)
def test_a_wrong_dx_is_outside_its_bound(name: str) -> None:
    x, weight, dy, rstd = draw()
    x = (4 * x.astype(F32)).astype(x.dtype)
    dy = (x.astype(F32) / 2 + dy.astype(F32)).astype(x.dtype)  # a projection that matters
    rstd = oracle.rstd64(x, 1e-6).astype(F32)
    additions = backward_order(1000, x.dtype).depth
    bounds = oracle.input_gradient64(x, weight, rstd, dy, additions)
    oracle.assert_within(wrong_dx("right", x, weight, rstd, dy), *bounds)
    with pytest.raises(AssertionError, match="outside the bound"):
        oracle.assert_within(wrong_dx(name, x, weight, rstd, dy), *bounds)


def test_a_dweight_added_up_in_bfloat16_or_of_an_unrounded_unit_is_outside_its_bound() -> None:
    x, _, dy, rstd = draw()
    terms = dy.astype(F32) * oracle.unit(x, rstd)
    bounds = oracle.weight_gradient64(x, rstd, dy, F32)
    oracle.assert_within(terms.sum(axis=0), *bounds)
    narrow = terms.astype(BF16).sum(axis=0).astype(F32)
    unrounded = (dy.astype(F32) * oracle.unit(x, rstd, cast_before_scale=False)).sum(axis=0)
    for wrong in (narrow, unrounded, terms[:-1].sum(axis=0)):
        with pytest.raises(AssertionError, match="outside the bound"):
            oracle.assert_within(wrong, *bounds)


@pytest.mark.parametrize("values", strategies.VALUES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_regime_of_values_gives_what_its_name_says(dtype: str, values: str) -> None:
    x = strategies.numbers(np.random.default_rng(0), (16, 64), dtype, values)
    assert x.dtype == DTYPES[dtype]
    assert len(np.unique(oracle.bits(x))) > 1
    if values in strategies.FINITE:
        assert oracle.judged(x, 1e-6).all()
    if values == "special":
        assert not np.isfinite(x.astype(F32)).all()
    if values == "subnormal":
        assert (np.abs(x.astype(np.float64)) < {"bf16": 2.0**-126, "f16": 2.0**-14, "f32": 2.0**-126}[dtype]).all()


def test_cases_are_rebuilt_from_their_seed() -> None:
    case = strategies.Case(64, 3, "bf16", "f32", "normal", seed=5)
    again = dataclasses.replace(case)
    oracle.assert_same(case.x(), again.x())
    oracle.assert_same(case.weight(), again.weight())
    assert not oracle.same(case.x(), dataclasses.replace(case, seed=6).x()).all()
