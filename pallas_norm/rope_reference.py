"""The specification of rotated heads: y as `reference.forward` gives it, then Hugging Face's rotation, in plain JAX.

    a = round(y * cos)
    b = round(rotate_half(y) * sin)       rotate_half((y1, y2)) = (-y2, y1), the halves of a row
    r = round(a + b)

each rounding to the dtype of y, which is that of cos and sin. Every product is rounded before it is added.

Source: `apply_rotary_pos_emb` in Hugging Face's transformers, in its eager operations; Su et al., "RoFormer", 2021.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from ._row_sum import product
from .reference import round_to

if TYPE_CHECKING:
    from jaxtyping import Array, Float

F32 = jnp.float32


def rotate_half(y: Float[Array, "*heads n"]) -> Float[Array, "*heads n"]:
    """(-y2, y1) of the halves (y1, y2) of each row."""
    first, second = jnp.split(y, 2, axis=-1)
    return jnp.concatenate([-second, first], axis=-1)


def _of_heads(angles: Float[Array, "... n"], like: Float[Array, "*batch heads n"]) -> Float[Array, "... n"]:
    """In float32, with the rank of `like`: those of a token for all of its heads."""
    *batch, n = angles.shape
    return angles.astype(F32).reshape((1,) * (like.ndim - len(batch) - 2) + (*batch, 1, n))


def rotated(
    y: Float[Array, "*batch heads n"], cos: Float[Array, "... n"], sin: Float[Array, "... n"]
) -> Float[Array, "*batch heads n"]:
    """Each head by the angles of its token."""
    wide, cos, sin = y.astype(F32), _of_heads(cos, y), _of_heads(sin, y)
    a = round_to(product(wide, cos), y.dtype).astype(F32)
    b = round_to(product(rotate_half(wide), sin), y.dtype).astype(F32)
    return round_to(a + b, y.dtype)


def rotated_back(
    dr: Float[Array, "*batch heads n"], cos: Float[Array, "... n"], sin: Float[Array, "... n"]
) -> Float[Array, "*batch heads n"]:
    """dy, the gradient of y, in the roundings of Hugging Face's autograd:

    dy = round(round(dr * cos) - rotate_half(round(dr * sin)))

    Autograd adds the gradients of the halves to zeros, so a zero of dy has no sign.
    """
    wide, cos, sin = dr.astype(F32), _of_heads(cos, dr), _of_heads(sin, dr)
    a = round_to(product(wide, cos), dr.dtype).astype(F32)
    b = round_to(product(wide, sin), dr.dtype).astype(F32)
    return _zeros_positive(round_to(a - rotate_half(b), dr.dtype))


@jax.custom_jvp
def _zeros_positive(dy: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Its derivative is one, also at zero: where a loss is least, dy is."""
    return jnp.where(dy == 0, jnp.zeros_like(dy), dy)


@_zeros_positive.defjvp
def _(primals: tuple[Any], tangents: tuple[Any]) -> tuple[Any, Any]:
    return _zeros_positive(*primals), *tangents
