"""Whether heads, angles and weights fit each other: of JAX's arrays and of torch's tensors alike."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

Describe = Callable[[Any], str]
Operands = Mapping[str, Any]  # q and k, or qkv; cos, sin; q_weight and k_weight, None where there is none
PARTIAL = "rotate part of a head in steps of your own"


class Sizes(NamedTuple):
    """How sizes are compared: torch's may be known only when a program runs."""

    same: Callable[[Any, Any], bool] = operator.eq  # of shapes
    is_one: Callable[[Any], bool] = lambda size: bool(size == 1)


KNOWN = Sizes()


def fit(
    operands: Operands,
    heads: tuple[int, int] | None,
    y_dtype: Any,
    describe: Describe,
    sizes: Sizes = KNOWN,
) -> None:
    """heads: of q and k, in the tensor of a projection. y_dtype: that of cos and sin, once what is normalised is known
    to have one."""
    name = "qkv" if heads else "q"
    _heads(operands, name, heads, describe, sizes)
    _weights(operands, name, describe)
    _angles(operands, name, y_dtype, describe, sizes)


def _heads(operands: Operands, name: str, heads: tuple[int, int] | None, describe: Describe, sizes: Sizes) -> None:
    q = operands[name]
    if len(q.shape) < 2:
        raise ValueError(f"{name} is {describe(q)}; needed [..., heads, n]: an axis of heads and one of their elements")
    if q.shape[-1] % 2 or not q.shape[-1]:
        raise ValueError(f"{name} is {describe(q)}; needed an even last axis: its halves are rotated together")
    if heads is not None:
        if q.shape[-2] < sum(heads):
            raise ValueError(
                f"qkv is {describe(q)} but q_heads + k_heads is {sum(heads)}; needed as many heads at least: reshape "
                "the projection to [..., heads, n]"
            )
        return
    k = operands["k"]
    if len(k.shape) != len(q.shape) or not sizes.same(_but_heads(k), _but_heads(q)):
        raise ValueError(f"k is {describe(k)} but q is {describe(q)}; needed the same shape but for the heads")
    if k.dtype != q.dtype:
        raise TypeError(f"k is {describe(k)} but q is {describe(q)}; needed the same dtype: cast one of them first")


def _weights(operands: Operands, name: str, describe: Describe) -> None:
    of_q, of_k = operands["q_weight"], operands["k_weight"]
    if (of_q is None) != (of_k is None):
        missing, given = ("q_weight", "k_weight") if of_q is None else ("k_weight", "q_weight")
        raise ValueError(f"{missing} is None but {given} is not; needed both, or none: pass ones for one of them")
    if of_q is None:
        return
    for which in ("q_weight", "k_weight"):
        if tuple(operands[which].shape) != tuple(operands[name].shape[-1:]):
            raise ValueError(
                f"{which} is {describe(operands[which])} but {name} is {describe(operands[name])}; needed one element "
                "for each of the last axis: pass the weight of this layer"
            )
    if of_q.dtype != of_k.dtype:
        raise TypeError(
            f"k_weight is {describe(of_k)} but q_weight is {describe(of_q)}; needed the same dtype: cast one of them "
            "first"
        )


def _angles(operands: Operands, name: str, y_dtype: Any, describe: Describe, sizes: Sizes) -> None:
    q, cos, sin = operands[name], operands["cos"], operands["sin"]
    if not sizes.same(tuple(sin.shape), tuple(cos.shape)):
        raise ValueError(f"sin is {describe(sin)} but cos is {describe(cos)}; needed the same shape")
    needed = _but_heads(q)
    shape = without_ones(cos.shape, sizes)
    if not shape or len(shape) > len(needed) or not sizes.same(shape, needed[len(needed) - len(shape) :]):
        some = f" ({PARTIAL})" if cos.shape and cos.shape[-1] != q.shape[-1] else ""
        raise ValueError(
            f"cos is {describe(cos)} but {name} is {describe(q)}; needed [{','.join(map(str, needed))}] or the last "
            f"axes of it, from the positions on: a row of n angles for each token{some}"
        )
    for which in ("cos", "sin"):
        if operands[which].dtype != y_dtype:
            raise TypeError(
                f"{which} is {describe(operands[which])}; needed {str(y_dtype).removeprefix('torch.')}, the dtype of "
                f"what is rotated: cast it first"
            )


def _but_heads(x: Any) -> tuple[int, ...]:
    return (*x.shape[:-2], x.shape[-1])


def without_ones(shape: Any, sizes: Sizes = KNOWN) -> tuple[int, ...]:
    """Without leading axes of size 1: one row of angles is that of every token."""
    shape = tuple(shape)
    while len(shape) > 1 and sizes.is_one(shape[0]):
        shape = shape[1:]
    return shape


def positions(cos: Any) -> int:
    """Rows of angles."""
    return math.prod(cos.shape[:-1])
