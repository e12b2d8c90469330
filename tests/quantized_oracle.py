"""What quantised results must be: NumPy and ml_dtypes, from y. XLA is not asked: it turns divisions into products."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from tests.oracle import F32, Array, assert_same, flushed

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
DTYPES = {"float8_e4m3fn": E4M3, "int8": np.dtype(np.int8)}
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


def cast(wide: Array, dtype: str) -> Array:
    """float32 to nearest even, saturated."""
    with np.errstate(invalid="ignore"):
        if dtype == "int8":
            return np.where(np.isnan(wide), 0, np.clip(np.rint(wide), -128, 127)).astype(np.int8)
        return np.clip(wide, -448, 448).astype(E4M3)


def by_scale(y: Array, scale: Array, dtype: str, *, flushes: bool = False) -> Array:
    """q, of a scale for each of the equal parts of a row."""
    parts = flushed(y.astype(F32), flushes=flushes).reshape(*scale.shape, y.shape[-1] // scale.shape[-1])
    with np.errstate(all="ignore"):
        return cast(parts / scale[..., None], dtype).reshape(y.shape)


def scale_of(y: Array, dtype: str, group: int, *, flushes: bool = False) -> Array:
    parts = flushed(y.astype(F32), flushes=flushes).reshape(*y.shape[:-1], y.shape[-1] // group, group)
    with np.errstate(all="ignore"):
        scale = flushed(np.max(np.abs(parts), axis=-1) / F32.type(LARGEST[dtype]), flushes=flushes)
    return np.where(scale == 0, F32.type(2.0**-23), scale)


def assert_same_q(actual: Array, expected: Array) -> None:
    """Bit for bit: -0 is not 0; a NaN agrees with any NaN."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    if actual.dtype == E4M3:
        nan = np.isnan(actual.astype(F32)) & np.isnan(expected.astype(F32))
    else:
        nan = np.zeros(actual.shape, bool)
    wrong = ~nan & (actual.view(np.uint8) != expected.view(np.uint8))
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(f"{wrong.sum()} of {wrong.size} differ; at {at}: {actual[at]!r}, not {expected[at]!r}")


def assert_quantized(y: Array, q: Array, scale: Array, dtype: str, group: int, *, flushes: bool = False) -> None:
    """q and scale of that y; group 0: the scale was given."""
    if group:
        assert_same(scale, scale_of(y, dtype, group, flushes=flushes))
    else:
        scale = np.broadcast_to(scale, (*y.shape[:-1], 1))
    assert_same_q(q, by_scale(y, scale, dtype, flushes=flushes))
