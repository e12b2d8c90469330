"""The specification of quantised results: y as `reference.forward` gives it, then 8 bits, in plain JAX.

    amax  = max |y| of a group             a row, or 128 neighbouring elements of one; y is rounded to its dtype before
    scale = amax / largest                 one float32 division; 448 for float8_e4m3fn, 127 for int8; 2^-23 instead of 0
    q     = cast(y / scale)                one float32 division, then to nearest even, saturated

With a scale that is given (per tensor) q = cast(y / scale) alone. Each rounding is one that XLA does not remove, and
each division one that XLA does not turn into something else.

A NaN or an infinity in y makes the scale of its group NaN or infinite, and q what the division then gives: NaN, and 0
for numbers divided by an infinity. int8 has no NaN: q is 0 there, and the scale tells. -0 stays -0 in float8_e4m3fn.

Source: vLLM's dynamic per-token and per-group quantisation in float32, with the scale of compressed-tensors (0.20) for
groups of zeros; OCP 8-bit Floating Point Specification (OFP8), 2023, for e4m3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax.numpy as jnp
from jax import lax

from ._quotient import quotient as quotient

if TYPE_CHECKING:
    from jaxtyping import Array, Float, Shaped

F32 = jnp.float32
LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}
SCALE_OF_ZEROS = 2.0**-23  # torch.finfo(torch.float32).eps, as compressed-tensors takes it


def largest(magnitudes: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
    """Of each row, NaN where one is: as integers, which have the order of magnitudes, NaN above all.

    XLA's own maximum on a CPU loses NaN in some fusions: 5 rows of NaN gave -inf.
    """
    bits = jnp.max(lax.bitcast_convert_type(magnitudes, jnp.int32), axis=-1)
    return lax.bitcast_convert_type(bits, F32)


def amax(y: Float[Array, "*batch n"], group: int) -> Float[Array, "*batch groups"]:
    """The largest magnitude of each `group` neighbouring elements, in float32; NaN where one is."""
    *batch, n = y.shape
    return largest(jnp.abs(y.astype(F32)).reshape(*batch, n // group, group))


def scale_of(amax: Float[Array, "*shape"], dtype: str) -> Float[Array, "*shape"]:
    """The scale of groups with these largest magnitudes."""
    scale = quotient(amax, jnp.full(amax.shape, LARGEST[dtype], F32))
    return jnp.where(scale == 0, F32(SCALE_OF_ZEROS), scale)


def cast(wide: Float[Array, "*shape"], dtype: str) -> Shaped[Array, "*shape"]:
    """`wide` (float32) to nearest even in `dtype`, at most its largest number."""
    if dtype == "int8":
        whole = jnp.clip(lax.round(wide, lax.RoundingMethod.TO_NEAREST_EVEN), -128, 127)
        return jnp.where(jnp.isnan(wide), F32(0), whole).astype(jnp.int8)
    # On the grid of e4m3 before the conversion, which XLA does by way of float16, in two roundings, for older GPUs.
    wide = jnp.where(jnp.isnan(wide), wide, jnp.clip(wide, -LARGEST[dtype], LARGEST[dtype]))
    subnormal = lax.round(wide * 2.0**9, lax.RoundingMethod.TO_NEAREST_EVEN) * 2.0**-9
    normal = lax.reduce_precision(wide, exponent_bits=8, mantissa_bits=3)
    return jnp.where(jnp.abs(wide) < 2.0**-6, subnormal, normal).astype(jnp.float8_e4m3fn)


def by_scale(
    y: Float[Array, "*batch n"], scale: Float[Array, "*batch groups"], dtype: str
) -> Shaped[Array, "*batch n"]:
    """q, of a scale for each of the equal parts of a row."""
    *batch, n = y.shape
    groups = scale.shape[-1]
    parts = (*batch, groups, n // groups)
    divisor = jnp.broadcast_to(scale[..., None], parts)
    return cast(quotient(y.astype(F32).reshape(parts), divisor), dtype).reshape(y.shape)


def by_group(
    y: Float[Array, "*batch n"], dtype: str, group: int
) -> tuple[Shaped[Array, "*batch n"], Float[Array, "*batch groups"]]:
    """(q, scale), the scale computed for each `group` neighbouring elements of a row."""
    scale = scale_of(amax(y, group), dtype)
    return by_scale(y, scale, dtype), scale
