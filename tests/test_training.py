"""A Llama-like training step: its loss curve is that of the same model written with the specification."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_norm
from pallas_norm import _held, reference

LAYERS, WIDTH, TOKENS, STEPS = 8, 64, 96, 20
Params = dict[str, jax.Array]
AddNorm = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def by_autodiff(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The forward specification, differentiated by JAX: the rounding order of its gradient is another one."""
    s = reference.add(x, residual)
    return reference.forward(s, weight)[0], s


by_specification = jax.custom_vjp(by_autodiff)


@_held.apart  # the model around it computes in bfloat16, and XLA keeps more
def _results(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    s = reference.add(given["x"], given["residual"])
    y, rstd = reference.forward(s, given["weight"])
    return {"y": y, "s": s, "rstd": rstd}


@_held.apart
def _gradients(given: dict[str, jax.Array]) -> dict[str, jax.Array]:
    dx, dweight = reference.backward(given["s"], given["weight"], given["rstd"], given["dy"], given["ds"])
    return {"dx": dx, "dweight": dweight}


def _forward(x: jax.Array, residual: jax.Array, weight: jax.Array) -> Any:
    found = _results({"x": x, "residual": residual, "weight": weight})
    return (found["y"], found["s"]), (found["s"], found["rstd"], weight)


def _backward(saved: Any, cotangents: Any) -> Any:
    given = dict(zip(("s", "rstd", "weight", "dy", "ds"), (*saved, *cotangents), strict=True))
    found = _gradients(given)
    return found["dx"], found["dx"], found["dweight"]


by_specification.defvjp(_forward, _backward)


def parameters(dtype: str) -> Params:
    rng = np.random.default_rng(0)
    return {
        "norm": jnp.asarray(1 + 0.1 * rng.standard_normal((LAYERS, WIDTH)), dtype),
        "matrix": jnp.asarray(rng.standard_normal((LAYERS, WIDTH, WIDTH)) / np.sqrt(WIDTH), dtype),
        "last_norm": jnp.ones(WIDTH, dtype),
    }


def loss(params: Params, x: jax.Array, target: jax.Array, add_norm: AddNorm) -> jax.Array:
    @jax.checkpoint
    def layer(carry: Any, layer_params: Any) -> Any:
        residual, branch = carry
        weight, matrix = layer_params
        y, residual = add_norm(branch, residual, weight)
        return (residual, jnp.tanh(y @ matrix)), None

    (residual, branch), _ = jax.lax.scan(layer, (x, jnp.zeros_like(x)), (params["norm"], params["matrix"]))
    y, _ = add_norm(branch, residual, params["last_norm"])
    return jnp.mean((y.astype(jnp.float32) - target) ** 2)


def sgd(params: Params, gradients: Params, state: Params, step: jax.Array, rate: float) -> tuple[Params, Params]:
    del step
    update = {name: (rate * value.astype(jnp.float32)).astype(value.dtype) for name, value in gradients.items()}
    return {name: params[name] - update[name] for name in params}, state


def adam(params: Params, gradients: Params, state: Params, step: jax.Array, rate: float) -> tuple[Params, Params]:
    wide = {name: value.astype(jnp.float32) for name, value in gradients.items()}
    first = {name: 0.9 * state[name][0] + 0.1 * value for name, value in wide.items()}
    second = {name: 0.99 * state[name][1] + 0.01 * value**2 for name, value in wide.items()}
    unbiased = {
        name: first[name] / (1 - 0.9**step) / (jnp.sqrt(second[name] / (1 - 0.99**step)) + 1e-8) for name in wide
    }
    moved = {name: (params[name] - (rate * unbiased[name]).astype(params[name].dtype)) for name in params}
    return moved, {name: jnp.stack([first[name], second[name]]) for name in params}


def train(add_norm: AddNorm, dtype: str, optimizer: Callable[..., Any], rate: float) -> np.ndarray:
    """The loss before each step, and after the last."""
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), dtype)
    target = jnp.asarray(rng.standard_normal((TOKENS, WIDTH)), "float32")

    @jax.jit
    def one_step(params: Params, state: Params, step: jax.Array) -> Any:
        value, gradients = jax.value_and_grad(functools.partial(loss, add_norm=add_norm))(params, x, target)
        return value, *optimizer(params, gradients, state, step, rate)

    params = parameters(dtype)
    state = {name: jnp.zeros((2, *value.shape), jnp.float32) for name, value in params.items()}
    losses = []
    for step in range(1, STEPS + 2):
        value, params, state = one_step(params, state, jnp.float32(step))
        losses.append(float(value))
    return np.array(losses)


RATES = {sgd: 1.0, adam: 0.01}


@pytest.mark.sampled(3)
@pytest.mark.parametrize(("dtype", "optimizer"), [("float32", adam), ("bfloat16", sgd), ("bfloat16", adam)])
def test_the_loss_curve_is_that_of_the_specification_bit_for_bit(dtype: str, optimizer: Callable[..., Any]) -> None:
    ours = train(pallas_norm.add_rms_norm, dtype, optimizer, RATES[optimizer])
    specified = train(by_specification, dtype, optimizer, RATES[optimizer])
    assert np.array_equal(ours, specified)
    assert np.all(np.isfinite(ours))
    assert ours[-1] < 0.9 * ours[0]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "unit_roundoff"), [("float32", 2.0**-24), ("bfloat16", 2.0**-8)])
def test_the_loss_curve_is_that_of_jax_autodiff_within_the_roundings_of_the_gradients(
    dtype: str, unit_roundoff: float
) -> None:
    """Both curves start at the same bits. A step lowers the loss by rate * |gradient|^2, so gradients that are off by
    a relative error e change the sum of all the steps by 2e of the whole fall, to first order. e is the roundings on a
    gradient's way through the layers, four at each, unbiased and independent in the elements of a row, so that the
    inner product with the gradient sees them 1 / sqrt(width) as large."""
    ours = train(pallas_norm.add_rms_norm, dtype, sgd, RATES[sgd])
    other = train(by_autodiff, dtype, sgd, RATES[sgd])
    assert ours[0] == other[0]
    error = 4 * (LAYERS + 1) * unit_roundoff / np.sqrt(WIDTH)
    assert np.all(np.abs(ours - other) <= 2 * error * (ours[0] - ours[-1]) + 2.0**-22 * ours[0])
