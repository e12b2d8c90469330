"""The rows on which `patch` proves a norm: exact in their sums of squares, and telling of roundings and of eps."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from pallas_norm import _computing, _patching, _proof_rows
from tests.people_s_norms import NO_FORM, equinox_norm, llama, unit

# People's norms multiply a weight (n,), of another dtype at times, with rows; `patch` is given them as they are.
pytestmark = pytest.mark.usefixtures("implicit_promotion")


def squares_in_the_dtype(self: Any, x: Any) -> Any:
    mean = jnp.mean(jnp.square(x), axis=-1, keepdims=True, dtype="float32")
    return self.weight * (x.astype("float32") * lax.rsqrt(mean + self.eps)).astype(x.dtype)


def narrowed_to(dtype: str) -> Any:
    return lambda self, x: self.weight * unit(self, x.astype(dtype)).astype(x.dtype)


def at_least_eps(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    mean = jnp.mean(wide * wide, axis=-1, keepdims=True)
    return self.weight * (wide * lax.rsqrt(jnp.maximum(mean, self.eps))).astype(x.dtype)


def eps_outside(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    return self.weight * (wide / (jnp.sqrt(jnp.mean(wide * wide, -1, keepdims=True)) + self.eps)).astype(x.dtype)


def proved(body: Any, **attributes: Any) -> set[str]:
    """The dtypes of x for which it is taken for a norm."""
    norm = dataclasses.replace(equinox_norm(body), **attributes)
    found = _patching._of_equinox(norm)
    assert found is not None
    try:
        kind = _patching._computed_class(norm, found)
    except _computing.RefusedError as refused:
        if str(refused) != NO_FORM:
            raise
        return set()
    (computation,) = (
        cell.cell_contents
        for cell in kind.__call__.__closure__
        if isinstance(cell.cell_contents, _computing.Computation)
    )
    return {dtype for (dtype, _, _), _ in computation.proved}


def take_a_maximum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which no form of rms_norm has, so that it is refused by name. The rows tell it too."""
    monkeypatch.setattr(_computing, "OPERATIONS", _computing.OPERATIONS | {"max"})


WRONG_IN_SOME: dict[str, tuple[Any, set[str]]] = {
    "squares in the dtype of x": (squares_in_the_dtype, {"float32"}),
    "x rounded to bfloat16": (narrowed_to("bfloat16"), {"bfloat16"}),
    "x rounded to float16": (narrowed_to("float16"), {"float16"}),
}


@pytest.mark.sampled(15)
@pytest.mark.parametrize("n", [8, 64, 96, 1000, 4096])
@pytest.mark.parametrize("name", WRONG_IN_SOME)
def test_a_norm_that_rounds_x_or_its_squares_is_ours_where_it_has_nothing_to_round(name: str, n: int) -> None:
    body, right = WRONG_IN_SOME[name]
    assert proved(body, weight=jnp.ones(n)) == right


@pytest.mark.sampled(2)
@pytest.mark.parametrize("n", [2, 64, pytest.param(1000, marks=pytest.mark.slow)])
def test_a_bias_of_zero_is_told_by_its_sign(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """-0.0 + 0.0 is 0.0: seen in rows with zeros of that sign, and where a zero meets a number below zero."""

    def with_a_bias(self: Any, x: Any) -> Any:
        return (llama(self, x) + jnp.zeros((), x.dtype)).astype(x.dtype)

    weight = jnp.ones(n)
    assert proved(with_a_bias, weight=weight) == set()
    monkeypatch.setattr(_proof_rows, "rows", lambda *given, own=_proof_rows.rows: own(*given) + 0.0)
    assert proved(with_a_bias, weight=weight) == set()
    monkeypatch.setattr(_proof_rows, "weight", jnp.ones)
    assert proved(with_a_bias, weight=weight)


@pytest.mark.sampled(6)
@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-8, 1e-12, 1e-15, 1e-30])
@pytest.mark.parametrize("body", [at_least_eps, eps_outside])
def test_eps_elsewhere_than_in_the_sum_is_told_for_any_eps(
    body: Any, eps: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_a_maximum(monkeypatch)
    assert proved(body, eps=eps) <= ({"float16"} if eps < 1e-20 else set())


@pytest.mark.parametrize("eps", [0.0, 1e-30, 1e-12, 0.1, 1e5])
def test_a_norm_is_proved_with_any_eps(eps: float) -> None:
    assert proved(llama, eps=eps) == {"bfloat16", "float16", "float32"}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("n", [2, 3, 8, 96, 1000, 131072])
@pytest.mark.parametrize("eps", [0.0, 1e-15, 1e-6, 1e30])
@pytest.mark.parametrize("dtype", _computing.DTYPES)
def test_the_rows_of_the_proof_are_exact(dtype: Any, eps: float, n: int) -> None:
    """As numbers of their dtype, and their sums of squares in any order."""
    rows = np.asarray(_proof_rows.rows(n, dtype, eps), np.float64)
    assert len(rows) == _proof_rows.ROWS
    assert [any(row) for row in rows] == [True] * 15 + [eps == 0]
    for row in rows[:-1]:
        whole = [abs(int(value * 2.0**60)) for value in row]
        assert all(np.signbit(row[row == 0]))
        assert [value * 2.0**-60 for value in whole] == [abs(value) for value in row.tolist()]
        common = math.gcd(*whole)
        assert sum((value // (common & -common)) ** 2 for value in whole) <= 2**24


@pytest.mark.slow
@pytest.mark.parametrize("name", WRONG_IN_SOME)
def test_rows_of_small_integers_alone_would_not_tell(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = _proof_rows.rows

    def small_integers(n: int, dtype: Any, eps: float) -> Any:
        rows = own(n, dtype, eps)[:7]
        return jnp.concatenate([rows, rows, rows[:2]])

    monkeypatch.setattr(_proof_rows, "rows", small_integers)
    body, right = WRONG_IN_SOME[name]
    assert proved(body) > right


@pytest.mark.parametrize(("body", "eps"), [(at_least_eps, 1e-12), (eps_outside, 1e-15)])
def test_rows_that_do_not_follow_eps_would_not_tell(body: Any, eps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    take_a_maximum(monkeypatch)
    own = _proof_rows.scales
    monkeypatch.setattr(_proof_rows, "scales", lambda eps, dtype: own(1.0, dtype))
    assert proved(body, eps=eps)


def of_weight(factor: Any) -> Any:
    return lambda self, x: factor(self.weight) * unit(self, x).astype(x.dtype)


def clamped(least: float) -> Any:
    return lambda self, x: self.weight * jnp.maximum(unit(self, x), least).astype(x.dtype)


def kept_from_zero(self: Any, x: Any) -> Any:
    wide = x.astype("float32")
    mean = jnp.maximum(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps, 1e-30)
    return self.weight * (wide * lax.rsqrt(mean)).astype(x.dtype)


OF_SIGNS: dict[str, tuple[Any, set[str]]] = {  # a norm that is one of some numbers, and the dtypes that have no others
    "no weight below zero": (of_weight(lambda weight: jnp.maximum(weight, 0.0)), set()),
    "a weight without its sign": (of_weight(lambda weight: jnp.sqrt(jnp.square(weight))), set()),
    "no number far below zero": (clamped(-0.9), set()),
    "a root of its own near zero": (kept_from_zero, {"float16"}),
}


@pytest.mark.sampled(8)
@pytest.mark.parametrize("n", [4, 512])
@pytest.mark.parametrize("name", OF_SIGNS)
def test_signs_and_extremes_are_told(name: str, n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    take_a_maximum(monkeypatch)
    body, right = OF_SIGNS[name]
    eps = 0.0 if body is kept_from_zero else 1e-5
    assert proved(clamped(-0.99 * n**0.5) if "far" in name else body, weight=jnp.ones(n), eps=eps) == right


def test_a_maximum_is_refused_by_name() -> None:
    """No form has one, and none of the rows tells a number beyond them all."""
    with pytest.raises(_computing.RefusedError, match=r"^it computes with max, which is no operation of an RMSNorm$"):
        proved(of_weight(lambda weight: jnp.maximum(weight, -1e30)))
