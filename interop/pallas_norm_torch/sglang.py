"""SGLang's rmsnorm_hf, by the same names: a drop-in without its limits on the hidden size."""

from __future__ import annotations

import operator
from typing import Any

import torch

from .ops import rms_norm

Tensor = torch.Tensor


def is_supported_rmsnorm_hf_hidden_size(hidden_size: Any) -> bool:
    """Whether `rmsnorm_hf` takes rows of this length: every positive int (SGLang's own: multiples of 512). Raises
    nothing.

    Source: sglang.jit_kernel.rmsnorm_hf.
    """
    try:
        return not isinstance(hidden_size, bool) and operator.index(hidden_size) > 0
    except TypeError:  # no int, or an array: of several, > would be as many answers
        return False


def rmsnorm_hf(input: Tensor, weight: Tensor, eps: float = 1e-6, out: Tensor | None = None) -> Tensor:
    """out = weight * round(input / sqrt(mean(input^2) + eps)), for inference.

    Arguments:
        input: `[rows, n]`, float16 or bfloat16.
        weight: `[n]`, of the dtype and device of input.
        eps: added to the mean of squares.
        out: `[rows, n]`, of the dtype and device of input; None makes one. It may be input.

    Returns: out. An input without elements is answered without a launch.

    Raises: RuntimeError for another dtype, as SGLang's; TypeError and ValueError as `rms_norm`, ValueError also for
        other than two axes.

    Source: sglang.jit_kernel.rmsnorm_hf.
    """
    _check(input, weight)
    if out is None:
        out = torch.empty_like(input, memory_format=torch.contiguous_format)
    if input.numel() == 0:
        return out
    with torch.no_grad():
        return rms_norm(input, weight, eps, out=out)


def _check(input: Any, weight: Any) -> None:
    if not isinstance(input, Tensor) or not isinstance(weight, Tensor):
        name, value = ("weight", weight) if isinstance(input, Tensor) else ("input", input)
        raise TypeError(f"{name} is a {type(value).__name__}; needed a torch.Tensor: wrap it with torch.as_tensor")
    if input.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"rmsnorm_hf: input must be fp16 or bf16, got {input.dtype}; for float32 call rms_norm")
    if weight.dtype != input.dtype:
        raise RuntimeError(
            f"rmsnorm_hf: weight must have the dtype of input, got {weight.dtype} and {input.dtype}; "
            "for mixed dtypes call rms_norm"
        )
    if input.ndim != 2:
        raise ValueError(
            f"input has shape {tuple(input.shape)}; needed (rows, n): pass input.reshape(-1, input.shape[-1])"
        )
