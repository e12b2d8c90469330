"""Which lane holds which elements: Mosaic GPU's layouts of our blocks, and reading and writing memory with them."""

# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import lax

from .. import _compat
from .._compat import fragments, pl, plgpu


def _tiled(tiles: Sequence[Sequence[int]], warp_dims: tuple[Any, ...], lane_dims: tuple[Any, ...]) -> Any:
    layout = fragments.TiledLayout(
        fragments.Tiling(tuple(map(tuple, tiles))), warp_dims, lane_dims, -1, _check_canonical=False
    ).canonicalize()
    return plgpu.Layout.TILED(
        layout.tiling, warp_dims=layout.warp_dims, lane_dims=layout.lane_dims, vector_dim=layout.vector_dim
    )


@functools.cache
def rows_in_warps(lanes: int, vec: int) -> Any:
    """(rows, lanes * vec) tiles: `lanes` lanes of one warp own a row, `vec` neighbouring elements each."""
    per_warp = 32 // lanes
    tiles = ((4 * per_warp, lanes * vec), (per_warp, lanes * vec), (1, vec))
    return _tiled(tiles, (-6,), (-4, -3) if per_warp > 1 else (-3,))


@functools.cache
def row_in_every_warp(lanes: int, vec: int) -> Any:
    """(lanes * vec,): every group of `lanes` lanes in every warp holds the same row."""
    copies = 32 // lanes
    lane_dims = (fragments.Replicated(copies), -2) if copies > 1 else (-2,)
    return _tiled(((lanes * vec,), (vec,)), (fragments.Replicated(4),), lane_dims)


@functools.cache
def row_across_warps(vec: int, *, split: bool) -> Any:
    """128 * vec neighbouring elements, 32 * vec for each warp: (128 * vec,), or (4, 32 * vec) where `split`."""
    if split:
        return rows_in_warps(32, vec)
    return _tiled(((128 * vec,), (32 * vec,), (vec,)), (-3,), (-2,))


def scalar() -> Any:
    """The same number in every lane."""
    return plgpu.Layout.WG_SPLAT(())


def load(ref: Any, layout: Any, *, shape: tuple[int, ...], interpret: bool) -> jax.Array:
    """`ref` seen as `shape`, in registers, laid out as `layout`.

    The interpreters have no reshaped references, so there the value is reshaped.
    """
    if interpret:
        return ref[...].reshape(shape)
    if tuple(ref.shape) != shape:
        ref = ref.reshape(*shape)
    return _compat.load(ref, layout)


def store(ref: Any, value: jax.Array, *, interpret: bool) -> None:
    """The inverse of load."""
    shape = tuple(ref.shape)
    if interpret:
        ref[...] = value.reshape(shape)
        return
    if shape != value.shape:
        ref = ref.reshape(*value.shape)
    _compat.store(ref, value)


def load_flat(ref: Any, start: Any, layout: Any, *, shape: tuple[int, ...], interpret: bool) -> jax.Array:
    """shape's worth of neighbouring elements of `ref`, whatever its own shape, from `start` on."""
    size = math.prod(shape)
    if interpret:
        return lax.dynamic_slice_in_dim(ref[...].reshape(-1), start, size).reshape(shape)
    flat = ref.reshape(math.prod(ref.shape))
    return load(flat.at[pl.ds(start, size)], layout, shape=shape, interpret=False)


def load_columns(ref: Any, start: Any, layout: Any, *, shape: tuple[int, ...], interpret: bool) -> jax.Array:
    """`ref` seen as shape[0] rows: shape[1] neighbouring elements of each, from `start` on."""
    rows, columns = shape
    if interpret:
        return lax.dynamic_slice_in_dim(ref[...].reshape(rows, -1), start, columns, 1)
    seen = ref.reshape(rows, math.prod(ref.shape) // rows)
    return load(seen.at[:, pl.ds(start, columns)], layout, shape=shape, interpret=False)


def layout_cast(value: jax.Array, layout: Any, *, interpret: bool) -> jax.Array:
    """0.10's interpreter has no rule for layout_cast, and a layout means nothing to an interpreter."""
    return value if interpret else plgpu.layout_cast(value, layout)
