"""sigmoid and silu of a gate in registers: _activation's statements, as instructions that nothing fuses."""

from __future__ import annotations

from typing import Any

import jax

from .. import _activation
from . import ieee
from .ieee import literal

# The power of two comes from the last bits of a sum: 1.5 * 2^23 + 126 + k is a float32 whose last nine bits are
# 126 + k, so they stand for 2^(k - 1), and the coefficients for twice theirs. A quotient that the approximation misses
# by a unit its remainder puts right, for every divisor (tests/gpu_proof/sigmoids.py); one above 2^126 has a subnormal
# inverse, which is flushed.
ROUNDER = 1.5 * 2**23 + 126


def _polynomial() -> str:
    first, *others = (literal(2 * coefficient) for coefficient in _activation.COEFFICIENTS)
    steps = (f"mul.rn.f32 p, p, r; add.rn.f32 p, p, {coefficient};" for coefficient in others)
    return f"mov.f32 p, {first}; " + " ".join(steps)


INVERSE = (  # r = 1 / p
    f"rcp.approx.ftz.f32 r, p; neg.f32 p, p; fma.rn.f32 k, p, r, {literal(1)}; fma.rn.ftz.f32 r, r, k, r;"
)
SIGMOID = f"""{{ .reg .f32 t, m, k, r, p; .reg .b32 i;
    min.NaN.f32 t, $1, {literal(-_activation.LEAST)}; max.NaN.f32 t, t, {literal(-_activation.MOST)};
    mul.rn.f32 m, t, {literal(-_activation.LOG2E)};
    add.rn.f32 m, m, {literal(ROUNDER)}; sub.rn.f32 k, m, {literal(ROUNDER)};
    neg.f32 t, t; fma.rn.f32 r, k, {literal(-_activation.LN2)}, t;
    mul.rn.f32 k, k, {literal(_activation.LN2_REST)}; sub.rn.f32 r, r, k;
    {_polynomial()}
    mov.b32 i, m; shl.b32 i, i, 23; mov.b32 m, i;
    mul.rn.f32 p, p, m; add.rn.f32 p, p, {literal(1)};
    {INVERSE} mov.f32 $0, r; }}"""


def sigmoid(gate: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """Of a float32 chunk in this layout."""
    if interpret:
        return _activation.logistic(gate, _activation.reciprocal_as_compiled)
    return ieee.mapped(SIGMOID, layout, gate)
