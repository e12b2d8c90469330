"""The second kernel of the backward pass: the programs' parts of dweight, added up by column in a fixed order."""

# pyright: reportArgumentType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from .. import _compat
from ..plans.lengths import LARGEST_N
from ..plans.vectors import vector
from . import launch_arguments, layouts, mosaic

F32 = jnp.float32
TILE = 32  # rows that the lanes of a warpgroup read at once


class Shape(NamedTuple):
    largest_n: int
    columns: int  # of one program
    ahead: int  # tiles whose loads are in flight together
    why: str


# H200, partial sums of the backward pass in L2; XLA's own sum and cast beside it.
SHAPES = (
    Shape(2048, 16, 5, "n = 128: 1.47 us, XLA 1.66; 896: 1.76, 1.82; 2048: 2.18, 2.18; 32 columns 1.60, 2.02, 2.94"),
    Shape(4096, 32, 5, "n = 4096: 2.37 us, XLA 2.30; 16 columns 2.40, 64 columns 3.04"),
    Shape(LARGEST_N, 64, 12, "n = 8192: 2.50 us, XLA 2.46; 16384: 2.62, 2.78; 32 columns 2.66, 2.88"),
)


def _body(
    partials_ref: Any, rows_ref: Any, sum_ref: Any, *, columns: int, ahead: int, rows: Any, layout: Any, interpret: bool
) -> None:
    n = partials_ref.shape[1]
    if rows_ref is not None:
        rows = launch_arguments.count(rows_ref, interpret=interpret)
    column = lax.min(lax.axis_index("program") * columns, jnp.int32(n - columns))

    def cast(value: jax.Array) -> jax.Array:
        return layouts.layout_cast(value, layout, interpret=interpret)

    last = lax.max(jnp.int32(rows) - TILE, jnp.int32(0))

    def add_tile(tile: Any, total: jax.Array) -> jax.Array:
        nominal = tile * TILE
        start = lax.min(nominal, last)  # tiles past the last row read the last tile again, so no load needs a mask
        part = layouts.load(
            partials_ref.at[pl.ds(start, TILE), pl.ds(column, columns)],
            layout,
            shape=(TILE, columns),
            interpret=interpret,
        )
        row = cast(lax.broadcasted_iota(jnp.int32, (TILE, columns), 0)) + start
        return total + jnp.where((row >= nominal) & (row < rows), part, 0.0)

    def add_tiles(step: Any, total: jax.Array) -> jax.Array:
        return functools.reduce(lambda total, tile: add_tile(step * ahead + tile, total), range(ahead), total)

    steps = lax.div(jnp.int32(rows) + (TILE * ahead - 1), jnp.int32(TILE * ahead))
    total = lax.fori_loop(0, steps, add_tiles, cast(jnp.zeros((TILE, columns), F32)))
    rounded = jnp.sum(total, axis=0).astype(sum_ref.dtype)
    layouts.store(sum_ref.at[pl.ds(column, columns)], rounded, interpret=interpret)


def column_sum(partials: jax.Array, rows: jax.Array | int, dtype: Any, *, interpret: bool) -> jax.Array:
    """(n,): the sum of the first `rows` of the at least TILE rows of `partials`, (held, n) in float32, rounded to
    dtype.

    rows: a number, or an operand whose address stands for one (see `launch_arguments.count`).
    """
    n = partials.shape[1]
    vec = vector(n, 4)
    shape = next(shape for shape in SHAPES if n <= shape.largest_n)
    columns = n if interpret else min(shape.columns, 32 * vec)  # a row of a tile lies in one warp
    layout = None if interpret else layouts.rows_in_warps(columns // vec, vec)
    known = isinstance(rows, int)

    def kernel(partials_ref: Any, *refs: Any) -> None:
        rows_ref, sum_ref = (None, *refs) if known else refs
        options = {"columns": columns, "ahead": shape.ahead, "rows": rows, "layout": layout, "interpret": interpret}
        _body(partials_ref, rows_ref, sum_ref, **options)

    result = mosaic.kernel(
        kernel,
        interpret=interpret,
        out_type=jax.ShapeDtypeStruct((n,), dtype),
        grid=(-(-n // columns),),
        grid_names=("program",),
    )(partials, *(() if known else (rows,)))
    return _compat.vary_like(result, partials)
