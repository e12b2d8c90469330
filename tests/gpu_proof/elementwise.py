"""A kernel that applies what the kernels compute a value with, such as 1 / sqrt, to every value of an array."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_norm.kernels import layouts, mosaic

VEC = 4
BLOCK = 128 * VEC  # of one warpgroup


def by_kernel(values: jax.Array, function: Callable[[jax.Array, Any], jax.Array]) -> jax.Array:
    """function(value, layout) of float32 values, whose number is a multiple of BLOCK."""
    layout = layouts.row_across_warps(VEC, split=False)

    def body(given: Any, out: Any) -> None:
        part = pl.ds(lax.axis_index("program") * BLOCK, BLOCK)
        value = layouts.load(given.at[part], layout, shape=(BLOCK,), interpret=False)
        layouts.store(out.at[part], function(value, layout), interpret=False)

    return mosaic.kernel(
        body,
        interpret=False,
        out_type=jax.ShapeDtypeStruct(values.shape, jnp.float32),
        grid=(values.size // BLOCK,),
        grid_names=("program",),
    )(values)
