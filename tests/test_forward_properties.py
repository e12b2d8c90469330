"""Forward: every bit of rstd and y against the specification in NumPy, and relations that hold bit for bit."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tests import oracle, specified, strategies
from tests.oracle import BF16, DTYPES, F16, F32, Array
from tests.strategies import FINITE, Case, cases, examples, flushes, norm, numbers, weights

SHARE = {"xla": 0.3, "interpret": 0.1, "mosaic_gpu": 0.3}
FEW = {"xla": 0.1, "interpret": 0.05, "mosaic_gpu": 0.05}


def check(case: Case, implementation: str) -> None:
    x, weight = case.x(), case.weight()
    expected = specified.forward(x, weight, case.eps, **case.rounding, flushes=flushes(implementation))
    for found, value in zip(norm(implementation, x, weight, **case.options), expected, strict=True):
        oracle.assert_same(found, value)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rstd_and_outputs_are_those_of_the_specification_in_numpy(implementation: str, dtype: str) -> None:
    """Properties 1 and 2."""

    @examples(SHARE[implementation] / len(DTYPES))
    @given(cases(implementation, dtypes=(dtype,), mixed=True))
    def holds(case: Case) -> None:
        check(case, implementation)

    holds()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_one_magnitude_without_eps_give_the_weight_with_their_signs(implementation: str, dtype: str) -> None:
    """Property 13, and no replay: mean, root and unit of rows of +-2^k are exact, so y = +-weight."""
    least, most = (-12, 16) if dtype == "f16" else (-28, 29)

    @examples(FEW[implementation])
    @given(
        cases(implementation, dtypes=(dtype,), values=("normal",), eps=(0.0,), mixed=True), st.integers(least, most - 1)
    )
    def holds(case: Case, power: int) -> None:
        powers = 2.0 ** np.clip(power + np.arange(case.rows)[:, None] % 5, least, most - 1)
        sign = case.rng().choice([-1.0, 1.0], (case.rows, case.n))
        x, weight = (sign * powers).astype(DTYPES[dtype]), case.weight()
        y, rstd = norm(implementation, x, weight, **case.options)
        oracle.assert_same(rstd, (1 / powers[:, 0]).astype(F32))
        exact = sign.astype(F32) * oracle.scale(weight, case.weight_offset, dtype=case.to.weight)
        oracle.assert_same(y, exact.astype(case.to.y))

    holds()


def check_integers(case: Case, implementation: str) -> None:
    case = dataclasses.replace(case, values="integers")
    x = case.x()
    x[:, -1] = 4  # no row of zeros, and the last column counts
    _, rstd = norm(implementation, x, case.weight(), **case.options)
    assert oracle.rstd_error(rstd, x, case.eps).max() <= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_rstd_of_integers_is_within_three_units(implementation: str, dtype: str) -> None:
    """Property 2. The sum is exact in any order: what is left is a division, an addition and rsqrt. Catches a wrong
    divisor, a dropped tail and a padded width at any n."""

    @examples(SHARE[implementation] / len(DTYPES))
    @given(cases(implementation, dtypes=(dtype,), values=("integers",), eps=(1e-12, 1e-6, 0.5)))
    def holds(case: Case) -> None:
        check_integers(case, implementation)

    holds()


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", [BF16, F16], ids=str)
@pytest.mark.parametrize("cast_before_scale", [True, False])
@pytest.mark.parametrize("eps", [0.0, 1e-6])
def test_all_patterns_of_16_bits_as_rows_of_one_element(
    kind: np.dtype,
    eps: float,
    cast_before_scale: bool,  # noqa: FBT001
) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(kind).reshape(-1, 1)
    weight = np.array([-1.7], F32).astype(kind)
    options = {"eps": eps, "cast_before_scale": cast_before_scale}
    expected = specified.forward(x, weight, **options, flushes=flushes("xla"))
    for found, value in zip(norm("xla", x, weight, **options), expected, strict=True):
        oracle.assert_same(found, value)
    judged = oracle.judged(x, eps)
    assert judged.sum() > 20_000
    assert (oracle.rstd_error(expected[1], x, eps)[judged] <= 3).all()


def test_signs_of_x_pass_through(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(cases(implementation, values=FINITE), st.booleans())
    def holds(case: Case, whole: bool) -> None:  # noqa: FBT001
        x, weight = case.x(), case.weight()
        sign = case.rng(4).choice([-1.0, 1.0], (1, 1) if whole else (1, case.n)).astype(x.dtype)
        (y, rstd), (signed, same_rstd) = (
            norm(implementation, value, weight, **case.options) for value in (x, multiplied(x, sign))
        )
        oracle.assert_same(same_rstd, rstd)
        oracle.assert_same(signed, multiplied(y, sign))

    holds()


def multiplied(values: Array, factor: Array | float) -> Array:
    """By a power of two or a sign, which rounds nothing."""
    return (values.astype(F32) * np.asarray(factor).astype(F32)).astype(values.dtype)


def test_a_power_of_two_in_the_weight_passes_through(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(
        cases(implementation, values=("normal", "integers"), eps=(1e-6,), weighted=True), st.sampled_from((-2, 0.5, 4))
    )
    @example(Case(8193, 3, "bf16", "f16", "normal", seed=65535, cast_before_scale=False), 0.5)  # halved, loses a bit
    def holds(case: Case, factor: float) -> None:
        case = dataclasses.replace(case, weight_offset=0.0)
        x, weight = case.x(), case.weight()
        y, _ = norm(implementation, x, weight, **case.options)
        changed = multiplied(weight, factor)
        scaled, _ = norm(implementation, x, changed, **case.options)
        # Of float16 below, where the spacing does not scale; a weight there has lost a bit.
        normal = (np.abs(y.astype(F32)) >= 2.0**-12) & (multiplied(changed, 1 / factor) == weight)
        oracle.assert_same(np.where(normal, scaled, 0), np.where(normal, multiplied(y, factor), 0))

    holds()


def test_a_power_of_two_in_x_cancels_with_its_square_in_eps(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(cases(implementation, values=("normal", "integers"), eps=(0.0, 2.0**-20, 0.5)), st.sampled_from((0.25, 4.0)))
    def holds(case: Case, factor: float) -> None:
        x, weight = case.x(), case.weight()
        x = np.where(np.abs(x.astype(F32)) < 2.0**-10, 1, x.astype(F32)).astype(x.dtype)  # exact in float16 too
        y, _ = norm(implementation, x, weight, **case.options)
        again, _ = norm(implementation, multiplied(x, factor), weight, **{**case.options, "eps": case.eps * factor**2})
        oracle.assert_same(again, y)

    holds()


def poison(case: Case, rows: int, dtype: np.dtype) -> Array:
    largest = float(np.finfo(F16).max) if dtype == F16 else 3e38
    return case.rng(5).choice(np.array([np.nan, np.inf, -np.inf, largest, 0], F32), (rows, case.n)).astype(dtype)


def test_rows_do_not_depend_on_their_position_or_their_neighbours(implementation: str) -> None:
    """The other rows hold NaN, infinities and huge numbers."""

    @examples(FEW[implementation])
    @given(cases(implementation, values=FINITE), st.data())
    def holds(case: Case, data: st.DataObject) -> None:
        weight = case.weight()
        rows = data.draw(strategies.row_counts(case.n, case.dtype))
        position = data.draw(st.integers(0, rows - 1))
        row = dataclasses.replace(case, rows=1).x()
        alone = norm(implementation, row, weight, **case.options)
        batch = poison(case, rows, row.dtype)
        batch[position] = row[0]
        for whole, part in zip(norm(implementation, batch, weight, **case.options), alone, strict=True):
            oracle.assert_same(whole[position], part[0])

    holds()


def test_permuted_rows_give_permuted_results(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(cases(implementation))
    def holds(case: Case) -> None:
        x, weight, order = case.x(), case.weight(), case.rng(6).permutation(case.rows)
        results = norm(implementation, x, weight, **case.options)
        for result, permuted in zip(results, norm(implementation, x[order], weight, **case.options), strict=True):
            oracle.assert_same(permuted, result[order])

    holds()


def test_permuted_columns_of_integers_give_permuted_results(implementation: str) -> None:
    @examples(FEW[implementation])
    @given(cases(implementation, values=("integers",)))
    def holds(case: Case) -> None:
        x, weight, order = case.x(), case.weight(), case.rng(6).permutation(case.n)
        y, _ = norm(implementation, x, weight, **case.options)
        permuted, _ = norm(implementation, x[:, order], None if weight is None else weight[order], **case.options)
        oracle.assert_same(permuted, y[:, order])

    holds()


@pytest.mark.sampled(14)
@pytest.mark.parametrize("n", [32, 50, 64, 256, 511, 512, 1000])
def test_a_row_of_integers_twice_gives_its_result_twice(implementation: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x, weight = numbers(rng, (3, n), "bf16", "integers"), weights(rng, n, "bf16")
    y, rstd = norm(implementation, x, weight)
    twice, same_rstd = norm(implementation, np.tile(x, 2), np.tile(weight, 2))
    oracle.assert_same(same_rstd, rstd)
    oracle.assert_same(twice, np.tile(y, 2))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("n", [33, 64, 256, 300])
def test_padding_to_four_times_the_width_and_a_quarter_of_eps_doubles_the_result(implementation: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x, weight = numbers(rng, (3, n), "bf16", "integers"), weights(rng, 4 * n, "bf16")
    y, _ = norm(implementation, x, weight[:n], eps=2.0**-10)
    padded, _ = norm(implementation, np.pad(x, ((0, 0), (0, 3 * n))), weight, eps=2.0**-12)
    oracle.assert_same(padded[:, :n], multiplied(y, 2.0))
    assert not padded[:, n:].astype(F32).any()
