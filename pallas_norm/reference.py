"""The specification: RMSNorm with Hugging Face's rounding, forward and backward, in plain JAX.

    rstd = 1 / sqrt(mean(x^2) + eps)       float32
    unit = round_to(x * rstd, x.dtype)     Hugging Face rounds here, before the weight
    y    = unit * (weight + weight_offset) one more rounding, to promote_types(x, weight)

Every kernel computes these statements in this order. These functions are also the path that runs where no kernel does.
They check nothing: the public functions have. Operands are bfloat16, float16 or float32, rstd is float32.

Source: `LlamaRMSNorm.forward` in Hugging Face transformers; Zhang and Sennrich, "Root Mean Square Layer
Normalization", 2019.
"""

# pyright: reportUnknownVariableType=false
# (lax.psum has no types.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jax.typing import DTypeLike
    from jaxtyping import Array, Float

F32 = jnp.float32
AxisName = tuple[str, ...]
AxisGroups = tuple[tuple[int, ...], ...] | None


def round_to(wide: Float[Array, "*shape"], dtype: DTypeLike) -> Float[Array, "*shape"]:
    """`wide` (float32) rounded to nearest even in `dtype`: a rounding that XLA does not remove.

    XLA drops a round trip from float32 to a 16-bit dtype and back where its fusion allows it, so both roundings are
    operations of their own. With the plain cast, 25 % of the outputs of the formula change between 512 x 1024 and
    4096 x 1024 in bfloat16 on a CPU, and 26 % are wrong in float16 on an H200, in any jitted program.
    """
    if dtype == jnp.bfloat16:
        wide = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=7)
    elif dtype == jnp.float16:
        # reduce_precision flushes float16's subnormal numbers, which are the multiples of 2^-24 below 2^-14.
        subnormal = lax.round(wide * 2.0**24, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-24
        normal = lax.reduce_precision(wide, exponent_bits=5, mantissa_bits=10)
        wide = jnp.where(jnp.abs(wide) < 2.0**-14, subnormal, normal)
    return wide.astype(dtype)


def result_dtype(x_dtype: DTypeLike, weight_dtype: DTypeLike | None) -> jnp.dtype:
    """The dtype of y: that of x, promoted by the weight's (a float32 weight makes y float32, as in Hugging Face)."""
    if weight_dtype is None:
        return jnp.dtype(x_dtype)
    with jax.numpy_dtype_promotion("standard"):  # the rule is ours, whatever the program around it allows
        return jnp.promote_types(x_dtype, weight_dtype)


def scale(weight: Float[Array, " n"], weight_offset: float) -> Float[Array, " n"]:
    """The float32 factor of each column. Adding an offset of 0.0 would turn a weight of -0.0 into 0.0."""
    return weight.astype(F32) + F32(weight_offset) if weight_offset else weight.astype(F32)


def _over_rows(columns: Float[Array, " n"], rows: Float[Array, "*batch n"]) -> Float[Array, "... n"]:
    """`columns` with the rank of `rows`: under jax.numpy_rank_promotion("raise") JAX does not add axes by itself."""
    return columns.reshape((1,) * (rows.ndim - 1) + columns.shape)


def row_mean(
    values: Float[Array, "*batch n"], axis_name: AxisName = (), axis_index_groups: AxisGroups = None
) -> Float[Array, "*batch 1"]:
    """The mean of each row; of the whole row, where every shard over `axis_name` holds some of its columns."""
    if not axis_name:
        return jnp.mean(values, axis=-1, keepdims=True)

    def add_up(part: Any) -> Any:
        return lax.psum(part, axis_name, axis_index_groups=axis_index_groups)

    return add_up(jnp.sum(values, axis=-1, keepdims=True)) / F32(values.shape[-1] * add_up(1))


def inverse_root(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / sqrt(values), each correctly rounded.

    Not lax.rsqrt, into which XLA also rewrites 1 / sqrt, unless an operation lies between: on a CPU that is off in the
    last bit in 38 of 128 values, and which ones depends on the shape of the loop (JAX 0.11, 0.12), so on other rows.
    """
    return F32(1) / lax.reduce_precision(lax.sqrt(values), exponent_bits=8, mantissa_bits=23)


def forward(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None = None,
    *,
    eps: float = 1e-6,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    axis_name: AxisName = (),
    axis_index_groups: AxisGroups = None,
) -> tuple[Float[Array, "*batch n"], Float[Array, "*batch"]]:
    """(y, rstd) of each row of x: y in the dtype of result_dtype, rstd in float32.

    Inside shard_map `axis_name` names the mesh axes over which the rows are split; a psum then adds up the squares.
    """
    wide = x.astype(F32)
    rstd = inverse_root(row_mean(wide * wide, axis_name, axis_index_groups) + F32(eps))
    unit = wide * rstd
    if cast_before_scale:
        unit = round_to(unit, x.dtype).astype(F32)  # Hugging Face rounds here, before the weight
    y = unit if weight is None else unit * _over_rows(scale(weight, weight_offset), x)
    return round_to(y, result_dtype(x.dtype, None if weight is None else weight.dtype)), rstd[..., 0]


def add(x: Float[Array, "*batch n"], residual: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
    """s = x + residual, rounded before it is normalised, as Hugging Face's decoder layers do."""
    return round_to(x.astype(F32) + residual.astype(F32), x.dtype)


def input_gradient(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None,
    rstd: Float[Array, "*batch"],
    dy: Float[Array, "*batch n"],
    ds: Float[Array, "*batch n"] | None = None,
    *,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
    axis_name: AxisName = (),
    axis_index_groups: AxisGroups = None,
) -> Float[Array, "*batch n"]:
    """dx, in the order in which Hugging Face's autograd rounds.

        g  = round_to(dy * weight, x.dtype)     the gradient of `unit`; not rounded when cast_before_scale is False
        dx = round_to(rstd * (g - unit * mean(g * unit)), x.dtype)      with unit = x * rstd, not rounded

    In the residual form `x` is s, and `ds` the gradient that reaches s from elsewhere: dx = round_to(dx + ds, x.dtype).
    `dy` has the dtype of y, `ds` and dx that of x.
    """
    unit = x.astype(F32) * rstd[..., None]
    g = dy.astype(F32) if weight is None else dy.astype(F32) * _over_rows(scale(weight, weight_offset), x)
    if cast_before_scale:
        g = round_to(g, x.dtype).astype(F32)
    dx = round_to(rstd[..., None] * (g - unit * row_mean(g * unit, axis_name, axis_index_groups)), x.dtype)
    return dx if ds is None else round_to(dx.astype(F32) + ds.astype(F32), x.dtype)


def weight_gradient(
    x: Float[Array, "*batch n"],
    rstd: Float[Array, "*batch"],
    dy: Float[Array, "*batch n"],
    *,
    cast_before_scale: bool = True,
) -> Float[Array, " n"]:
    """dweight = sum over rows of dy * unit, in float32, before its one rounding; `unit` is what the weight
    multiplied."""
    unit = x.astype(F32) * rstd[..., None]
    if cast_before_scale:
        unit = round_to(unit, x.dtype).astype(F32)
    return jnp.sum(dy.astype(F32) * unit, axis=tuple(range(x.ndim - 1)))


def backward(
    x: Float[Array, "*batch n"],
    weight: Float[Array, " n"] | None,
    rstd: Float[Array, "*batch"],
    dy: Float[Array, "*batch n"],
    ds: Float[Array, "*batch n"] | None = None,
    *,
    cast_before_scale: bool = True,
    weight_offset: float = 0.0,
) -> tuple[Float[Array, "*batch n"], Float[Array, " n"] | None]:
    """(dx, dweight): input_gradient and weight_gradient, the latter rounded to the weight's dtype."""
    dx = input_gradient(x, weight, rstd, dy, ds, cast_before_scale=cast_before_scale, weight_offset=weight_offset)
    if weight is None:
        return dx, None
    return dx, round_to(weight_gradient(x, rstd, dy, cast_before_scale=cast_before_scale), weight.dtype)
