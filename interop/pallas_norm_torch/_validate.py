"""What a call is given, checked before anything is launched: each message says what came, what was needed, what to
do."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from pallas_norm import _validate as _numbers  # pyright: ignore[reportPrivateUsage]

from . import _torch_state

Tensor = torch.Tensor
DTYPES = tuple(getattr(torch, name) for name in _numbers.DTYPES)
DEVICES = ("cpu", "cuda")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def form(tensor: Tensor) -> str:
    """Its dtype and shape."""
    return f"{dtype_name(tensor.dtype)}[{','.join(map(str, tensor.shape))}]"


def describe(tensor: Tensor) -> str:
    return f"{form(tensor)} on {tensor.device}"


def with_memory(name: str, value: Any) -> Tensor:
    """A tensor of any dtype whose memory has its elements, as they are."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a {type(value).__name__}; needed a torch.Tensor: wrap it with torch.as_tensor "
            "(a JAX or NumPy array: use pallas_norm.rms_norm)"
        )
    if torch.nn.parameter.is_lazy(value):
        raise TypeError(f"{name} is not initialised yet; needed its elements: run the module it belongs to once before")
    if value.is_nested:  # before its layout, which may be jagged, and has no to_dense
        raise TypeError(f"{name} is a nested tensor; needed a plain one: pass {name}.to_padded_tensor(0.0)")
    if value.layout is not torch.strided:
        raise TypeError(f"{name} has the layout {value.layout}; needed torch.strided: pass {name}.to_dense()")
    if value.is_neg():
        raise TypeError(
            f"{name} is negated lazily, so its memory holds other values; needed them themselves: "
            f"pass {name}.resolve_neg()"
        )
    if value._is_zerotensor():  # autograd's zeros, of which there is no memory
        raise TypeError(f"{name} is a zero tensor without memory; needed one with: pass torch.zeros_like({name})")
    if value.is_quantized:
        raise TypeError(f"{name} is quantized ({value.dtype}); needed a plain tensor: pass {name}.dequantize()")
    return value


def tensor(name: str, value: Any) -> Tensor:
    value = with_memory(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} is {describe(value)}; needed bfloat16, float16 or float32: cast it with {name}.to")
    if value.device.type not in DEVICES and value.device.type != "meta":
        raise NotImplementedError(
            f"{name} is on the device {value.device}; needed cpu or cuda: move it with {name}.to first"
        )
    return value


def same_sizes(found: Sequence[int], needed: Sequence[int]) -> bool:
    """What torch.compile knows when the program runs, sizes of unbacked symbols, is checked then."""
    if torch.SymInt not in map(type, (*found, *needed)):
        return tuple(found) == tuple(needed)
    pairs = list(zip(found, needed, strict=False))
    unknown = [_torch_state.is_unbacked(size) or _torch_state.is_unbacked(other) for size, other in pairs]
    for (size, other), later in zip(pairs, unknown, strict=True):
        if later:
            _torch_state.holds_later(size == other, lambda: "the shapes of the operands do not fit")
    return len(found) == len(needed) and all(later or a == b for (a, b), later in zip(pairs, unknown, strict=True))


def _is_usual(value: Tensor) -> bool:
    return (
        type(value) in _torch_state.TENSORS
        and (value.is_cpu or value.is_cuda)
        and value.dtype in DTYPES
        and value.layout is torch.strided
        and not (value.is_nested or value.is_neg() or value._is_zerotensor())
    )


def are_usual(x: Any, residual: Any, weight: Any, *, with_residual: bool) -> bool:
    """All that `operands` checks, at a glance and without a message: it costs 2 us of a call, not 8."""
    return (
        _is_usual(x)
        and (weight is None or (_is_usual(weight) and weight.shape == x.shape[-1:] and weight.device == x.device))
        and x.ndim > 0
        and x.shape[-1] > 0
        and (not with_residual or (_is_usual(residual) and residual.shape == x.shape and residual.device == x.device))
    )


NOTHING = {"residual": "nothing to add", "gate": "no gate"}


def operands(x: Any, residual: Any, weight: Any, *, with_residual: bool, beside: str = "residual") -> None:
    """beside: what the second is called."""
    x = tensor("x", x)
    if x.ndim == 0:
        raise ValueError(f"x is {describe(x)}; needed at least one axis: the last one is normalised")
    if _torch_state.is_unbacked(x.shape[-1]):
        _torch_state.holds_later(x.shape[-1] > 0, lambda: "x has a last axis of no elements")
    elif x.shape[-1] == 0:
        raise ValueError(f"x is {describe(x)}; needed a last axis of at least one element: it is normalised")
    if with_residual:
        if residual is None:
            raise TypeError(f"{beside} is None; needed a tensor: call rms_norm where there is {NOTHING[beside]}")
        residual = tensor(beside, residual)
        if residual.device != x.device:
            raise ValueError(f"{beside} is on {residual.device} but x is on {x.device}; move one of them with .to")
        if not same_sizes(residual.shape, x.shape):
            raise ValueError(
                f"{beside} is {describe(residual)} but x is {describe(x)}; needed the same shape: expand it first"
            )
    if weight is not None:
        weight = tensor("weight", weight)
        if weight.device != x.device:
            raise ValueError(f"weight is on {weight.device} but x is on {x.device}; move one of them with .to")
        if not same_sizes(weight.shape, x.shape[-1:]):
            raise ValueError(
                f"weight has shape {tuple(weight.shape)} but the last axis of x has length {x.shape[-1]} "
                f"(x: {describe(x)}); pass the weight of this layer, or slice x"
            )


def belongs(
    name: str, value: Tensor, x: Tensor, shape: Sequence[int], dtypes: Collection[torch.dtype], of: str = "x"
) -> None:
    """What an operator for gradients is given beside its operands, of which a kernel gets no more than the address."""
    if not same_sizes(value.shape, shape):
        raise ValueError(f"{name} has shape {tuple(value.shape)}; needed {tuple(shape)}, which belongs to {of}")
    if value.device != x.device:
        raise ValueError(f"{name} is on {value.device} but {of} is on {x.device}; move one of them with .to")
    if value.dtype not in dtypes:
        needed = ", ".join(map(dtype_name, dtypes))
        raise TypeError(f"{name} is {describe(value)}; needed {needed}: cast it first")


def _not_a_tensor(name: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        raise TypeError(
            f"{name} is a tensor ({describe(value)}); needed a Python float, because it is compiled into the kernel: "
            f"pass {name}.item()"
        )
    return value


def hidden_size(value: Any) -> int:
    if not _numbers.is_int(value):
        raise TypeError(f"hidden_size is a {type(value).__name__}; needed an int: the length of the last axis")
    if not 1 <= (size := int(value)) < 2**63:
        raise ValueError(f"hidden_size is {'below 1' if size < 1 else 'beyond int64'}; needed the length of a row")
    return size


def row_length(value: Any) -> int:
    if not _numbers.is_int(value):
        raise TypeError(f"n is a {type(value).__name__}; needed an int: the length of the last axis")
    if (n := int(value)) < 1:
        raise ValueError(f"n is {n}; needed the length of a row, at least 1")
    return n


def operand_dtype(value: Any) -> torch.dtype:
    if not isinstance(value, torch.dtype) or value not in DTYPES:  # an array compares its elements
        shown = dtype_name(value) if isinstance(value, torch.dtype) else f"a {type(value).__name__}"
        raise TypeError(f"dtype is {shown}; needed torch.bfloat16, torch.float16 or torch.float32: cast x with x.to")
    return value


def parameter_dtype(value: Any) -> None:
    if not isinstance(value, torch.dtype) or not value.is_floating_point:
        shown = dtype_name(value) if isinstance(value, torch.dtype) else f"a {type(value).__name__}"
        raise TypeError(f"dtype is {shown}; needed torch.bfloat16, torch.float16 or torch.float32")


def eps(value: Any) -> float:
    return _numbers.eps(_not_a_tensor("eps", value))


def flag(name: str, value: Any) -> bool:
    return _numbers.flag(name, value)


def _rounding_dtype(name: str, value: Any) -> torch.dtype | None:
    if value is not None and not (isinstance(value, torch.dtype) and value in DTYPES):
        shown = dtype_name(value) if isinstance(value, torch.dtype) else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {shown}; needed torch.bfloat16, torch.float16, torch.float32 or None")
    return value


def rounding(cast_before_scale: Any, given: Any, weight: Any) -> tuple[bool, Any]:
    """cast_before_scale and an _options.Rounding, in which a float32 unit has one name: no cast_before_scale."""
    cast_before_scale = flag("cast_before_scale", cast_before_scale)
    unit, round_weight, out, s = given
    unit = _rounding_dtype("unit_dtype", unit)
    if not cast_before_scale and unit not in (None, torch.float32):
        raise ValueError(
            f"unit_dtype is {dtype_name(unit)} but cast_before_scale is False, which is unit_dtype float32 by another "
            "name; pass one of them"
        )
    if unit == torch.float32:
        cast_before_scale, unit = False, None
    round_weight = _numbers.round_weight(round_weight, weight)
    return cast_before_scale, (unit, round_weight, _rounding_dtype("out_dtype", out), _rounding_dtype("s_dtype", s))


def weight_offset(value: Any, weight: Any) -> float:
    return _numbers.weight_offset(_not_a_tensor("weight_offset", value), weight)


def no_tangents(*tensors: Any) -> None:
    """Forward mode has no rule here, and must not come out as zeros."""
    if _torch_state.transformation() is not None and _torch_state.inside_jvp():
        raise NotImplementedError(
            "forward-mode differentiation (torch.func.jvp) of rms_norm is not implemented; use reverse mode: "
            "torch.func.vjp, grad or jacrev"
        )
    if _torch_state.forward_mode() and any(
        isinstance(tensor, Tensor) and _torch_state.has_tangent(tensor) for tensor in tensors
    ):
        raise NotImplementedError(
            "forward-mode differentiation (torch.autograd.forward_ad) of rms_norm is not implemented; use reverse "
            "mode: torch.autograd.grad or backward"
        )
