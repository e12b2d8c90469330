"""jax.export from a machine without a GPU: for CPU, and for CUDA, forward and gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from pallas_norm import add_rms_norm, rms_norm


def forward(x: jax.Array, weight: jax.Array) -> jax.Array:
    return rms_norm(x, weight)


def forward_with_rstd(x: jax.Array, weight: jax.Array) -> Any:
    return add_rms_norm(x, x, weight, return_rstd=True)


def gradient(x: jax.Array, weight: jax.Array) -> Any:
    return jax.grad(lambda x, weight: jnp.sum(rms_norm(x, weight).astype(jnp.float32) ** 2), argnums=(0, 1))(x, weight)


FUNCTIONS = [forward, forward_with_rstd, gradient]


def operands(n: int, dtype: str = "bfloat16") -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(n))
    return jax.random.normal(keys[0], (2, 5, n), dtype), jax.random.normal(keys[1], (n,), dtype)


def round_trip(function: Callable[..., Any], *arguments: Any, platform: str) -> export.Exported:
    exported = export.export(jax.jit(function), platforms=(platform,), disabled_checks=KERNEL_ALLOWED)(*arguments)
    return export.deserialize(exported.serialize())


# JAX promises no stability of a Mosaic kernel's serialised form, so an export has to name what it accepts.
KERNEL_ALLOWED = [export.DisabledSafetyCheck.custom_call(name) for name in ("mosaic_gpu", "mosaic_gpu_v2")]


@pytest.mark.sampled(12)
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="runs what was exported for a CPU")
@pytest.mark.parametrize("n", [31, 256, 1000, 4096])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_was_exported_for_a_cpu_gives_the_same_bits(function: Callable[..., Any], n: int) -> None:
    x, weight = operands(n)
    exported = round_trip(function, x, weight, platform="cpu")
    assert exported.platforms == ("cpu",)
    ours, theirs = jax.tree.leaves(jax.jit(function)(x, weight)), jax.tree.leaves(exported.call(x, weight))
    for own, other in zip(ours, theirs, strict=True):
        assert own.dtype == other.dtype
        assert np.array_equal(own, other)


@pytest.mark.sampled(12)
@pytest.mark.parametrize("n", [128, 1000, 4096, 131072])
@pytest.mark.parametrize(("function", "kernels"), [(forward, 1), (forward_with_rstd, 1), (gradient, 3)])
def test_what_was_exported_for_cuda_has_the_kernels(function: Callable[..., Any], kernels: int, n: int) -> None:
    x, weight = operands(n)
    exported = round_trip(function, x, weight, platform="cuda")
    assert exported.platforms == ("cuda",)
    assert exported.mlir_module().count("custom_call @mosaic_gpu") == kernels
    shapes = [(value.shape, value.dtype) for value in exported.out_avals]
    assert shapes == [(value.shape, value.dtype) for value in jax.tree.leaves(jax.eval_shape(function, x, weight))]


def test_what_was_exported_for_cuda_says_so_when_it_is_called_elsewhere() -> None:
    if jax.default_backend() == "gpu":
        pytest.skip("calls it where it cannot run: needs a machine whose default backend is not CUDA")
    x, weight = operands(128)
    exported = round_trip(forward, x, weight, platform="cuda")
    with pytest.raises(ValueError, match="was exported for platforms"):
        exported.call(x, weight)


def test_an_exported_forward_pass_can_still_be_differentiated() -> None:
    """With vjp_order=1 the artefact carries the backward pass too."""
    x, weight = operands(256)
    exported = export.export(jax.jit(forward), platforms=("cpu",))(x, weight)
    again = export.deserialize(exported.serialize(vjp_order=1))
    if jax.default_backend() != "cpu":
        pytest.skip("exports for a CPU and runs that: needs CPU as the default backend")
    ours, theirs = (jax.jit(lambda f=f: jax.vjp(f, x, weight)[1](x))() for f in (forward, again.call))
    for own, other in zip(ours, theirs, strict=True):
        assert np.array_equal(own, other)
