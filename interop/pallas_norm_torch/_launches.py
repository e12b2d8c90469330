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


def has_kernel(x: torch.Tensor) -> bool:
    """Whether rows of x can be normalised by a kernel where x lies."""
    return x.is_cuda and direct.unavailable(x.shape[-1], x.get_device()) is None


def launched(x: Any, weight: Any = None, *others: Any) -> bool:
    """Whether `rms_norm` computes what a replaced norm was called with: x, its weight, and gates shaped like x."""
    if torch.compiler.is_compiling():
        return _in_graph(x) and all(other is None or _in_graph(other) for other in (weight, *others))
    if type(x) not in TENSORS or not x.dim() or not x.shape[-1] or not has_kernel(x) or not _plain(x):
        return False
    if weight is not None and not (
        type(weight) in TENSORS
        and weight.dim() == 1
        and weight.numel() == x.shape[-1]
        and weight.device == x.device
        and _plain(weight)
    ):
        return False
    if not all(other is None or (type(other) in TENSORS and other.device == x.device) for other in others):
        return False
    return not _unusual(x, weight)


def _plain(tensor: torch.Tensor) -> bool:
    """Memory that holds the elements themselves."""
    return (
        tensor.dtype in DTYPES
        and tensor.layout is torch.strided
        and not (tensor.is_neg() or tensor.is_nested or tensor._is_zerotensor())
    )


def _unusual(x: torch.Tensor, weight: torch.Tensor | None) -> bool:
    """Modes in which the class's own forward does more than the function: forward mode; tensors of inference mode in a
    graph of autograd, which can save no view of them but may save what it computes from them."""
    if _torch_state.forward_mode() or (_torch_state.transformation() is not None and _torch_state.inside_jvp()):
        return True
    if not torch.is_grad_enabled() or not (x.is_inference() or (weight is not None and weight.is_inference())):
        return False
    return not torch.is_inference_mode_enabled()


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
    reason = direct.unavailable(128 if weight is None else weight.shape[-1], index)
    return f"with kernels on {device}" if reason is None else f"in their own forward: {reason}"
