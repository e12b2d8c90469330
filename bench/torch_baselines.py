"""The norms that torch programs call: ours, transformers' and torch's own (peers.py has the libraries).

Backward is autograd's backward pass alone: the forward pass ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .calls import AbsentError, Call, module
from .operands import EPS, Operands

ADD_THEN_NORM = "add, then norm"

Norm = Callable[[Any], Any]  # of x
Add = Callable[[Any, Any, Any], tuple[Any, Any]]  # of x, residual, weight: (y, s)


def torch_call(operands: Operands, make: Callable[[Any], Norm], add: Add | None = None, note: str = "") -> Call:
    """make(weight) gives the norm of x; `add` is for providers that fuse the residual's sum."""
    torch = module("torch")
    tensors, operation = operands.tensors, operands.case.operation
    x, weight = tensors["x"], tensors["weight"]
    if operation == "backward":
        leaves = (x.detach().requires_grad_(), torch.nn.Parameter(weight.detach()))
        y, dy = make(leaves[1])(leaves[0]), tensors["dy"]

        def backward() -> Any:
            # On the calling thread: CUPTI's record has nothing of what autograd's own threads launch.
            with torch.autograd.set_multithreading_enabled(False):
                return torch.autograd.grad(y, leaves, dy, retain_graph=True)

        return Call(backward, note)
    norm = make(weight)
    if operation == "forward":
        return Call(lambda: norm(x), note)
    residual = tensors["residual"]
    if add is not None:
        return Call(lambda: add(x, residual, weight), note)

    def add_then_norm() -> tuple[Any, Any]:
        s = x + residual
        return norm(s), s

    return Call(add_then_norm, f"{note}; {ADD_THEN_NORM}" if note else ADD_THEN_NORM)


def exported(name: str) -> Any:
    """Of pallas_norm_torch."""
    package = module("pallas_norm_torch")
    if not hasattr(package, name):
        raise AbsentError(f"pallas_norm_torch has no {name}")
    return getattr(package, name)


def ours(operands: Operands) -> Call:
    norm, add = exported("rms_norm"), None
    if operands.case.operation == "add":
        fused = exported("add_rms_norm")

        def add(x: Any, residual: Any, weight: Any) -> tuple[Any, Any]:
            return fused(x, residual, weight, EPS)

    return torch_call(operands, lambda weight: lambda x: norm(x, weight, EPS), add)


def llama(weight: Any) -> Any:
    """Hugging Face's module, with this weight: the parameter itself, or a tensor as a parameter without gradient."""
    torch = module("torch")
    modeling = module("transformers.models.llama.modeling_llama", "transformers")
    norm = modeling.LlamaRMSNorm(weight.shape[0], eps=EPS)
    is_parameter = isinstance(weight, torch.nn.Parameter)
    norm.weight = weight if is_parameter else torch.nn.Parameter(weight, requires_grad=False)
    return norm


def hugging_face(operands: Operands) -> Call:
    return torch_call(operands, llama)


def compiled(operands: Operands) -> Call:
    """torch.compile of Hugging Face's module; the sum is compiled with it."""
    torch = module("torch")
    # One program for each case: without the reset, dynamo stops compiling after a few shapes.
    torch._dynamo.reset()
    # A donated buffer makes a backward pass impossible to repeat.
    functorch = module("torch._functorch.config", "torch")
    functorch.donated_buffer = False

    def make(weight: Any) -> Norm:
        return torch.compile(llama(weight), dynamic=False)

    if operands.case.operation != "add":
        return torch_call(operands, make)
    norm = llama(operands.tensors["weight"])

    @torch.compile(dynamic=False)
    def add_then_norm(x: Any, residual: Any) -> tuple[Any, Any]:
        s = x + residual
        return norm(s), s

    note = "sum and norm compiled together"
    return torch_call(operands, make, lambda x, residual, _: add_then_norm(x, residual), note)


def functional(operands: Operands) -> Call:
    rms_norm = module("torch").nn.functional.rms_norm
    return torch_call(operands, lambda weight: lambda x: rms_norm(x, x.shape[-1:], weight, EPS))
