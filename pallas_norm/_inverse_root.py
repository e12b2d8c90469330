"""1 / sqrt(v), the root and the quotient each rounded to nearest, as IEEE prescribes, on CPUs and NVIDIA GPUs.

XLA's CPU code has both. On an H200 its root or its quotient was off in the last bit in half of the rows, so there what
XLA gives is put right by whole numbers: a candidate's distance from the exact square, or from 1, is small, and so it
is known modulo 2^32, whatever the compiler does with floating-point arithmetic.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax.custom_vjp and lax.platform_dependent have few types.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax

from ._quotient import ONE, STEPS, exponent, mantissa

if TYPE_CHECKING:
    from jaxtyping import Array, Float

F32 = jnp.float32


def as_compiled(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The two operations, as the compiler has them.

    Not lax.rsqrt, into which XLA also rewrites 1 / sqrt, unless an operation lies between: on a CPU that is off in the
    last bit in 38 of 128 values, and which ones depends on the shape of the loop (JAX 0.11, 0.12), so on other rows.
    """
    return F32(1) / lax.reduce_precision(lax.sqrt(values), exponent_bits=8, mantissa_bits=23)


def _bits(values: Any) -> Any:
    return lax.bitcast_convert_type(values, jnp.int32)


def _float(bits: Any) -> Any:
    return lax.bitcast_convert_type(bits, F32)


def _root_corrected(value_bits: Any, root_bits: Any) -> Any:
    """`root_bits`, or a neighbour that is nearer to the root: of normal numbers.

    With s the root's mantissa and m the value's, in units of the root's last place squared, s is right where
    (2 s - 1)^2 < 4 m < (2 s + 1)^2. Below a power of two the places are half as wide.
    """
    s = mantissa(root_bits)
    shift = exponent(value_bits) - 2 * exponent(root_bits) + 127 + 25
    distance = lax.shift_left(mantissa(value_bits), shift) - 4 * s * s
    below = jnp.where(s == ONE, 2 * s, 4 * s)
    return root_bits + (distance > 4 * s).astype(jnp.int32) - (distance <= -below).astype(jnp.int32)


def _quotient_corrected(root_bits: Any, quotient_bits: Any) -> Any:
    """`quotient_bits`, or a neighbour that is nearer to 1 / root: of normal numbers. 1 is 2^47, or 2^46, in these
    units: both are 0 modulo 2^32."""
    r, s = mantissa(quotient_bits), mantissa(root_bits)
    distance = -(r * s)
    below = jnp.where(r == ONE, 4 * distance, 2 * distance)
    return quotient_bits + (2 * distance > s).astype(jnp.int32) - (below < -s).astype(jnp.int32)


def corrected(values: Float[Array, "*shape"], root: Any = lax.sqrt, quotient: Any = None) -> Float[Array, "*shape"]:
    """From `root` and `quotient` that may be off by STEPS units in the last place."""
    small = values < 2.0**-126
    scaled = jnp.where(small, values * 2.0**48, values)
    value_bits = _bits(scaled)
    root_bits = _bits(root(scaled))
    for _ in range(STEPS):
        root_bits = _root_corrected(value_bits, root_bits)
    nearest = _float(root_bits)
    quotient_bits = _bits(F32(1) / nearest if quotient is None else quotient(nearest))
    for _ in range(STEPS):
        quotient_bits = _quotient_corrected(root_bits, quotient_bits)
    result = _float(quotient_bits) * jnp.where(small, F32(2.0**24), F32(1))
    return jnp.where((values > 0) & (values < jnp.inf), result, as_compiled(values))


@jax.custom_vjp
def _inverse_root(values: Any) -> Any:
    return lax.platform_dependent(values, cuda=corrected, default=as_compiled)


def _forward(values: Any) -> tuple[Any, Any]:
    return _inverse_root(values), values


def _backward(values: Any, cotangent: Any) -> tuple[Any]:
    root: Any = _inverse_root(values)
    return (cotangent * F32(-0.5) * root * root * root,)


_inverse_root.defvjp(_forward, _backward)


def inverse_root(values: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / sqrt(values), each correctly rounded."""
    found: Any = _inverse_root(values)
    return found
