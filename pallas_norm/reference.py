"""The specification: RMSNorm with Hugging Face's rounding, forward and backward, in plain JAX.

    rstd = 1 / sqrt(mean(x^2) + eps)       float32
    unit = round_to(x * rstd, x.dtype)     Hugging Face rounds here, before the weight
    y    = unit * (weight + weight_offset) one more rounding, to promote_types(x, weight)

With the options of `Rounding` these are roundings to other dtypes, which `_dtypes.Dtypes` tells, never one more.

Every kernel computes these statements in this order. These functions are also the path that runs where no kernel does.
They check nothing: the public functions have. Operands are bfloat16, float16 or float32, rstd is float32.

Source: `LlamaRMSNorm.forward` in Hugging Face transformers; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

# pyright: reportUnknownVariableType=false
# (lax.psum has no types.)

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from ._dtypes import Dtypes, GradientDtypes
from ._inverse_root import inverse_root
from ._row_sum import AxisGroups, AxisName, product, row_mean
from .plans.backward import backward_order
from .plans.forward import forward_order

if TYPE_CHECKING:
    from typing import Unpack

    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

F32 = jnp.float32


class Rounding(TypedDict, total=False):
    """As `rms_norm` takes them."""

    cast_before_scale: bool
    unit_dtype: DTypeLike | None
    round_weight: bool
    out_dtype: DTypeLike | None


def round_to(wide: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """`wide` (float32) rounded to nearest even in `dtype`: a rounding that XLA does not remove.

    XLA drops a round trip from float32 to a 16-bit dtype and back where its fusion allows it, so both roundings are
    operations of their own. With the plain cast, 25 % of the outputs of the formula change between 512 x 1024 and
    4096 x 1024 in bfloat16 on a CPU, and 26 % are wrong in float16 on an H200, in any jitted program.
    """
    if dtype == jnp.bfloat16:
        wide = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    elif dtype == jnp.float16:
        wide = _rounded_to_half(wide)
    return wide.astype(dtype)


@jax.custom_jvp
def _rounded_to_half(wide: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Its derivative is one. That of lax.round is zero, and that of reduce_precision flushes what it is given: second
    derivatives of small gradients vanished."""
    # reduce_precision flushes float16's subnormal numbers, which are the multiples of 2^-24 below 2^-14.
    subnormal = lax.round(wide * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
    normal = lax.reduce_precision(wide, exponent_bits=5, mantissa_bits=10)
    return jnp.where(jnp.abs(wide) < 2.0**-14, subnormal, normal)


@_rounded_to_half.defjvp
def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return _rounded_to_half(*primals), *tangents


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _rounded_weight(wide: Float[Array, "*columns"], dtype: DTypeLike) -> Float[Array, "*columns"]:
    """Rounded to `dtype`, as float32. Its derivative is one: no gradient of a float32 weight is rounded on the way."""
    return round_to(wide, dtype).astype(F32)


@_rounded_weight.defjvp
def _(dtype: DTypeLike, primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return _rounded_weight(*primals, dtype), *tangents


def scale(
    weight: Float[Array, "*columns"], weight_offset: float, dtype: DTypeLike | None = None
) -> Float[Array, "*columns"]:
    """The float32 factor of each column, in the shape in which they come, the weight rounded to `dtype` where that is
    not its own. Adding an offset of 0.0 would turn a weight of -0.0 into 0.0."""
    wide = weight.astype(F32) if dtype is None or dtype == weight.dtype else _rounded_weight(weight.astype(F32), dtype)
    return wide + F32(weight_offset) if weight_offset else wide


def _over_rows(columns: Float[Array, " n"], rows: Float[Array, "*batch n"]) -> Float[Array, "... n"]:
    """`columns` with the rank of `rows`: under jax.numpy_rank_promotion("raise") JAX does not add axes by itself."""
    return columns.reshape((1,) * (rows.ndim - 1) + columns.shape)


def forward(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    axis_name: AxisName = (),
    axis_index_groups: AxisGroups = None,
    ordered: bool = True,
    **rounding: Unpack[Rounding],
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch"]]:
    """(y, rstd) of each row of x: y in out_dtype, by default promote_types(x, weight), and rstd in float32.

        unit = round_to(x * rstd, unit_dtype)                        by default the dtype of x
        y    = round_to(unit * (weight + weight_offset), out_dtype)  with round_weight of round_to(weight, unit_dtype)

    Inside shard_map `axis_name` names the mesh axes over which the rows are split; a psum then adds up the squares.
    ordered=False leaves the order in which a row is added up to XLA, and with it the last bits.
    """
    wide = x.astype(F32)
    order = forward_order(x.shape[-1], x.dtype) if ordered else None
    mean = row_mean(product(wide, wide), order, axis_name, axis_index_groups)
    rstd = inverse_root(mean + F32(eps))
    dtypes = Dtypes.of(x.dtype, weight=None if weight is None else weight.dtype, **rounding)
    unit = round_to(wide * rstd, dtypes.unit).astype(F32)  # Hugging Face rounds here, before the weight
    y = unit if weight is None else unit * _over_rows(scale(weight, weight_offset, dtypes.weight), x)
    return round_to(y, dtypes.y), rstd[..., 0]


def add(
    x: Float[Array, "*batch n"], residual: Float[Array, "*batch n"], s_dtype: DTypeLike | None = None
) -> Float[Array, "*batch n"]:
    """s = x + residual, rounded before it is normalised, as Hugging Face's decoder layers do: to the residual's dtype,
    or to s_dtype."""
    dtypes = Dtypes.of(x.dtype, residual.dtype, s_dtype=s_dtype)
    return round_to(x.astype(F32) + residual.astype(F32), dtypes.s)


def input_gradient(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None,
    rstd: Float[Array, "*batch"],
    dy: Float[Array, "*batch n"],
    ds: Float[Array, "*batch n"] | None = None,
    *,
    weight_offset: float = 0.0,
    axis_name: AxisName = (),
    axis_index_groups: AxisGroups = None,
    ordered: bool = True,
    **rounding: Unpack[Rounding],
) -> Float[Array, "*batch n"]:
    """dx, in the order in which Hugging Face's autograd rounds.

        g  = round_to(dy * weight, unit_dtype)  the gradient of `unit`; the weight is what multiplied
        dx = round_to(rstd * (g - unit * mean(g * unit)), x.dtype)      with unit = x * rstd, not rounded

    In the residual form `x` is s, and `ds` the gradient that reaches s from elsewhere: dx = round_to(dx + ds, x.dtype),
    the gradient of s, which `passed_on` gives x and the residual. `dy` has the dtype of y, `ds` and dx that of x.
    """
    dtypes = Dtypes.of(x.dtype, weight=None if weight is None else weight.dtype, **rounding)
    unit = x.astype(F32) * rstd[..., None]
    g = dy.astype(F32)
    if weight is not None:
        g = product(g, _over_rows(scale(weight, weight_offset, dtypes.weight), x))
    g = round_to(g, dtypes.unit).astype(F32)
    order = backward_order(x.shape[-1], x.dtype, dy_dtype=dy.dtype, residual=ds is not None) if ordered else None
    mean = row_mean(product(g, unit), order, axis_name, axis_index_groups)
    dx = round_to(product(g - product(unit, mean), rstd[..., None]), x.dtype)
    return dx if ds is None else round_to(dx.astype(F32) + ds.astype(F32), x.dtype)


def narrowed(gradient: Float[Array, "*batch n"], dtype: DTypeLike | None) -> Float[Array, "*batch n"]:
    """The gradient of s as that of an operand of another dtype: s = x + residual passes it on, and the conversion
    before the sum rounds it. None: of the dtype of s."""
    return gradient if dtype is None or gradient.dtype == dtype else round_to(gradient.astype(F32), dtype)


def passed_on(total: Float[Array, "*batch n"], dtypes: GradientDtypes) -> dict[str, Float[Array, "*batch n"]]:
    """The gradient of s as dx, and where the residual has another dtype than x as dresidual."""
    gradients = {"dx": narrowed(total, dtypes.dx)}
    return gradients if dtypes.dresidual is None else gradients | {"dresidual": narrowed(total, dtypes.dresidual)}


def weight_gradient(
    x: Float[Array, "*batch n"],
    rstd: Float[Array, "*batch"],
    dy: Float[Array, "*batch n"],
    **rounding: Unpack[Rounding],
) -> Float[Array, " n"]:
    """dweight = sum over rows of dy * unit, in float32, before its one rounding; `unit` is what the weight multiplied.

    round_weight rounds the weight, and nothing on dweight's way back: it is that of the weight as it is kept.
    """
    dtypes = Dtypes.of(x.dtype, **rounding)
    unit = x.astype(F32) * rstd[..., None]
    unit = round_to(unit, dtypes.unit).astype(F32)
    return jnp.sum(dy.astype(F32) * unit, axis=tuple(range(x.ndim - 1)))


def backward(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None,
    rstd: Float[Array, "*batch"],
    dy: Float[Array, "*batch n"],
    ds: Float[Array, "*batch n"] | None = None,
    *,
    weight_offset: float = 0.0,
    **rounding: Unpack[Rounding],
) -> tuple[Float[Array, "*batch n"], Float[Array, " n"] | None]:
    """(dx, dweight): input_gradient and weight_gradient, the latter rounded to the weight's dtype."""
    dx = input_gradient(x, weight, rstd, dy, ds, weight_offset=weight_offset, **rounding)
    if weight is None:
        return dx, None
    return dx, round_to(weight_gradient(x, rstd, dy, **rounding), weight.dtype)
