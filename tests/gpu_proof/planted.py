"""Kernels with a defect that one tool of compute-sanitizer must report: what shows that it looks at our kernels at all.

`python -m tests.gpu_proof.planted memcheck` runs those for memcheck. They are Mosaic GPU kernels with the name of the
real ones, so that what filters the real ones out filters these out too; for racecheck real ones less a barrier.
"""

from __future__ import annotations

import mmap
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_norm.kernels import layouts, mosaic
from tests import rewrites, test_gpu_mutants

F32 = jnp.float32
CHUNK = 128  # a warpgroup's lanes, one element each
VECTOR = jax.ShapeDtypeStruct((CHUNK,), F32)


def _layout() -> Any:
    return layouts.row_across_warps(1, split=False)


def _kernel(body: Callable[..., None], grid: int, **options: Any) -> Callable[..., Any]:
    return mosaic.kernel(body, interpret=False, grid=(grid,), grid_names=("program",), **options)


@jax.jit
def read_past_the_end(x: jax.Array) -> jax.Array:
    """The last program of one too many reads a GB behind x: right behind it another array may lie."""
    grid = len(x) // CHUNK + 1

    def kernel(x_ref: Any, y_ref: Any) -> None:
        start = lax.axis_index("program") * CHUNK
        far = jnp.where(start < len(x), start, start + (1 << 28))
        value = layouts.load(x_ref.at[pl.ds(far, CHUNK)], _layout(), shape=(CHUNK,), interpret=False)
        layouts.store(y_ref.at[pl.ds(start, CHUNK)], value, interpret=False)

    return _kernel(kernel, grid, out_type=jax.ShapeDtypeStruct((grid * CHUNK,), F32))(x)


@jax.jit
def read_what_nobody_wrote(x: jax.Array) -> jax.Array:
    """Adds x to a result that is not there yet."""

    def kernel(x_ref: Any, y_ref: Any) -> None:
        x, y = (
            layouts.load(ref.at[pl.ds(0, CHUNK)], _layout(), shape=(CHUNK,), interpret=False) for ref in (x_ref, y_ref)
        )
        layouts.store(y_ref, x + y, interpret=False)

    return _kernel(kernel, 1, out_type=VECTOR)(x)


@jax.jit
def arrival_at_no_barrier(x: jax.Array) -> jax.Array:
    """At a place in shared memory that nobody made one. It ends the process's use of the GPU: another would not run."""

    def kernel(x_ref: Any, y_ref: Any) -> None:
        value = layouts.load(x_ref.at[pl.ds(0, CHUNK)], _layout(), shape=(CHUNK,), interpret=False)
        layouts.store(y_ref, value, interpret=False)
        names = ".reg .b64 state; .reg .u32 at; .shared .align 8 .b64 planted; mov.u32 at, planted;"
        mosaic._inline_ptx(f"{{ {names} mbarrier.arrive.shared.b64 state, [at]; }}")

    return _kernel(kernel, 1, out_type=VECTOR)(x)


def without(barrier: str) -> Callable[[jax.Array], None]:
    """A kernel of ours from which test_gpu_mutants.py takes this barrier. Not one in which a row is read before its
    bulk copy has arrived, or a total before another CTA of the cluster has sent it: racecheck reports nothing of what
    bulk copies and asynchronous stores write. Of those the mutants tell, whose bits are wrong."""

    def run(_: jax.Array) -> None:
        rewrite, kernel = test_gpu_mutants.WITHOUT[barrier]
        with rewrites.rewritten(rewrite):
            test_gpu_mutants.differing(kernel, launches=1, rows=20)

    return run


DEFECTS: dict[str, dict[str, Callable[[jax.Array], Any]]] = {
    "memcheck": {"a read past the end": read_past_the_end},
    "racecheck": {name: without(name) for name in ("backward sum", "after a chunk of dweight")},
    "initcheck": {"a read of what nobody wrote": read_what_nobody_wrote},
    "synccheck": {"an arrival at no barrier": arrival_at_no_barrier},
}


def run(tool: str) -> None:
    x = jnp.ones(8 * CHUNK, F32)
    for name, defect in DEFECTS[tool].items():
        print(f"case: {name}", flush=True)
        jax.block_until_ready(defect(x))
    print(f"{len(DEFECTS[tool])} planted defects ran")


def pages(count: int) -> mmap.mmap:
    """Memory that the process did not have: an allocation may be of some that was freed before."""
    found = mmap.mmap(-1, count)
    found.write(b"1" * count)
    return found


if __name__ == "__main__":
    run(*sys.argv[1:])
