"""Every mutant is killed by a property of the suite, and the right kernel by none. `-s` prints who killed whom."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests import mutants, oracle, rewrites
from tests.killers import ROWS, N, draw, killers, operands
from tests.oracle import BF16, F16, F32
from tests.strategies import Case

# --- forward --------------------------------------------------------------------------------------------------------


def replay(kernel: mutants.Forward) -> None:
    for dtype, weight_dtype in ((BF16, BF16), (F16, F16), (F32, F32), (BF16, F32)):
        x, weight = draw(1, dtype, 64, N), draw(2, weight_dtype, N, size=1.0)
        y, rstd = kernel(x, weight, 1e-6)
        oracle.assert_same(y, oracle.replay(x, weight, rstd))


def rstd_bound(kernel: mutants.Forward) -> None:
    for eps, size in ((1e-6, 1e-3), (0.37, 1.0), (0.0, 300.0), (1e-6, 3.0)):
        for dtype in (BF16, F16, F32):
            x = draw(3, dtype, 32, N, size=size)
            _, rstd = kernel(x, draw(4, dtype, N), eps)
            assert (oracle.rstd_error(rstd, x, eps) <= oracle.rstd_bound(N)).all()


def special_values(kernel: mutants.Forward) -> None:
    x, weight = draw(5, BF16, 5, N), draw(6, BF16, N)
    x[0, 3], x[1, 4], x[2], x[3, 0] = np.nan, np.inf, 0, -0.0
    weight[7] = -0.0
    x[4] = np.full(N, 1e-40, BF16)  # subnormal
    y, rstd = kernel(x, weight, 1e-6)
    oracle.assert_same(y, oracle.replay(x, weight, rstd))
    assert np.isnan(y[0]).all()
    with np.errstate(invalid="ignore"):  # a mutant's NaN is no number greater than 0, and no warning either
        assert (np.abs(y[4]) > 0).sum() >= N - 1


def rows_of_one_magnitude(kernel: mutants.Forward) -> None:
    weight = draw(15, BF16, N)
    for power in (-12, 0, 5):
        sign = np.sign(draw(16, BF16, 8, N)).astype(F32)
        y, _ = kernel((sign * 2.0**power).astype(BF16), weight, 0.0)
        oracle.assert_same(y, (sign * weight.astype(F32)).astype(BF16))


def batch_invariance(kernel: mutants.Forward) -> None:
    x, weight = draw(7, F32, 64, N), draw(8, F32, N)
    whole, alone = kernel(x, weight, 1e-6)[1], np.concatenate([kernel(row[None], weight, 1e-6)[1] for row in x])
    oracle.assert_same(whole, alone)


FORWARD: dict[str, Callable[[mutants.Forward], None]] = {
    "1 replay": replay,
    "2 rstd bound": rstd_bound,
    "13 rows of one magnitude": rows_of_one_magnitude,
    "14 special values": special_values,
    "8 batch invariance": batch_invariance,
}


# --- backward -------------------------------------------------------------------------------------------------------


def dx_bound(kernel: mutants.Backward) -> None:
    for dtype in (BF16, F32):
        o = operands(64, N, dtype)
        dx, _ = kernel(**o)
        oracle.assert_within(dx, *oracle.input_gradient64(o["x"], o["weight"], o["rstd"], o["dy"], N))


def dx_of_residual(kernel: mutants.Backward) -> None:
    """dx is rounded before ds is added: bits of the composition."""
    o, ds = operands(64), draw(12, BF16, 64, N)
    expected = oracle.round_to(kernel(**o)[0].astype(F32) + ds.astype(F32), BF16)
    oracle.assert_same(kernel(**o, ds=ds)[0], expected)


def exact_sums(kernel: mutants.Backward) -> None:
    """Of sums that are exact in any order, over a row as long as the additions of a bound would hide an element of."""
    for n, weight_dtype in ((N, "bf16"), (4096, "f32")):
        case = Case(n, ROWS, "bf16", weight_dtype, "normal", seed=0)
        x, weight, dy = case.exact()
        rstd = np.ones(ROWS, F32)
        dx, dweight = kernel(x, weight, rstd, dy)
        oracle.assert_within(dx, *oracle.input_gradient64(x, weight, rstd, dy, 0))
        oracle.assert_same(dweight, (x.astype(F32) * dy.astype(F32)).sum(axis=0).astype(weight.dtype))


def subnormal_g(kernel: mutants.Backward) -> None:
    x = (2.0**-7 * np.sign(draw(17, F32, ROWS, N))).astype(F16)
    dy = (np.random.default_rng(18).integers(-1023, 1024, x.shape) * 2.0**-24).astype(F16)
    weight, rstd = np.ones(N, F16), np.full(ROWS, 2.0**7, F32)
    oracle.assert_within(kernel(x, weight, rstd, dy)[0], *oracle.input_gradient64(x, weight, rstd, dy, N))


def euler(kernel: mutants.Backward) -> None:
    o = operands(64, N, BF16) | {"weight": draw(10, F32, N), "dy": draw(11, F32, 64, N)}
    _, dweight = kernel(**o)
    y = oracle.replay(o["x"], o["weight"], o["rstd"]).astype(np.float64)
    _, of_dweight = oracle.weight_gradient64(o["x"], o["rstd"], o["dy"], F32)
    weight64, dy64 = o["weight"].astype(np.float64), o["dy"].astype(np.float64)
    error = np.sum(np.abs(weight64) * of_dweight) + oracle.U * np.sum(np.abs(y * dy64))
    assert abs(np.sum(weight64 * dweight.astype(np.float64)) - np.sum(y * dy64)) <= error


def two_batches(kernel: mutants.Backward) -> None:
    x, weight, dy = Case(N, 9, "bf16", "f32", "normal", seed=0).exact()
    rstd = np.ones(9, F32)
    whole, *parts = (
        kernel(x[rows], weight, rstd[rows], dy[rows])[1] for rows in (slice(None), slice(4), slice(4, None))
    )
    oracle.assert_same(whole, parts[0] + parts[1])


def dweight_bound(kernel: mutants.Backward) -> None:
    o = operands(64, N, BF16) | {"weight": draw(10, F32, N)}
    _, dweight = kernel(**o)
    oracle.assert_within(dweight, *oracle.weight_gradient64(o["x"], o["rstd"], o["dy"], F32))


BACKWARD: dict[str, Callable[[mutants.Backward], None]] = {
    "23 dx bound": dx_bound,
    "residual form": dx_of_residual,
    "23 dweight bound": dweight_bound,
    "23 exact sums": exact_sums,
    "23 subnormal g": subnormal_g,
    "27 weight times dweight": euler,
    "29 two batches": two_batches,
}


# --- verdicts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", mutants.FORWARD)
def test_a_wrong_forward_kernel_is_killed(name: str) -> None:
    found = killers(mutants.FORWARD[name], FORWARD)
    print(f"\n{name:45} killed by {', '.join(found)}")  # noqa: T201
    assert found, f"{name} survives"


@pytest.mark.parametrize("name", mutants.BACKWARD)
def test_a_wrong_backward_kernel_is_killed(name: str) -> None:
    found = killers(mutants.BACKWARD[name], BACKWARD)
    print(f"\n{name:45} killed by {', '.join(found)}")  # noqa: T201
    assert found, f"{name} survives"


def test_the_right_kernels_are_killed_by_nothing() -> None:
    assert killers(mutants.forward, FORWARD) == []
    assert killers(mutants.backward, BACKWARD) == []


def test_there_are_at_least_forty_mutants() -> None:
    assert len(mutants.FORWARD) + len(mutants.BACKWARD) + len(rewrites.SOURCE) + len(rewrites.REFERENCE) >= 40
