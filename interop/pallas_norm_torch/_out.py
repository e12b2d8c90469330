"""What a call may write its results to: `out`, and in the residual form `s_out`."""

# pyright: reportUntypedFunctionDecorator=false

from __future__ import annotations

import itertools
from typing import Any

import torch

from . import _torch_state
from ._library import TAGS, library
from ._options import Dtypes
from ._overlap import address, may_overlap, overlaps_itself
from ._validate import describe, dtype_name
from .rows import ALIGNMENT

Tensor = torch.Tensor
RESULT = {"out": "y", "s_out": "s"}
TWICE = "out overlaps s_out, and both are written; pass memory of its own for each"


def _kind(name: str, value: Tensor) -> None:
    if torch.nn.parameter.is_lazy(value):
        raise TypeError(f"{name} is not initialised yet; needed memory to write to: make it with torch.empty_like(x)")
    if value.is_nested or value.is_neg() or value._is_zerotensor():
        kind = "nested" if value.is_nested else "negated lazily" if value.is_neg() else "a zero tensor without memory"
        raise TypeError(f"{name} is {kind}; needed plain memory to write to: make it with torch.empty_like(x)")
    if value.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name} was made in torch.inference_mode, and torch allows no writing to it outside; "
            f"pass {name}.clone(), or call inside torch.inference_mode"
        )


def form(name: str, value: Any, x: Tensor, dtype: torch.dtype, *, differentiates: bool) -> None:
    """Everything about it but where it lies."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}; needed a torch.Tensor or None")
    if not torch.compiler.is_compiling():
        _kind(name, value)
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {value.layout}; needed torch.strided")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but x is on {x.device}; make it with device=x.device")
    if value.shape != x.shape:
        raise ValueError(
            f"{name} is {describe(value)} but x is {describe(x)}; "
            "needed the shape of x: make it with torch.empty_like(x)"
        )
    if value.dtype != dtype:
        needed = dtype_name(dtype)
        raise TypeError(
            f"{name} is {describe(value)}; needed {needed}, which is the dtype of {RESULT[name]} here: "
            f"make it with torch.empty_like(x, dtype=torch.{needed})"
        )
    if differentiates:
        raise ValueError(
            f"{name}= was given while an operand requires grad, and autograd cannot record that; "
            f"needed torch.no_grad(), detached operands, or a call without {name}="
        )
    if value.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires grad, and autograd cannot record what is written to it; pass {name}.detach()"
        )


def memory(given: dict[str, Tensor], rows: dict[str, Tensor], weight: Tensor | None) -> None:
    """Each of `given` may be one of `rows`, the operands, or share no memory with any of them or with the other."""
    if _torch_state.transformation() is not None:
        bare = _torch_state.unwrapped
        given, rows = ({name: bare(one) for name, one in of.items()} for of in (given, rows))
        weight = None if weight is None else bare(weight)
    for name, value in given.items():
        if overlaps_itself(value):
            raise ValueError(
                f"{name} is {describe(value)} with strides {value.stride()}, so several of its elements are one; "
                "needed memory of its own for each: pass a tensor that was not expanded"
            )
        for operand, x in rows.items():
            same = address(value) == address(x) and value.stride() == x.stride() and value.dtype == x.dtype
            if not same and may_overlap(value, x):
                raise ValueError(
                    f"{name} overlaps {operand} without being {operand}: rows would be written before they are read; "
                    f"pass {name}={operand} to work in place, or memory of its own"
                )
        if weight is not None and may_overlap(value, weight):
            raise ValueError(f"{name} overlaps weight, which every row reads; pass memory of its own")
    if len(given) == 2 and may_overlap(given["out"], given["s_out"]):
        raise ValueError(TWICE)


library.define("check_places(Tensor? out, Tensor? s_out, Tensor x, Tensor? residual, Tensor? weight) -> ()", tags=TAGS)


def _check_places(
    out: Tensor | None, s_out: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor | None
) -> None:
    places, rows = {"out": out, "s_out": s_out}, {"x": x, "residual": residual}
    given, operands = ({name: one for name, one in of.items() if one is not None} for of in (places, rows))
    memory(given, operands, weight)


library.impl("check_places", _check_places, "CompositeExplicitAutograd")


@torch.library.register_fake("pallas_norm::check_places", lib=library)
def _(*operands: Tensor | None) -> None:
    """All that a program has of the check: it sees what lies in one storage when it is made, and nothing of it stays
    in the program, since an operator without a result is left out."""
    sizes = (size for one in operands if one is not None for size in (*one.shape, *one.stride(), one.storage_offset()))
    if not any(map(_torch_state.is_unbacked, sizes)):
        _check_places(*operands)  # pyright: ignore[reportArgumentType]


def _vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[None, None]:
    """Members lie where their batch does."""
    del info, in_dims
    torch.ops.pallas_norm.check_places(*operands)
    return None, None


torch.library.register_vmap("pallas_norm::check_places", _vmap, lib=library)


def check_program(
    out: Tensor | None, s_out: Tensor | None, x: Tensor, residual: Tensor | None, weight: Tensor | None
) -> None:
    """As `memory`, of what torch.compile traces; of subclasses, which may hold no memory of their own, nothing."""
    given = out, s_out, x, residual, weight
    if all(one is None or type(one) in _torch_state.TENSORS for one in given):
        torch.ops.pallas_norm.check_places(*given)


def takes_x(x: Tensor, weight: Tensor | None) -> bool:
    """Whether a prepared call may write y to x itself."""
    if x.is_inference():
        return False
    if x.is_contiguous():
        start = x.data_ptr()
        return weight is None or _is_apart(weight, x, start, start + x.nbytes)
    return not overlaps_itself(x) and (weight is None or not may_overlap(x, weight))


def takes_y(out: Any, x: Tensor, weight: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether a prepared call may write y to `out`: all of the above holds at a glance, a kernel can write there."""
    if (
        type(out) not in _torch_state.TENSORS
        or out.dtype != dtype
        or out.shape != x.shape
        or out.get_device() != x.get_device()
        or not out.is_contiguous()
        or out.is_neg()
        or out.is_inference()
        or (out.requires_grad and torch.is_grad_enabled())
    ):
        return False
    start, end = out.data_ptr(), out.data_ptr() + out.nbytes
    # An address is 0 for autograd's zero tensors, which have no memory.
    return (
        bool(start)
        and not start % ALIGNMENT
        and _is_apart(x, out, start, end)
        and (weight is None or _is_apart(weight, out, start, end))
    )


def _is_apart(operand: Tensor, place: Tensor, start: int, end: int) -> bool:
    """Whether it shares no memory with `place`, which is contiguous and lies from start to end."""
    if not operand.is_contiguous():  # it reaches over more bytes than it has
        return not may_overlap(place, operand)
    at = operand.data_ptr()
    return at >= end or at + operand.nbytes <= start


def takes_both(out: Any, s_out: Any, x: Tensor, residual: Tensor, weight: Tensor | None, to: Dtypes) -> bool:
    """Whether a prepared call may write y to `out` and s to `s_out`: the operands themselves, in one order or the
    other, which share no memory."""
    operands = x, residual
    for place, dtype in ((out, to.y), (s_out, to.s)):
        if place is not None and not (
            (place is x or place is residual)
            and place.dtype == dtype
            and place.is_contiguous()
            and not place.is_inference()
            and not (place.requires_grad and torch.is_grad_enabled())
        ):
            return False
    given = [*operands, *([] if weight is None else [weight])]
    if out is s_out or not all(tensor.data_ptr() for tensor in given):
        return False
    ranges = sorted((tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes) for tensor in given)
    return all(tensor.is_contiguous() for tensor in given) and all(
        end <= start for (_, end), (start, _) in itertools.pairwise(ranges)
    )
