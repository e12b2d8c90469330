"""Autograd for plain tensors, with no operator between it and what computes: prepared calls, or where there is none the
path of x."""

# pyright: reportIncompatibleMethodOverride=false, reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from typing import Any, cast

import torch

from pallas_norm._spec import Spec
from pallas_norm.plans.fitting import Misfit

from . import _library, _options, _torch_state, direct, launch
from .prepared import ForwardCall

Tensor = torch.Tensor


def norm(x: Tensor, residual: Tensor | None, weight: Tensor | None, call: ForwardCall) -> Any:
    """y, with a residual (y, s), recorded by autograd. Raises launch.Unavailable."""
    return _apply(x, residual, weight, call.training())


class KernelNorm(torch.autograd.Function):
    """y, with a residual (y, s). `call` is the one with rstd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, call: ForwardCall) -> Any:
        ctx.call = call
        if residual is None:
            s, (y, rstd) = None, call.trained(x, weight)
        else:
            y, s, rstd = call(x, residual, weight)
        kept = x if s is None else s
        if kept.is_inference() or (weight is not None and weight.is_inference()):
            _torch_state.save(ctx, kept, weight, rstd)
        else:
            ctx.save_for_backward(kept, weight, rstd)
        if s is None:
            return y
        ctx.set_materialize_grads(False)
        _torch_state.mark_constants(ctx, s)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        wants_x, wants_residual, wants_weight, _ = ctx.needs_input_grad
        call: ForwardCall = ctx.call
        dtypes, wanted = (call.kernel.x, call.kernel.residual), (wants_x, wants_residual)
        if dy is None:  # y was not used: ds passes as it is, whatever is in the rows
            return *_library.passed_on(ds, dtypes, wanted), None, None
        # To be differentiated again, or by a tangent, or a batch of gradients: not for a launch of raw memory.
        if (
            torch.is_grad_enabled()
            or _torch_state.forward_mode()
            or not (_torch_state.is_memory(dy) and _torch_state.is_memory(ds))
        ):
            options = _library.joined(_options.arguments(call.kernel.spec), wants_weight)
            total, dweight = cast(tuple[Any, Any], _library.Gradient.apply(x, weight, rstd, dy, ds, *options))
            dx, dresidual = _library.passed_on(total, dtypes, wanted)
        else:
            dx, dresidual, dweight = _gradient(call, x, weight, rstd, dy, ds, with_dweight=wants_weight)
        return dx if wants_x else None, dresidual if wants_residual else None, dweight if wants_weight else None, None


# Past what apply does for torch.func, under which no plain tensor comes here: 2 us of a call.
_apply = _torch_state.plain_apply(KernelNorm)


def _gradient(
    call: ForwardCall,
    x: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    *,
    with_dweight: bool,
) -> tuple[Tensor | None, ...]:
    """(dx, dresidual, dweight), the first two of the dtypes of the operands."""
    try:
        prepared = call.gradient(dy.dtype, with_ds=ds is not None, with_dweight=with_dweight)
        dx, dresidual, dweight = prepared(x, weight, rstd, dy, ds)
        return dx, dx if dresidual is None else dresidual, dweight
    except Misfit:  # of this kernel alone: the forward one goes on
        pass
    except launch.Unavailable as reason:  # raised before anything is written
        direct.refuse(call.n, call.device, str(reason))
    kernel = call.kernel
    dx, dweight = _library.backward(x, weight, rstd, dy, ds, kernel.spec, with_dweight=with_dweight)
    return *_library.passed_on(dx, (kernel.x, kernel.residual), (True, True)), dweight


class Norm(torch.autograd.Function):
    """Where no call was prepared: without the operators' dispatch and with the context in forward, which saves most of
    190 us a call."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, residual: Tensor | None, weight: Tensor | None, spec: Spec) -> Any:
        y, s, rstd = _library.forward(x, residual, weight, spec, with_rstd=True)
        ctx.spec, ctx.passed_on = spec, (x.dtype, None if residual is None else residual.dtype)
        ctx.set_materialize_grads(False)
        _torch_state.save(ctx, x if s is None else s, weight, rstd)
        if s is None:
            return y
        _torch_state.mark_constants(ctx, s)
        return y, s

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, ds: Tensor | None = None) -> tuple[Any, ...]:
        x, weight, rstd = ctx.saved_tensors
        wants_x, wants_residual, wants_weight, _ = ctx.needs_input_grad
        spec, dx, dweight = ctx.spec, ds, None
        # To be differentiated again, or by a tangent, or a batch of gradients: not for a launch of raw memory.
        again = torch.is_grad_enabled() or _torch_state.forward_mode() or not all(map(_torch_state.is_memory, (dy, ds)))
        if dy is not None and again:
            options = _library.joined(_options.arguments(spec), wants_weight)
            dx, dweight = _library.Gradient.apply(x, weight, rstd, dy, ds, *options)
        elif dy is not None:
            dx, dweight = _library.backward(x, weight, rstd, dy, ds, spec, with_dweight=wants_weight)
        dx, dresidual = _library.passed_on(dx, ctx.passed_on, (wants_x, wants_residual))
        return dx, dresidual, dweight if wants_weight else None, None
