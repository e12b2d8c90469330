"""sigmoid and silu of a gate, in float32: the same bits in kernels, the interpreter and XLA's programs for
CPUs and NVIDIA GPUs.

A compiler's exp has bits of its own, and on an H200 its quotient too. So every operation is written down here, each one
that IEEE prescribes, rounded before the next:

    t = -g, between -87 and 88                 beyond, 1 + e is 1, or so large that s is 0
    k = round(t * log2(e))                     a whole number
    r = (t - k * LN2) - k * LN2_REST           the first product and difference are exact
    p = 1 + r * (c1 + r * (c2 + ...))          within 9.2e-8 of exp(r), |r| <= log(2) / 2
    s = 1 / (1 + 2^k * p)                      sigmoid(g); 0 where the divisor is above 2^126
    g * s                                      silu(g)

Within 3.5 and 4 units in the last place of sigmoid and silu; torch's are within 2.4 (tests/test_activation.py).
"""

# pyright: reportUnknownArgumentType=false, reportUnknownMemberType=false, reportUnknownVariableType=false
# (jax.custom_jvp and lax.platform_dependent have few types.)

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._quotient import quotient
from ._row_sum import product

if TYPE_CHECKING:
    from jaxtyping import Array, Float

F32 = jnp.float32

ACTIVATIONS = ("silu", "sigmoid")

LEAST, MOST = -87.0, 88.0  # of t
LOG2E = np.float32(1.442695)
LN2 = np.float32(45426 / 2**16)  # 16 bits of log(2): times k, of 7 bits, it is exact
LN2_REST = np.float32(1.4286068e-06)
# c5 to c1, 1: the polynomial of degree 5 with the least relative error, its coefficients rounded one after the other.
COEFFICIENTS = tuple(map(np.float32, (0.008289718, 0.04189784, 0.16667648, 0.4999915, 0.9999997, 1.0)))
LARGEST_DIVISOR = 2.0**126  # of which 1 / d is a normal number


def reciprocal_as_compiled(divisor: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """An operation lies between, so that nothing is made of the quotient and what it divides."""
    return F32(1) / lax.reduce_precision(divisor, exponent_bits=8, mantissa_bits=23)


def _reciprocal(divisor: Any) -> Any:
    def corrected(divisor: Any) -> Any:
        return quotient(jnp.ones_like(divisor), divisor)

    return lax.platform_dependent(divisor, cuda=corrected, default=reciprocal_as_compiled)


def logistic(gate: Float[Array, "*shape"], reciprocal: Callable[[Any], Any]) -> Float[Array, "*shape"]:
    """s of g, float32. reciprocal: 1 / d, correctly rounded."""
    t = -jnp.where(gate > -LEAST, F32(-LEAST), jnp.where(gate < -MOST, F32(-MOST), gate))  # NaN stays
    k = lax.round(t * LOG2E, lax.RoundingMethod.TO_NEAREST_EVEN)
    r = (t - k * LN2) - product(k, LN2_REST)
    first, *others = COEFFICIENTS
    p = jnp.full_like(r, first)
    for coefficient in others:
        p = product(p, r) + coefficient
    power = lax.bitcast_convert_type((k.astype(jnp.int32) + 127) << 23, F32)  # of NaN any number, and p is NaN
    divisor = product(power, p) + F32(1)
    return jnp.where(divisor > LARGEST_DIVISOR, F32(0), reciprocal(divisor))


@jax.custom_jvp
def sigmoid(gate: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """1 / (1 + exp(-gate)), of float32."""
    return logistic(gate, _reciprocal)


@sigmoid.defjvp
def _(primals: Any, tangents: Any) -> Any:
    s = sigmoid(*primals)
    return s, tangents[0] * (s * (F32(1) - s))


def activated(gate: Float[Array, "*shape"], s: Float[Array, "*shape"], name: str) -> Float[Array, "*shape"]:
    """silu(gate) or sigmoid(gate), where s is sigmoid(gate)."""
    return gate * s if name == "silu" else s


def slope(
    gate: Float[Array, "*shape"], s: Float[Array, "*shape"], name: str, times: Callable[..., Any] = product
) -> Float[Array, "*shape"]:
    """The derivative of `activated` as torch computes it: s * (1 + g * (1 - s)), or s * (1 - s)."""
    rest = F32(1) - s
    return s * (times(gate, rest) + F32(1)) if name == "silu" else s * rest
