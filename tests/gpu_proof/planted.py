"""Kernels with a defect that one tool of compute-sanitizer must report: what shows that it looks at our kernels at all.

`python -m tests.gpu_proof.planted memcheck` runs the one for memcheck. They are Mosaic GPU kernels with the name of the
real ones, so that what filters the real ones out filters these out too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_norm import _compat

F32 = jnp.float32
CHUNK = 128  # a warpgroup's lanes, one element each
VECTOR = jax.ShapeDtypeStruct((CHUNK,), F32)


def _layout() -> Any:
    return _compat.row_across_warps(1, split=False)


def _kernel(body: Callable[..., None], grid: int, **options: Any) -> Callable[..., Any]:
    return _compat.kernel(body, interpret=False, grid=(grid,), grid_names=("program",), **options)


def read_past_the_end(x: jax.Array) -> jax.Array:
    """The last program of one too many reads a GB behind x: right behind it another array may lie."""
    grid = len(x) // CHUNK + 1

    def kernel(x_ref: Any, y_ref: Any) -> None:
        start = lax.axis_index("program") * CHUNK
        far = jnp.where(start < len(x), start, start + (1 << 28))
        value = _compat.load(x_ref.at[pl.ds(far, CHUNK)], _layout(), shape=(CHUNK,), interpret=False)
        _compat.store(y_ref.at[pl.ds(start, CHUNK)], value, interpret=False)

    return _kernel(kernel, grid, out_type=jax.ShapeDtypeStruct((grid * CHUNK,), F32))(x)


def race_in_shared_memory(x: jax.Array) -> jax.Array:
    """Each of two warpgroups writes its half of shared memory and reads the other's, with no barrier between."""

    def kernel(x_ref: Any, y_ref: Any, shared: Any) -> None:
        warpgroup = lax.axis_index("warpgroup")
        value = _compat.load(x_ref.at[pl.ds(0, CHUNK)], _layout(), shape=(CHUNK,), interpret=False)
        own, other = (pl.ds(half * CHUNK, CHUNK) for half in (warpgroup, 1 - warpgroup))
        _compat.store(shared.at[own], value + warpgroup.astype(F32), interpret=False)
        found = _compat.load(shared.at[other], _layout(), shape=(CHUNK,), interpret=False)
        _compat.store(y_ref.at[pl.ds(warpgroup * CHUNK, CHUNK)], found, interpret=False)

    options = {"num_threads": 2, "thread_name": "warpgroup", "scratch_types": (_compat.smem((2 * CHUNK,), F32),)}
    return _kernel(kernel, 1, out_type=jax.ShapeDtypeStruct((2 * CHUNK,), F32), **options)(x)


def read_what_nobody_wrote(x: jax.Array) -> jax.Array:
    """Adds x to a result that is not there yet."""

    def kernel(x_ref: Any, y_ref: Any) -> None:
        x, y = (
            _compat.load(ref.at[pl.ds(0, CHUNK)], _layout(), shape=(CHUNK,), interpret=False) for ref in (x_ref, y_ref)
        )
        _compat.store(y_ref, x + y, interpret=False)

    return _kernel(kernel, 1, out_type=VECTOR)(x)


def barrier_of_half_a_warpgroup(x: jax.Array) -> jax.Array:
    """64 threads of 128 come to a barrier of all; the others end, which lets it pass."""

    def kernel(x_ref: Any, y_ref: Any) -> None:
        value = _compat.load(x_ref.at[pl.ds(0, CHUNK)], _layout(), shape=(CHUNK,), interpret=False)
        _compat.store(y_ref, value, interpret=False)
        _compat._inline_ptx(
            "{ .reg .pred few; .reg .u32 thread; mov.u32 thread, %tid.x; "
            "setp.lt.u32 few, thread, 64; @few bar.sync 0; }"
        )

    return _kernel(kernel, 1, out_type=VECTOR)(x)


DEFECTS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "memcheck": read_past_the_end,
    "racecheck": race_in_shared_memory,
    "initcheck": read_what_nobody_wrote,
    "synccheck": barrier_of_half_a_warpgroup,
}

if __name__ == "__main__":
    (tool,) = sys.argv[1:]
    jax.block_until_ready(jax.jit(DEFECTS[tool])(jnp.ones(8 * CHUNK, F32)))
    print("the planted defect ran")
