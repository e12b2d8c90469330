"""Tensors seen as rows: how many there are, and at which strides they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pallas_norm._compat import ADDRESS_UNIT

Tensor = torch.Tensor
ALIGNMENT = ADDRESS_UNIT  # bytes, of what a kernel takes as the address of an operand


class Strides(NamedTuple):
    """Of a tensor: row r begins offset + (r // group) * outer + (r % group) * inner bytes from an aligned address."""

    offset: int
    outer: int
    inner: int


def aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def ready(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor if aligned(tensor) else tensor.clone()


def strided(*tensors: Tensor, vec: int) -> tuple[int, list[Strides]] | None:
    """Tensors of one shape [..., n] as rows that a kernel reads where they lie: (group, strides in bytes of each).

    None where it cannot: the last axis must be contiguous, the other axes must come down to two, the same for all
    tensors, and every row must begin at a multiple of vec elements. So it reads the query heads inside a fused
    projection, of shape [tokens, heads, n] with strides (n * all heads, n, 1).
    """
    axes: list[tuple[int, tuple[int, ...]]] = []  # (size, strides in elements of each tensor)
    for axis, size in enumerate(tensors[0].shape[:-1]):
        if size == 1:
            continue
        steps = tuple(tensor.stride(axis) for tensor in tensors)
        if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    if len(axes) > 2:
        return None
    # One axis alone is the outer one, of groups of one row.
    (_, outer), (group, inner) = (*axes, *[(1, (0,) * len(tensors))] * 2)[:2]
    strides = [
        Strides(tensor.data_ptr() % ALIGNMENT, o * tensor.element_size(), i * tensor.element_size())
        for tensor, o, i in zip(tensors, outer, inner, strict=True)
    ]
    if any(tensor.stride(-1) != 1 for tensor in tensors) or any(
        step % (vec * tensor.element_size()) for tensor, place in zip(tensors, strides, strict=True) for step in place
    ):
        return None
    return group, strides
