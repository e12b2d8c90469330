"""The operator pallas_norm::rms_norm_quantized: what torch.compile, torch.export and functorch see of 8-bit results."""

# pyright: reportReturnType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUntypedFunctionDecorator=false, reportPrivateUsage=false

from __future__ import annotations

import math
from typing import Any

import torch

from pallas_norm import _api_quantized
from pallas_norm._spec import Spec

from . import _form_calls, _library, _options, _torch_state, _validate, direct, quantized_statements
from ._kernels import Quantized
from ._library import OPTIONS, TAGS, library
from .prepared_quantized import QuantizedCall, Results

Tensor = torch.Tensor
DTYPES = (torch.float8_e4m3fn, torch.int8)
LARGEST = torch.finfo(torch.float32).max

# group: 0 for one scale for each row; a scale that is given is that of the whole tensor.
library.define(
    "rms_norm_quantized(Tensor x, Tensor? residual, Tensor? weight, Tensor? scale, ScalarType dtype, int group, "
    f"bool with_y, {OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=TAGS,
)


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    spec: Spec,
    dtype: torch.dtype,
    group: int,
    *,
    with_y: bool,
) -> Results:
    """(q, scales, s, y); None for what is not there."""
    if _library.path(x) is direct:
        kernel = Quantized(
            *(x.shape[-1], x.dtype, None if weight is None else weight.dtype),
            *(spec, None if residual is None else residual.dtype, dtype, group, with_y),
        )
        found = _form_calls.run(QuantizedCall, kernel, x.get_device(), x, residual, weight, scale)
        if found is not None:
            return found
    q, scales, s, y = quantized_statements.forward(x, residual, weight, scale, spec, dtype, group)
    return q, scales, s, y if with_y else None


def check_dtype(value: Any) -> None:
    """That of q."""
    if not isinstance(value, torch.dtype) or value not in DTYPES:  # an array compares its elements
        shown = _validate.dtype_name(value) if isinstance(value, torch.dtype) else f"a {type(value).__name__}"
        raise TypeError(f"dtype is {shown}; needed torch.float8_e4m3fn or torch.int8, the dtype of q")


def _positive(value: Any) -> Any:
    """A number that varies is a symbol to torch.compile, of which NumPy knows nothing; a comparison becomes a guard of
    the program, so for a number beyond there is another, or none."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if torch.compiler.is_compiling() and is_number:
        if _api_quantized.BELOW < value <= LARGEST:
            return value
        raise ValueError("scale is no positive float32 number; needed one: y is divided by it")
    return _api_quantized.positive(value)


def one_scale(value: Any, x: Tensor) -> Tensor:
    """A float32 scalar on the device of x."""
    if not isinstance(value, Tensor):
        return torch.full((), _positive(value), dtype=torch.float32, device=x.device)
    if not torch.compiler.is_compiling():  # the operator does, with what the program has then
        _validate.with_memory("scale", value)
    if math.prod(value.shape) != 1 or value.ndim > 1:
        raise ValueError(
            f"scale is {_validate.describe(value)}; needed one number: pass scale=None to compute one for each row"
        )
    if value.dtype != torch.float32:
        raise TypeError(f"scale is {_validate.describe(value)}; needed float32: cast it with scale.to(torch.float32)")
    if value.device != x.device:
        raise ValueError(f"scale is on {value.device} but x is on {x.device}; move it with scale.to(x.device)")
    return value.reshape(())


def _checked(*arguments: Any) -> int:
    """The group. What a direct call of the operator may have wrong too is refused."""
    x, residual, weight, scale, dtype, group, _, *options = arguments
    _validate.operands(x, residual, weight, with_residual=residual is not None)
    _library.check_options(weight, options)
    check_dtype(dtype)
    if scale is not None:
        one_scale(scale, x)
    return _api_quantized.group_of(x.shape[-1], group or None, given=scale is not None)


def _operator(*arguments: Any) -> tuple[Tensor, ...]:
    x, residual, weight, scale, dtype, group, with_y, *options = arguments
    group = _checked(*arguments)
    found = forward(x, residual, weight, scale, _options.of(options), dtype, group, with_y=with_y)
    return tuple(x.new_empty(0) if value is None else value for value in found)


library.impl("rms_norm_quantized", _operator, "CompositeExplicitAutograd")


def in_steps(*arguments: Any) -> tuple[Tensor, ...]:
    """As the operator, in torch's statements, for programs that leave."""
    x, residual, weight, scale, dtype, group, with_y, *options = arguments
    group = 0 if scale is not None else group or x.shape[-1]
    q, scales, s, y = quantized_statements.forward(x, residual, weight, scale, _options.of(options), dtype, group)
    return tuple(x.new_empty(0) if one is None else one for one in (q, scales, s, y if with_y else None))


@_torch_state.register_fake("pallas_norm::rms_norm_quantized", library)
def _(*arguments: Any) -> tuple[Tensor, ...]:
    x, residual, weight, scale, dtype, group, with_y, *options = arguments
    group = _checked(*arguments)
    to = _options.dtypes_of(_options.of(options), x, residual, weight)

    def like(dtype: torch.dtype, *tail: int, wanted: Any = True) -> Tensor:
        return torch.empty((*x.shape[:-1], *tail), dtype=dtype, device=x.device) if wanted else x.new_empty(0)

    n = x.shape[-1]
    return (
        like(dtype, n),
        like(torch.float32, n // (group or n), wanted=scale is None),
        like(to.s, n, wanted=residual is not None),
        like(to.y, n, wanted=with_y),
    )


def no_gradient(*operands: Any) -> None:
    """Raises where a derivative would be asked for, that of a scale too: its rounding to 8 bits is of y / scale. A
    parameter that is not initialised requires grad, but lacks more than that."""
    tensors = [one for one in operands if isinstance(one, Tensor) and not torch.nn.parameter.is_lazy(one)]
    backward = torch.is_grad_enabled() and any(one.requires_grad for one in tensors)
    jvp = _torch_state.transformation() is not None and _torch_state.inside_jvp()
    if backward or jvp or any(map(_torch_state.has_tangent, tensors)):
        raise NotImplementedError(
            "an operand of a norm with a result of 8 bits requires grad; rounding to 8 bits has the derivative 0 "
            "almost everywhere, so there is none to give: call it under torch.no_grad(), pass detached operands, or "
            "take rms_norm or add_rms_norm"
        )


def _autograd(*arguments: Any) -> Any:
    no_gradient(*arguments)
    with _torch_state.below_autograd():
        return torch.ops.pallas_norm.rms_norm_quantized(*arguments)


library.impl("rms_norm_quantized", _autograd, "Autograd")


def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """One more leading axis of the rows; a loop where each member has a weight or a scale of its own."""
    operator, size, rows = torch.ops.pallas_norm.rms_norm_quantized, info.batch_size, arguments[:2]

    def moved(at: int, value: Any) -> Any:
        if not isinstance(value, Tensor) or (at >= len(rows) and in_dims[at] is None):
            return value
        return value.expand(size, *value.shape) if in_dims[at] is None else value.movedim(in_dims[at], 0)

    whole = [moved(at, value) for at, value in enumerate(arguments)]
    is_batched = [isinstance(value, Tensor) and (at < 2 or in_dims[at] is not None) for at, value in enumerate(whole)]
    if not any(is_batched[len(rows) :]):
        results = operator(*whole)
        return results, tuple(0 if value.ndim > 1 else None for value in results)
    if size == 0:  # of which one is computed for the shapes and dtypes of the results
        one = operator(*(v.new_ones(v.shape[1:]) if own else v for v, own in zip(whole, is_batched, strict=True)))
        return tuple(value.new_empty(0, *value.shape) for value in one), (0,) * len(one)
    members = [[v[i] if own else v for v, own in zip(whole, is_batched, strict=True)] for i in range(size)]
    results = tuple(torch.stack(values) for values in zip(*(operator(*member) for member in members), strict=True))
    return results, (0,) * len(results)


torch.library.register_vmap("pallas_norm::rms_norm_quantized", _vmap, lib=library)
