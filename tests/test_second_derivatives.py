"""Second derivatives where a rounding has none: of gradients that float16 holds as subnormal numbers, and of a
rotation's gradient at zero. Both were silently zero."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import rms_norm, rms_norm_gated, rms_norm_rope
from tests.oracle import F32
from tests.rewrites import Rewrite, rewritten

N = 64
COLUMNS = np.arange(N, dtype=F32)[None] / N


def draw(*shape: int, seed: int, dtype: Any = np.float16) -> Any:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape).astype(dtype))


def unit(x: Any) -> Any:
    return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)


GATE, OF_GATE = draw(4, N, seed=1), draw(4, N, seed=1).astype(jnp.float32)
FORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "norm": (lambda x: rms_norm(x), unit),
    "gated": (lambda x: rms_norm_gated(x, GATE), lambda x: unit(x) * jax.nn.silu(OF_GATE)),
}


def of_small_gradients(form: str, scale: float) -> None:
    """The derivative of <dx, v>, of a loss whose gradients are near `scale`, against float32's."""
    call, plain = FORMS[form]
    x, v = draw(4, N, seed=0), draw(4, N, seed=2).astype(jnp.float32)

    def product(function: Any, x: Any) -> Any:
        loss = lambda x: jnp.sum(jnp.square(function(x).astype(jnp.float32)) * COLUMNS) * scale  # noqa: E731
        return jax.grad(lambda x: jnp.sum(jax.grad(loss)(x).astype(jnp.float32) * v))(x)

    found = np.asarray(product(call, x), np.float64) / scale
    expected = np.asarray(product(plain, x.astype(jnp.float32)), np.float64) / scale
    # A few roundings to float16 of numbers that are multiples of 2^-24.
    assert np.abs(found - expected).max() <= (2.0**-8 + 2.0**-23 / scale) * np.abs(expected).max()


@pytest.mark.parametrize("scale", [1.0, 2.0**-12])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_that_are_subnormal_in_float16_have_derivatives(form: str, scale: float) -> None:
    of_small_gradients(form, scale)


def at_the_least_loss() -> None:
    """There dy is zero, and its derivative is all there is of the second one."""
    q, k = draw(3, 2, N, seed=0, dtype=F32), draw(3, 1, N, seed=1, dtype=F32)
    cos, sin = (draw(3, N, seed=seed, dtype=F32) for seed in (2, 3))
    v = draw(3, 2, N, seed=4, dtype=F32)

    def plain(q: Any) -> Any:
        first, second = jnp.split(unit(q), 2, axis=-1)
        return unit(q) * cos[:, None] + jnp.concatenate([-second, first], axis=-1) * sin[:, None]

    def product(function: Any) -> Any:
        target = jax.lax.stop_gradient(function(q))
        loss = lambda q: jnp.sum((function(q) - target) ** 2 * COLUMNS[None])  # noqa: E731
        return jax.grad(lambda q: jnp.vdot(jax.grad(loss)(q), v))(q)

    found, expected = product(lambda q: rms_norm_rope(q, k, cos, sin)[0]), product(plain)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_rotation_has_a_second_derivative_where_its_gradient_is_zero() -> None:
    at_the_least_loss()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rewrite", "killer"),
    [
        (
            Rewrite("reference", "return _rounded_to_half(*primals), *tangents", "return jax.jvp(_rounded_to_half.fun, primals, tangents)"),  # noqa: E501
            functools.partial(of_small_gradients, "norm", 2.0**-12),
        ),
        (
            Rewrite("rope_reference", "return _zeros_positive(*primals), *tangents", "return jax.jvp(_zeros_positive.fun, primals, tangents)"),  # noqa: E501
            at_the_least_loss,
        ),
    ],
    ids=["float16", "zero"],
)  # fmt: skip
def test_the_derivative_of_a_rounding_itself_is_killed(rewrite: Rewrite, killer: Callable[[], None]) -> None:
    with rewritten(rewrite), pytest.raises(AssertionError):
        killer()
