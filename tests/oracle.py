"""What the results must be: the roundings replayed on the host, and float64 with derived bounds, which judge the
specification (specified.py), dweight, and what adds up in an order of its own.

NumPy and ml_dtypes only. XLA is never the oracle: it may drop the rounding that is being tested.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, Any]

BF16, F16, F32 = np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32)
DTYPES = {"bf16": BF16, "f16": F16, "f32": F32}
U = 2.0**-24  # unit roundoff of float32
SMALLEST = 2.0**-126  # the smallest normal float32: what an operation that flushes can lose
UNCOMPARABLE = np.iinfo(np.int64).max  # the distance from a number to a NaN

# --- bits -----------------------------------------------------------------------------------------------------------


def bits(values: Array) -> Array:
    """The integer view: -0 and 0 differ."""
    return values.view(np.uint16 if values.dtype.itemsize == 2 else np.uint32)


def same(actual: Array, expected: Array) -> Array:
    """Where the bits agree; a NaN agrees with any NaN."""
    both_nan = np.isnan(actual) & np.isnan(expected)
    return both_nan | (bits(actual) == bits(expected))


def assert_same(actual: Any, expected: Any) -> None:
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    actual, expected = np.atleast_1d(actual, expected)
    agree = same(actual, expected)
    if not agree.all():
        at = tuple(int(i[0]) for i in np.nonzero(~agree))
        raise AssertionError(f"{(~agree).sum()} of {agree.size} differ; at {at}: {actual[at]!r}, not {expected[at]!r}")


def ordered(values: Array) -> Array:
    """int64 in which neighbouring numbers are neighbours; -0 and 0 are one number. Not for NaN."""
    raw = bits(values).astype(np.int64)
    sign = np.int64(1) << (8 * values.dtype.itemsize - 1)
    return np.where(raw & sign, sign - raw, raw)


def ulps(actual: Array, expected: Array) -> Array:
    """Signed distance in units in the last place; 0 between NaNs, UNCOMPARABLE between a NaN and a number."""
    distance = ordered(actual) - ordered(expected)
    nan = np.isnan(actual), np.isnan(expected)
    return np.where(nan[0] & nan[1], 0, np.where(nan[0] | nan[1], UNCOMPARABLE, distance))


def spacing(values: Array, dtype: Any) -> Array:
    """The distance in `dtype` between the neighbours of each float64 value."""
    info = ml_dtypes.finfo(dtype)
    exponent = np.where(values == 0, info.minexp, np.maximum(np.frexp(np.abs(values))[1] - 1, info.minexp))
    return np.ldexp(1.0, exponent - info.nmant)


def flushed(values: Array, *, flushes: bool = True) -> Array:
    """Subnormal float32 replaced by signed zeros, as XLA's CPU code does with operands and results."""
    return (
        np.where(np.abs(values) < F32.type(SMALLEST), np.copysign(F32.type(0), values), values) if flushes else values
    )


# --- the roundings, replayed ----------------------------------------------------------------------------------------


def round_to(wide: Array, dtype: Any) -> Array:
    """float32 to nearest even in `dtype`."""
    with np.errstate(all="ignore"):
        return wide.astype(dtype)


def result_dtype(x_dtype: Any, weight_dtype: Any | None) -> np.dtype[Any]:
    """The dtype of y: two different dtypes meet in float32."""
    x_dtype = np.dtype(x_dtype)
    return x_dtype if weight_dtype is None or np.dtype(weight_dtype) == x_dtype else F32


class Roundings(NamedTuple):
    """What s, unit, the weight and y are rounded to."""

    s: np.dtype[Any]
    unit: np.dtype[Any]
    weight: np.dtype[Any] | None
    y: np.dtype[Any]


def roundings(
    x: Any,
    weight: Any | None = None,
    *,
    residual: Any | None = None,
    cast_before_scale: bool = True,
    unit_dtype: Any = None,
    round_weight: bool = False,
    out_dtype: Any = None,
    s_dtype: Any = None,
) -> Roundings:
    """The rule, told anew: of operands of these dtypes."""
    s = np.dtype(x) if residual is None else np.dtype(residual)
    if s_dtype is not None:
        s = np.dtype(s_dtype)
    unit = s
    if unit_dtype is not None:
        unit = np.dtype(unit_dtype)
    if not cast_before_scale:
        unit = F32
    kept = None if weight is None else np.dtype(weight)
    if kept is not None and round_weight and unit != F32:
        kept = unit  # where it is bfloat16 beside a float16 weight, too
    return Roundings(s, unit, kept, result_dtype(s, kept) if out_dtype is None else np.dtype(out_dtype))


def scale(
    weight: Array | None, weight_offset: float = 0.0, *, dtype: np.dtype[Any] | None = None, flushes: bool = False
) -> Array:
    """The float32 factor of each column, of the weight rounded to dtype."""
    if weight is None:
        return np.ones((), F32)
    wide = flushed(weight.astype(F32), flushes=flushes)
    if dtype is not None:
        wide = round_to(wide, dtype).astype(F32)
    return flushed(wide + F32.type(weight_offset), flushes=flushes) if weight_offset else wide


def unit(x: Array, rstd: Array, *, flushes: bool = False, **rounding: Any) -> Array:
    """What the weight multiplies, in float32."""
    with np.errstate(all="ignore"):
        wide = flushed(flushed(x.astype(F32), flushes=flushes) * rstd[..., None], flushes=flushes)
    return round_to(wide, roundings(x.dtype, **rounding).unit).astype(F32)


def replay(
    x: Array,
    weight: Array | None,
    rstd: Array,
    *,
    weight_offset: float = 0.0,
    flushes: bool = False,
    **rounding: Any,
) -> Array:
    """y, from the kernel's own rstd. `flushes`: float32 arithmetic takes and gives no subnormal numbers."""
    to = roundings(x.dtype, None if weight is None else weight.dtype, **rounding)
    with np.errstate(all="ignore"):
        wide = unit(x, rstd, flushes=flushes, **rounding)
        factor = scale(weight, weight_offset, dtype=to.weight, flushes=flushes)
        wide = flushed(flushed(wide, flushes=flushes) * flushed(factor, flushes=flushes), flushes=flushes)
    return round_to(wide, to.y)


def add(x: Array, residual: Array, s_dtype: Any = None, *, flushes: bool = False) -> Array:
    """s = x + residual, rounded once."""
    wide = (flushed(value.astype(F32), flushes=flushes) for value in (x, residual))
    with np.errstate(all="ignore"):
        return round_to(flushed(np.add(*wide), flushes=flushes), residual.dtype if s_dtype is None else s_dtype)


# --- rstd in float64 ------------------------------------------------------------------------------------------------


def mean_square64(x: Array, eps: float) -> Array:
    with np.errstate(all="ignore"):
        return np.mean(np.square(x.astype(np.float64)), axis=-1) + np.float64(np.float32(eps))


def rstd64(x: Array, eps: float) -> Array:
    with np.errstate(all="ignore"):
        return 1 / np.sqrt(mean_square64(x, eps))


def rstd_error(rstd: Array, x: Array, eps: float) -> Array:
    """Distance from float64 in units in the last place of float32, a fraction."""
    exact = rstd64(x, eps)
    with np.errstate(all="ignore"):  # rows that are not judged may be infinite or NaN
        return np.abs(rstd.astype(np.float64) - exact) / spacing(exact, F32)


def rstd_bound(additions: int) -> float:
    """rsqrt, division and the addition of eps take two units; squares do not cancel, so the relative error of the
    sum is at most one 2^-24 per addition, and the square root halves it."""
    return 2 + additions / 2


def rstd_interval(x: Array, eps: float, additions: int, *, flushes: bool = False) -> tuple[Array, Array]:
    """(smallest, largest) rstd of each row that float32 may give, in whatever order it adds: for every row, also where
    the sum overflows or squares underflow. Both are NaN for a row with a NaN.

    Relative: 2^-24 for each square, addition, division, and for the addition of eps; two units for rsqrt. Absolute:
    what an operation can lose to underflow, half the smallest subnormal, or all of it where it is flushed.
    """
    n = x.shape[-1]
    eps32 = flushed(np.asarray(eps, F32), flushes=flushes).astype(np.float64)
    with np.errstate(all="ignore"):
        wide = flushed(x.astype(F32), flushes=flushes).astype(np.float64)
        total = np.sum(np.square(wide), axis=-1)
        lost = np.where(total > 0, SMALLEST if flushes else 2.0**-150, 0)  # zeros lose nothing
        relative = (additions + 2) * U
        # Squares and, flushed, their sums lose at most `lost` n times over, which the division by n undoes.
        absolute = (4 if flushes else 2) * lost
        least = np.maximum(total * (1 - relative) / n - absolute, 0) + eps32
        most = total * (1 + relative) / n + absolute + eps32
        low, high = 1 / np.sqrt(most * (1 + U) + lost * flushes), 1 / np.sqrt(least * (1 - U))
        low, high = low - 2 * spacing(low, F32), np.where(np.isinf(high), high, high + 2 * spacing(high, F32))
        overflow = 2.0**128 * (1 - 2.0**-25)
        low = np.where(total * (1 + relative) >= overflow, 0, low)
        high = np.where(total * (1 - relative) >= overflow, 0, high)
    nan = np.isnan(wide).any(axis=-1)
    return np.where(nan, np.nan, low), np.where(nan, np.nan, high)


def assert_rstd(rstd: Array, x: Array, eps: float, additions: int, *, flushes: bool = False) -> None:
    assert rstd.dtype == F32
    low, high = rstd_interval(x, eps, additions, flushes=flushes)
    wrong = ~(((rstd >= low) & (rstd <= high)) | (np.isnan(low) & np.isnan(rstd)))
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        raise AssertionError(f"rstd of row {row} is {rstd[row]!r}, not in [{low[row]!r}, {high[row]!r}]")


def judged(x: Array, eps: float) -> Array:
    """Rows whose mean of squares neither overflows nor loses a bit to underflow: those that the bound holds for."""
    mean = mean_square64(x, eps)
    return (mean * x.shape[-1] < 2.0**127) & (mean > 2.0**-100)


# --- gradients in float64, with the roundings that the specification prescribes ---------------------------------------


def gradient_of_unit(
    x: Array, weight: Array | None, dy: Array, *, weight_offset: float = 0.0, **rounding: Any
) -> Array:
    """g, in float32."""
    to = roundings(x.dtype, None if weight is None else weight.dtype, **rounding)
    with np.errstate(all="ignore"):
        g = dy.astype(F32) * scale(weight, weight_offset, dtype=to.weight)
    return round_to(g, to.unit).astype(F32)


def input_gradient64(
    x: Array, weight: Array | None, rstd: Array, dy: Array, additions: int, **rounding: Any
) -> tuple[Array, Array]:
    """(dx, the largest |kernel - dx|), componentwise: before the bound nothing but g is rounded."""
    wide_rstd = rstd.astype(np.float64)[..., None]
    unit64 = x.astype(np.float64) * wide_rstd
    g = gradient_of_unit(x, weight, dy, **rounding).astype(np.float64)
    mean = np.mean(g * unit64, axis=-1, keepdims=True)
    dx = wide_rstd * (g - unit64 * mean)
    of_sum = np.abs(unit64) * (additions + 4) * U * np.mean(np.abs(g * unit64), axis=-1, keepdims=True)
    of_rest = 6 * U * (np.abs(g) + np.abs(unit64 * mean))
    underflow = 2 * SMALLEST * (1 + wide_rstd * (1 + np.abs(unit64) * (1 + np.abs(unit64))))
    error = wide_rstd * (of_sum + of_rest) + underflow
    return dx, error + spacing(np.abs(dx) + error, x.dtype) / 2


def weight_gradient64(x: Array, rstd: Array, dy: Array, dtype: Any, **rounding: Any) -> tuple[Array, Array]:
    """(dweight, the largest |kernel - dweight|): any order of the rows' additions, then one rounding to `dtype`."""
    factor = unit(x, rstd, **rounding).astype(np.float64).reshape(-1, x.shape[-1])
    terms = dy.astype(np.float64).reshape(factor.shape) * factor
    exact = terms.sum(axis=0)
    error = (len(terms) + 1) * (U * np.abs(terms).sum(axis=0) + 2 * SMALLEST)
    return exact, error + spacing(np.abs(exact) + error, dtype) / 2


def assert_within(actual: Any, expected: Array, bound: Array) -> None:
    """Componentwise, where the result does not overflow."""
    actual = np.asarray(actual)
    largest = float(ml_dtypes.finfo(actual.dtype).max)
    with np.errstate(all="ignore"):
        inside = np.abs(expected) + bound < largest
        ratio = np.abs(actual.astype(np.float64) - expected) / bound
    wrong = inside & ~(ratio <= 1)
    if wrong.any():
        at = tuple(int(i[0]) for i in np.nonzero(wrong))
        raise AssertionError(
            f"{wrong.sum()} of {inside.sum()} outside the bound; at {at}: {actual[at]!r}, not {expected[at]!r} "
            f"(+- {bound[at]!r}, ratio {ratio[at]:.3g})"
        )
