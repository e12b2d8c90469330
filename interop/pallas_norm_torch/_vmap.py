"""vmap: one more leading axis where the weight is shared, a loop where each member has a column of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Tensor = torch.Tensor


def members(
    call: Callable[..., Any],
    size: int,
    in_dims: tuple[Any, ...],
    arguments: tuple[Any, ...],
    *,
    weight_at: int,
    loop: bool = False,
    shared_results: tuple[int, ...],
) -> tuple[Any, tuple[Any, ...]]:
    """weight_at: which argument is (n,); the other tensors are (..., n) or (...). shared_results: results without an
    axis, if there is no loop."""

    def moved(position: int, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if in_dims[position] is not None:
            return value.movedim(in_dims[position], 0)
        return value if position == weight_at else value.expand(size, *value.shape)

    whole = [moved(position, value) for position, value in enumerate(arguments)]
    if not loop and in_dims[weight_at] is None:
        results = call(*whole)
        return results, tuple(None if i in shared_results else 0 for i in range(len(results)))

    def member(index: int) -> list[Any]:
        own = [isinstance(v, Tensor) and (i != weight_at or in_dims[i] is not None) for i, v in enumerate(whole)]
        return [value[index] if is_own else value for value, is_own in zip(whole, own, strict=True)]

    if size == 0:
        one = call(*(v.new_zeros(v.shape[1:]) if isinstance(v, Tensor) and v.shape[:1] == (0,) else v for v in whole))
        results = tuple(value.new_empty(0, *value.shape) for value in one)
    else:
        looped = zip(*(call(*member(index)) for index in range(size)), strict=True)
        results = tuple(torch.stack(values) for values in looped)
    return results, (0,) * len(results)


def members_of_gradient(
    call: Callable[..., Any], size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]
) -> Any:
    with_dweight = arguments[8]  # behind x, weight, rstd, dy, ds and three options
    return members(call, size, in_dims, arguments, weight_at=1, loop=with_dweight, shared_results=(1,))
