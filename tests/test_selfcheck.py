"""The doctor's comparison of results: what is right passes, and whatever is wrong in them is named."""

from __future__ import annotations

import sys
from collections.abc import Callable

import jax
import numpy as np
import pytest

from pallas_norm import _golden, _selfcheck
from tests import oracle, rewrites, specified
from tests.doctor_report import CASES


def right(given: dict[str, np.ndarray], *, residual: bool, **rounding: bool) -> dict[str, np.ndarray]:
    """What the tests' own specification says; dweight with sums in float64."""
    found = specified.results(given, _golden.EPS, residual=residual, **rounding)
    x = found["s"] if residual else given["x"]
    dweight = oracle.weight_gradient64(x, found["rstd"], given["dy"], x.dtype)[0].astype(x.dtype)
    return found | {"dweight": dweight}


def changed(values: np.ndarray, at: int, change: Callable[[np.ndarray], object]) -> np.ndarray:
    values = values.copy()
    values.reshape(-1)[at] = change(values.reshape(-1)[at])
    return values


def last_bit(values: np.ndarray) -> np.ndarray:
    return changed(values, -1, lambda value: np.nextafter(value, values.dtype.type(9)))


def one_nan(values: np.ndarray) -> np.ndarray:
    return changed(values, 0, lambda _: np.nan)


def without_eps(rstd: np.ndarray) -> np.ndarray:
    return (1 / np.sqrt(1 / rstd.astype(np.float64) ** 2 - _golden.EPS)).astype(np.float32)


MUTANTS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "a last bit of y": ("y", last_bit),
    "a last bit of s": ("s", last_bit),
    "a row of y missing": ("y", lambda y: y[:-1]),
    "y in another dtype": ("y", lambda y: y.astype(np.float64)),
    "no eps": ("rstd", without_eps),
    "rstd NaN": ("rstd", one_nan),
    "rows of dx exchanged": ("dx", lambda dx: dx[::-1].copy()),
    "dx doubled": ("dx", lambda dx: dx + dx),
    "dweight of half": ("dweight", lambda dweight: dweight / dweight.dtype.type(2)),
    "dweight NaN": ("dweight", one_nan),
}


@pytest.mark.parametrize("specified_bits", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", _golden.DTYPES)
def test_what_is_right_passes_and_each_mutant_is_named(dtype: str, *, residual: bool, specified_bits: bool) -> None:
    case = _golden.case(128, dtype)
    given, bits = _golden.operands(case), _golden.bits(case, residual=residual) if specified_bits else {}
    found = right(given, residual=residual)
    assert _selfcheck.check(given, found, bits=bits) == []
    for mutant, (name, change) in MUTANTS.items():
        if name in found:
            wrong = _selfcheck.check(given, found | {name: change(found[name])}, bits=bits)
            assert any(sentence.startswith((f"{name}: ", f"{name} is ")) for sentence in wrong), mutant


@pytest.mark.parametrize("name", ["rstd", "y", "s", "dx"])
def test_a_last_bit_is_named_where_bits_are_specified(name: str) -> None:
    """rstd's and dx's are within their bounds."""
    case = _golden.case(128, "float32")
    given, bits = _golden.operands(case), _golden.bits(case, residual=True)
    found = right(given, residual=True)
    wrong = _selfcheck.check(given, found | {name: last_bit(found[name])}, bits=bits)
    assert any(sentence.startswith(f"{name}: ") for sentence in wrong)
    if name in ("rstd", "dx"):
        assert f"{name}: {_selfcheck.OTHER_BITS}" in wrong


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("specified_bits", [False, True])
def test_gradients_without_a_rounding_are_named(dtype: str, *, residual: bool, specified_bits: bool) -> None:
    case = _golden.case(1000, dtype)
    given, bits = _golden.operands(case), _golden.bits(case, residual=residual) if specified_bits else {}
    found, unrounded = (right(given, residual=residual, cast_before_scale=cast) for cast in (True, False))
    (wrong,) = _selfcheck.check(given, found | {"dx": unrounded["dx"]}, bits=bits)
    assert wrong.startswith("dx: ")


@pytest.mark.parametrize("dtype", _golden.DTYPES)
def test_slack_takes_another_order_of_a_sum_and_no_missing_rounding(dtype: str) -> None:
    given = _golden.operands(_golden.Case(1024, dtype, 5))
    x, weight, rstd = given["x"], given["weight"], right(given, residual=False)["rstd"]
    moved = (rstd.view(np.int32) + np.int32([0, 3, -3, 32, -32])).view(np.float32)
    y = _selfcheck.output(x, weight, moved)
    assert _selfcheck.check_y(y, x, weight, rstd, {}) == []
    assert _selfcheck.check_y(y, x, weight, rstd, {"y": _golden.digest(y)[::-1]}) != []
    if dtype == "float32":
        assert _selfcheck.check_output("y", y, x, weight, rstd, slack=31) != []
    else:
        once = _selfcheck.rounded_once(x, weight, moved)
        (sentence,) = _selfcheck.check_y(once, x, weight, rstd, {})
        assert sentence.endswith("the one before the weight is missing")


# --- comparisons left out ---------------------------------------------------------------------------------------------


def bits_of_both_forms_are_taken() -> None:
    for residual in (False, True):
        case = CASES[0]
        given, bits = _golden.operands(case), sys.modules["pallas_norm._golden"].bits(case, residual=residual)
        assert sys.modules["pallas_norm._selfcheck"].check(given, right(given, residual=residual), bits=bits) == []


def a_last_bit_of_rstd_is_found() -> None:
    case = CASES[2]
    given, bits = _golden.operands(case), _golden.bits(case, residual=False)
    found = right(given, residual=False)
    rstd = last_bit(found["rstd"])
    found |= {"rstd": rstd, "y": _selfcheck.output(given["x"], given["weight"], rstd)}
    assert sys.modules["pallas_norm._selfcheck"].check(given, found, bits=bits) != []


def a_cpu_has_specified_bits() -> None:
    assert sys.modules["pallas_norm._doctor"].has_specified_bits(jax.local_devices(backend="cpu")[0])


KILLERS: dict[str, Callable[[], None]] = {
    "bits not compared": a_last_bit_of_rstd_is_found,
    "bits of the form without a residual": bits_of_both_forms_are_taken,
    "no platform has specified bits": a_cpu_has_specified_bits,
}


@pytest.mark.parametrize("name", rewrites.DOCTOR)
def test_a_doctor_that_does_not_compare_bits_is_killed(name: str) -> None:
    KILLERS[name]()
    with rewrites.rewritten(rewrites.DOCTOR[name]), pytest.raises((AssertionError, KeyError)):
        KILLERS[name]()
