"""Sums over rows whose bits are specified: in the order of plans/order.py, in plain JAX.

`product` and `row_mean` are statements of the specification, reference.py, and `neighbours_added` is what the
interpreter runs in place of a warp's shuffles.
"""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false
# (lax.psum has no types.)

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from jax import lax

if TYPE_CHECKING:
    from jaxtyping import Array, Float

    from .plans.order import Order

F32 = jnp.float32
AxisName = tuple[str, ...]
AxisGroups = tuple[tuple[int, ...], ...] | None

# Neighbours that one pass adds up: each pass is a loop of XLA's. On a CPU, 128 x 4096 in float32 took 1.38 of the plain
# formula's time with 8 and 1.19 with 4, 32 x 16384 1.52 and 1.40, 2048 x 128 1.45 and 1.37; in bfloat16 1.51 and 1.58.
RADIX = 4


def product(a: Float[Array, "*shape"], b: Any) -> Float[Array, "*shape"]:
    """a * b rounded to float32, also where the program adds it to something.

    XLA's compilers turn a * b + c into one instruction that rounds once, where their fusion puts the two next to each
    other: in some shapes, and not in others. A choice stands between them, which only NaN would see. It depends on the
    product: with constant operands one that depends on them is gone. lax.reduce_precision of float32 leaves no
    instruction behind.
    """
    rounded = a * b
    return jnp.where(jnp.isnan(rounded), -rounded, rounded)


def inverse(n: int) -> np.float32:
    """1 / n, by which sums are multiplied."""
    return np.float32(1) / np.float32(n)


def neighbours_added(columns: Float[Array, "*batch width"]) -> Float[Array, "*batch 1"]:
    """Neighbouring columns, of which there is a power of two, added until one is left."""
    while (width := columns.shape[-1]) > 1:
        step = min(RADIX, width)
        values = [lax.slice_in_dim(columns, i, width, step, axis=-1) for i in range(step)]
        while len(values) > 1:
            values = [a + b for a, b in zip(values[::2], values[1::2], strict=True)]
        (columns,) = values
    return columns


def row_sum(values: Float[Array, "*batch n"], order: Order) -> Float[Array, "*batch 1"]:
    """The sum of each row, whatever else the program computes."""
    width, whole = order.width, order.n // order.width
    columns = lax.slice_in_dim(values, 0, width, axis=-1)
    for block in range(1, whole):
        columns = columns + lax.slice_in_dim(values, block * width, (block + 1) * width, axis=-1)
    if order.overlap:
        last = lax.slice_in_dim(values, whole * width, order.n, axis=-1)
        before = [(0, 0, 0)] * (values.ndim - 1) + [(order.overlap, 0, 0)]
        columns = columns + lax.pad(last, F32(-0.0), before)  # the zero that changes no sum, not even one of -0.0
    return neighbours_added(columns)


def row_mean(
    values: Float[Array, "*batch n"],
    order: Order | None,
    axis_name: AxisName = (),
    axis_index_groups: AxisGroups = None,
) -> Float[Array, "*batch 1"]:
    """The mean of each row: its sum times 1 / n, each rounded, as XLA and torch's CUDA kernels divide by n. Without an
    order XLA adds in its own.

    Of the whole row, where every shard over `axis_name` holds some of its columns: each shard adds up its own in the
    order of so many columns, and a psum adds up the shards.
    """
    total = jnp.sum(values, axis=-1, keepdims=True) if order is None else row_sum(values, order)
    n = values.shape[-1]
    if axis_name:
        total = lax.psum(total, axis_name, axis_index_groups=axis_index_groups)
        n = n * lax.psum(1, axis_name, axis_index_groups=axis_index_groups)  # a number, which JAX knows
    return product(total, inverse(n))
