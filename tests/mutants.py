"""Wrong kernels that the suite must kill: small functions over emulated rows. rewrites.py changes the real ones' text.

The emulation is the specification in NumPy. A mutant changes one thing; the properties that kill it are in
test_mutants.py. A bug that was found once is a mutant for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from tests.oracle import BF16, F32, Array, result_dtype, round_to

Forward = Callable[..., tuple[Array, Array]]  # (x, weight, eps) -> (y, rstd)
Backward = Callable[..., tuple[Array, Array]]  # (x, weight, rstd, dy, ds) -> (dx, dweight)


def _narrowed(values: Array, dtype: Any) -> Array:
    return round_to(values, dtype).astype(F32)


def _truncated(values: Array, dtype: Any) -> Array:
    """Toward zero instead of to nearest."""
    with np.errstate(all="ignore"):
        near = values.astype(dtype)
        beyond = np.abs(near.astype(F32)) > np.abs(values)
        return np.where(beyond, np.nextafter(near, near.dtype.type(0)), near)


def forward(
    x: Array,
    weight: Array,
    eps: float,
    *,
    squares: Callable[[Array], Array] = lambda wide: wide * wide,
    total: Callable[[Array], Array] = lambda squares: squares.sum(axis=-1, dtype=F32),
    divisor: Callable[[int], float] = float,
    root: Callable[[Array, Any], Array] = lambda mean, eps: 1 / np.sqrt(mean + eps, dtype=F32),
    rstd_used: Callable[[Array], Array] = lambda rstd: rstd,
    unit: Callable[[Array, Any], Array] = lambda wide, dtype: _narrowed(wide, dtype),
    weighted: Callable[[Array, Array, Any], Array] = lambda unit, weight, dtype: round_to(unit * weight, dtype),
    weight_of: Callable[[Array, Any], Array] = lambda weight, dtype: weight.astype(F32),
    x_of: Callable[[Array], Array] = lambda x: x,
) -> tuple[Array, Array]:
    """The right kernel, each of whose steps a mutant may replace."""
    with np.errstate(all="ignore"):
        wide = x_of(x).astype(F32)
        mean = (total(squares(wide)) / F32.type(divisor(x.shape[-1]))).astype(F32)
        rstd = root(mean, F32.type(eps)).astype(F32)
        scaled = unit(wide * rstd_used(rstd)[..., None], x.dtype)
        y = weighted(scaled, weight_of(weight, x.dtype), result_dtype(x.dtype, weight.dtype))
    return y, rstd


def _with(**steps: Any) -> Forward:
    return lambda x, weight, eps: forward(x, weight, eps, **steps)


def _last(values: Array, replacement: Any) -> Array:
    changed = values.copy()
    changed[..., -1] = replacement
    return changed


def _stale_row(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    y, rstd = forward(x, weight, eps)
    if len(x) > 1:
        y[-1] = forward(x, weight, eps, rstd_used=lambda rstd: np.roll(rstd, 1))[0][-1]
    return y, rstd


def _no_nan(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    y, rstd = forward(x, weight, eps)
    return np.where(np.isnan(y), y.dtype.type(0), y), rstd


def _last_output_zero(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    y, rstd = forward(x, weight, eps)
    return _last(y, 0), rstd


def _batch_dependent(x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """The order of the sum depends on how many rows there are."""
    order = np.random.default_rng(len(x)).permutation(x.shape[-1])
    return forward(x, weight, eps, total=lambda squares: np.cumsum(squares[..., order], axis=-1, dtype=F32)[..., -1])


def _subnormals_flushed(values: Array) -> Array:
    return np.where(np.abs(values.astype(F32)) < 2.0**-126, values.dtype.type(0), values)


FORWARD: dict[str, Forward] = {
    "weight before the rounding": _with(unit=lambda wide, dtype: wide),
    "normalised x truncated": _with(unit=lambda wide, dtype: _truncated(wide, dtype).astype(F32)),
    "y truncated": _with(weighted=lambda unit, weight, dtype: _truncated(unit * weight, dtype)),
    "rstd rounded to the dtype of x": _with(
        root=lambda mean, eps: _narrowed(1 / np.sqrt(mean + eps), BF16), rstd_used=lambda rstd: rstd
    ),
    "rstd rounded where it is used": _with(rstd_used=lambda rstd: _narrowed(rstd, BF16)),
    "eps outside the root": _with(root=lambda mean, eps: 1 / (np.sqrt(mean) + eps)),
    "eps ignored": _with(root=lambda mean, eps: 1 / np.sqrt(mean)),
    "eps of zero taken for none": _with(root=lambda mean, eps: 1 / np.sqrt(mean + (eps or F32.type(1e-6)))),
    "eps ten times too large": _with(root=lambda mean, eps: 1 / np.sqrt(mean + 10 * eps)),
    "eps rounded to bfloat16": _with(root=lambda mean, eps: 1 / np.sqrt(mean + _narrowed(np.asarray(eps), BF16))),
    "squares in bfloat16": _with(squares=lambda wide: _narrowed(wide * wide, BF16)),
    "squares in float16": _with(squares=lambda wide: _narrowed(wide * wide, np.float16)),
    "sum in bfloat16": _with(total=lambda squares: _narrowed(np.add.accumulate(squares, axis=-1)[..., -1], BF16)),
    "mean over a power of two": _with(divisor=lambda n: 1 << (n - 1).bit_length()),
    "mean over n - 1": _with(divisor=lambda n: n - 1),
    "mean over the width padded to 32": _with(divisor=lambda n: -(-n // 32) * 32),
    "last column not in the sum": _with(total=lambda squares: squares[..., :-1].sum(axis=-1, dtype=F32)),
    "last column counted twice": _with(total=lambda squares: squares.sum(axis=-1) + squares[..., -1]),
    "tail of the vector not in the sum": _with(
        total=lambda squares: squares[..., : squares.shape[-1] // 8 * 8].sum(axis=-1, dtype=F32)
    ),
    "variance ignored": _with(root=lambda mean, eps: np.ones_like(mean)),
    "mean of x taken off": _with(squares=lambda wide: np.square(wide - wide.mean(axis=-1, keepdims=True))),
    "last row with its neighbour's rstd": _stale_row,
    "weight ignored": _with(weight_of=lambda weight, dtype: np.ones_like(weight, dtype=F32)),
    "weight shifted by one": _with(weight_of=lambda weight, dtype: np.roll(weight, 1).astype(F32)),
    "last weight stale": _with(weight_of=lambda weight, dtype: _last(weight, weight[0]).astype(F32)),
    "float32 weight rounded to the dtype of x": _with(weight_of=_narrowed),
    "offset of one added": _with(weight_of=lambda weight, dtype: weight.astype(F32) + 1),
    "offset of zero added": _with(weight_of=lambda weight, dtype: weight.astype(F32) + F32.type(0)),
    "subnormal x flushed": _with(x_of=_subnormals_flushed),
    "NaN becomes zero": _no_nan,
    "last output zero": _last_output_zero,
    "sum depends on the batch": _batch_dependent,
}


def backward(
    x: Array,
    weight: Array,
    rstd: Array,
    dy: Array,
    ds: Array | None = None,
    *,
    g_of: Callable[[Array, Array, Any], Array] = lambda dy, weight, dtype: _narrowed(dy * weight, dtype),
    mean_of: Callable[[Array], Array] = lambda values: values.mean(axis=-1, keepdims=True, dtype=F32),
    combined: Callable[[Array, Array, Array, Array], Array] = lambda rstd, g, unit, mean: rstd * (g - unit * mean),
    with_ds: Callable[[Array, Array, Any], Array] = lambda dx, ds, dtype: round_to(_narrowed(dx, dtype) + ds, dtype),
    factor: Callable[[Array, Any], Array] = _narrowed,
    over_rows: Callable[[Array], Array] = lambda terms: terms.sum(axis=0, dtype=F32),
    rstd_used: Callable[[Array], Array] = lambda rstd: rstd,
    scaled_dy: Callable[[Array, Array], Array] = lambda dy, weight: dy,
) -> tuple[Array, Array]:
    """The right gradients, each of whose steps a mutant may replace."""
    with np.errstate(all="ignore"):
        scale, wide_dy = rstd_used(rstd)[..., None], dy.astype(F32)
        unit = x.astype(F32) * scale
        g = g_of(wide_dy, weight.astype(F32), x.dtype)
        dx = combined(scale, g, unit, mean_of(g * unit))
        dx = round_to(dx, x.dtype) if ds is None else with_ds(dx, ds.astype(F32), x.dtype)
        return dx, round_to(over_rows(scaled_dy(wide_dy, weight.astype(F32)) * factor(unit, x.dtype)), weight.dtype)


def _back(**steps: Any) -> Backward:
    return lambda x, weight, rstd, dy, ds=None: backward(x, weight, rstd, dy, ds, **steps)


def _sum_in_bf16(terms: Array) -> Array:
    total = np.zeros(terms.shape[1:], F32)
    for term in terms:
        total = _narrowed(total + term, BF16)
    return total


BACKWARD: dict[str, Backward] = {
    "projection missing": _back(combined=lambda rstd, g, unit, mean: rstd * g),
    "projection with the wrong sign": _back(combined=lambda rstd, g, unit, mean: rstd * (g + unit * mean)),
    "rstd missing in dx": _back(combined=lambda rstd, g, unit, mean: g - unit * mean),
    "rstd squared in dx": _back(combined=lambda rstd, g, unit, mean: rstd * rstd * (g - unit * mean)),
    "mean over the padded width": _back(
        mean_of=lambda v: v.sum(axis=-1, keepdims=True) / F32.type(-(-v.shape[-1] // 32) * 32)
    ),
    "last column not in the mean": _back(mean_of=lambda v: v[..., :-1].sum(axis=-1, keepdims=True) / v.shape[-1]),
    "weight missing in g": _back(g_of=lambda dy, weight, dtype: dy),
    "dy * weight not rounded": _back(g_of=lambda dy, weight, dtype: dy * weight),
    "dy * weight truncated": _back(g_of=lambda dy, weight, dtype: _truncated(dy * weight, dtype).astype(F32)),
    "rstd kept in the dtype of x": _back(rstd_used=lambda rstd: _narrowed(rstd, BF16)),
    "ds not added": _back(with_ds=lambda dx, ds, dtype: round_to(dx, dtype)),
    "ds added before dx is rounded": _back(with_ds=lambda dx, ds, dtype: round_to(dx + ds, dtype)),
    "mean over n + 1": _back(mean_of=lambda v: v.sum(axis=-1, keepdims=True) / F32.type(v.shape[-1] + 1)),
    "subnormal float16 g flushed": _back(
        g_of=lambda dy, weight, dtype: np.where(
            np.abs(dy * weight) < (2.0**-14 if dtype == np.float16 else 0), 0, _narrowed(dy * weight, dtype)
        )
    ),
    "dweight of dy * weight": _back(scaled_dy=lambda dy, weight: dy * weight),
    "dweight divided by the rows": _back(over_rows=lambda terms: terms.mean(axis=0, dtype=F32)),
    "dweight with x not rounded": _back(factor=lambda unit, dtype: unit),
    "dweight of one row missing": _back(over_rows=lambda terms: terms[:-1].sum(axis=0, dtype=F32)),
    "dweight of one row twice": _back(over_rows=lambda terms: terms.sum(axis=0) + terms[0]),
    "dweight summed in bfloat16": _back(over_rows=_sum_in_bf16),
    "dweight cast before the second sum": _back(
        over_rows=lambda terms: _narrowed(terms[::2].sum(axis=0), BF16) + _narrowed(terms[1::2].sum(axis=0), BF16)
    ),
}
