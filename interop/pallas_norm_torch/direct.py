"""The kernels by direct launch: whether one can be launched, and the calls of the operators."""

from __future__ import annotations

from typing import Any

import torch

from pallas_norm import _dispatch  # pyright: ignore[reportPrivateUsage]
from pallas_norm._spec import Spec
from pallas_norm.plans.fitting import Misfit, forward_plan_on

from . import launch
from ._kernels import Backward, Forward
from ._validate import DTYPES, dtype_name
from .prepared import ForwardCall, forward_call
from .prepared_gradient import BackwardCall, backward_call

Tensor = torch.Tensor


# By n, device and the dtype of x, why, or None; what was found out once.
_refused: dict[tuple[int, int, torch.dtype], str | None] = {}

# By dtypes, n, options, device and form: the call for operands like some that `ops` has checked.
calls: dict[Any, ForwardCall] = {}


def unavailable(n: int, device: int, dtype: torch.dtype) -> str | None:
    """Why rows of n elements of dtype cannot take the direct launch on this CUDA device, or None."""
    key = n, device, dtype
    if key not in _refused:
        _refused[key] = _dispatch.no_kernel_for(n) or launch.unavailable(device) or _misfit(n, device, dtype)
    return _refused[key]


def _misfit(n: int, device: int, dtype: torch.dtype) -> str | None:
    if dtype not in DTYPES:  # of which no row has a kernel, so their length says nothing
        return None
    try:
        forward_plan_on(launch.gpu_of(device), n, dtype_name(dtype))
    except Misfit as reason:
        return str(reason)
    return None


def refuse(n: int, device: int, reason: str) -> None:
    """From now on rows of n elements take the other way on this device, for that reason, which `explain` tells.

    Also those whose call was prepared: a backward pass that cannot be launched is found out after many forward passes.
    """
    for dtype in DTYPES:
        _refused[n, device, dtype] = reason
    calls.clear()


def call_of(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec, *, with_rstd: bool = False
) -> ForwardCall:
    """The prepared call for such operands. Raises launch.Unavailable."""
    dtype = None if weight is None else weight.dtype
    added = None if residual is None else residual.dtype
    kernel = Forward(x.shape[-1], x.dtype, dtype, spec, added, with_rstd)
    return forward_call(kernel, x.get_device())


def gradient_of(
    x: Tensor, weight: Tensor | None, dy: Tensor, ds: Tensor | None, spec: Spec, *, with_dweight: bool
) -> BackwardCall:
    """The prepared call of the backward pass. Raises launch.Unavailable, and Misfit where the GPU has this kernel for
    shorter rows only."""
    dtype = None if weight is None else weight.dtype
    kernel = Backward(x.shape[-1], x.dtype, dtype, dy.dtype, spec, ds is not None, with_dweight and weight is not None)
    return backward_call(kernel, x.get_device())


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    spec: Spec,
    *,
    with_rstd: bool,
    out: Tensor | None = None,
    s_out: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(y, s, rstd). `out` receives y and `s_out` s: each an operand itself, or memory that none shares."""
    return call_of(x, residual, weight, spec, with_rstd=with_rstd)(x, residual, weight, out, s_out)


def backward(
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    spec: Spec,
    *,
    with_dweight: bool,
) -> tuple[Tensor, Tensor | None]:
    """(dx, dweight in the dtype of the weight); in the residual form x is s, and dx its gradient."""
    dx, _, dweight = gradient_of(x, weight, dy, ds, spec, with_dweight=with_dweight)(x, weight, rstd, dy, ds)
    return dx, dweight
