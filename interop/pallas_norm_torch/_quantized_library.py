"""The operator pallas_norm::rms_norm_quantized: what torch.compile, torch.export and functorch see of 8-bit results."""

# pyright: reportReturnType=false, reportUnknownArgumentType=false, reportUnknownVariableType=false
# pyright: reportUntypedFunctionDecorator=false, reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch

from pallas_norm._spec import Spec
from pallas_norm.plans.fitting import Misfit

from . import _library, _options, _torch_state, _validate, direct, launch, quantized_statements
from ._kernels import Quantized
from ._library import OPTIONS, TAGS, library
from .prepared_quantized import Results, quantized_call

Tensor = torch.Tensor

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
        try:
            return quantized_call(kernel, x.get_device())(x, residual, weight, scale)
        except Misfit:  # the norm has a kernel there, this form has none
            pass
        except launch.Unavailable as reason:  # raised before anything is written
            direct.refuse(x.shape[-1], x.get_device(), str(reason))
    q, scales, s, y = quantized_statements.forward(x, residual, weight, scale, spec, dtype, group)
    return q, scales, s, y if with_y else None


def _operator(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    group: int,
    with_y: bool,  # noqa: FBT001  an operator has no keywords
    *options: Any,
) -> tuple[Tensor, ...]:
    _validate.operands(x, residual, weight, with_residual=residual is not None)
    group = 0 if scale is not None else group or x.shape[-1]
    found = forward(x, residual, weight, scale, _options.of(options), dtype, group, with_y=with_y)
    return tuple(x.new_empty(0) if value is None else value for value in found)


library.impl("rms_norm_quantized", _operator, "CompositeExplicitAutograd")


@torch.library.register_fake("pallas_norm::rms_norm_quantized", lib=library)
def _(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    scale: Tensor | None,
    dtype: torch.dtype,
    group: int,
    with_y: bool,  # noqa: FBT001
    *options: Any,
) -> tuple[Tensor, ...]:
    _validate.operands(x, residual, weight, with_residual=residual is not None)
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
    """Raises where a derivative would be asked for."""
    differentiates = torch.is_grad_enabled() and any(isinstance(o, Tensor) and o.requires_grad for o in operands)
    if differentiates or _torch_state.forward_mode():
        raise NotImplementedError(
            "an operand of a norm with a result of 8 bits requires grad; rounding to 8 bits has the derivative 0 "
            "almost everywhere, so there is none to give: call it under torch.no_grad(), pass detached operands, or "
            "take rms_norm or add_rms_norm"
        )


def _autograd(x: Tensor, residual: Tensor | None, weight: Tensor | None, *arguments: Any) -> Any:
    no_gradient(x, residual, weight)
    with _torch_state.below_autograd():
        return torch.ops.pallas_norm.rms_norm_quantized(x, residual, weight, *arguments)


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
    members = [[v[i] if own else v for v, own in zip(whole, is_batched, strict=True)] for i in range(size)]
    results = tuple(torch.stack(values) for values in zip(*(operator(*member) for member in members), strict=True))
    return results, (0,) * len(results)


torch.library.register_vmap("pallas_norm::rms_norm_quantized", _vmap, lib=library)
