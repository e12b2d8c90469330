"""An NNX model on a mesh with Explicit axes trains as with Flax's own norms, and no activation is gathered."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.modules_compared import draw

# Flax's and Equinox's own norms, beside which ours stand, multiply what has other dtypes and ranks.
pytestmark = pytest.mark.usefixtures("implicit_promotion")

HIDDEN, HEADS, HEAD = 64, 4, 32
MOVED = re.compile(r"= \(?(\w+)\[([\d,]*)\]\S* (all-gather)")


def attention_model(kind: Any, mesh: Any) -> Any:
    """Llama's shape: a norm of the residual stream, q and k norms whose hidden axis is split over `model`."""
    from flax import nnx

    def put(value: jax.Array, spec: P) -> jax.Array:
        return jax.device_put(value, NamedSharding(mesh, spec))

    class Block(nnx.Module):
        def __init__(self, seed: int) -> None:
            rngs = nnx.Rngs(seed)
            self.norm, self.q_norm, self.k_norm = (kind(n, rngs=rngs) for n in (HIDDEN, HEADS * HEAD, HEADS * HEAD))
            self.q, self.k, self.o = (
                nnx.Param(put(draw(*shape, seed=seed + i, dtype="float32") / 8, spec))
                for i, (shape, spec) in enumerate(
                    [
                        ((HIDDEN, HEADS * HEAD), P(None, "model")),
                        ((HIDDEN, HEADS * HEAD), P(None, "model")),
                        ((HEADS * HEAD, HIDDEN), P("model", None)),
                    ]
                )
            )
            for norm, spec in ((self.norm, P()), (self.q_norm, P("model")), (self.k_norm, P("model"))):
                norm.scale = nnx.Param(put(norm.scale[...], spec))

        def __call__(self, x: jax.Array) -> jax.Array:
            h = self.norm(x)
            q, k = self.q_norm(h @ self.q[...]), self.k_norm(h @ self.k[...])
            return x + jnp.einsum("btc,cd->btd", jnp.tanh(q * k), self.o[...], out_sharding=P("data", None, None))

    class Model(nnx.Module):
        def __init__(self) -> None:
            self.first, self.second = Block(0), Block(10)

        def __call__(self, x: jax.Array) -> jax.Array:
            return self.second(self.first(x))

    return Model()


@pytest.mark.skipif(jax.local_device_count("cpu") < 8, reason="needs 8 CPU devices (jax_num_cpu_devices)")
def test_an_nnx_model_trains_on_an_explicit_mesh_as_with_flax() -> None:
    nnx = pytest.importorskip("flax.nnx", reason="needs flax (pip install flax)")
    from pallas_norm.nnx import RMSNorm

    mesh = jax.make_mesh((4, 2), ("data", "model"), devices=jax.devices("cpu")[:8])
    x = jax.device_put(draw(8, 4, HIDDEN, dtype="float32"), NamedSharding(mesh, P("data")))

    def losses(kind: Any) -> tuple[list[float], str]:
        with jax.set_mesh(mesh):
            graph, state = nnx.split(attention_model(kind, mesh))

            @jax.jit
            def step(state: Any, x: Any) -> Any:
                def loss(state: Any) -> Any:
                    return jnp.mean((nnx.merge(graph, state)(x) - jnp.roll(x, 1, axis=-1)) ** 2)

                value, gradients = jax.value_and_grad(loss)(state)
                return value, jax.tree.map(lambda p, g: p - 0.1 * g, state, gradients)

            text = step.lower(state, x).compile().as_text()
            found = []
            for _ in range(8):
                value, state = step(state, x)
                found.append(float(value))
            return found, text

    (ours, text), (theirs, _) = losses(RMSNorm), losses(nnx.RMSNorm)
    assert ours[-1] < 0.9 * ours[0]
    assert np.allclose(ours, theirs, rtol=1e-5)
    assert not [sizes for _, sizes, _ in MOVED.findall(text) if sizes.count(",") >= 2]  # no activation is gathered
