"""Backward: every bit of dx against the specification in NumPy, dweight against float64, and relations that hold bit
for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pallas_norm.plans.forward import forward_order
from tests import oracle, specified, strategies
from tests.oracle import BF16, DTYPES, F16, F32, Array
from tests.strategies import Case, cases, examples, gradients, numbers, outputs_and_gradients, weights

# On a GPU an example compiles a program with three kernels: 600 of them took longer than 290 s.
SHARE = {"xla": 0.3, "interpret": 0.05, "mosaic_gpu": 0.08}
FEW = {"xla": 0.1, "interpret": 0.02, "mosaic_gpu": 0.02}
SMOOTH = ("normal", "integers", "wide", "powers", "sparse")  # rstd, and with it dx, neither over- nor underflows
POSITIVE = (1e-6, 1e-5, 0.5)


def drawn(implementation: str, **options: object) -> st.SearchStrategy[Case]:
    return cases(
        implementation,
        **{"values": SMOOTH, "eps": POSITIVE, "widths_of": strategies.backward_widths(implementation)} | options,
    )


def arguments(case: Case) -> tuple[Array, Array | None, Array]:
    return case.x(), case.weight(), case.dy(case.to.y)


def check(case: Case, implementation: str) -> None:
    x, weight, dy = arguments(case)
    dx, dweight, rstd = gradients(implementation, x, weight, dy, **case.options)
    assert dx.dtype == x.dtype
    given = x, weight, rstd, dy
    oracle.assert_same(
        dx, specified.input_gradient(*given, **case.rounding, flushes=strategies.flushes(implementation))
    )
    if weight is not None:
        assert dweight is not None
        assert dweight.dtype == weight.dtype
        options = case.of_unit
        oracle.assert_within(dweight, *oracle.weight_gradient64(x, rstd, dy, weight.dtype, **options))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dx_is_that_of_the_specification_in_numpy_and_dweight_is_within_its_bound(
    implementation: str, dtype: str
) -> None:
    """Property 23."""

    @examples(SHARE[implementation] / len(DTYPES))
    @given(drawn(implementation, dtypes=(dtype,), mixed=True))
    def holds(case: Case) -> None:
        check(case, implementation)

    holds()


def check_exact(case: Case, implementation: str) -> None:
    case = dataclasses.replace(case, eps=0.0, weight_offset=0.0)
    x, weight, dy = case.exact()
    dx, dweight, rstd = gradients(implementation, x, weight, dy, **case.options)
    oracle.assert_same(rstd, np.ones(case.rows, F32))
    oracle.assert_within(dx, *oracle.input_gradient64(x, weight, rstd, dy, 0, **case.rounding))
    exact = (x.astype(F32) * dy.astype(F32)).sum(axis=0) + F32.type(0)
    oracle.assert_same(dweight, exact.astype(weight.dtype))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_of_exact_sums_are_right_to_the_last_roundings(implementation: str, dtype: str) -> None:
    """Property 23 without the slack of the additions, which at n = 4096 hides a mean taken over n + 1 elements; and
    dweight to the bit."""

    @examples(SHARE[implementation] / len(DTYPES))
    @given(drawn(implementation, dtypes=(dtype,), values=("normal",)))
    def holds(case: Case) -> None:
        check_exact(case, implementation)

    holds()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("n", [128, 1024])
def test_a_subnormal_float16_g_is_kept(implementation: str, n: int) -> None:
    """XLA's CPU code flushes subnormal float32 only, but a float16 rounding by reduce_precision would flush these."""
    rng = np.random.default_rng(n)
    x = (2.0**-7 * rng.choice([-1.0, 1.0], (9, n))).astype(F16)  # rstd is 2^7, so dx is no subnormal number
    dy = (rng.integers(-1023, 1024, x.shape) * 2.0**-24).astype(F16)
    weight = rng.choice([-1.0, 1.0], n).astype(F16)
    dx, dweight, rstd = gradients(implementation, x, weight, dy, eps=0.0)
    oracle.assert_same(rstd, np.full(9, 2.0**7, F32))
    oracle.assert_within(dx, *oracle.input_gradient64(x, weight, rstd, dy, n))
    oracle.assert_same(dweight + 0, (np.sign(x).astype(F32) * dy.astype(F32)).sum(axis=0).astype(F16) + 0)


@pytest.mark.sampled(2)
def test_the_weight_times_its_gradient_is_y_times_its_own(implementation: str) -> None:
    """Property 27, Euler: y is linear in the weight, so sum(factor * dweight) = sum(y * dy), with factor = weight +
    weight_offset. Both passes have to use one `unit`.

    y = factor * unit within a product's rounding and that of y; dweight within its bound; both with a float32 weight.
    """

    @examples(FEW[implementation])
    @given(drawn(implementation, weighted=True))
    def holds(case: Case) -> None:
        case = dataclasses.replace(case, weight_dtype="f32")
        x, weight, dy = arguments(case)
        y, _, dweight, rstd = outputs_and_gradients(implementation, x, weight, dy, **case.options)
        factor = oracle.scale(weight, case.weight_offset).astype(np.float64)
        y64, dy64 = y.astype(np.float64), dy.astype(np.float64)
        options = case.of_unit
        _, of_dweight = oracle.weight_gradient64(x, rstd, dy, F32, **options)
        of_y = oracle.U * np.abs(y64) + 2 * oracle.SMALLEST
        error = np.sum(np.abs(factor) * of_dweight) + np.sum(np.abs(dy64) * of_y)
        difference = np.sum(factor * dweight.astype(np.float64)) - np.sum(y64 * dy64)
        assert abs(difference) <= error, f"{difference} of {np.sum(y64 * dy64)}, with {error} allowed"

    holds()


@pytest.mark.sampled(2)
def test_dweight_of_two_batches_is_the_sum_of_theirs(implementation: str) -> None:
    """Property 29. To the bit where the sums are exact, else within the three bounds."""

    @examples(FEW[implementation] / 2)
    @given(drawn(implementation, weighted=True), st.data())
    def holds(case: Case, data: st.DataObject) -> None:
        first = data.draw(strategies.row_counts(case.n, case.dtype))
        case = dataclasses.replace(case, rows=case.rows + first, weight_dtype="f32", weight_offset=0.0)
        parts = slice(first), slice(first, None)

        def of_parts(x: Array, weight: Array, dy: Array, eps: float) -> list[tuple[Array, Array]]:
            """(dweight, rstd) of the whole and of the parts."""
            options = case.options | {"eps": eps}
            rows = (slice(None), *parts)
            return [gradients(implementation, x[part], weight, dy[part], **options)[1:] for part in rows]

        (whole, _), *results = of_parts(*case.exact(), 0.0)
        oracle.assert_same(whole + 0, results[0][0] + results[1][0] + 0)

        x, weight, dy = arguments(case)
        (whole, rstd), *results = of_parts(x, weight, dy, case.eps)
        assert weight is not None
        options = case.of_unit
        exact, bound = oracle.weight_gradient64(x, rstd, dy, weight.dtype, **options)
        total = np.zeros(case.n)
        for part, (dweight, own_rstd) in zip(parts, results, strict=True):
            own_exact, own_bound = oracle.weight_gradient64(x[part], own_rstd, dy[part], weight.dtype, **options)
            total, bound = total + dweight, bound + own_bound
            exact = exact - own_exact  # what another rstd of the same row makes, on the XLA path
        assert (np.abs(whole - total) <= bound + np.abs(exact)).all()

    holds()


def test_a_power_of_two_or_a_sign_in_dy_passes_through(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(drawn(implementation, values=("normal", "integers")), st.sampled_from((-1.0, 2.0, -0.25)))
    def holds(case: Case, factor: float) -> None:
        case = dataclasses.replace(case, dtype="bf16", weight_dtype=case.weight_dtype and "f32")  # nothing underflows
        x, weight, dy = arguments(case)
        dx, dweight, _ = gradients(implementation, x, weight, dy, **case.options)
        scaled = gradients(implementation, x, weight, multiplied(dy, factor), **case.options)
        # x * 0 and x - x have signs of their own
        oracle.assert_same(scaled[0] + 0, multiplied(dx, factor) + 0)
        if dweight is not None:
            oracle.assert_same(scaled[1] + 0, multiplied(dweight, factor) + 0)

    holds()


def multiplied(values: Array, factor: Array | float) -> Array:
    """By a power of two or a sign, which rounds nothing."""
    return (values.astype(F32) * np.asarray(factor).astype(F32)).astype(values.dtype)


def test_signs_of_x_and_dy_pass_through_to_dx_and_cancel_in_dweight(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(drawn(implementation))
    def holds(case: Case) -> None:
        x, weight, dy = arguments(case)
        sign = case.rng(4).choice([-1.0, 1.0], x.shape)
        dx, dweight, _ = gradients(implementation, x, weight, dy, **case.options)
        signed = gradients(implementation, multiplied(x, sign), weight, multiplied(dy, sign), **case.options)
        oracle.assert_same(signed[0] + 0, multiplied(dx, sign) + 0)
        if dweight is not None:
            oracle.assert_same(signed[1] + 0, dweight + 0)

    holds()


def test_a_dy_of_zeros_gives_zeros(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(drawn(implementation))
    def holds(case: Case) -> None:
        x, weight, dy = arguments(case)
        dx, dweight, _ = gradients(implementation, x, weight, np.zeros_like(dy), **case.options)
        assert (dx == 0).all()
        assert dweight is None or (dweight == 0).all()

    holds()


def test_dx_of_a_row_does_not_depend_on_its_position_or_its_neighbours(implementation: str) -> None:
    """The other rows hold NaN and infinities. XLA orders the sum by the shape of the whole batch, so there the other
    batch has the same shape."""

    @examples(FEW[implementation])
    @given(drawn(implementation), st.data())
    def holds(case: Case, data: st.DataObject) -> None:
        rows = data.draw(strategies.row_counts(case.n, case.dtype))
        position = data.draw(st.integers(0, rows - 1))
        first = dataclasses.replace(case, rows=rows if implementation == "xla" else 1)
        row, weight, dy = arguments(first)
        alone, _, _ = gradients(implementation, row, weight, dy, **case.options)
        x, dys = (
            case.rng(7).choice(np.array([np.nan, np.inf, 1], F32), (rows, case.n)).astype(like.dtype)
            for like in (row, dy)
        )
        x[position], dys[position] = row[0], dy[0]
        dx, _, _ = gradients(implementation, x, weight, dys, **case.options)
        oracle.assert_same(dx[position], alone[0])

    holds()


@pytest.mark.sampled(4)
@pytest.mark.parametrize("n", [64, 1024])
def test_a_nan_in_dy_reaches_only_its_column_of_dweight_and_one_in_x_all(implementation: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x, dy = (rng.standard_normal((19, n)).astype(BF16) for _ in range(2))
    weight = weights(rng, n, "bf16")
    clean = gradients(implementation, x, weight, dy)[1]
    poisoned = dy.copy()
    poisoned[17, 5] = np.nan
    dx, dweight, _ = gradients(implementation, x, weight, poisoned)
    assert clean is not None
    assert dweight is not None
    assert np.flatnonzero(np.isnan(dweight)).tolist() == [5]
    oracle.assert_same(np.delete(dweight, 5), np.delete(clean, 5))
    assert np.flatnonzero(np.isnan(dx).any(axis=1)).tolist() == [17]
    x[17, 5] = np.nan
    assert np.isnan(gradients(implementation, x, weight, dy)[1]).all()


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("n", "dtype"), [(64, "bf16"), (200, "f16"), (513, "f32"), (1024, "bf16"), (1024, "f32")])
def test_dweight_of_rows_whose_unit_is_one_is_the_exact_sum_of_integers(
    implementation: str, dtype: str, n: int
) -> None:
    """Rows of +-2^k without eps: unit is exactly +-1 where rstd is exact."""
    rng = np.random.default_rng(n)
    x = numbers(rng, (35, n), dtype, "powers")
    x = np.sign(x.astype(F32)).astype(x.dtype)  # a mean of exactly one in any order of the sum
    dy = rng.integers(-7, 8, x.shape).astype(F32)
    weight = weights(rng, n, "f32")
    _, dweight, rstd = gradients(implementation, x, weight, dy, eps=0.0)
    assert (rstd == 1).all()
    oracle.assert_same(dweight, (x.astype(F32) * dy).sum(axis=0) + F32.type(0))


@pytest.mark.sampled(2)
def test_dx_is_radial_only_by_eps(implementation: str) -> None:
    """<x, dx> = eps * rstd^2 * <x, dy * weight> * rstd: nothing without eps, because y does not depend on the scale."""
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal((5, 256)).astype(F32) for _ in range(2))
    weight = weights(rng, 256, "f32")
    for eps in (0.0, 1e-3, 0.5):
        dx, _, rstd = gradients(implementation, x, weight, dy, eps=eps)
        x64, g64, rstd64 = (value.astype(np.float64) for value in (x, dy * weight, rstd))
        radial = np.sum(x64 * dx, axis=1)
        expected = eps * rstd64**3 * np.sum(x64 * g64, axis=1)
        scale = np.sum(np.abs(x64 * g64), axis=1) * rstd64
        assert (np.abs(radial - expected) <= (forward_order(256, F32).depth + 12) * oracle.U * scale).all()
