"""The gradients of add_rms_norm, whose sum has a gradient of its own, and the gradients of gradients."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from tests import oracle, specified
from tests.oracle import DTYPES, F32
from tests.strategies import norm, weights


def residual_gradients(implementation, dtype):
    """The operands, and the function that gives (dx, dresidual, dweight) of (dy, ds)."""
    rng = np.random.default_rng(0)
    x, residual, dy, ds = (rng.standard_normal((5, 256)).astype(DTYPES[dtype]) for _ in range(4))
    weight = weights(rng, 256, dtype)

    @jax.jit
    def run(dy, ds):
        fused = functools.partial(pallas_norm.add_rms_norm, implementation=implementation)
        return jax.vjp(fused, x, residual, weight)[1]((dy, ds))

    return x, residual, weight, dy, ds, run


@pytest.mark.sampled(2)
def test_a_float32_dx_is_rounded_before_the_gradient_of_the_sum_is_added(implementation: str) -> None:
    *_, dy, ds, run = residual_gradients(implementation, "f32")
    oracle.assert_same(run(dy, ds)[0], oracle.add(np.asarray(run(dy, np.zeros_like(ds))[0]), ds))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_of_the_sum_is_added_to_dx_after_dx_was_rounded(implementation: str, dtype: str) -> None:
    x, residual, weight, dy, ds, run = residual_gradients(implementation, dtype)
    plain, dresidual, dweight = run(dy, np.zeros_like(ds))
    dx, dresidual_too, same_dweight = run(dy, ds)
    oracle.assert_same(plain, dresidual)
    oracle.assert_same(dx, dresidual_too)
    oracle.assert_same(same_dweight, dweight)
    expected = oracle.add(np.asarray(plain), ds)
    oracle.assert_same(dx, expected)
    s = oracle.add(x, residual)
    _, rstd = norm(implementation, s, weight)
    oracle.assert_same(dx, specified.input_gradient(s, weight, rstd, dy, ds))


def reference64(x, weight, dy, eps):
    x, weight, dy = (value.astype(jnp.float64) for value in (x, weight, dy))
    rstd = 1 / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + eps)
    g, unit = dy * weight[None], x * rstd
    return rstd * (g - unit * jnp.mean(g * unit, axis=-1, keepdims=True)), jnp.sum(dy * unit, axis=0)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("n", [64, 1024])
def test_the_second_derivative_matches_float64(implementation: str, n: int) -> None:
    rng = np.random.default_rng(n)
    x, dy, ddx = (rng.standard_normal((3, n)).astype(F32) for _ in range(3))
    weight, ddweight = weights(rng, n, "f32"), rng.standard_normal(n).astype(F32)
    fixed = functools.partial(pallas_norm.rms_norm, eps=1e-3, implementation=implementation)

    @jax.jit
    def second(x, weight, dy):
        return jax.vjp(lambda x, weight, dy: jax.vjp(fixed, x, weight)[1](dy), x, weight, dy)[1]((ddx, ddweight))

    actual = second(x, weight, dy)
    with jax.enable_x64(True):  # noqa: FBT003
        pullback = jax.vjp(functools.partial(reference64, eps=float(F32.type(1e-3))), x, weight, dy)[1]
        expected = pullback((ddx.astype(np.float64), ddweight.astype(np.float64)))
    for value, exact in zip(actual, expected, strict=True):
        error = np.abs(np.asarray(value, np.float64) - np.asarray(exact))
        # Sums of n or 3 terms, each a product of a few roundings, of the magnitude of the largest result.
        assert error.max() <= (n + 32) * oracle.U * np.abs(np.asarray(exact)).max()
