"""Whether a call of a replaced norm launches a kernel: the one rule by which it, or the class's own forward, runs.

Eager, a kernel is launched for plain CUDA tensors of the dtypes that it takes, on a device that it runs on; everything
else is computed by the class's own forward: on CPUs and other GPUs, in float64, for subclasses of Tensor such as
DTensor, under forward mode, for proxies of torch.fx. Compiled and exported, the operator stays in the graph on every
device, because the compiler would drop the inner rounding of the class's own forward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from . import _torch_state, direct
from ._changes import HOOK
from ._validate import DTYPES

TENSORS = _torch_state.TENSORS
STRIDED = torch.strided
is_compiling = torch.compiler.is_compiling  # looked up once: this is part of the host's time for a call
forward_mode, transformation = _torch_state.forward_mode, _torch_state.transformation


def has_kernel(x: torch.Tensor) -> bool:
    """Whether rows of x can be normalised by a kernel where x lies."""
    return x.is_cuda and direct.unavailable(x.shape[-1], x.get_device(), x.dtype) is None


def _plain(tensor: torch.Tensor) -> bool:
    """Memory that holds the elements themselves, of a dtype that the kernels take."""
    return (
        type(tensor) in TENSORS
        and tensor.dtype in DTYPES
        and tensor.layout is STRIDED
        and not (tensor.is_neg() or tensor.is_nested or tensor._is_zerotensor())
    )


def launched(x: Any, weight: Any = None, *others: Any) -> bool:
    """Whether `rms_norm` computes what a replaced norm was called with: x, its weight, and gates shaped like x."""
    if is_compiling():
        operands = all(other is None or _in_graph(other) for other in (weight, *others))
        if not (_in_graph(x) and operands and x.dim() and (weight is None or weight.shape == x.shape[-1:])):
            return False  # a weight that its own forward broadcasts is none of the operator's
        return all(gate is None or gate.shape == x.shape for gate in others)
    if type(x) not in TENSORS or not x.dim() or not (n := x.shape[-1]) or not has_kernel(x) or not _plain(x):
        return False
    inference = x.is_inference()
    if weight is not None:
        if not (
            _plain(weight)
            and weight.dim() == 1
            and weight.shape[0] == n
            and weight.get_device() == x.get_device()
            and not weight.is_meta
        ):
            return False
        inference = inference or weight.is_inference()
    for gate in others:
        if gate is None:
            continue
        if type(gate) not in TENSORS or gate.device != x.device or gate.shape != x.shape or not _plain(gate):
            return False
        inference = inference or gate.is_inference()
    # Autograd can save no tensor of inference mode, but what the class's own forward computes from it.
    if inference and torch.is_grad_enabled():
        return False
    return not forward_mode() and (transformation() is None or not _torch_state.inside_jvp())


def beside(x: torch.Tensor, *others: Any) -> bool:
    """Whether a kernel that `launched` has found for x may read these too, of whatever shape."""
    if is_compiling():
        return all(map(_in_graph, others))
    return all(type(other) in TENSORS and other.device == x.device and _plain(other) for other in others)


def _in_graph(tensor: Any) -> bool:
    """Whether the operator takes this tensor of a program being compiled or exported; no DTensor or the like."""
    return (
        isinstance(tensor, torch.Tensor)
        and not hasattr(type(tensor), "__tensor_flatten__")
        and tensor.dtype in DTYPES
        and tensor.device.type in ("cpu", "cuda")
        and tensor.layout is torch.strided
    )


def place(module: nn.Module, otherwise: torch.device | None) -> str:
    """Where a replaced norm runs eagerly, as it lies now, and why; `otherwise` is where one without a weight lies."""
    weight = next(module.parameters(recurse=False), None)
    device = otherwise if weight is None else weight.device
    execution = getattr(vars(module).get(HOOK), "execution_device", None)  # accelerate brings it there
    if execution is not None:
        device = torch.device("cuda", execution) if isinstance(execution, int) else torch.device(execution)
    if device is None:
        return "with kernels where their input is on a CUDA device that runs them, in their own forward elsewhere"
    if weight is not None and weight.dtype not in DTYPES:
        name = str(weight.dtype).removeprefix("torch.")
        return f"in their own forward: they are in {name}, and the kernels take bfloat16, float16 and float32"
    if device.type != "cuda":
        return f"in their own forward: they are on {device.type}, and the kernels take CUDA tensors"
    index = torch.cuda.current_device() if device.index is None else device.index  # pyright: ignore[reportUnnecessaryComparison]
    n, dtype = (128, torch.bfloat16) if weight is None else (weight.shape[-1], weight.dtype)
    reason = direct.unavailable(n, index, dtype)
    return f"with kernels on {device}" if reason is None else f"in their own forward: {reason}"
