"""1 / sqrt of every mantissa, on this GPU: the kernels' instructions, and XLA's operations with and without correction.

    python -m tests.gpu_proof.roots

A line for each, with how many of 2^24 values, from 1 up to 4 times powers of 4, have other bits than NumPy's on the
host. Exits with 1 where the kernels' or the corrected ones do.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_norm import _inverse_root
from pallas_norm.kernels import ieee
from tests.gpu_proof.elementwise import by_kernel

F32 = np.float32
POWERS = (-30, -12, 0, 9, 62)  # of 4, beside which ieee.SMALLEST is nothing
GENERAL = (-62, 0)  # for the instructions that take every value


def by_instructions(values: jax.Array, eps: float) -> jax.Array:
    """An eps that no value sees chooses the instructions."""
    return by_kernel(values, lambda value, layout: ieee.inverse_root(value, 1, eps, layout, interpret=False))


def every_mantissa(power: int) -> np.ndarray[Any, Any]:
    return np.ldexp(np.arange(0x3F800000, 0x40800000, dtype=np.uint32).view(F32), 2 * power)


def off(function: Callable[[jax.Array], jax.Array], values: Any, expected: Any) -> tuple[int, int]:
    """(how many have other bits, the largest distance in units in the last place)."""
    found = np.asarray(jax.jit(function)(values))
    distance = np.abs(found.view(np.int32).astype(np.int64) - expected.view(np.int32))
    return int((distance != 0).sum()), int(distance.max())


def main() -> int:
    wrong = 0
    one = F32(1)
    for power in sorted({*POWERS, *GENERAL}):
        values = every_mantissa(power)
        root = np.sqrt(values)
        paths: dict[str, tuple[Callable[[jax.Array], jax.Array], Any, Any]] = {
            "xla, root": (lax.sqrt, values, root),
            "xla, quotient": (lambda root: jnp.float32(1) / root, root, one / root),
            "xla, corrected": (_inverse_root.inverse_root, values, one / root),
        }
        if power in POWERS:
            paths["kernel"] = lambda values: by_instructions(values, ieee.SMALLEST), values, one / root
        if power in GENERAL:
            paths["kernel, any eps"] = lambda values: by_instructions(values, 0.0), values, one / root
        for name, path in paths.items():
            count, largest = off(*path)
            print(f"{name}, 4^{power}: {count} of {values.size} have other bits, the largest distance {largest}")
            wrong += count if "kernel" in name or "corrected" in name else 0
    print(f"roots: {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
