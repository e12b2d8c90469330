"""The specification of gated norms: `reference`'s statements with a gate before or behind them, in plain JAX.

    a    = silu(gate) or sigmoid(gate)     float32, of the gate as it is: _activation's statements
    h    = x * a                           float32, not rounded; with norm_before_gate h is x itself
    rstd = 1 / sqrt(mean(h^2) + eps)       of each group of group_size neighbouring elements
    unit = round_to(h * rstd, x.dtype)     with cast_before_scale=False not rounded
    v    = unit * (weight + weight_offset)
    v    = round_to(v) * a                 with norm_before_gate; to promote_types(unit, weight) before the product
    y    = round_to(v, out_dtype)          by default promote_types(x, weight)

Rows are added up in the order of the dtype of x, also where h is float32.

Source: the bodies of MambaRMSNormGated, Zamba2RMSNormGated, FalconH1RMSNormGated, Qwen3NextRMSNormGated and
KimiLinearRMSNormGated in Hugging Face transformers 5.23.
"""

# pyright: reportUnknownVariableType=false

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from . import reference
from ._activation import activated, sigmoid, slope
from ._dtypes import Dtypes, promoted
from ._inverse_root import inverse_root
from ._row_sum import product, row_mean
from .plans.backward import backward_order
from .plans.forward import forward_order
from .reference import round_to

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

F32 = jnp.float32


@dataclasses.dataclass(frozen=True)
class Form:
    """What is gated, beside the options of the norm."""

    activation: str
    norm_before_gate: bool
    group: int  # elements that share an rstd


def product_dtype(dtypes: Dtypes) -> Any:
    """What unit * weight is rounded to where a gate follows: as torch promotes."""
    return dtypes.unit if dtypes.weight is None else promoted(dtypes.unit, dtypes.weight)


def grouped(columns: Float[Array, "*batch n"], group: int) -> Float[Array, "*batch groups group"]:
    return columns.reshape(*columns.shape[:-1], columns.shape[-1] // group, group)


def _factor(weight: Any, offset: float, rows: Any) -> Any:
    """The weight's factors, of rows in groups; None without a weight."""
    if weight is None:
        return None
    factors = reference.scale(weight, offset)
    return factors.reshape((1,) * (rows.ndim - 2) + rows.shape[-2:])


def _dtypes(x: Any, weight: Any, cast_before_scale: bool, out_dtype: Any = None) -> Dtypes:  # noqa: FBT001
    of_weight = None if weight is None else weight.dtype
    return Dtypes.of(x.dtype, weight=of_weight, cast_before_scale=cast_before_scale, out_dtype=out_dtype)


def forward(
    x: Float[Array, "*batch n"],
    gate: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None,
    form: Form,
    *,
    eps: float,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    out_dtype: DTypeLike | None = None,
    ordered: bool = True,
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch groups"]]:
    """(y, rstd)."""
    dtypes = _dtypes(x, weight, cast_before_scale, out_dtype)
    wide, g = grouped(x.astype(F32), form.group), grouped(gate.astype(F32), form.group)
    a = activated(g, sigmoid(g), form.activation)
    h = wide if form.norm_before_gate else wide * a
    mean = row_mean(product(h, h), forward_order(form.group, x.dtype) if ordered else None)
    rstd = inverse_root(mean + F32(eps))
    unit = round_to(h * rstd, dtypes.unit).astype(F32)
    factor = _factor(weight, weight_offset, unit)
    v = unit if factor is None else unit * factor
    if form.norm_before_gate:
        v = round_to(v, product_dtype(dtypes)).astype(F32) * a
    return round_to(v, dtypes.y).reshape(x.shape), rstd[..., 0]


def gradients(
    x: Float[Array, "*batch n"],
    gate: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None,
    rstd: Float[Array, "*batch groups"],
    dy: Float[Array, "*batch n"],
    form: Form,
    *,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    ordered: bool = True,
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch n"], Float[Array, "*batch n"]]:
    """(dx, dgate, what dweight adds up over rows, in float32), in the order in which Hugging Face's autograd rounds.

    dv    = round_to(dy * a)                      with norm_before_gate, as v was rounded; else dy
    g     = round_to(dv * weight, unit's dtype)
    dh    = rstd * (g - u * mean(g * u))          float32, with u = h * rstd, not rounded
    dx    = round_to(dh * a, x.dtype)             with norm_before_gate round_to(dh, x.dtype)
    da    = dh * x                                with norm_before_gate dy * v
    dgate = round_to(da * slope, gate.dtype)      s * (1 + gate * (1 - s)) of silu, s * (1 - s) of sigmoid
    dweight = sum of dv * unit
    """
    dtypes = _dtypes(x, weight, cast_before_scale)
    wide, g, wide_dy = (grouped(value.astype(F32), form.group) for value in (x, gate, dy))
    s = sigmoid(g)
    a = activated(g, s, form.activation)
    h = wide if form.norm_before_gate else wide * a
    u = h * rstd[..., None]
    unit, factor = round_to(u, dtypes.unit).astype(F32), _factor(weight, weight_offset, u)
    dv, da = wide_dy, wide_dy
    if form.norm_before_gate:
        to = product_dtype(dtypes)
        da = wide_dy * round_to(unit if factor is None else unit * factor, to).astype(F32)
        dv = round_to(product(wide_dy, a), to).astype(F32)
    dunit = round_to(dv if factor is None else product(dv, factor), dtypes.unit).astype(F32)
    order = backward_order(form.group, x.dtype, dy_dtype=dy.dtype, residual=True) if ordered else None
    dh = product(dunit - product(u, row_mean(product(dunit, u), order)), rstd[..., None])
    dx = dh if form.norm_before_gate else dh * a
    da = da if form.norm_before_gate else dh * wide
    dgate = da * slope(g, s, form.activation)
    return (
        round_to(dx, x.dtype).reshape(x.shape),
        round_to(dgate, gate.dtype).reshape(x.shape),
        product(dv, unit).reshape(x.shape),
    )


def weight_gradient(terms: Float[Array, "*batch n"]) -> Float[Array, " n"]:
    """dweight before its one rounding."""
    return jnp.sum(terms, axis=tuple(range(terms.ndim - 1)))
