"""What torch is doing at the moment, which only its private functions tell."""

# pyright: reportAttributeAccessIssue=false, reportPrivateUsage=false
# pyright: reportUnknownArgumentType=false, reportUnknownVariableType=false

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch._C._dynamo.eval_frame
import torch._decomp
from torch._subclasses.fake_tensor import FakeTensor
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


holds_later: Callable[..., None] = torch._check  # of unbacked sizes: what torch.compile makes a guard or an assertion


def is_unbacked(size: int | torch.SymInt) -> bool:
    """Whether torch.compile does not know it, not even an example of it."""
    if type(size) is not torch.SymInt:
        return False
    from torch.fx.experimental.symbolic_shapes import has_free_unbacked_symbols

    return has_free_unbacked_symbols(size)


def register_decomposition(overload: torch._ops.OpOverload[..., Any], function: Callable[..., Any]) -> None:
    """What torch.onnx.export finds; torch.compile and run_decompositions look into no table but that they are given.

    Fake tensors of symbolic sizes would compute with it, too, without the checks of a call, unless the operator has a
    meta function of Python's, which is its fake one.
    """
    torch._decomp.decomposition_table[overload] = function
    torch._decomp.meta_table[overload] = overload


def register_fake(name: str, library: torch.library.Library) -> Callable[[Callable[..., Any]], None]:
    """As torch.library.register_fake, of an operator that register_decomposition knows as well.

    Where the variable CI is set, as it is on most services that run tests, inductor raises at an operator that has a
    decomposition and was left whole, unless its list has the name. Inductor takes seconds to import, so the name goes
    into the list when inductor, imported by then, asks what the operator returns.
    """

    def register(fake: Callable[..., Any]) -> None:
        @functools.wraps(fake)
        def listed(*arguments: Any) -> Any:
            lowering = sys.modules.get("torch._inductor.lowering")
            if lowering is not None:
                lowering.FALLBACK_ALLOW_LIST.add(name)
            return fake(*arguments)

        torch.library.register_fake(name, listed, lib=library)

    return register


def is_stand_in(*values: Any) -> bool:
    """Whether one is no tensor and sees torch's functions instead, as the proxies of torch.fx do."""
    return any(not isinstance(value, Tensor) and hasattr(type(value), "__torch_function__") for value in values)


def is_plain(tensor: Tensor) -> bool:
    """No subclass, mode or transformation that must see operators instead of their effects."""
    return type(tensor) in TENSORS and not dispatch_modes() and transformation() is None and tracing() is None


def is_fake(tensor: Tensor) -> bool:
    """Whether torch.compile makes a program of it, of which there is no memory yet."""
    return isinstance(tensor, FakeTensor)


def unwrapped(tensor: Tensor) -> Tensor:
    """The one in whose memory a tensor of torch.func lies: of all members, or without its level of differentiation."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def is_of_storage(left: Tensor, right: Tensor) -> bool:
    """Whether they are views of one storage."""
    return left.untyped_storage()._cdata == right.untyped_storage()._cdata


def inside_jvp() -> bool:
    """Whether a transformation of torch.func around this call is forward mode."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == torch._C._functorch.TransformType.Jvp for interpreter in stack)


def functionalized() -> bool:
    """Whether functionalize is one of the transformations of torch.func around this call."""
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(interpreter.key() == torch._C._functorch.TransformType.Functionalize for interpreter in stack)


def alone() -> bool:
    """Whether the transformation around this call is the only one."""
    return len(torch._C._functorch.get_interpreter_stack() or []) == 1


def forward_mode() -> bool:
    """Whether a level of forward mode is open."""
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    return forward_mode() and forward_ad.unpack_dual(tensor).tangent is not None


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """function.apply for calls that no transformation of torch.func is around."""
    base: Any = getattr(torch._C, "_FunctionBase", None)
    return function.apply if base is None else super(torch.autograd.Function, function).apply


Function = TypeVar("Function", bound=Callable[..., Any])


def never_compiled(function: Function) -> Function:
    """function, which Dynamo runs as it is written, with all that it calls, and takes into no graph.

    Where torch.compile breaks a graph, Dynamo compiles what runs between, operators' own Python too, as programs of
    their own, in which inductor keeps float32 where a statement rounds. torch.compiler.disable prevents that with a
    wrapper, which is 1.1 of 19 us of a small call on a CPU, and imports torch._dynamo, for 0.9 s; marks cost neither.
    """
    frames = torch._C._dynamo.eval_frame
    if not hasattr(frames, "set_code_exec_strategy"):
        return cast(Function, torch.compiler.disable(function))
    skip = frames._FrameAction.SKIP
    frames.set_code_exec_strategy(function.__code__, frames._FrameExecStrategy(skip, skip))  # for calls of it
    function.__dict__["_torchdynamo_disable"] = True  # for callers that are compiled
    return function


def is_lazy(tensor: Tensor) -> bool:
    """Whether its memory holds other values than it has, negated ones, or it has none, as autograd's zeros."""
    return tensor.is_neg() or tensor._is_zerotensor()


def is_memory(tensor: Tensor | None) -> bool:
    """Whether a launch may read it as it lies: no subclass, batch or lazy values; or there is none."""
    return tensor is None or (type(tensor) in TENSORS and not is_batched(tensor) and not is_lazy(tensor))


def save(ctx: Any, *tensors: Tensor | None) -> None:
    """For backward; of tensors that were made in inference mode, which autograd does not save, copies."""
    if any(ctx.needs_input_grad):
        tensors = tuple(
            None if tensor is None else tensor.clone() if tensor.is_inference() else tensor for tensor in tensors
        )
    ctx.save_for_backward(*tensors)


def mark_constants(ctx: Any, s: Tensor | None, *rstd: Tensor) -> None:
    """s requires grad where x or the residual does, and not for the weight's sake; rstd never does."""
    wants_x, wants_residual, *_ = ctx.needs_input_grad
    constants = rstd if s is None or wants_x or wants_residual else (s, *rstd)
    if constants:
        ctx.mark_non_differentiable(*constants)


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
