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


def differentiated() -> bool:
    """Whether the innermost transformation of torch.func has a rule for autograd.Function; functionalize has none, and
    takes operators as they are."""
    innermost = transformation()
    return innermost is not None and innermost.key() != torch._C._functorch.TransformType.Functionalize


def forward_mode() -> bool:
    """Whether a level of forward mode is open."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    return forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply for calls that no transformation of torch.func is around."""
    base: Any = getattr(torch._C, "_FunctionBase", None)
    return function.apply if base is None else super(torch.autograd.Function, function).apply


def is_lazy(tensor: Tensor) -> bool:
    """Whether its memory holds other values than it has, negated ones, or it has none, as autograd's zeros."""
    return tensor.is_neg() or tensor._is_zerotensor()


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For backward; of tensors that were made in inference mode, which autograd does not save, copies."""
    if any(ctx.needs_input_grad):
        tensors = tuple(
            None if tensor is None else tensor.clone() if tensor.is_inference() else tensor for tensor in tensors
        )
    ctx.save_for_backward(*tensors)


def options_decide_sharding(overload: torch._ops.OpOverload[..., Any], first: str) -> None:
    """Has DTensor keep what it propagated apart for other options, from the argument of that name on.

    register_sharding looks for the first int, and an operator without one shares what its first call found with all:
    a gradient without dweight decided the shape of the next one's.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._op_schema import RuntimeSchemaInfo

    known = DTensor._op_dispatcher.sharding_propagator.op_to_schema_info
    names = [argument.name for argument in overload._schema.arguments]
    known[overload] = RuntimeSchemaInfo(names.index(first), needs_pytree=True)
