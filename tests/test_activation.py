"""sigmoid and silu: the statements of _activation, to the bit, and how far they are from the true values."""

from __future__ import annotations

import hypothesis
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as of_numpy

from pallas_norm import _activation
from pallas_norm.kernels import activation
from tests import gated_oracle, oracle
from tests.gpu_proof import sigmoids
from tests.oracle import F32, Array

BITS = np.arange(1 << 16, dtype=np.uint16)
EVERY = {"bfloat16": BITS.view(ml_dtypes.bfloat16).astype(F32), "float16": BITS.view(np.float16).astype(F32)}
NEAR = F32.type([87, 88, 87.3365, 17.33, 0.34657359, 1.0397208]).repeat(9) + 0
NEAR = np.concatenate([np.nextafter(NEAR, F32.type(step), dtype=F32) for step in (-np.inf, np.inf)] + [NEAR])
SPECIAL = {np.nan: np.nan, np.inf: 1.0, -np.inf: 0.0, 0.0: 0.5, 1e30: 1.0, -1e30: 0.0, -87.4: 0.0}


def check(gates: Array) -> None:
    expected = gated_oracle.sigmoid(oracle.flushed(gates))
    oracle.assert_same(jax.jit(_activation.sigmoid)(gates), expected)
    oracle.assert_same(jax.jit(lambda g: activation.sigmoid(g, None, interpret=True))(gates), expected)


@pytest.mark.parametrize("dtype", EVERY)
def test_of_every_gate_of_16_bits_the_bits_are_those_of_the_statements(dtype: str) -> None:
    check(EVERY[dtype])


def test_where_a_step_changes_the_bits_are_those_of_the_statements() -> None:
    check(np.concatenate([NEAR, -NEAR]))


@hypothesis.given(of_numpy.arrays(F32, 64, elements=st.floats(width=32, allow_subnormal=False)))
def test_the_bits_are_those_of_the_statements(gates: Array) -> None:
    check(gates)


def test_special_values() -> None:
    found = np.asarray(_activation.sigmoid(jnp.array(list(SPECIAL), F32)))
    oracle.assert_same(found, np.array(list(SPECIAL.values()), F32))
    gates = jnp.array([-np.inf, np.inf, -1e30], F32)
    silu = _activation.activated(gates, _activation.sigmoid(gates), "silu")
    oracle.assert_same(silu, np.array([np.nan, np.inf, -0.0], F32))


@pytest.mark.parametrize(("name", "bound"), [("sigmoid", 3.5), ("silu", 4.0)])
def test_the_distance_from_the_true_value_is_what_is_told(name: str, bound: float) -> None:
    rng = np.random.default_rng(0)
    drawn = [rng.uniform(-87, 20, 200_000).astype(F32), (2 * rng.standard_normal(200_000)).astype(F32)]
    gates = np.concatenate([*EVERY.values(), *drawn])
    gates = gates[np.isfinite(gates) & (gates > -87)]
    wide = gates.astype(np.float64)
    exact = 1 / (1 + np.exp(-wide)) * (wide if name == "silu" else 1)
    distance = np.abs(gated_oracle.activated(gates, name) - exact) / oracle.spacing(exact, F32)
    normal = np.abs(exact) > oracle.SMALLEST
    assert bound - 1 < distance[normal].max() < bound


@pytest.mark.sampled(2)
@pytest.mark.parametrize("name", _activation.ACTIVATIONS)
def test_the_slope_is_the_derivative(name: str) -> None:
    gates = np.linspace(-20, 20, 401, dtype=F32)

    def function(gate: jax.Array) -> jax.Array:
        return _activation.activated(gate, _activation.sigmoid(gate), name)

    s = gated_oracle.sigmoid(gates)
    slope = np.asarray(_activation.slope(jnp.asarray(gates), jnp.asarray(s), name))
    exact = 1 / (1 + np.exp(-gates.astype(np.float64)))
    exact = exact * (1 + gates * (1 - exact)) if name == "silu" else exact * (1 - exact)
    bound = 2.0**-22 + 2.0**-24 * np.abs(gates)  # 1 - s is off by half a unit of 1
    assert (np.abs(slope - exact) < bound).all()
    assert (np.abs(np.asarray(jax.vmap(jax.grad(function))(gates)) - exact) < bound).all()


@pytest.mark.gpu
def test_on_a_gpu_every_gate_of_16_bits_and_every_quotient_has_the_bits_of_the_statements() -> None:
    assert sigmoids.main() == 0
