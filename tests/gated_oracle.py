"""What gated norms must be: NumPy and ml_dtypes, from docs/gated.md. Written anew; XLA is never the oracle."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from pallas_norm.plans.backward import backward_order
from pallas_norm.plans.forward import forward_order
from tests import specified
from tests.oracle import F32, Array, flushed, result_dtype, round_to, scale

LOG2E, LN2, LN2_REST = np.float32(1.442695), np.float32(0.69314575), np.float32(1.4286068e-06)
POLYNOMIAL = (0.008289718, 0.04189784, 0.16667648, 0.4999915, 0.9999997, 1.0)


def sigmoid(gate: Array) -> Array:
    """Of float32: each line rounds once for each operation."""
    one = np.float32(1)
    with np.errstate(all="ignore"):
        t = -np.clip(gate, np.float32(-88), np.float32(87))
        k = np.rint(t * LOG2E)
        r = t - k * LN2
        r = r - k * LN2_REST
        p = np.full_like(r, POLYNOMIAL[0])
        for coefficient in POLYNOMIAL[1:]:
            p = p * r
            p = p + np.float32(coefficient)
        divisor = one + np.ldexp(p, np.where(np.isnan(k), 0, k).astype(np.int32))
        return np.where(divisor > 2.0**126, np.float32(0), one / divisor)


def activated(gate: Array, name: str) -> Array:
    with np.errstate(all="ignore"):
        s = sigmoid(gate)
        return gate * s if name == "silu" else s


class Gate(NamedTuple):
    """The options of a call, as rms_norm_gated takes them."""

    activation: str = "silu"
    norm_before_gate: bool = True
    group_size: int | None = None
    cast_before_scale: bool = True
    weight_offset: float = 0.0
    out_dtype: Any = None


class Results(NamedTuple):
    y: Array
    rstd: Array  # (..., groups)
    dx: Array | None = None
    dgate: Array | None = None
    dweight: Array | None = None  # float64, of terms that are rounded
    dweight_error: Array | None = None


def results(
    x: Array, gate: Array, weight: Array | None, dy: Array | None, how: Gate, eps: float, *, flushes: bool = False
) -> Results:
    """flushes: float32 arithmetic takes and gives no subnormal numbers."""

    def wide(value: Any) -> Array:
        return flushed(np.asarray(value).astype(F32), flushes=flushes)

    size = how.group_size or x.shape[-1]

    def parts(value: Array) -> Array:
        return wide(value).reshape(*value.shape[:-1], -1, size)

    with np.errstate(all="ignore"):
        g, rows = parts(gate), parts(x)
        s = wide(sigmoid(g))
        a = wide(g * s) if how.activation == "silu" else s
        h = rows if how.norm_before_gate else wide(rows * a)
        mean = specified.row_mean(wide(h * h), forward_order(size, x.dtype).width, flushes=flushes)
        rstd = F32.type(1) / np.sqrt(wide(mean + wide(F32.type(eps))))
        u = wide(h * rstd[..., None])
        of_unit = np.dtype(x.dtype) if how.cast_before_scale else F32
        of_v = result_dtype(of_unit, None if weight is None else weight.dtype)
        unit = wide(round_to(u, of_unit))
        factor = np.ones((1, size), F32) if weight is None else wide(scale(weight, how.weight_offset, flushes=flushes))
        factor = factor.reshape(-1, size)
        v = wide(unit * factor)
        if how.norm_before_gate:
            v = wide(round_to(v, of_v))
        y = wide(v * a) if how.norm_before_gate else v
        default = result_dtype(x.dtype, None if weight is None else weight.dtype)
        y = round_to(y, default if how.out_dtype is None else how.out_dtype).reshape(x.shape)
        if dy is None:
            return Results(y, rstd)
        dv = parts(dy)
        da = wide(dv * v)
        if how.norm_before_gate:
            dv = wide(round_to(wide(dv * a), of_v))
        dunit = wide(round_to(wide(dv * factor), of_unit))
        order = backward_order(size, x.dtype, dy_dtype=dy.dtype, residual=True)
        mean = specified.row_mean(wide(dunit * u), order.width, flushes=flushes)[..., None]
        dh = wide(wide(dunit - wide(u * mean)) * rstd[..., None])
        dx = dh if how.norm_before_gate else wide(dh * a)
        da = da if how.norm_before_gate else wide(dh * rows)
        rest = wide(F32.type(1) - s)
        slope = wide(s * wide(wide(g * rest) + F32.type(1))) if how.activation == "silu" else wide(s * rest)
        terms = (dv.astype(np.float64) * unit).reshape(-1, x.shape[-1])
        of_dweight = terms.sum(0)
        bound = (len(terms) + 2) * 2.0**-24 * np.abs(terms).sum(0) + len(terms) * 2.0**-125
        dx, dgate = (round_to(value, to.dtype).reshape(x.shape) for value, to in ((dx, x), (wide(da * slope), gate)))
    return Results(y, rstd, dx, dgate, of_dweight, bound)
