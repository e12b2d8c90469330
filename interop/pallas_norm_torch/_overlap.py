"""Whether tensors have memory in common, by their addresses: two storages may be of the same memory."""

from __future__ import annotations

import torch

from . import _torch_state

Tensor = torch.Tensor


def address(tensor: Tensor) -> int | torch.SymInt:
    """Of the first element; where torch.compile makes a program there is no memory, but the place in a storage."""
    if _torch_state.is_fake(tensor):
        return tensor.storage_offset() * tensor.element_size()
    return tensor.data_ptr()


def _span(tensor: Tensor) -> tuple[int | torch.SymInt, int | torch.SymInt]:
    """The address of the first element, and the one behind the last."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = address(tensor)
    return start, start + (reach + 1) * tensor.element_size()


def may_overlap(left: Tensor, right: Tensor) -> bool:
    """False where it is sure that no element of one is an element of the other.

    That is where the one ends before the other begins, and for columns of the same rows, such as two slices of a fused
    projection, where the columns are others.
    """
    if left.numel() == 0 or right.numel() == 0:
        return False
    if _torch_state.is_fake(left) and not _torch_state.is_of_storage(left, right):
        return False
    (left_start, left_end), (right_start, right_end) = _span(left), _span(right)
    if left_end <= right_start or right_end <= left_start:
        return False
    if left.shape[-1] != right.shape[-1] or left.stride() != right.stride() or left.stride(-1) != 1:
        return True
    steps = [stride for size, stride in zip(left.shape[:-1], left.stride(), strict=False) if size > 1]
    if not steps or min(steps) == 0 or any(step % min(steps) for step in steps):
        return True
    # Every row begins at a multiple of the period, so only the distance within it matters.
    period, width = (count * left.element_size() for count in (min(steps), left.shape[-1]))
    distance = (right_start - left_start) % period
    return left.element_size() != right.element_size() or not width <= distance <= period - width


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether two elements may be one: some axis steps less far than those within it reach."""
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += (size - 1) * stride
    return False


def in_place(places: list[Tensor], *operands: Tensor | None) -> bool:
    """Whether a result is written where an operand may be read."""
    return any(may_overlap(place, operand) for place in places for operand in operands if operand is not None)
