"""A Llama-like training step (8 layers, scan and remat) with our norms and with the plain jitted formula: device time
of a step."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import pallas_norm

LAYERS, BATCH, SEQUENCE, WIDTH, EPS = 8, 4, 2048, 4096, 1e-6


def plain_add_norm(x: jax.Array, residual: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What a JAX program writes without this library."""
    s = x + residual
    wide = s.astype(jnp.float32)
    unit = (wide * lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + EPS)).astype(s.dtype)
    return weight * unit, s


def step(parameters: dict[str, jax.Array], batch: jax.Array, add_norm: Callable[..., Any]) -> Any:
    def loss(parameters: dict[str, jax.Array]) -> jax.Array:
        @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable)
        def layer(carry: tuple[jax.Array, jax.Array], layer: dict[str, jax.Array]) -> Any:
            branch, residual = carry
            y, s = add_norm(branch, residual, layer["norm"])
            return (jax.nn.silu(y @ layer["up"]) @ layer["down"], s), None

        (branch, residual), _ = lax.scan(layer, (jnp.zeros_like(batch), batch), parameters)
        return jnp.mean(jnp.square((branch + residual).astype(jnp.float32)))

    value, gradient = jax.value_and_grad(loss)(parameters)
    return value, jax.tree.map(lambda p, g: (p - 0.01 * g).astype(p.dtype), parameters, gradient)


def run(repetitions: int = 30) -> list[dict[str, Any]]:
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (LAYERS, WIDTH, WIDTH)
    parameters = {
        "norm": jnp.ones((LAYERS, WIDTH), jnp.bfloat16),
        "up": (jax.random.normal(keys[0], shape, jnp.float32) / WIDTH**0.5).astype(jnp.bfloat16),
        "down": (jax.random.normal(keys[1], shape, jnp.float32) / WIDTH**0.5).astype(jnp.bfloat16),
    }
    batch = jax.random.normal(keys[2], (BATCH, SEQUENCE, WIDTH), jnp.bfloat16)
    providers = {
        "pallas-norm": functools.partial(pallas_norm.add_rms_norm, eps=EPS),
        "plain formula": plain_add_norm,
    }
    steps = {name: jax.jit(functools.partial(step, add_norm=add_norm)) for name, add_norm in providers.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    for call in steps.values():
        for _ in range(3):
            jax.block_until_ready(call(parameters, batch))
    for _ in range(repetitions):  # in turn, so that clocks and neighbours treat both alike
        for name, call in steps.items():
            start = time.perf_counter()
            jax.block_until_ready(call(parameters, batch))
            samples[name].append(1e3 * (time.perf_counter() - start))
    rows = []
    for name, times in samples.items():
        print(f"{name:14} {statistics.median(times):.2f} ms a step", flush=True)
        rows.append(
            {
                "provider": name,
                "median_ms": round(statistics.median(times), 3),
                "samples_ms": [round(t, 3) for t in times],
            }
        )
    return rows
