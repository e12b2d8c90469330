"""With jax_enable_x64, which pallas_norm_torch itself advises for float64 tensors, the kernels are the same.

A Python int next to an int32 became an int64 then, and lax refuses the mix: no backward kernel lowered.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import jax, jax.numpy as jnp
from pallas_norm import add_rms_norm, rms_norm
assert jax.config.jax_enable_x64

def gradient(*operands):
    return jax.vjp(rms_norm, *operands)[1](operands[0])

def add_gradient(*operands):
    return jax.vjp(add_rms_norm, *operands)[1]((operands[0], operands[0]))

for n in (64, 600, 1000, 2048, 4097, 16384, 65536):
    x, weight = jax.ShapeDtypeStruct((37, n), "bfloat16"), jax.ShapeDtypeStruct((n,), "bfloat16")
    for function, operands in ((rms_norm, (x, weight)), (gradient, (x, weight)), (add_gradient, (x, x, weight))):
        jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",))
x = jax.random.normal(jax.random.key(0), (5, 64), jnp.float32)
assert rms_norm(x).dtype == jnp.float32
for implementation in ("xla", "interpret"):
    dx, = jax.vjp(lambda x: rms_norm(x, implementation=implementation), x)[1](x)
    assert dx.dtype == jnp.float32
print("lowered")
"""


@pytest.mark.slow
def test_every_kernel_lowers_with_x64() -> None:
    environment = os.environ | {"JAX_ENABLE_X64": "1", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "lowered", done.stderr[-2000:]
