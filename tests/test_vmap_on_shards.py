"""Gradients under vmap inside shard_map: the members of a shard have dweights of their own, each the sum over all
shards."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm, rms_norm_gated
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
