"""What a program costs and needs: how often a call compiles, how many kernels a model has, what tracing asks."""

from __future__ import annotations

import gc
import itertools
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_norm import add_rms_norm, rms_norm

ROOT = Path(__file__).parent.parent
COMPILED = "/jax/core/compile/backend_compile_duration"


def draw(*shape: int, seed: int = 0, dtype: str = "bfloat16") -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def loss(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.sum(rms_norm(x, weight).astype(jnp.float32) ** 2)


# --- programs are kept ----------------------------------------------------------------------------------------------

X, WEIGHT = draw(4, 128), draw(128, seed=1)
OUTSIDE_JIT: dict[str, Callable[[], Any]] = {
    "grad": lambda: jax.grad(loss, (0, 1))(X, WEIGHT),
    "vjp": lambda: jax.vjp(rms_norm, X, WEIGHT)[1](X),
    "vjp of the sum": lambda: jax.vjp(add_rms_norm, X, X, WEIGHT)[1]((X, X)),
    "vmap": lambda: jax.vmap(rms_norm, in_axes=(0, None))(X, WEIGHT),
    "vmap, a weight each": lambda: jax.vmap(rms_norm)(X, X),
    "vmap of grad": lambda: jax.vmap(jax.grad(loss), in_axes=(0, None))(X, WEIGHT),
    "second derivative": lambda: jax.grad(lambda x: jnp.sum(jax.grad(loss)(x, WEIGHT).astype(jnp.float32)))(X),
    "remat": lambda: jax.grad(jax.checkpoint(rms_norm_sum))(X),
    "a plain call": lambda: rms_norm(X, WEIGHT),
}


def rms_norm_sum(x: jax.Array) -> jax.Array:
    return loss(x, WEIGHT)


@pytest.fixture
def compiles() -> Any:
    """The compilations of a test so far."""
    seen: list[str] = []

    def listen(event: str, *_: Any, **__: Any) -> None:
        if event == COMPILED:
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", OUTSIDE_JIT)
def test_a_call_outside_jit_compiles_the_first_time_only(name: str, compiles: list[str]) -> None:
    """custom_vjp and custom_vmap trace their rules anew in every transformation: 1.3 s and 4 MB a call, for ever."""
    call = OUTSIDE_JIT[name]
    jax.clear_caches()
    call()
    assert compiles  # the listener hears
    call()
    compiles.clear()
    for _ in range(5):
        call()
    assert compiles == []


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_calls() -> None:
    """A leak grows with every fifty calls; a table of JAX that is full, or what another thread keeps, with some."""

    def calls(count: int) -> None:
        for _ in range(count):
            jax.block_until_ready(OUTSIDE_JIT["grad"]())
        gc.collect()

    calls(20)
    tracemalloc.start()
    try:
        calls(20)
        held = [tracemalloc.get_traced_memory()[0]]
        for _ in range(4):
            calls(50)
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    grown = [after - before for before, after in itertools.pairwise(held)]
    assert min(grown) < 100 * 1024, grown  # a compiled program each was 1 MB


LAYERS = 64


def plain(x: jax.Array, weight: jax.Array) -> jax.Array:
    wide = x.astype(jnp.float32)
    unit = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + 1e-6)
    return weight * unit.astype(x.dtype)


def model(norm: Callable[..., Any]) -> Callable[..., Any]:
    """64 layers, unrolled, of two norms and two matrix products each."""

    def run(x: jax.Array, weights: Any, matrices: Any) -> jax.Array:
        for (first, second), (up, down) in zip(weights, matrices, strict=True):
            x = x + norm(x, first) @ up
            x = x + norm(x, second) @ down
        return jnp.sum(x.astype(jnp.float32))

    return jax.grad(run, argnums=(0, 1, 2))


def lowered(norm: Callable[..., Any], platform: str) -> tuple[str, float]:
    struct = jax.ShapeDtypeStruct
    x, weight, matrix = (struct(shape, jnp.bfloat16) for shape in ((4, 16, 256), (256,), (256, 256)))
    operands = x, [(weight, weight)] * LAYERS, [(matrix, matrix)] * LAYERS
    jax.clear_caches()
    start = time.process_time()
    text = jax.jit(model(norm)).trace(*operands).lower(lowering_platforms=(platform,)).as_text()
    return text, time.process_time() - start


def test_a_deep_model_has_one_kernel_text_for_each_distinct_norm() -> None:
    text, _ = lowered(rms_norm, "cuda")
    assert text.count("custom_call @mosaic_gpu") == 3  # forward, backward, and the sum of the parts of dweight
    assert len(text) < 2_000_000  # 18 MB, with 384 kernels
    assert "mosaic_gpu" not in lowered(rms_norm, "cpu")[0]


@pytest.mark.slow
@pytest.mark.usefixtures("implicit_promotion")  # the plain formula leaves it to JAX
@pytest.mark.parametrize("platform", ["cpu", "cuda"])
def test_a_deep_model_traces_and_lowers_about_as_fast_as_the_plain_formula(platform: str) -> None:
    """Processor time, in turns, the least of three each. On CUDA three kernels are lowered on top, once."""
    lowered(rms_norm, platform)  # imports
    ours = min(lowered(rms_norm, platform)[1] for _ in range(3))
    theirs = min(lowered(plain, platform)[1] for _ in range(3))
    assert ours <= 1.3 * theirs + (1.0 if platform == "cuda" else 0.0)


# --- tracing asks no device -----------------------------------------------------------------------------------------

NOTHING_STARTED = """
import jax, jax.numpy as jnp, numpy as np
from jax._src import xla_bridge
from pallas_norm import add_rms_norm, rms_norm

x, w = jax.ShapeDtypeStruct((4, 256), "bfloat16"), jax.ShapeDtypeStruct((256,), "bfloat16")
def gradient(x, w): return jax.vjp(rms_norm, x, w)[1](x)
def add(x, w): return add_rms_norm(x, x, w)
def of_numpy(x, w): return rms_norm(x, np.ones(256, "float32"))
for function in (rms_norm, gradient, add, of_numpy):
    jax.eval_shape(function, x, w)
    jax.make_jaxpr(function)(x, w)
    jax.eval_shape(jax.vmap(lambda x: function(x, jnp.ones(256, "bfloat16"))), x)
assert not xla_bridge.backends_are_initialized(), "a backend was started"
jax.distributed.initialize("localhost:{port}", num_processes=1, process_id=0)
assert rms_norm(jnp.ones((2, 64)), jnp.ones(64)).shape == (2, 64)
"""


def test_tracing_starts_no_backend() -> None:
    """What runs is decided when a program is lowered; jax.distributed.initialize works after eval_shape."""
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = NOTHING_STARTED.replace("{port}", str(port))
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
