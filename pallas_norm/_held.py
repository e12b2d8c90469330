"""What a program computes before a call and after it, as values of its dtypes.

A kernel reads its operands from memory. XLA's program of the specification may stand in one fusion with what computed
them, and there XLA keeps float32 for 16 bits, moves constants from one product to the next, and adds to a product
before that is rounded. So a norm of a + b had other bits in a program than outside: in bfloat16 18 % of y on a CPU, and
of float32 15 % of rms_norm(x * 0.3). What goes in and comes out is rounded once more, which changes no value, and
behind a barrier, since of constants nothing else is left.

XLA of jax 0.10 also computes a cheap operand again in each of its loops on a CPU, and made one instruction of a * b + c
in one loop and two in another: y was that of one x, rstd that of another. What is divided it computes once. Of
bfloat16 it made one array anyhow.
"""

# pyright: reportUnknownVariableType=false
# (lax.platform_dependent has few types.)

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from . import _compat
from .reference import round_to

Arrays = dict[str, jax.Array]
F32 = jnp.float32


def held(value: jax.Array) -> jax.Array:
    """The value, whatever the program does with it."""
    if value.dtype in (jnp.bfloat16, jnp.float16):
        return round_to(value.astype(F32), value.dtype)
    if value.dtype == F32:
        return jnp.where(jnp.isnan(value), -value, value)  # as _row_sum.product
    return value


def _divided(value: jax.Array) -> jax.Array:
    """The value, by 1 that XLA does not know to be 1: s * (s + 1) is 0 where s is 0 or -1. A scalar it would turn into
    a factor, and a product it computes again."""
    wide = value.astype(F32)
    sign = lax.shift_right_arithmetic(lax.bitcast_convert_type(wide, jnp.int32), jnp.int32(31))
    one = lax.bitcast_convert_type(jnp.int32(0x3F800000) + sign * (sign + jnp.int32(1)), F32)
    return (wide / one).astype(value.dtype)


def _computed_once(value: jax.Array) -> jax.Array:
    if not _compat.COMPUTES_OPERANDS_AGAIN or value.dtype not in (jnp.float16, F32):
        return value
    return lax.platform_dependent(value, cpu=_divided, default=jnp.positive)


def all_held(operands: Arrays) -> Arrays:
    """One by one: a barrier of several would have each vary over the devices over which any does."""
    return {name: held(_computed_once(lax.optimization_barrier(value))) for name, value in operands.items()}


def apart(function: Callable[[Arrays], Arrays]) -> Callable[[Arrays], Arrays]:
    """`function`, of the specification, of operands that are held, with results that are: those of 16 bits it rounded
    by an operation that stays."""

    def alone(operands: Arrays) -> Arrays:
        found = function(all_held(operands))
        return {name: held(value) if value.dtype == F32 else value for name, value in found.items()}

    return alone
