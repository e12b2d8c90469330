"""sigmoid on this GPU: the kernels' instructions, and XLA's program, of every gate of 16 bits and of many of 32.

    python -m tests.gpu_proof.sigmoids

A line for each, with how many values have other bits than NumPy's on the host; then the quotient 1 / d alone, of every
mantissa. Exits with 1 where any has.
"""

from __future__ import annotations

import sys
from typing import Any

import jax
import ml_dtypes
import numpy as np

from pallas_norm import _activation
from pallas_norm.kernels import activation, ieee
from tests.gated_oracle import sigmoid
from tests.gpu_proof.elementwise import by_kernel

F32 = np.float32
RECIPROCAL = f"{{ .reg .f32 p, k, r; mov.f32 p, $1; {activation.INVERSE} mov.f32 $0, r; }}"
POWERS = (0, 1, 24, 100, 125)  # of 2, of the divisors


def of_gates(values: jax.Array) -> jax.Array:
    return by_kernel(values, lambda value, layout: activation.sigmoid(value, layout, interpret=False))


def of_divisors(values: jax.Array) -> jax.Array:
    return by_kernel(values, lambda value, layout: ieee.mapped(RECIPROCAL, layout, value))


def gates() -> dict[str, np.ndarray[Any, Any]]:
    bits, rng = np.arange(1 << 16, dtype=np.uint16), np.random.default_rng(0)
    return {
        "every bfloat16": bits.view(ml_dtypes.bfloat16).astype(F32),
        "every float16": bits.view(np.float16).astype(F32),
        "float32, near 0": rng.standard_normal(1 << 22).astype(F32),
        "float32, of all sizes": rng.uniform(-90, 90, 1 << 22).astype(F32),
    }


def main() -> int:
    wrong = 0
    for name, values in gates().items():
        for path, function in (("kernel", of_gates), ("xla", _activation.sigmoid)):
            found, expected = np.asarray(jax.jit(function)(values)), sigmoid(values)
            count = int(((found != expected) & ~(np.isnan(found) & np.isnan(expected))).sum())
            print(f"sigmoid, {path}, {name}: {count} of {values.size} have other bits")
            wrong += count
    mantissas = np.arange(0x3F800000, 0x40000000, dtype=np.uint32).view(F32)
    for power in POWERS:
        divisors = np.ldexp(mantissas, power)
        count = int((np.asarray(jax.jit(of_divisors)(divisors)) != F32(1) / divisors).sum())
        print(f"1 / d, kernel, 2^{power}: {count} of {divisors.size} have other bits")
        wrong += count
    print(f"sigmoids: {wrong} wrong")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
