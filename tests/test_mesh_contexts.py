"""A mesh in context, one around auto_axes or shard_map over some axes, two in one program, an abstract one, one of one
device, and operands from before it: bits and shardings as on one device.
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
    KINDS,
    NAMES,
    OPERANDS,
    RESIDUAL,
    ROWS,
    U32,
    WEIGHT,
    N,
    X,
    assert_close,
    assert_equal,
    collectives,
    gradient,
    mesh_of,
    norm,
    on_eight,
    padded,
    placed,
)

pytestmark = on_eight


@pytest.mark.sampled(8)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spec", [P(), P("data")])
def test_a_mesh_in_context_and_operands_from_before_it(kind: str, spec: P) -> None:
    """NumPy arrays, arrays of one device, data made in the program, constraints: nothing of the op may take the mesh in
    context for its own."""
    mesh, expected = mesh_of(kind), jax.jit(norm)(*OPERANDS)
    before = [jnp.asarray(value) for value in OPERANDS]
    with jax.set_mesh(mesh):
        for operands in (OPERANDS, before):
            assert_equal(norm(*operands), expected)
            assert_equal(jax.jit(norm)(*operands), expected)
            gradient(*operands)
            jax.jit(gradient)(*operands)
        on_mesh = placed(mesh, spec, *OPERANDS)
        assert_equal(jax.jit(norm)(*on_mesh), expected)
        assert_equal(jax.jit(gradient)(*on_mesh)[0], jax.jit(gradient)(*OPERANDS)[0])
        made = jax.jit(lambda: rms_norm(jnp.ones((8, N)) * 2, jnp.ones(N)))()
        assert np.all(np.abs(made - 1) < 1e-5)
        if kind == "auto":
            constrained = jax.jit(lambda x, w: rms_norm(jax.lax.with_sharding_constraint(x, P("data")), w))
            assert_equal(constrained(before[0], before[2]), expected[0])


@pytest.mark.sampled(3)
@pytest.mark.parametrize("implementation", ["xla", "interpret", None])
def test_auto_axes_inside_explicit_ones(implementation: Any) -> None:
    mesh = mesh_of("explicit")
    x, weight = placed(mesh, P("data"), X, WEIGHT)
    with jax.set_mesh(mesh):
        f = jax.sharding.auto_axes(
            lambda x, w: rms_norm(x, w, implementation=None if implementation == "interpret" else implementation)
        )
        assert_equal(jax.jit(lambda x, w: f(x, w, out_sharding=P("data")))(x, weight), jax.jit(rms_norm)(X, WEIGHT))
    assert_equal(rms_norm(x, weight, implementation=implementation), rms_norm(X, WEIGHT, implementation=implementation))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("manual", [{"data"}, {"model"}, {"data", "model"}], ids=lambda axes: "+".join(sorted(axes)))
def test_shard_map_over_some_axes_runs_on_local_rows(kind: str, manual: set[str], check_vma: bool) -> None:  # noqa: FBT001
    if kind == "auto data, explicit model" and len(manual) == 2:
        pytest.skip("JAX cannot place an axis split over an Auto axis first and an Explicit one then")
    mesh = mesh_of(kind)
    rows = P(tuple(sorted(manual)))
    mapped = jax.shard_map(
        add_rms_norm,
        mesh=mesh,
        in_specs=(rows, rows, P()),
        out_specs=rows,
        axis_names=manual,
        check_vma=check_vma,
    )
    expected = jax.jit(add_rms_norm)(X, RESIDUAL, WEIGHT)
    operands = placed(mesh, rows, X, RESIDUAL, WEIGHT)
    assert_equal(jax.jit(mapped)(*operands), expected)
    assert collectives(mapped, *operands) == []


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_two_meshes_in_one_program(kind: str) -> None:
    one = mesh_of(kind)
    other = jax.make_mesh((2, 4), ("a", "b"), axis_types=KINDS[kind], devices=jax.devices("cpu")[:8])
    (x,) = placed(one, P("data"), X)
    (again,) = placed(other, P("b"), X)
    results = jax.jit(lambda x, y: (rms_norm(x), rms_norm(y)))(x, again)
    assert_equal(results, (jax.jit(rms_norm)(X),) * 2)


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_abstract_mesh_is_enough_to_lower(kind: str, platform: str) -> None:
    mesh = jax.sharding.AbstractMesh((4, 2), NAMES, axis_types=KINDS[kind])
    operands = [
        jax.ShapeDtypeStruct(
            value.shape, value.dtype, sharding=NamedSharding(mesh, P("data") if value.ndim > 1 else P())
        )
        for value in OPERANDS
    ]
    text = jax.jit(gradient).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    kernels = text.count("custom_call @mosaic_gpu") + text.count("custom_call @pallas_norm")
    assert kernels == (2 if "auto" in kind else 0 if platform == "cpu" else 3)


def test_an_explicit_mesh_of_one_device() -> None:
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices("cpu")[:1])
    operands = placed(mesh, P("data"), *OPERANDS)
    assert_equal(norm(*operands), jax.jit(norm)(*OPERANDS))
    assert_equal(gradient(*operands), jax.jit(gradient)(*OPERANDS))
    text = jax.jit(gradient).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["explicit", "auto"])
def test_a_weight_from_before_the_mesh_goes_with_rows_on_it(kind: str) -> None:
    """Outside jit nothing may move it: only a program knows the devices."""
    (x,) = placed(mesh_of(kind), P("data"), X)
    weight = jnp.asarray(WEIGHT)

    def gradients(x: Any, weight: Any) -> Any:
        y, pullback = jax.vjp(rms_norm, x, weight)
        return pullback(y)

    expected = jax.jit(gradients)(X, WEIGHT)
    for function in (gradients, jax.jit(gradients)):
        dx, dweight = function(x, weight)
        assert_equal(dx, expected[0])
        assert padded(dx) == ("data", None, None)
        assert_close(dweight, expected[1], 2 * ROWS * U32 * 16 * ROWS * np.abs(WEIGHT).max() * 16)
    assert_equal(rms_norm(x, weight), rms_norm(X, WEIGHT))
    assert jax.vmap(rms_norm, in_axes=(0, None))(x, weight).shape == X.shape
    with pytest.raises(TypeError, match="jvp"):
        jax.jvp(rms_norm, (x, weight), (x, weight))
