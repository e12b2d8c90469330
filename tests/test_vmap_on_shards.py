"""Gradients under vmap inside shard_map: the members of a shard have dweights of their own, each the sum over all
shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm, rms_norm_gated, rms_norm_quantized, rms_norm_rope
from tests.meshes import draw, mesh_of, on_eight
from tests.rewrites import Rewrite, rewritten

pytestmark = on_eight

N, MEMBERS = 64, 3
NORMS: dict[str, Callable[..., Any]] = {
    "norm": lambda x, weight: rms_norm(x, weight),
    "sum": lambda x, weight: add_rms_norm(x, x, weight)[0],
    "gated": lambda x, weight: rms_norm_gated(x, x, weight),
}
X = draw(8, MEMBERS, N, seed=0, dtype="float32")
WEIGHTS = {"shared": (draw(N, seed=1, dtype="float32"), None), "own": (draw(MEMBERS, N, seed=1, dtype="float32"), 0)}


def losses(norm: str, axis: int | None) -> Callable[[Any, Any], jax.Array]:
    return lambda weight, x: jnp.sum(jnp.sin(jax.vmap(NORMS[norm], in_axes=(1, axis))(x, weight)))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("norm", NORMS)
def test_dweight_of_members_is_summed_over_the_shards(norm: str, weights: str) -> None:
    """Without the sum JAX refused the rule: its result varied over the shards, where the weight does not."""
    weight, axis = WEIGHTS[weights]
    loss = losses(norm, axis)
    expected = np.asarray(jax.grad(loss)(weight, X), np.float64)
    mesh, specs = mesh_of("auto"), {"in_specs": (P(), P("data")), "out_specs": P()}
    inside = jax.shard_map(jax.grad(loss), mesh=mesh, **specs)
    total = jax.shard_map(lambda weight, x: jax.lax.psum(loss(weight, x), "data"), mesh=mesh, **specs)
    for gradient in (inside, jax.grad(total)):
        found = np.asarray(jax.jit(gradient)(weight, X), np.float64)
        # Sums of 24 products at most, each below 8 in size, in another order.
        assert np.abs(found - expected).max() <= 2 * 24 * 2.0**-24 * 24 * 8


@pytest.mark.parametrize("norm", NORMS)
def test_a_dweight_of_one_shard_is_seen(norm: str) -> None:
    of_one = Rewrite("_sharding", "lax.psum(sums, over) if over else sums", "sums")
    gradient = jax.shard_map(
        jax.grad(losses(norm, None)), mesh=mesh_of("auto"), in_specs=(P(), P("data")), out_specs=P()
    )
    with rewritten(of_one), pytest.raises(ValueError, match="bwd rule"):
        jax.jit(gradient)(WEIGHTS["shared"][0], X)


OF_MEMBERS: dict[str, Callable[[Any], Any]] = {
    "norm": lambda weight: rms_norm(X, weight),
    "gated": lambda weight: rms_norm_gated(X, X, weight),
    "gradient of gated": lambda weight: jax.vjp(lambda x, w: rms_norm_gated(x, x, w), X, weight)[1](X),
    "quantized": lambda weight: rms_norm_quantized(X, weight),
    "scales": lambda weight: rms_norm_quantized(X, scale=jnp.abs(weight[0]) + 1)[0],
    "heads": lambda weight: rms_norm_rope(X, X, X[:, 0], X[:, 0], weight, weight),
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["explicit", "auto"])
@pytest.mark.parametrize("name", OF_MEMBERS)
def test_members_may_lie_on_the_devices_of_an_axis(name: str, kind: str) -> None:
    """Gated norms and 8-bit results mapped over operands of which one was split and others not: JAX refused."""
    kinds = {"explicit": AxisType.Explicit, "auto": AxisType.Auto}
    mesh = jax.make_mesh((8,), ("data",), devices=jax.devices("cpu")[:8], axis_types=(kinds[kind],))
    weights = draw(8, N, seed=1, dtype="float32")
    expected = jax.vmap(OF_MEMBERS[name])(weights)
    with jax.set_mesh(mesh):
        found = jax.jit(jax.vmap(OF_MEMBERS[name]))(jax.device_put(weights, NamedSharding(mesh, P("data"))))
    *others, one = jax.tree.leaves(found)
    *expected_others, other = jax.tree.leaves(expected)
    for found_one, expected_one in zip(others, expected_others, strict=True):
        assert np.asarray(found_one).tobytes() == np.asarray(expected_one).tobytes()
    if name != "gradient of gated":  # whose last one is dweight, which XLA adds up in an order of its own
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    np.testing.assert_allclose(one, other, rtol=1e-4)


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "interpret"])
def test_a_kernel_that_was_asked_for_is_not_left_out_for_members(implementation: Any) -> None:
    """XLA computed them without a word."""
    calls: dict[str, Callable[[Any], Any]] = {
        "gated": lambda weight: rms_norm_gated(X, X, weight, implementation=implementation),
        "heads": lambda weight: rms_norm_rope(X, X, X[:, 0], X[:, 0], weight, weight, implementation=implementation),
    }
    for call in calls.values():
        with pytest.raises(NotImplementedError) as raised:
            jax.vmap(call)(WEIGHTS["own"][0])
        assert str(raised.value) == (
            f'implementation="{implementation}" cannot run: each member of a vmap has a weight of its own, and a '
            "kernel has one for all rows; pass implementation=None to let XLA compile the reference"
        )
