"""Meshes of 8 virtual CPU devices, of every kind of axes; operands on them; what a compiled program moves."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pallas_norm import add_rms_norm, rms_norm

on_eight = pytest.mark.skipif(
    jax.local_device_count("cpu") < 8 or jax.default_backend() != "cpu",
    reason="needs 8 CPU devices (jax.config jax_num_cpu_devices) and no other backend",
)
COLLECTIVE = re.compile(
    r"= \(?(\w+\[[\d,]*\]).*? (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)[\w-]*\("
)
NAMES = ("data", "model")
KINDS = {
    "explicit": (AxisType.Explicit, AxisType.Explicit),
    "auto": (AxisType.Auto, AxisType.Auto),
    "explicit data, auto model": (AxisType.Explicit, AxisType.Auto),
    "auto data, explicit model": (AxisType.Auto, AxisType.Explicit),
}
U32 = 2.0**-24
ROWS, N = 8 * 16, 256


def mesh_of(kind: str) -> Any:
    return jax.make_mesh((4, 2), NAMES, axis_types=KINDS[kind], devices=jax.devices("cpu")[:8])


def draw(*shape: int, seed: int, dtype: str = "bfloat16") -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


# Small integers: sums of their squares are exact, so no order of additions, XLA's or that of shards, changes a bit.
X, RESIDUAL = np.round(draw(8, 16, N, seed=0)), np.round(draw(8, 16, N, seed=1))
WEIGHT = draw(N, seed=2, dtype="float32")  # so that dweight shows its sum, not its last rounding
DY, DS = draw(8, 16, N, seed=3, dtype="float32"), draw(8, 16, N, seed=4)


def norm(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
    del dy, ds
    return rms_norm(x, weight), *add_rms_norm(x, residual, weight, return_rstd=True)


def gradient(x: Any, residual: Any, weight: Any, dy: Any, ds: Any) -> Any:
    return jax.vjp(add_rms_norm, x, residual, weight)[1]((dy, ds))


OPERANDS = (X, RESIDUAL, WEIGHT, DY, DS)
WHOLE = P()


def placed(mesh: Any, spec: P, *operands: Any, weight: P = WHOLE) -> list[Any]:
    def allowed(value: Any) -> P:
        return spec if value.ndim > 1 else weight

    return [jax.device_put(value, NamedSharding(mesh, allowed(value))) for value in operands]


def padded(value: Any) -> tuple[Any, ...]:
    return (*value.sharding.spec, *[None] * value.ndim)[: value.ndim]


def collectives(function: Callable[..., Any], *operands: Any) -> list[tuple[str, str]]:
    found = COLLECTIVE.findall(jax.jit(function).lower(*operands).compile().as_text())
    return sorted((name, shape) for shape, name in found)


def assert_equal(ours: Any, theirs: Any) -> None:
    for own, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert own.dtype == other.dtype
        assert np.array_equal(own, other)


def assert_close(own: Any, other: Any, bound: Any) -> None:
    assert np.all(np.abs(np.asarray(own, np.float64) - np.asarray(other, np.float64)) <= bound)
