"""What rotated heads must be: NumPy and ml_dtypes, from y. Each operation rounds to the dtype of y, as torch's."""

from __future__ import annotations

import numpy as np

from tests.oracle import F32, Array, flushed


def half_rotated(y: Array) -> Array:
    first, second = np.split(y, 2, axis=-1)
    return np.concatenate([-second, first], axis=-1)


def rotated(y: Array, cos: Array, sin: Array, *, flushes: bool = False) -> Array:
    """y (..., heads, n); cos and sin (..., n). flushes: float32 products that are subnormal are zeros."""
    angles = [flushed(value.astype(F32), flushes=flushes)[..., None, :] for value in (cos, sin)]
    wide = flushed(y.astype(F32), flushes=flushes)
    with np.errstate(all="ignore"):
        a, b = (
            flushed((flushed(values * of, flushes=flushes)).astype(y.dtype).astype(F32), flushes=flushes)
            for values, of in zip((wide, half_rotated(wide)), angles, strict=True)
        )
        return flushed(a + b, flushes=flushes).astype(y.dtype)


def rotated_back(dr: Array, cos: Array, sin: Array) -> Array:
    """dy, as eager torch's autograd adds it up: to zeros."""
    wide, cos, sin = dr.astype(F32), cos.astype(F32)[..., None, :], sin.astype(F32)[..., None, :]
    with np.errstate(all="ignore"):
        a, b = ((wide * of).astype(dr.dtype).astype(F32) for of in (cos, sin))
        return ((a - half_rotated(b)).astype(dr.dtype).astype(F32) + F32.type(0)).astype(dr.dtype)
