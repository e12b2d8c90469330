"""The specification in NumPy, from its description in docs/order.md: rstd, y, s and dx to the bit.

Nothing here comes from the package but the width of a row's columns. XLA is never the oracle.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pallas_norm.plans.backward import backward_order
from pallas_norm.plans.forward import forward_order
from tests.oracle import F32, Array, add, flushed, replay, round_to, roundings, scale


def row_sum(values: Array, width: int, *, flushes: bool = False) -> Array:
    """Of the last axis, float32. flushes: as XLA's CPU code, which takes and gives no subnormal numbers."""
    n = values.shape[-1]
    totals = np.moveaxis(flushed(values, flushes=flushes), -1, 0)[:width].copy()
    for begin in range(width, n, width):
        block = np.moveaxis(values, -1, 0)[begin : begin + width]
        columns = slice(width - len(block), None)  # the last block ends at n
        totals[columns] = flushed(totals[columns] + flushed(block, flushes=flushes), flushes=flushes)
    while len(totals) > 1:
        totals = flushed(totals[0::2] + totals[1::2], flushes=flushes)
    return totals[0]


def row_mean(values: Array, width: int, *, flushes: bool = False) -> Array:
    one_over_n = np.float32(1) / np.float32(values.shape[-1])
    return flushed(row_sum(values, width, flushes=flushes) * one_over_n, flushes=flushes)


def rstd(x: Array, eps: float, *, width: int = 0, flushes: bool = False) -> Array:
    """width: of a plan whose order is not the specified one."""
    width = width or forward_order(x.shape[-1], x.dtype).width
    with np.errstate(all="ignore"):
        wide = flushed(x.astype(F32), flushes=flushes)
        mean = row_mean(flushed(wide * wide, flushes=flushes), width, flushes=flushes)
        return F32.type(1) / np.sqrt(flushed(mean + flushed(F32.type(eps), flushes=flushes), flushes=flushes))


def forward(
    x: Array, weight: Array | None, eps: float, *, width: int = 0, flushes: bool = False, **rounding: Any
) -> tuple[Array, Array]:
    """(y, rstd); x is s in the residual form."""
    of_rows = rstd(x, eps, width=width, flushes=flushes)
    return replay(x, weight, of_rows, flushes=flushes, **rounding), of_rows


def input_gradient(
    x: Array,
    weight: Array | None,
    rstd: Array,
    dy: Array,
    ds: Array | None = None,
    *,
    weight_offset: float = 0.0,
    width: int = 0,
    flushes: bool = False,
    **rounding: Any,
) -> Array:
    """width: of a plan whose order is not the specified one."""

    def wide(value: Array) -> Array:
        return flushed(value.astype(F32), flushes=flushes)

    to = roundings(x.dtype, None if weight is None else weight.dtype, **rounding)
    if not width:
        width = backward_order(x.shape[-1], x.dtype, dy_dtype=dy.dtype, residual=ds is not None).width
    with np.errstate(all="ignore"):
        per_row = rstd[..., None]
        unit = wide(wide(x) * per_row)
        g = wide(dy)
        if weight is not None:
            g = wide(g * wide(scale(weight, weight_offset, dtype=to.weight, flushes=flushes)))
        g = wide(round_to(g, to.unit))
        mean = row_mean(wide(g * unit), width, flushes=flushes)[..., None]
        dx = round_to(wide(wide(g - wide(unit * mean)) * per_row), x.dtype)
        return dx if ds is None else round_to(wide(wide(dx) + wide(ds)), x.dtype)


def results(given: dict[str, Array], eps: float, *, residual: bool = False, **rounding: Any) -> dict[str, Array]:
    """Of rms_norm, or add_rms_norm, and its gradient."""
    x, weight = given["x"], given["weight"]
    found = {}
    if residual:
        found["s"] = x = add(x, given["residual"])
    found["y"], found["rstd"] = forward(x, weight, eps, **rounding)
    found["dx"] = input_gradient(x, weight, found["rstd"], given["dy"], given["ds"] if residual else None, **rounding)
    return found
