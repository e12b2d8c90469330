"""Calls that were prepared: looked up by what a call is given, and prepared for the next one."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

from pallas_norm._spec import Spec

from . import _library, _torch_state, direct, launch
from .prepared import ForwardCall

Tensor = torch.Tensor
TENSORS = _torch_state.TENSORS

# Looked up once: each name saves 0.05 us of a call.
_dispatch_modes = _torch_state.dispatch_modes
_transformation = _torch_state.transformation
_tracing = _torch_state.tracing

_prepared = direct.calls


def prepared_for(
    x: Any, residual: Any, weight: Any, eps: Any, cast_before_scale: Any, weight_offset: Any, rounding: Any
) -> ForwardCall | None:
    """The call for operands like some that were checked before; None where more must be looked at: another type, a
    mode, a transformation, memory that does not hold the values."""
    if not (
        type(x) in TENSORS
        and (weight is None or type(weight) in TENSORS)
        and (residual is None or type(residual) in TENSORS)
        and type(eps) is type(weight_offset) is float
        and type(cast_before_scale) is type(rounding[1]) is bool
        and not _dispatch_modes()
        and _transformation() is None
        and _tracing() is None
        and forward_ad._current_level < 0
    ):
        return None
    device = x.get_device()
    try:
        if weight is None:
            n, dtype = x.shape[-1], None
        else:
            n, dtype = weight.numel(), weight.dtype
            if weight.dim() != 1 or weight.get_device() != device or weight.is_neg() or x.shape[-1] != n:
                return None
        added = None if residual is None else residual.dtype
        call = _prepared[x.dtype, n, dtype, eps, cast_before_scale, weight_offset, device, added, rounding]
    except (KeyError, IndexError, RuntimeError, TypeError):  # like none before, without an axis, sparse, or no dtype
        return None
    if x.is_neg() or (
        residual is not None and (residual.shape != x.shape or residual.get_device() != device or residual.is_neg())
    ):
        return None
    return call


def refuse(x: Tensor, reason: launch.Unavailable) -> None:
    """Raised before anything is written; other rows of that length follow."""
    direct.refuse(x.shape[-1], x.get_device(), str(reason))


def prepare(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec, as_given: tuple[Any, Any]
) -> ForwardCall | None:
    """The call for these operands, which were checked, and from now on for others like them; None where no kernel can
    be launched, for which `explain` has the reason. Raises launch.Unavailable where that turns out only now.

    as_given: cast_before_scale and the Rounding by which such a call is looked up."""
    if _library.path(x) is not direct:
        return None
    call = direct.call_of(x, residual, weight, spec)
    cast_before_scale, rounding = as_given
    options = spec.eps, cast_before_scale, spec.weight_offset
    dtypes = None if weight is None else weight.dtype, None if residual is None else residual.dtype
    _prepared[x.dtype, x.shape[-1], dtypes[0], *options, x.get_device(), dtypes[1], rounding] = call
    return call
