"""Rows shared out over meshes of jax.make_mesh, Explicit (its default) and Auto, on 8 virtual CPU devices, eager and
jitted: bits and shardings as on one device.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm
from tests.meshes import (
    DY,
    KINDS,
    OPERANDS,
    ROWS,
    U32,
    WEIGHT,
    N,
    X,
    assert_close,
    assert_equal,
    collectives,
    draw,
    gradient,
    mesh_of,
    norm,
    on_eight,
    padded,
    placed,
)

pytestmark = on_eight
BY_ROWS = {
    "batch": P("data"),
    "sequence": P(None, "data"),
    "batch and sequence": P("data", "model"),
    "batch over both axes": P(("data", "model")),
    "nothing": P(),
}
DWEIGHT_BOUND = 2 * ROWS * U32 * 16 * np.sum(np.abs(DY), axis=(0, 1))  # as in test_sharding.py


def second(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
    del residual

    def first(x: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(rms_norm, x, weight)[1](dy)

    return jax.vjp(first, x, weight, dy)[1]((ds, weight))


def of_every_kind(test: Any) -> Any:
    """JAX itself cannot split an axis over an Auto axis first and an Explicit one then: it forgets the first."""
    cases = [
        pytest.param(kind, spec, id=f"{kind}: {name}")
        for kind in KINDS
        for name, spec in BY_ROWS.items()
        if not (kind == "auto data, explicit model" and name == "batch over both axes")
    ]
    return pytest.mark.parametrize(("kind", "spec"), cases)(test)


@pytest.mark.sampled(19)
@of_every_kind
def test_rows_shared_out_over_any_axes_give_the_same_bits_without_communication(kind: str, spec: P) -> None:
    operands = placed(mesh_of(kind), spec, *OPERANDS)
    expected = jax.jit(norm)(*OPERANDS)
    for function in (jax.jit(norm), norm):
        results = function(*operands)
        assert_equal(results, expected)
        for value in results:
            assert padded(value) == (*spec, None, None, None)[: value.ndim]
    assert collectives(norm, *operands) == []


@pytest.mark.sampled(19)
@of_every_kind
def test_the_gradient_sums_dweight_in_float32_and_moves_nothing_else(kind: str, spec: P) -> None:
    operands = placed(mesh_of(kind), spec, *OPERANDS)
    expected = jax.jit(gradient)(*OPERANDS)
    for function in (jax.jit(gradient), gradient):
        dx, dresidual, dweight = function(*operands)
        assert_equal([dx, dresidual], expected[:2])
        assert padded(dx) == (*spec, None, None, None)[:3]
        assert_close(dweight, expected[2], DWEIGHT_BOUND)
    assert set(collectives(gradient, *operands)) <= ({("all-reduce", f"f32[{N}]")} if spec else set())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_second_derivatives_are_those_of_one_device(kind: str) -> None:
    operands = placed(mesh_of(kind), BY_ROWS["batch and sequence"], *OPERANDS)
    expected = jax.jit(second)(*OPERANDS)
    for own, other in zip(jax.jit(second)(*operands), expected, strict=True):
        wide = np.asarray(other, np.float64)
        assert_close(own, wide, (N + ROWS) * (U32 if own.dtype == jnp.float32 else 2.0**-8) * np.abs(wide).max())


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", KINDS)
def test_vmap_of_sharded_members_is_one_program(kind: str) -> None:
    mesh = mesh_of(kind)
    x, dy = placed(mesh, P("data"), X, DY)
    expected = jax.jit(rms_norm)(X, WEIGHT)
    shared = jax.vmap(rms_norm, in_axes=(0, None))
    weight = jax.device_put(WEIGHT, NamedSharding(mesh, P()))
    assert_equal(jax.jit(shared)(x, weight), expected)
    assert_equal(shared(x, weight), expected)
    assert collectives(shared, x, weight) == []
    weights = jax.device_put(draw(8, N, seed=5, dtype="float32"), NamedSharding(mesh, P("data")))
    y = jax.jit(jax.vmap(rms_norm))(x, weights)
    assert padded(y) == ("data", None, None)
    assert_equal(y, jnp.stack([rms_norm(X[i], np.asarray(weights)[i]) for i in range(8)]))

    def gradients(x: Any, weight: Any, dy: Any) -> Any:
        return jax.vjp(rms_norm, x, weight)[1](dy)

    assert collectives(jax.vmap(gradients), x, weights, dy) == []
    dx, dweight = jax.jit(jax.vmap(gradients))(x, weights, dy)
    assert padded(dx)[0] == padded(dweight)[0] == "data"
    for i in range(8):
        alone = jax.jit(gradients)(X[i], np.asarray(weights)[i], DY[i])
        assert_equal(np.asarray(dx)[i], alone[0])
        assert_close(np.asarray(dweight)[i], alone[1], DWEIGHT_BOUND)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("weight", [P("data"), P("model"), P(("data", "model"))])
def test_a_weight_that_lies_split_keeps_rows_where_they_are(weight: P) -> None:
    """FSDP: the weight is gathered, never x; its gradient lies as it does."""
    operands = placed(mesh_of("explicit"), P("data"), *OPERANDS, weight=weight)
    assert_equal(jax.jit(norm)(*operands), jax.jit(norm)(*OPERANDS))
    dx, _, dweight = jax.jit(gradient)(*operands)
    assert_equal(dx, jax.jit(gradient)(*OPERANDS)[0])
    assert padded(dweight) == (*weight, None)[:1]
    assert all("," not in shape for _, shape in collectives(gradient, *operands))


def test_operands_that_disagree_raise_what_the_sum_raises() -> None:
    mesh = mesh_of("explicit")
    x, residual = (jax.device_put(X, NamedSharding(mesh, spec)) for spec in (P("data"), P("model")))
    for function in (jnp.add, add_rms_norm):
        with pytest.raises(Exception, match="incompatible shardings"):
            function(x, residual)
    y, s = add_rms_norm(x, jax.device_put(X, NamedSharding(mesh, P(None, "model"))))
    assert padded(y) == padded(s) == ("data", "model", None)
    assert_equal(s, add_rms_norm(X, X)[1])
