"""Sharded operands on two GPUs: the kernel runs on each one's rows, and the bits are those of one GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm

pytestmark = pytest.mark.gpu
ROWS, N = 1024, 4096


@pytest.fixture(params=[AxisType.Explicit, AxisType.Auto], ids=str)
def mesh(request: pytest.FixtureRequest) -> Mesh:
    if len(jax.devices()) < 2:
        pytest.skip(f"needs two CUDA devices; this machine has {len(jax.devices())}")
    return jax.make_mesh((2,), ("data",), axis_types=(request.param,), devices=jax.devices()[:2])


def operands() -> list[jax.Array]:
    """x, residual, dy; weight in float32, so that dweight shows its sum. Exact sums in any order."""
    draw = np.random.default_rng(0)
    x, residual = (jnp.asarray(draw.choice([-1.0, 1.0], (ROWS, N)), "bfloat16") for _ in range(2))
    dy = jnp.asarray(draw.integers(-3, 4, (ROWS, N)), "float32")
    return [x, residual, dy, jnp.asarray(draw.integers(1, 4, N), "float32")]


def forward(x: Any, residual: Any, dy: Any, weight: Any) -> Any:
    return rms_norm(x, weight), add_rms_norm(x, residual, weight)


def gradients(x: Any, residual: Any, dy: Any, weight: Any) -> Any:
    return jax.vjp(rms_norm, x, weight)[1](dy)


def placed(mesh: Mesh) -> list[jax.Array]:
    by_rows, everywhere = NamedSharding(mesh, P("data", None)), NamedSharding(mesh, P())
    return [jax.device_put(value, everywhere if value.ndim == 1 else by_rows) for value in operands()]


def assert_equal(found: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(np.asarray(one).view(np.uint8), np.asarray(other).view(np.uint8))


@pytest.mark.parametrize("function", [forward, gradients])
def test_the_bits_of_two_gpus_are_those_of_one(mesh: Mesh, function: Callable[..., Any]) -> None:
    jitted = jax.jit(function)
    program = jitted.lower(*placed(mesh)).compile().as_text()
    assert "mosaic_gpu" in program
    assert "all-gather" not in program  # every GPU works on its own rows
    assert ("all-reduce" in program) == (function is gradients)  # dweight alone is summed over the GPUs
    assert_equal(jitted(*placed(mesh)), jitted(*operands()))


def test_inside_shard_map(mesh: Mesh) -> None:
    @jax.jit
    def sharded(x: jax.Array, weight: jax.Array) -> jax.Array:
        return jax.shard_map(rms_norm, mesh=mesh, in_specs=(P("data", None), P()), out_specs=P("data", None))(x, weight)

    x, _, _, weight = placed(mesh)
    assert_equal(sharded(x, weight), jax.jit(rms_norm)(*(operands()[i] for i in (0, 3))))
