"""a / b rounded to nearest, as IEEE prescribes, in every program for CPUs and NVIDIA GPUs.

XLA has no division that stays one: it multiplies with the inverse where b is a constant or broadcast, and computes
a / (b / c) as (a * c) / b; on a CPU 28 % of the quotients y / (amax / 448) of 4096 x 1024 came out otherwise, and on an
H200, whose instruction is off by two units in the last place at most, half of the quotients amax / 448. So what it
gives is put right by whole numbers: of a candidate q the distance a - q * b is small, and so it is known modulo 2^32.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

F32 = jnp.float32
STEPS = 2  # units in the last place that a candidate may be off: the instructions XLA uses stay within two
ONE = 1 << 23  # the leading one of a mantissa: all of that of a power of two
MAGNITUDE = 0x7FFFFFFF


def mantissa(bits: Any) -> Any:
    """With its leading one, a whole number of 24 bits."""
    return (bits & (ONE - 1)) | ONE


def exponent(bits: Any) -> Any:
    """As it is stored, of a number of either sign."""
    return (bits & MAGNITUDE) >> 23


def _is_normal(bits: Any) -> Any:
    return (exponent(bits) > 0) & (exponent(bits) < 255)


def corrected(
    a: Float[Array, "*shape"], b: Float[Array, "*shape"], q: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """The quotient of normal numbers, from a q that is off by STEPS units at most; q itself of other numbers."""
    of_a, of_b, of_q = (lax.bitcast_convert_type(value, jnp.int32) for value in (a, b, q))
    divisor, bits = mantissa(of_b), of_q
    for _ in range(STEPS):
        # a - q * b, in units of the last places of q and b: q is nearest where twice that is less than b. There is no
        # tie, a quotient of two floats lies in the middle of none; nor any so near below a power of two that the places
        # there, half as wide, would matter.
        shift = exponent(of_a) - exponent(bits) - exponent(of_b) + 150
        distance = lax.shift_left(mantissa(of_a), shift) - mantissa(bits) * divisor
        bits = bits + (2 * distance > divisor).astype(jnp.int32) - (2 * distance < -divisor).astype(jnp.int32)
    normal = _is_normal(of_a) & _is_normal(of_b) & _is_normal(of_q)
    return jnp.where(normal, lax.bitcast_convert_type(bits, F32), q)


def quotient(a: Float[Array, "*shape"], b: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """a / b of float32, correctly rounded; where a or the quotient is subnormal as XLA gives it."""
    size = jnp.abs(b)
    # An instruction may lose a quotient by a number whose inverse is subnormal.
    k = jnp.where(size < 2.0**-60, F32(2.0**100), jnp.where(size > 2.0**60, F32(2.0**-100), F32(1)))
    a, b = a * k, b * k
    return corrected(a, b, a / b)
