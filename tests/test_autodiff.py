"""Differentiation: forward mode is refused, first and second derivatives are those of the formula in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import add_rms_norm, rms_norm

EPS = 1e-6
PATHS = ["xla", "interpret"]
U32 = 2.0**-24  # half a unit in the last place of a float32


def draw(*shape: int, seed: int, dtype: Any = "float32") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def formula(x: Any, weight: Any, *, cast_before_scale: bool = True) -> Any:
    """In the dtype of x; meant for float64, where the roundings of the product are not there."""
    del cast_before_scale
    return jnp.broadcast_to(weight, x.shape) * (
        x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + float(np.float32(EPS)))
    )


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", PATHS)
def test_forward_mode_is_refused(path: str) -> None:
    x, weight = draw(3, 64, seed=0), draw(64, seed=1)
    first_sentence = "can't apply forward-mode autodiff (jvp) to a custom_vjp function."
    with pytest.raises(TypeError) as caught:
        jax.jvp(lambda x: rms_norm(x, weight, implementation=path), (x,), (x,))
    assert str(caught.value).partition("\n")[0] == first_sentence
    with pytest.raises(TypeError) as caught:
        jax.jacfwd(lambda x: add_rms_norm(x, x, weight, implementation=path)[0])(x)
    assert str(caught.value).partition("\n")[0] == first_sentence


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", PATHS)
def test_first_derivatives_are_those_of_the_formula(path: str) -> None:
    """dx is rstd * (g - unit * mean(g * unit)): every element is off by a few roundings of its two terms, and by
    the mean's error, at most n roundings of the mean of absolute values, times the unit."""
    rows, n = 6, 200
    x, weight, dy = draw(rows, n, seed=0), draw(n, seed=1), draw(rows, n, seed=2)
    dx, dweight = jax.vjp(lambda x, weight: rms_norm(x, weight, eps=EPS, implementation=path), x, weight)[1](dy)
    with jax.enable_x64(True):  # noqa: FBT003
        x64, weight64, dy64 = (jnp.asarray(np.asarray(value, np.float64)) for value in (x, weight, dy))
        exact_dx, exact_dweight = (np.asarray(value) for value in jax.vjp(formula, x64, weight64)[1](dy64))
    x64, weight64, dy64 = (np.asarray(value, np.float64) for value in (x, weight, dy))
    rstd = 1 / np.sqrt(np.mean(x64**2, axis=1, keepdims=True) + EPS)
    unit, g = np.abs(x64 * rstd), np.abs(dy64 * weight64)
    roundings = n + 10  # of the sum of squares and of the products, each counted as if the sum were sequential
    bound = roundings * U32 * rstd * (g + 3 * unit * np.mean(g * unit, axis=1, keepdims=True))
    assert np.all(np.abs(dx - exact_dx) <= bound)
    assert np.all(np.abs(dweight - exact_dweight) <= roundings * U32 * np.sum(np.abs(dy64) * unit, axis=0))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("cast_before_scale", [True, False])
@pytest.mark.parametrize("path", PATHS)
def test_second_derivatives_are_those_of_the_formula(path: str, cast_before_scale: bool) -> None:  # noqa: FBT001
    """Of a penalty on the gradient, as in a WGAN: every term is a product of at most six sums over n or rows."""
    rows, n = 3, 64
    x, weight, dy = draw(rows, n, seed=3), draw(n, seed=4), draw(rows, n, seed=5)

    def penalty(norm: Any) -> Any:
        def of(x: Any, weight: Any, dy: Any) -> Any:
            dx, dweight = jax.vjp(norm, x, weight)[1](dy)
            return jnp.sum(dx * dx) + jnp.sum(jnp.sin(dweight))

        return jax.grad(of, argnums=(0, 1, 2))

    def ours(x: Any, weight: Any) -> Any:
        return rms_norm(x, weight, eps=EPS, implementation=path, cast_before_scale=cast_before_scale)

    second = penalty(ours)(x, weight, dy)
    with jax.enable_x64(True):  # noqa: FBT003
        wide = [jnp.asarray(np.asarray(value, np.float64)) for value in (x, weight, dy)]
        exact = [np.asarray(value) for value in penalty(formula)(*wide)]
    for own, truth in zip(second, exact, strict=True):
        assert np.any(truth != 0)
        assert np.linalg.norm(own - truth) <= 6 * n * U32 * np.linalg.norm(truth)


def test_the_second_derivative_does_not_take_rstd_for_a_constant() -> None:
    """A backward rule that kept the saved rstd fixed would pass every first-order test."""
    x, dy = draw(2, 64, seed=6), draw(2, 64, seed=7)

    def inner(x: Any) -> Any:
        return jnp.vdot(jax.vjp(rms_norm, x)[1](dy)[0], dy)

    direction = draw(2, 64, seed=8)
    step = 1e-2
    slope = jnp.vdot(jax.grad(inner)(x), direction)
    difference = (inner(x + step * direction) - inner(x - step * direction)) / (2 * step)
    # Central differences are off by step^2 / 6 times the third derivative, of the size of the value itself here.
    assert abs(slope - difference) <= 0.02 * abs(slope)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", PATHS)
def test_no_gradient_flows_through_rstd(path: str) -> None:
    x, weight = draw(3, 64, seed=9), draw(64, seed=10)

    def of_rstd(x: Any, weight: Any) -> Any:
        return jnp.sum(rms_norm(x, weight, return_rstd=True, implementation=path)[1])

    def of_both(x: Any, weight: Any) -> Any:
        y, rstd = rms_norm(x, weight, return_rstd=True, implementation=path)
        return jnp.sum(y * y) + jnp.sum(rstd)

    def of_y(x: Any, weight: Any) -> Any:
        return jnp.sum(rms_norm(x, weight, implementation=path) ** 2)

    assert all(not np.any(value) for value in jax.grad(of_rstd, (0, 1))(x, weight))
    for both, y in zip(jax.grad(of_both, (0, 1))(x, weight), jax.grad(of_y, (0, 1))(x, weight), strict=True):
        assert np.array_equal(both, y)


@pytest.mark.sampled(18)
@pytest.mark.parametrize("weight_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("path", PATHS)
def test_a_gradient_has_the_dtype_of_its_operand(path: str, dtype: str, weight_dtype: str) -> None:
    x, residual, weight = draw(3, 64, seed=0, dtype=dtype), draw(3, 64, seed=1, dtype=dtype), draw(64, seed=2)
    weight = weight.astype(weight_dtype)

    def norm(*operands: Any) -> Any:
        return add_rms_norm(*operands, implementation=path)

    results, pullback = jax.vjp(norm, x, residual, weight)
    gradients = pullback(results)
    assert [value.dtype for value in gradients] == [x.dtype, residual.dtype, weight.dtype]
    assert np.array_equal(gradients[0], gradients[1])  # s = x + residual


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", PATHS)
def test_a_frozen_weight_changes_no_bit_of_dx(path: str) -> None:
    x, weight = draw(5, 256, seed=0, dtype="bfloat16"), draw(256, seed=1, dtype="bfloat16")

    def norm(x: Any, weight: Any) -> Any:
        return rms_norm(x, weight, implementation=path)

    (dx,) = jax.vjp(lambda x: norm(x, weight), x)[1](x)
    (dx_stopped,) = jax.vjp(lambda x: norm(x, jax.lax.stop_gradient(weight)), x)[1](x)
    assert np.array_equal(dx, jax.vjp(norm, x, weight)[1](x)[0])
    assert np.array_equal(dx, dx_stopped)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("path", PATHS)
def test_no_weight_gives_the_gradient_of_a_weight_of_ones(path: str) -> None:
    x, dy, ones = draw(5, 256, seed=0, dtype="bfloat16"), draw(5, 256, seed=1, dtype="bfloat16"), jnp.ones(256)
    (dx,) = jax.vjp(lambda x: rms_norm(x, implementation=path), x)[1](dy)
    (dx_ones, _) = jax.vjp(lambda x, w: rms_norm(x, w, implementation=path), x, ones.astype("bfloat16"))[1](dy)
    assert np.array_equal(dx, dx_ones)


@pytest.mark.parametrize("path", PATHS)
def test_no_rows_give_an_empty_dx_and_a_dweight_of_zeros(path: str) -> None:
    x, weight = jnp.zeros((0, 64)), draw(64, seed=0)
    dx, dweight = jax.vjp(lambda x, w: rms_norm(x, w, implementation=path), x, weight)[1](x)
    assert dx.shape == (0, 64)
    assert np.array_equal(dweight, np.zeros(64))


def test_the_gradient_equals_that_of_the_specification_bit_for_bit() -> None:
    x, residual, ds = (draw(5, 256, seed=seed, dtype="bfloat16") for seed in range(3))
    weight, dy = draw(256, seed=3, dtype="bfloat16"), draw(5, 256, seed=4, dtype="bfloat16")
    reference = pallas_norm.reference

    @jax.jit
    def ours() -> Any:
        return jax.vjp(add_rms_norm, x, residual, weight)[1]((dy, ds))

    @jax.jit
    def specified() -> Any:
        s = reference.add(x, residual)
        _, rstd = reference.forward(s, weight)
        dx, dweight = reference.backward(s, weight, rstd, dy, ds)
        return dx, dx, dweight

    for own, other in zip(ours(), specified(), strict=True):
        assert np.array_equal(own, other)
