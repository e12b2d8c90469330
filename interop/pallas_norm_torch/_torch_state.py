"""What torch is doing at the moment, which only its private functions tell."""

# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

Tensor = torch.Tensor
# By type(), not isinstance: a subclass may hold no memory of its own, or mean more by a call.
TENSORS = (Tensor, torch.nn.Parameter)

dispatch_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack  # how many see operators instead of calls
transformation: Callable[[], object | None] = torch._C._functorch.peek_interpreter_stack  # of torch.func, innermost
tracing: Callable[[], object | None] = torch._C._get_tracing_state  # of torch.jit.trace, which records operators
is_batched: Callable[[Tensor], bool] = torch._C._functorch.is_legacy_batchedtensor  # of autograd's is_grads_batched
below_autograd = torch._C._AutoDispatchBelowAutograd
# A build without CUDA has neither, and never asks.
current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -1)
stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)


def inside_jvp() -> bool:
    """Whether a transformation of torch.func around this call is forward mode."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in stack)


def forward_mode() -> bool:
    """Whether a level of forward mode is open."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    return forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def is_lazy(tensor: Tensor) -> bool:
    """Whether its memory holds other values than it has, negated ones, or it has none, as autograd's zeros."""
    return tensor.is_neg() or tensor._is_zerotensor()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For backward; of tensors that were made in inference mode, which autograd does not save, copies."""
    if any(ctx.needs_input_grad):
        tensors = tuple(one.clone() if one is not None and one.is_inference() else one for one in tensors)
    ctx.save_for_backward(*tensors)
