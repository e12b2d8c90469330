"""Tensors seen as rows: how many there are, and at which strides they lie."""

from __future__ import annotations

from typing import NamedTuple

import torch

from pallas_norm.kernels.launch_arguments import ALIGNMENT, BYTES, COUNT

Tensor = torch.Tensor
LARGEST = 2**31 - 1  # of a number of a launch


class Strides(NamedTuple):
    """Of a tensor: row r begins offset + (r // group) * outer + (r % group) * inner bytes from an aligned address."""

    offset: int
    outer: int
    inner: int


class Places(NamedTuple):
    group: int
    of: dict[str, Strides]  # by name


def aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0


def ready(tensor: Tensor) -> Tensor:
    """The tensor, or a copy of it that is contiguous and aligned."""
    tensor = tensor.contiguous()
    return tensor if aligned(tensor) else tensor.clone()


def strided(tensors: dict[str, Tensor], *, vec: int) -> Places | None:
    """Tensors of one shape [..., n] as rows that a kernel reads where they lie, or None where it cannot.

    The last axis must be contiguous, the other axes must come down to two, the same for all tensors, and every row must
    begin at a multiple of vec elements. So it reads the query heads inside a fused projection, of shape
    [tokens, heads, n] with strides (n * all heads, n, 1).
    """
    shape, *_ = (tensor.shape for tensor in tensors.values())
    strides = [tensor.stride() for tensor in tensors.values()]
    axes: list[tuple[int, list[int]]] = []  # (size, strides in elements of each tensor)
    for axis, size in enumerate(shape[:-1]):
        if size == 1:
            continue
        steps = [stride[axis] for stride in strides]
        if axes and all(outer == inner * size for outer, inner in zip(axes[-1][1], steps, strict=True)):
            axes[-1] = (axes[-1][0] * size, steps)
        else:
            axes.append((size, steps))
    if len(axes) > 2 or any(stride[-1] != 1 for stride in strides):
        return None
    # One axis alone is the outer one, of groups of one row.
    (_, outer), (group, inner) = (*axes, *[(1, [0] * len(strides))] * 2)[:2]
    of: dict[str, Strides] = {}
    for (name, tensor), o, i in zip(tensors.items(), outer, inner, strict=True):
        size, offset = tensor.element_size(), tensor.data_ptr() % ALIGNMENT
        if (offset | o * size | i * size) % (vec * size):
            return None
        of[name] = Strides(offset, o * size, i * size)
    return Places(group, of)


def fresh(row_bytes: int, group: int) -> Strides:
    """Of a contiguous, aligned tensor with rows of so many bytes."""
    return Strides(0, group * row_bytes, row_bytes if group > 1 else 0)


def numbers(given: dict[str, Tensor], made: dict[str, torch.dtype], *, n: int, vec: int) -> tuple[int, ...] | None:
    """The group and strides of a launch, as a kernel takes them: of the rows that are given, and of fresh results of
    these dtypes; None where they are to be copied."""
    if (places := strided(given, vec=vec)) is None:
        return None
    of = {name: fresh(n * dtype.itemsize, places.group) for name, dtype in made.items()} | places.of
    names = [name for name in ("x", "residual", "y", "s") if name in of]
    return (places.group * COUNT, *(number * BYTES for name in names for number in of[name]))


class Heads(NamedTuple):
    """A tensor [..., heads, n] as the kernel reads it: head h of token t begins at element offset + t * outer + h *
    inner from an aligned address."""

    heads: int
    tokens: int
    offset: int
    outer: int
    inner: int


def heads_of(tensor: Tensor, *, vec: int) -> Heads | None:
    """None where the kernel cannot read the tensor as it lies: the last axis must be contiguous, the tokens must come
    down to one axis, and every row must begin at a multiple of vec elements."""
    *batch, heads, _ = tensor.shape
    *steps, inner, last = tensor.stride()
    outer, tokens = 0, 1
    for size, step in zip(reversed(batch), reversed(steps), strict=True):
        if size == 1:
            continue
        if tokens == 1:
            outer = step
        elif step != outer * tokens:
            return None
        tokens *= size
    size = tensor.element_size()
    offset = tensor.data_ptr() % ALIGNMENT
    inner = inner if heads > 1 else 0
    if last != 1 or offset % (vec * size) or outer % vec or inner % vec or max(outer, inner) > LARGEST:
        return None
    return Heads(heads, tokens, offset // size, outer, inner)
